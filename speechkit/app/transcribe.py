"""``speechkit transcribe``: audio files in, text out. A file that cannot be read is reported and the rest goes on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from speechkit import features
from speechkit.config import build, catalogue
from speechkit.config import load as load_yaml
from speechkit.pretrained import load_recogniser
from speechkit.recogniser import Recogniser
from speechkit.schema import meant
from speechkit.search import Search
from speechkit.session import Session, live_context
from speechkit.session import transcribe as hear
from speechkit.types import Seconds, Transcript


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
) -> int:
    """Print the text of each file that can be read; the exit status is 1 if one could not."""
    recogniser = ready(model, search)
    context = live_context(recogniser, seconds(chunk_ms)) if stream or chunk_ms else None
    readable = _Reading(files, recogniser.sample_rate)
    for group in groups(readable, batch):
        clips = [clip for _, clip in group]
        start = time.perf_counter()
        if context is None:
            transcripts = recogniser.transcribe(clips, batch=batch)
        else:
            transcripts = hear(Session(recogniser, slots=len(clips), context=context), clips)
        rtf = (time.perf_counter() - start) / sum(t.seconds for t in transcripts)
        for (file, _), transcript in zip(group, transcripts, strict=True):
            print(_json(file, transcript, rtf) if as_json else _plain(file, transcript, timestamps, len(files) > 1))
        sys.stdout.flush()
    return 1 if readable.faults else 0


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
    """The files that can be read, with their samples; the others are counted and said on stderr."""

    def __init__(self, files: Sequence[str], sample_rate: int) -> None:
        self.files, self.sample_rate, self.faults = files, sample_rate, 0

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for file in self.files:
            try:
                yield file, features.read(Path(file), self.sample_rate)
            except (ValueError, OSError) as fault:
                self.faults += 1
                print(f"speechkit: {fault}", file=sys.stderr)


def _json(file: str, transcript: Transcript, rtf: float) -> str:
    words = [
        {"word": w.word, "start": round(w.start, 3), "end": round(w.end, 3), "confidence": round(w.confidence, 4)}
        for w in transcript.words
    ]
    seconds = round(transcript.seconds, 3)
    line = {"file": file, "text": transcript.text, "words": words, "seconds": seconds, "rtf": round(rtf, 4)}
    return json.dumps(line, ensure_ascii=False)


def _plain(file: str, transcript: Transcript, timestamps: bool, named: bool) -> str:
    lines = [f"{file}: {transcript.text}" if named else transcript.text]
    if timestamps:
        lines += [f"{w.start:9.2f} {w.end:9.2f}  {w.confidence:4.2f}  {w.word}" for w in transcript.words]
    return "\n".join(lines)
