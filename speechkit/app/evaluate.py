"""``speechkit evaluate``: runs times test sets times searches times whole or streamed, in one table.

Taggers are evaluated by `speechkit.app.evaluate_tags`.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from speechkit.app import evaluate_tags
from speechkit.app.sets import Sets, is_run, manifests, own, results
from speechkit.app.transcribe import groups, ready, search_of, seconds
from speechkit.data.corpora import Cut, text_of
from speechkit.data.loading import load as load_samples
from speechkit.metrics import alignment, char_errors, word_errors
from speechkit.pretrained import load
from speechkit.recogniser import Recogniser
from speechkit.search import Search
from speechkit.session import Session, live_context, transcribe
from speechkit.stream import Context
from speechkit.tagger import Tagger
from speechkit.text import normalise
from speechkit.types import Seconds, Transcript

WIDTH = 150  # of a table in a file or a pipe


@dataclass(frozen=True)
class Row:
    """One line of the table. Rates are shares, with the 95 % interval of drawing utterances anew."""

    run: str
    set: str
    search: str
    heard: str  # "whole", or the length of a chunk
    wer: float
    wer_interval: tuple[float, float]
    cer: float
    cer_interval: tuple[float, float]
    utterances: int
    words: int
    seconds: Seconds
    rtf: float


@dataclass(frozen=True)
class Reading:
    """What was said in an utterance, and what was heard."""

    id: str
    reference: str
    transcript: Transcript


def evaluate(
    *,
    inputs: Sequence[str],
    split: str | None = None,
    search: Sequence[str] | None = None,
    stream: bool = False,
    chunk_ms: Sequence[float] | None = None,
    batch: int = 16,
    worst: int = 3,
    as_json: bool = False,
    threshold: float | None = None,
    median: Seconds | None = None,
) -> int:
    """Evaluate every run on every set and print the table; what was heard is written to ``RUN/evaluate``.

    Runs are recognisers, or all of them taggers. Texts are normalised before they are compared. The exit status is 1 if
    an utterance could not be read.

    Raises:
        ValueError: before anything is evaluated, for an input, a search or a chunk that cannot be used.
    """
    runs = [name for name in inputs if is_run(name)]
    named = [name for name in inputs if name not in runs]
    if not runs:
        raise ValueError(f"A run must be among {', '.join(inputs)}, but none of them holds a model; name one first.")
    if isinstance(load(runs[0]), Tagger):
        if search or stream or chunk_ms:
            raise ValueError(
                f"{runs[0]} holds a tagger, which searches nothing and hears clips whole, but --search, --stream "
                f"or --chunk-ms is given; leave it out."
            )
        return evaluate_tags.evaluate(
            runs=runs,
            named=named,
            split=split,
            batch=batch,
            worst=worst,
            as_json=as_json,
            threshold=threshold,
            median=median,
        )
    if threshold is not None or median is not None:
        raise ValueError(
            f"{runs[0]} holds a recogniser, which finds no events, but --threshold or --median is given; leave it out."
        )
    jobs = list(_jobs(runs, manifests(named, split), search or [None], stream, chunk_ms or []))
    rows, wrong, faults = [], [], 0
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        for job in jobs:
            readings, unread, spent = job.hear(batch, progress)
            faults += unread
            rows.append(_write(job, readings, spent))
            wrong += [_worst(job, readings, worst)] if job.first else []
    if as_json:
        print(*(json.dumps(asdict(row), ensure_ascii=False) for row in rows), sep="\n")
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
        console.print(*wrong, table(rows), sep="", markup=False)
    return 1 if faults else 0


@dataclass(frozen=True)
class _Job:
    """A row to be."""

    run: str
    set: str
    cuts: list[Cut]
    model: Recogniser
    searched: str
    search: Search
    context: Context | None  # to stream in; whole utterances if None
    first: bool  # of its run and set

    def hear(self, batch: int, progress: Progress) -> tuple[list[Reading], int, Seconds]:
        """Readings, utterances that could not be read, and seconds spent hearing."""
        self.model.search = self.search
        listen, unread, spent = self._listener(batch), 0, 0.0
        readings: dict[str, Transcript] = {}
        bar = progress.add_task(f"{self.run} {self.set} {self.heard}", total=sum(cut.duration for cut in self.cuts))
        for group in groups(sorted(self.cuts, key=lambda cut: cut.duration), batch):
            clips = {cut.id: clip for cut in group if (clip := self._clip(cut)) is not None}
            unread += len(group) - len(clips)
            start = time.perf_counter()
            readings.update(zip(clips, listen(list(clips.values())), strict=True))
            spent += time.perf_counter() - start
            progress.advance(bar, sum(cut.duration for cut in group))
        if not readings:
            raise ValueError(f"{self.set} must have utterances that can be read, but has none; see the faults above.")
        heard = [Reading(cut.id, text_of(cut), readings[cut.id]) for cut in self.cuts if cut.id in readings]
        return heard, unread, spent

    @property
    def heard(self) -> str:
        return "whole" if self.context is None else f"{1000 * self.context.latency() * self.model.frame_seconds:g} ms"

    def _listener(self, batch: int) -> Callable[[list[np.ndarray]], Sequence[Transcript]]:
        if self.context is None:
            return lambda clips: self.model.transcribe(clips, batch=batch)
        session = Session(self.model, slots=batch, context=self.context, endpoint=None)
        return lambda clips: transcribe(session, clips)

    def _clip(self, cut: Cut) -> np.ndarray | None:
        try:
            return load_samples(cut, self.model.sample_rate)
        except (ValueError, OSError) as fault:
            print(f"speechkit: {fault}", file=sys.stderr)
            return None


def _jobs(
    runs: Sequence[str], given: Sets, searches: Sequence[str | None], stream: bool, chunk_ms: Sequence[float]
) -> Iterator[_Job]:
    for run in runs:
        model = ready(run)
        streamed = [live_context(model, seconds(ms)) for ms in chunk_ms] or ([live_context(model)] if stream else [])
        found = [(name or _snake(type(model.search).__name__), search_of(model, name)) for name in searches]
        for name, cuts in (given or own(run)).items():
            ways = [(*search, context) for search in found for context in (None, *streamed)]
            for number, way in enumerate(ways):
                yield _Job(run, name, cuts, model, *way, first=not number)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _write(job: _Job, readings: Sequence[Reading], spent: Seconds) -> Row:
    """The row of the table, also written to RUN/evaluate, with the hypotheses beside it."""
    words, chars = word_errors(*_texts(readings)), char_errors(*_texts(readings))
    audio = sum(reading.transcript.seconds for reading in readings)
    row = Row(
        run=job.run,
        set=job.set,
        search=job.searched,
        heard=job.heard,
        wer=words.rate,
        wer_interval=words.interval(),
        cer=chars.rate,
        cer_interval=chars.interval(),
        utterances=len(readings),
        words=words.words,
        seconds=round(audio, 3),
        rtf=round(spent / audio, 5),
    )
    folder, name = results(job.run, f"{job.set}-{job.searched}-{job.heard}")
    (folder / f"{name}.json").write_text(json.dumps(asdict(row), ensure_ascii=False, indent=2) + "\n")
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for reading, errors in zip(readings, words.utterances, strict=True):
            line: dict[str, Any] = {"id": reading.id, "reference": reading.reference, "errors": errors.errors}
            file.write(json.dumps(line | asdict(reading.transcript), ensure_ascii=False) + "\n")
    return row


def _worst(job: _Job, readings: Sequence[Reading], count: int) -> str:
    """The utterances with most errors, their words aligned."""
    said, heard = _texts(readings)
    worst = word_errors(said, heard).worst(count)
    shown = "\n".join(f"\n{readings[row].id}\n{alignment(said[row], heard[row])}" for row in worst)
    return f"Most errors of {job.run} on {job.set}, {job.searched}, {job.heard}:\n{shown}\n\n" if worst else ""


def _texts(readings: Sequence[Reading]) -> tuple[list[str], list[str]]:
    """What was said and what was heard, as they are compared."""
    return [normalise(r.reference) for r in readings], [normalise(r.transcript.text) for r in readings]


def table(rows: Sequence[Row]) -> Table:
    """Rates in percent, the best of each run and set in bold."""
    table = Table(header_style="bold")
    for name in ("run", "set", "search", "heard"):
        table.add_column(name, overflow="fold")
    for name in ("WER %", "95 %", "CER %", "95 %", "utterances", "words", "audio s", "RTF"):
        table.add_column(name, justify="right")
    for row in rows:
        best = min(other.wer for other in rows if (other.run, other.set) == (row.run, row.set))
        table.add_row(
            row.run,
            row.set,
            row.search,
            row.heard,
            f"{100 * row.wer:.2f}",
            _interval(row.wer_interval),
            f"{100 * row.cer:.2f}",
            _interval(row.cer_interval),
            f"{row.utterances:,}",
            f"{row.words:,}",
            f"{row.seconds:,.0f}",
            f"{row.rtf:.3f}",
            style="bold" if row.wer == best else None,
        )
    return table


def _interval(interval: tuple[float, float]) -> str:
    return " - ".join(f"{100 * value:.2f}" for value in interval)
