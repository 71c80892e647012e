"""Corpora: a manifest becomes a lhotse CutSet, and what is wrong with it is said before training starts.

A manifest is a JSONL file with one utterance a line::

    {"audio": "audio/0001.flac", "text": "THREE ONE FOUR", "duration": 2.41, "speaker": "ann", "split": "train"}

=========== ======== ===============================================================================================
key                  meaning
=========== ======== ===============================================================================================
audio       required path of a file soundfile reads, relative to the manifest
text        required transcript; may be empty
start       optional second in the file where the utterance begins, 0 if absent
duration    optional seconds; without ``start`` it must be the length of the file
id          optional name in reports; by default the path without its suffix, and ``@start``
speaker     optional name, for filters and for splits that share no speaker
split       optional ``train``, ``dev``, ``test`` or any other name, for filters
fold        optional number, for filters
label       optional name of what is heard, for tagging; ``labels`` is a list of such names, and may be empty
events      optional list of ``{"label": NAME, "start": SECOND, "end": SECOND}``, counted from where the clip begins:
            everything that is heard, and when; an empty list is a clip in which nothing is. Labels then are theirs
=========== ======== ===============================================================================================

Other keys are kept. A lhotse CutSet (``.jsonl`` or ``.jsonl.gz``) is read by the same functions.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lhotse import CutSet, MonoCut, MultiCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item

from speechkit import audio
from speechkit.files import replacing
from speechkit.types import Event, Seconds

TOLERANCE: Seconds = 0.05  # manifests round, and lossy codecs pad


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where utterances come from, which of them are wanted, and how often an epoch has them.

    Args:
        path: a manifest or a lhotse CutSet.
        split: only utterances of this split; ``None`` is all.
        folds: only utterances of these folds; ``None`` is all.
        without_folds: none of these.
        speakers: only these speakers; ``None`` is all.
        without_speakers: none of these.
        min_seconds: only utterances at least this long.
        max_seconds: only utterances at most this long.
        repeat: how often an epoch has each utterance, each time augmented differently. With 2.5, every utterance is
            there twice and half of them, drawn anew each epoch, a third time; with 0.1 a tenth of them is there.
    """

    path: str
    split: str | None = None
    folds: Sequence[int] | None = None
    without_folds: Sequence[int] = ()
    speakers: Sequence[str] | None = None
    without_speakers: Sequence[str] = ()
    min_seconds: Seconds = 0.0
    max_seconds: Seconds = math.inf
    repeat: float = 1.0

    def __post_init__(self) -> None:
        if not self.repeat > 0:
            raise ValueError(
                f"Source.repeat of {self.path} must be more than 0, but is {self.repeat}; 1 is once an epoch."
            )

    def cuts(self, *, transcribed: bool = True) -> CutSet:
        """The wanted utterances.

        Args:
            transcribed: whether each must have a text; what is tagged has labels instead.

        Raises:
            ValueError: as `read_corpus`, if the filters leave nothing, with what there is to choose from, and if there
                is no such fold to be left out.
        """
        every = read_corpus(self.path, transcribed=transcribed)
        if absent := set(self.without_folds) - {fold_of(cut) for cut in every}:
            raise ValueError(
                f"{self.path} must have the folds that are left out, or nothing is held out, but has no "
                f"{next(iter(absent))} among {_census('fold', fold_of, every)}; correct without_folds, or fold=."
            )
        wanted = [cut for cut in every if self._wants(cut)]
        if not wanted:
            kinds = (("split", split_of), ("fold", fold_of), ("speaker", speaker_of))
            there = ", ".join(_census(kind, name_of, every) for kind, name_of in kinds)
            raise ValueError(
                f"{self.path} must have at least one utterance with {self._filters()}, but none of its {len(every)} is "
                f"left; it has {there}, {min(c.duration for c in every):.2f} to "
                f"{max(c.duration for c in every):.2f} s long."
            )
        return CutSet(wanted)

    def _wants(self, cut: Cut) -> bool:
        return (
            self.split in (None, split_of(cut))
            and (self.folds is None or fold_of(cut) in self.folds)
            and fold_of(cut) not in self.without_folds
            and (self.speakers is None or speaker_of(cut) in self.speakers)
            and speaker_of(cut) not in self.without_speakers
            and self.min_seconds <= cut.duration <= self.max_seconds
        )

    def _filters(self) -> str:
        given = {name: value for name, value in vars(self).items() if name not in ("path", "repeat")}
        usual = {name: field.default for name, field in self.__dataclass_fields__.items()}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value != usual[name]) or "no filter"


def _census(what: str, name_of: Callable[[Cut], Any], cuts: Iterable[Cut]) -> str:
    """For example ``splits train (60), dev (10)``."""
    counts = Counter(name for name in map(name_of, cuts) if name is not None).most_common()
    some = ", ".join(f"{name} ({count})" for name, count in counts[:8]) + (", ..." if len(counts) > 8 else "")
    return f"{what}s {some}" if counts else f"no {what}s"


