"""``speechkit tag``: audio files in, labels out. A file that cannot be read is reported and the rest goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from speechkit import audio, pictures
from speechkit.app.outputs import Faults, make
from speechkit.app.progress import Progress
from speechkit.explain import explain as explanation
from speechkit.pretrained import load
from speechkit.tagger import Piece, Tag, Tagger
from speechkit.types import Event, Seconds

SURE = 0.5  # of a frame of an event, unless a threshold is given
MEDIAN: Seconds = 0.3  # over which scores of frames are taken, unless it is given


def tag(
    *,
    model: str,
    files: Sequence[str],
    top: int = 5,
    threshold: float | None = None,
    events: bool = False,
    median: Seconds | None = None,
    as_json: bool = False,
    explain: str | None = None,
) -> int:
    """Print what is heard in each file that can be read; the exit status is 1 if one could not.

    Raises:
        ValueError: for a model that is no tagger, or a median where no events are wanted.
    """
    if median is not None and not events:
        raise ValueError("--median must be given with --events, whose scores it smooths, but is alone; add --events.")
    tagger, faults = ready(model), Faults()
    if explain is not None:
        make(Path(explain), files, ".png")
    for file in files:
        with faults.reporting():
            length = audio.info(file).seconds
            with Progress(file, length) as progress:
                if events:
                    sure = SURE if threshold is None else threshold
                    width = MEDIAN if median is None else median
                    found = tagger.events(file, threshold=sure, median=width, progress=progress)
                    heard: Heard | Events = Events(found)
                else:
                    pieces = tagger.pieces(file, progress)
                    heard = Heard.of(tagger, pieces, length, top, threshold or 0.0)
                if explain is not None:
                    picture(tagger, file, top).savefig(Path(explain, f"{Path(file).stem}.png"), dpi=110)
            if as_json:
                print(json.dumps({"file": file, "seconds": round(length, 3)} | heard.record(), ensure_ascii=False))
            else:
                print(*(f"{file}: {line}" if len(files) > 1 else line for line in heard.lines()), sep="\n", flush=True)
    return 1 if faults.count else 0


def ready(model: str) -> Tagger:
    """The tagger of a folder or run, on the GPU if there is one.

    Raises:
        ValueError: where there is none, or it holds another model.
    """
    found = load(model)
    if not isinstance(found, Tagger):
        raise ValueError(
            f"{model} must hold a tagger, but holds a {type(found).__name__}, which has no labels; name another model, "
            f"or fine-tune this one with: speechkit train CONFIG init={model}"
        )
    return found.to("cuda" if torch.cuda.is_available() else "cpu")


class Stretch(NamedTuple):
    """A part of a recording throughout which the same label is on top, and its labels of highest score."""

    start: Seconds
    end: Seconds
    tags: tuple[Tag, ...]


class Heard(NamedTuple):
    """The labels of a recording, and those of its stretches."""

    tags: tuple[Tag, ...]
    stretches: tuple[Stretch, ...]

    @classmethod
    def of(cls, tagger: Tagger, pieces: Iterable[Piece], length: Seconds, top: int, threshold: float) -> Heard:
        ends, rows = [0.0], []
        for piece in pieces:
            ends.append(tagger.seconds(piece.start + piece.length))
            rows.append(tagger.score(piece))
        scores, ends[-1] = torch.stack(rows), length

        def best(first: int, last: int) -> tuple[Tag, ...]:
            tags = tagger.best(scores[first:last].mean(0), top)
            return tuple(tag for tag in tags if tag.score >= threshold)

        alike = [len(list(same)) for _, same in groupby(scores.argmax(1).tolist())]
        borders = [0, *torch.tensor(alike).cumsum(0).tolist()]
        stretches = (Stretch(ends[first], ends[last], best(first, last)) for first, last in pairwise(borders))
        return cls(best(0, len(scores)), tuple(stretches))

    def lines(self) -> Iterator[str]:
        for start, end, tags in self.stretches:
            said = "; ".join(f"{score:.2f} {label}" for label, score in tags) or "nothing that sure"
            yield f"{start:8.2f} - {end:.2f} s  {said}"

    def record(self) -> dict[str, Any]:
        stretches = ({"start": round(a, 3), "end": round(b, 3), "tags": _tags(tags)} for a, b, tags in self.stretches)
        return {"tags": _tags(self.tags), "stretches": list(stretches)}


class Events(NamedTuple):
    """The events of a recording."""

    events: tuple[Event, ...]

    def lines(self) -> Iterator[str]:
        if not self.events:
            yield "no event"
        for label, start, end, score in self.events:
            yield f"{start:8.2f} - {end:.2f} s  {score:.2f} {label}"

    def record(self) -> dict[str, Any]:
        return {"events": rounded(self.events)}


def picture(tagger: Tagger, file: str, top: int) -> pictures.Figure:
    """The piece of a recording in which a label has its highest score, and where in it the tagger finds it."""
    piece = max(tagger.pieces(file), key=lambda piece: float(tagger.score(piece).max()))
    how, heat = explanation(tagger, piece)
    times = tagger.seconds(piece.start), tagger.seconds(piece.start + piece.length)
    shown = piece.features[0, : piece.length].cpu().numpy()
    return pictures.explained(
        shown, heat.numpy(), tagger.best(tagger.score(piece), top), times, title=Path(file).name, how=how
    )


def _tags(tags: Iterable[Tag]) -> list[dict[str, Any]]:
    return [{"label": label, "score": round(score, 5)} for label, score in tags]


def rounded(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Events as they are written: times and scores to three digits."""
    return [
        {key: round(value, 3) if isinstance(value, float) else value for key, value in event._asdict().items()}
        for event in events
    ]
