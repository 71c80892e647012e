"""``speechkit transcribe``: audio files in, text out. A file that cannot be read is reported and the rest goes on.

Recordings of up to two minutes are heard whole, many in a batch. A longer one, or any behind voice activity, is
decoded, cut (`speechkit.cut`) and heard a group of clips at a time, in constant memory. With ``--out`` each group is
kept in ``<name>.part.jsonl``: a run that was stopped goes on after the last one, and because groups are the same in
every run, so is what comes out.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechkit import __version__, audio, features
from speechkit.app.outputs import Faults, Folder, Printed
from speechkit.app.progress import Progress
from speechkit.config import build, catalogue
from speechkit.config import load as load_yaml
from speechkit.cut import Clip, clips
from speechkit.pretrained import load_recogniser
from speechkit.recogniser import BATCH_SECONDS, Recogniser
from speechkit.schema import meant
from speechkit.search import Search
from speechkit.session import Session, live_context
from speechkit.session import transcribe as hear
from speechkit.stream import Context
from speechkit.types import Seconds, Transcript
from speechkit.vad import Vad

BLOCK: Seconds = 10.0  # decoded at a time


def transcribe(
    *,
    model: str,
    files: Sequence[str],
    stream: bool = False,
    chunk_ms: float | None = None,
    as_json: bool = False,
    timestamps: bool = False,
    search: str | None = None,
    batch: int = 16,
    vad: bool = False,
    out: str | None = None,
    formats: Sequence[str] = (),
) -> int:
    """Print the text of each file that can be read, or write it; the exit status is 1 if one could not."""
    output = _output(files, as_json, timestamps, out, formats)
    recogniser = ready(model, search)
    context = live_context(recogniser, seconds(chunk_ms)) if stream or chunk_ms else None
    ears = _Ears(recogniser, context, batch, Vad() if vad else None)
    readable = _Reading(_todo(files, output), ears)
    for group in groups(readable, batch):
        short = [clip for _, clip in group if clip is not None]
        start = time.perf_counter()
        transcripts = iter(ears.whole(short))
        rtf = (time.perf_counter() - start) / max(sum(map(len, short)) / recogniser.sample_rate, 1e-9)
        for file, clip in group:
            if clip is not None:
                output(file, next(transcripts), rtf)
            else:
                with readable.faults.reporting():
                    _long(file, ears, output, {"search": search, "vad": vad, "batch": batch})
    return 1 if readable.faults.count else 0


def _output(
    files: Sequence[str], as_json: bool, timestamps: bool, out: str | None, formats: Sequence[str]
) -> Printed | Folder:
    if out is None:
        if formats:
            raise ValueError("--format says what is written to a folder, but there is none; add --out FOLDER.")
        return Printed(files, as_json, timestamps)
    if as_json or timestamps:
        raise ValueError("--json and --timestamps say what is printed, but --out writes files; add --format json.")
    return Folder(out, files, formats or ("text",))


def _todo(files: Sequence[str], output: Printed | Folder) -> Iterator[str]:
    for file in files:
        if isinstance(output, Folder) and output.done(file):
            paths = ", ".join(map(str, output.paths(file).values()))
            print(f"speechkit: {file} is done, {paths} is there; remove it to hear it again.", file=sys.stderr)
        else:
            yield file


class _Ears:
    """How recordings are heard: the model, what it may see, how much at once, and what it leaves out."""

    def __init__(self, recogniser: Recogniser, context: Context | None, batch: int, vad: Vad | None) -> None:
        self.recogniser, self.context, self.batch, self.vad = recogniser, context, batch, vad

    def read(self, file: str) -> np.ndarray | None:
        """The samples of a recording, ``None`` for one that is to be cut."""
        cut = self.vad is not None or audio.info(file).seconds > BATCH_SECONDS
        return None if cut and self.context is None else features.read(Path(file), self.recogniser.sample_rate)

    def whole(self, recordings: Sequence[np.ndarray | torch.Tensor]) -> list[Transcript]:
        if self.context is None:
            return self.recogniser.transcribe(list(recordings), batch=self.batch)
        slots = max(1, len(recordings))
        return hear(Session(self.recogniser, slots=slots, context=self.context, vad=self.vad), recordings)

    def cut(self, file: str) -> Iterator[list[Clip]]:
        """The groups of clips of a recording."""
        rate = self.recogniser.sample_rate
        blocks = map(torch.from_numpy, features.blocks(file, rate, BLOCK))
        return groups(clips(blocks, rate, vad=self.vad), self.batch)

    def group(self, cuts: Sequence[Clip]) -> list[Transcript]:
        """Clips of one recording, with times in it."""
        heard = self.whole([clip.samples for clip in cuts])
        starts = [clip.start / self.recogniser.sample_rate for clip in cuts]
        return [transcript.later(start) for transcript, start in zip(heard, starts, strict=True)]


def _long(file: str, ears: _Ears, output: Printed | Folder, options: dict[str, Any]) -> None:
    length = audio.info(file).seconds
    part = output.part(file, _made(file, ears.recogniser) | options) if isinstance(output, Folder) else None
    known, heard, start = list(part.groups) if part else [], list[Transcript](), time.perf_counter()
    with Progress(file, length) as progress:
        for number, cuts in enumerate(ears.cut(file)):
            if number < len(known):
                heard += known[number]
            else:
                heard += (new := ears.group(cuts))
                if part:
                    part.add(new)
            progress((cuts[-1].start + len(cuts[-1].samples)) / ears.recogniser.sample_rate)
    output(file, Transcript.joined(heard, length), (time.perf_counter() - start) / length)


def _made(file: str, recogniser: Recogniser) -> dict[str, Any]:
    """What a transcript depends on, as far as it can be told apart: the recording, the weights, the search."""
    weights = 0
    for tensor in recogniser.state_dict().values():
        weights = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), weights)
    search = {key: value for key, value in vars(recogniser.search).items() if isinstance(value, int | float | str)}
    about = Path(file).stat()
    return {
        "version": __version__,
        "bytes": about.st_size,
        "changed": about.st_mtime_ns,
        "weights": weights,
        "by": [type(recogniser.search).__name__, search],
    }


def ready(model: str, search: str | None = None) -> Recogniser:
    """The model of a folder or run, on the GPU if there is one, with the named search or its own."""
    recogniser = load_recogniser(model).to("cuda" if torch.cuda.is_available() else "cpu")
    recogniser.search = search_of(recogniser, search)
    return recogniser


def search_of(recogniser: Recogniser, name: str | None) -> Search:
    """The search of conf/search/NAME.yaml for this recogniser; its own for ``None``.

    Raises:
        ValueError: where there is no such file, or the search needs a head that the model lacks.
    """
    if name is None:
        return recogniser.search
    files = {file.stem: file for file in (catalogue() / "search").glob("*.yaml")}
    if name not in files:
        raise ValueError(f"A search must be one of {', '.join(sorted(files))}, but is {name}{meant(name, files)}")
    return build(load_yaml(files[name]), "search")(recogniser.objective)


def seconds(chunk_ms: float | None) -> Seconds | None:
    return None if chunk_ms is None else chunk_ms / 1000


def groups(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while group := list(islice(items, size)):
        yield group


class _Reading:
    """The files that can be read, with their samples where they are short."""

    def __init__(self, files: Iterable[str], ears: _Ears) -> None:
        self.files, self.ears, self.faults = files, ears, Faults()

    def __iter__(self) -> Iterator[tuple[str, np.ndarray | None]]:
        for file in self.files:
            with self.faults.reporting():
                yield file, self.ears.read(file)