def text_of(cut: Cut) -> str:
    """The transcript of a cut, its supervisions joined."""
    return " ".join(supervision.text for supervision in cut.supervisions if supervision.text)


def speaker_of(cut: Cut) -> str | None:
    return cut.supervisions[0].speaker if cut.supervisions else None


def split_of(cut: Cut) -> str | None:
    return _custom(cut).get("split")


def fold_of(cut: Cut) -> int | None:
    return _custom(cut).get("fold")


def labels_of(cut: Cut) -> tuple[str, ...]:
    """What is heard in a cut: its ``labels``, its one ``label``, or the labels of its ``events``.

    Raises:
        ValueError: naming the cut, where they are no names, or are not those of its events.
    """
    custom, events = _custom(cut), events_of(cut)
    heard = list(dict.fromkeys(event.label for event in events or ()))
    labels = custom.get("labels", [custom["label"]] if "label" in custom else heard)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(
            f"The labels of {cut.id} must be a list of names, but are {labels!r}; write 'label': NAME or 'labels': "
            f"[NAME, ...] into its line."
        )
    if events is not None and set(labels) != set(heard):
        raise ValueError(
            f"The labels of {cut.id} must be those of its events, but are {', '.join(labels) or 'none'} where its "
            f"events are of {', '.join(heard) or 'nothing'}; correct one of them, or delete the labels."
        )
    return tuple(labels)


def events_of(cut: Cut) -> tuple[Event, ...] | None:
    """What is heard in a cut and when, in seconds from its beginning; ``None`` where that is not known.

    Raises:
        ValueError: naming the cut, where ``events`` is no list of events that lie within it.
    """
    listed = _custom(cut).get("events")
    if listed is None:
        return None
    if not isinstance(listed, list):
        raise ValueError(
            f"the events of {cut.id} must be a list, but are {_named(listed)}; write 'events': [{{'label': NAME, "
            f"'start': SECOND, 'end': SECOND}}, ...], or [] where nothing is heard."
        )
    return tuple(_event(record, cut) for record in listed)


def _event(record: Any, cut: Cut) -> Event:
    label, *times = map(record.get, ("label", "start", "end")) if isinstance(record, dict) else (None,) * 3
    if not isinstance(label, str) or not all(isinstance(t, int | float) and not isinstance(t, bool) for t in times):
        raise ValueError(
            f"an event of {cut.id} must be {{'label': NAME, 'start': SECOND, 'end': SECOND}}, but is {record!r:.80}; "
            f"correct it."
        )
    start, end = map(float, times)  # type: ignore[arg-type]
    if not 0 <= start < min(end, cut.duration) or not end <= cut.duration + TOLERANCE:
        raise ValueError(
            f"an event of {cut.id} must begin before it ends and lie within the clip, 0 to {cut.duration:.3f} s, but "
            f"{label} lasts from {start} to {end} s; correct it, counting from the beginning of the clip."
        )
    return Event(label, start, min(end, cut.duration))


def _custom(cut: Cut) -> Mapping[str, Any]:
    return getattr(cut, "custom", None) or {}


def read_corpus(path: str | os.PathLike[str], *, transcribed: bool = True) -> CutSet:
    """The cuts of a manifest or of a lhotse CutSet.

    Args:
        transcribed: whether every line must have a text; noises have none.

    Raises:
        ValueError: naming the first faulty line, and how many more there are: not JSON, a key missing or of another
            type, an audio file that is missing, broken or not as long as the line says, an event that is not within
            its clip, an id used twice; or if there is no line at all.
    """
    cuts: dict[str, Cut] = {}
    faults = []
    for number, line in _lines(Path(path)):
        try:
            cut = _cut(line, Path(path).parent, transcribed)
            if cuts.setdefault(cut.id, cut) is not cut:
                raise ValueError(
                    f"the id '{cut.id}' must be its own, but an earlier line has it; give each line an 'id'."
                )
        except ValueError as fault:
            faults.append(f"{path}, line {number}: {fault}")
    if faults:
        more = f" ({len(faults) - 1} more lines have faults.)" if len(faults) > 1 else ""
        raise ValueError(faults[0] + more)
    if not cuts:
        raise ValueError(
            f"{path} must hold at least one utterance, but is empty; write one JSON object a line into it."
        )
    return CutSet(list(cuts.values()))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise ValueError(
            f"{path} must be a manifest, but there is no such file; prepare the corpus, or correct the path."
        )
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
        try:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
            raise ValueError(
                f"{path} must be text in UTF-8, or that compressed by gzip, but is not ({error}); write it again."
            ) from error


def _cut(line: str, folder: Path, transcribed: bool) -> Cut:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"a line must be a JSON object, but is not JSON ({error}); correct or delete it.") from error
    if not isinstance(record, dict):
        raise ValueError(f"a line must be a JSON object, but is {_named(record)}; write {{'audio': ..., 'text': ...}}.")
    cut = _from_lhotse(record, folder) if str(record.get("type")).endswith("Cut") else _from_manifest(record, folder)
    if transcribed and not any(supervision.text is not None for supervision in cut.supervisions):
        raise ValueError("the key 'text' is missing; add the transcript, or '' where nothing is said.")
    if events_of(cut) is not None:
        labels_of(cut)  # which must be theirs
    return cut


def _from_manifest(record: dict[str, Any], folder: Path) -> Cut:
    file = _value(record, "audio", str)
    if file is None:
        raise ValueError(f"the key 'audio' is missing (there are {sorted(record)}); add the path of the sound.")
    recording = _recording(str(folder / file))
    start, duration = _section(record, recording.duration)
    name = _value(record, "id", str) or Path(file).with_suffix("").as_posix() + (f"@{start:g}" if start else "")
    said = SupervisionSegment(
        id=name,
        recording_id=recording.id,
        start=0.0,
        duration=duration,
        text=_value(record, "text", str),
        speaker=_value(record, "speaker", str),
        language=_value(record, "lang", str),
        gender=_value(record, "gender", str),
    )
    known = {"audio", "text", "start", "duration", "id", "speaker", "lang", "gender"}
    rest = {key: value for key, value in record.items() if key not in known}
    kind, channel = (MonoCut, 0) if recording.num_channels == 1 else (MultiCut, recording.channel_ids)
    return kind(name, start, duration, channel, supervisions=[said], recording=recording, custom=rest or None)


def _value(record: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    value = record.get(key)
    if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    wanted = "a string" if kind is str else "a number"
    raise ValueError(f"the key '{key}' must be {wanted}, but is {_named(value)}; correct it.")


def _named(value: Any) -> str:
    return f"the {type(value).__name__} {value!r:.40}"


@lru_cache(maxsize=1)
def _recording(path: str) -> Recording:
    """What the header says; the one before is remembered for manifests with many segments of one long file."""
    about = audio.info(path)
    channels = list(range(about.channels))
    return Recording(
        id=path,
        sources=[AudioSource(type="file", channels=channels, source=path)],
        sampling_rate=about.sample_rate,
        num_samples=about.frames,
        duration=about.seconds,
        channel_ids=channels,
    )


def _section(record: Mapping[str, Any], available: Seconds) -> tuple[Seconds, Seconds]:
    """Start and duration of the utterance in a file that lasts ``available``."""
    start = _value(record, "start", (int, float))
    first = 0.0 if start is None else float(start)
    claimed = _value(record, "duration", (int, float))
    length = available - first
    if not 0 <= first < available:
        raise ValueError(f"start must lie in its file, which lasts {available:.3f} s, but is {first} s; correct it.")
    if claimed is None:
        return first, length
    if claimed <= 0:
        raise ValueError(f"duration must be more than 0 s, but is {claimed} s; correct or delete it.")
    if claimed > length + TOLERANCE or (start is None and claimed < length - TOLERANCE):
        raise ValueError(
            f"duration must be what the file lasts{f' after {first} s' if first else ''}, {length:.3f} s, but is "
            f"{claimed} s; correct or delete it, or add 'start' if the utterance is a part of the file."
        )
    return first, length if start is None else min(float(claimed), length)


def _from_lhotse(record: dict[str, Any], folder: Path) -> Cut:
    try:
        cut = deserialize_item(record)
    except Exception as error:  # lhotse raises whatever Python does
        raise ValueError(
            f"a lhotse cut must be complete, but lhotse says {error!r}; write the CutSet again."
        ) from error
    for file in _files(cut):
        if not Path(file).is_file() and (folder / file).is_file():
            return cut.with_recording_path_prefix(folder)
        audio.info(file)
    return cut


def _files(cut: Cut) -> list[str]:
    """The files a cut is read from; none where the sound is in memory, or comes from a command."""
    parts = [track.cut for track in cut.tracks] if hasattr(cut, "tracks") else [cut]
    recordings = [part.recording for part in parts if part.has_recording and hasattr(part, "recording")]
    return [source.source for recording in recordings for source in recording.sources if source.type == "file"]


def write_manifest(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a manifest whole or not at all."""
    with replacing(path) as draft:
        draft.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def once(folder: Path, settings: Mapping[str, Any], prepare: Callable[[], None]) -> bool:
    """Call ``prepare`` unless ``folder`` was completed with the same ``settings`` before; whether it was called.

    The settings stand in ``folder/.complete``, which is written last, so an interrupted preparation starts again.
    """
    marker, wanted = folder / ".complete", json.dumps(settings, indent=1, sort_keys=True)
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return False
    marker.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    prepare()
    marker.write_text(wanted, encoding="utf-8")
    return True
