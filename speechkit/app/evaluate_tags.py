"""``speechkit evaluate`` of taggers: runs times test sets in one table, a report of each class, a confusion matrix.

Where clips have events, these too are measured, by `speechkit.app.tag_events`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from speechkit import pictures
from speechkit.app.outputs import Faults
from speechkit.app.sets import manifests, own, results
from speechkit.app.tag import MEDIAN, SURE, ready, rounded
from speechkit.app.tag_events import Finder, InTime, Timed, picture
from speechkit.app.tag_reports import Interval, Row, classes, finite, report, tables
from speechkit.app.transcribe import groups
from speechkit.data.corpora import Cut, events_of, labels_of
from speechkit.data.loading import load as load_samples
from speechkit.data.targets import Labels
from speechkit.metrics import Tagging, interval
from speechkit.tagger import Tagger
from speechkit.types import Event, Seconds

WIDTH = 150  # of a table in a file or a pipe
DRAWS, BUDGET = 1000, 2 * 10**8  # of an interval; scores sorted for all of them together
Heard = tuple[np.ndarray, tuple[Event, ...] | None]  # the scores of a clip, and its events if those are measured


@dataclass(frozen=True)
class Result:
    """What was heard in the clips of a set, in their order."""

    ids: tuple[str, ...]
    found: Tagging
    timed: Timed | None  # those that have events
    seconds: Seconds
    spent: Seconds

    def drawn(self, measure: str, seed: int = 0) -> np.ndarray:
        draws = min(DRAWS, max(DRAWS // 10, BUDGET // self.found.scores.size))
        return self.found.drawn(measure, samples=draws, seed=seed)


def evaluate(
    *,
    runs: Sequence[str],
    named: Sequence[str],
    split: str | None,
    batch: int,
    worst: int,
    as_json: bool,
    threshold: float | None = None,
    median: Seconds | None = None,
) -> int:
    """Evaluate every run on every set and print the table; scores and reports are written to ``RUN/evaluate``.

    Runs that were tested on different clips of one set, as folds are, have a last row of their mean.

    Args:
        threshold, median: of events, as those of `Tagger.events`.

    Raises:
        ValueError: before anything is evaluated, for a run that is no tagger, labels that it does not have, or how
            events are to be found where no clip has any.
    """
    given, faults = manifests(named, split, transcribed=False), Faults()
    finder = Finder(SURE if threshold is None else threshold, MEDIAN if median is None else median)
    jobs = [job for run in runs for job in _jobs(run, given, finder)]
    if not (threshold is None and median is None) and not any(job.timed for job in jobs):
        raise ValueError(
            "--threshold and --median must be given for clips with events, but no clip has any; leave them out, or "
            "write 'events': [...] into the manifest."
        )
    done: list[tuple[_Job, Result]] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        for job in jobs:
            done.append((job, job.hear(batch, progress, faults)))
    rows = [_write(job, result, worst) for job, result in done] + _means(done)
    if as_json:
        print(*(json.dumps(finite(asdict(row)), ensure_ascii=False) for row in rows), sep="\n")
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
        if len(done) == 1:
            console.print(classes(done[0][1].found, done[0][1].timed))
        for job, result in done:
            console.print(_worst(job, result, worst), end="", markup=False)
        console.print(*tables(rows), sep="\n")
    return 1 if faults.count else 0


@dataclass(frozen=True)
class _Job:
    """A row to be."""

    run: str
    set: str
    cuts: list[Cut]
    tagger: Tagger
    finder: Finder

    @cached_property
    def timed(self) -> frozenset[str]:
        """The clips of which it is known when what is heard."""
        return frozenset(cut.id for cut in self.cuts if events_of(cut) is not None)

    @cached_property
    def exclusive(self) -> bool:
        """Whether classes exclude each other in clips, and not only at any moment of them."""
        several = any(cut.id in self.timed and len(labels_of(cut)) != 1 for cut in self.cuts)
        return self.tagger.exclusive and not several

    def hear(self, batch: int, progress: Progress, faults: Faults) -> Result:
        heard: dict[str, Heard] = {}
        spent, bar = 0.0, progress.add_task(f"{self.run} {self.set}", total=sum(cut.duration for cut in self.cuts))
        for group in self._groups(batch):
            clips = {}
            for cut in group:
                with faults.reporting():
                    clips[cut.id] = self._clip(cut)
            start = time.perf_counter()
            heard.update(zip(clips, self._heard(clips), strict=True))
            spent += time.perf_counter() - start
            progress.advance(bar, sum(cut.duration for cut in group))
        there = [cut for cut in self.cuts if cut.id in heard]
        if not there:
            raise ValueError(f"{self.set} must have clips that can be read, but has none; see the faults above.")
        ids, seconds = tuple(cut.id for cut in there), sum(cut.duration for cut in there)
        return Result(ids, self._found(there, heard), self._timed(there, heard), seconds, spent)

    def _groups(self, batch: int) -> Iterator[list[Cut]]:
        """Clips that are heard together, the shortest first; those that are heard in pieces are alone."""
        longest = self.tagger.seconds(self.tagger.frames)
        together = [cut for cut in self.cuts if cut.duration <= longest]
        yield from groups(sorted(together, key=lambda cut: cut.duration), batch)
        yield from ([cut] for cut in self.cuts if cut.duration > longest)

    def _clip(self, cut: Cut) -> torch.Tensor:
        samples = load_samples(cut, self.tagger.sample_rate)
        least = self.tagger.features.mel.window if self.tagger.features else 1
        if len(samples) < least:
            raise ValueError(
                f"{cut.id} must have at least {least} samples, one feature frame, but has {len(samples)}; leave it out."
            )
        return torch.from_numpy(samples)

    def _heard(self, clips: dict[str, torch.Tensor]) -> list[Heard]:
        if not clips:
            return []
        device, rows = next(self.tagger.head.parameters()).device, list(clips.values())
        samples = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        heard: list[Heard] = []
        for name, pieces in zip(clips, self.tagger.clips(samples.to(device), lengths.to(device)), strict=True):
            timed = name in self.timed
            scores, found = self.finder(self.tagger, pieces) if timed else (self.tagger.scores_in(pieces), None)
            heard.append((scores.double().numpy(), found))
        return heard

    def _found(self, cuts: Sequence[Cut], heard: dict[str, Heard]) -> Tagging:
        labels = self.tagger.labels
        targets = np.array([[label in labels_of(cut) for label in labels] for cut in cuts])
        return Tagging(labels, targets, np.stack([heard[cut.id][0] for cut in cuts]), self.exclusive)

    def _timed(self, cuts: Sequence[Cut], heard: dict[str, Heard]) -> Timed | None:
        timed = tuple(cut for cut in cuts if cut.id in self.timed)
        found = tuple(heard[cut.id][1] or () for cut in timed)
        return Timed(self.tagger.labels, timed, found, self.finder) if timed else None


def _jobs(run: str, given: dict[str, list[Cut]], finder: Finder) -> list[_Job]:
    tagger = ready(run)
    sets = given or own(run, transcribed=False)
    jobs = [_Job(run, name, cuts, tagger, finder) for name, cuts in sets.items()]
    for job in jobs:
        try:
            Labels(tagger.labels, job.exclusive).check(job.cuts)
        except ValueError as fault:
            raise ValueError(f"{run} cannot be evaluated on {job.set}: {fault}") from fault
    return jobs


def _write(job: _Job, result: Result, worst: int) -> Row:
    """The row of the table, also written to RUN/evaluate, with scores, reports and confusions beside it."""
    found = result.found
    row = _row(job.run, job.set, [result])
    folder, name = results(job.run, job.set)
    about = finite(asdict(row)) | {"labels": list(found.labels)}
    (folder / f"{name}.json").write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n")
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(result))
    report(folder, name, row, found, result.timed)
    if found.exclusive:
        title = f"{job.run} on {job.set}: {100 * found.accuracy():.1f} % of {len(result.ids)} clips"
        pictures.confusion(found.confusion, found.labels, title).savefig(folder / f"{name}-confusion.png", dpi=110)
    if result.timed and worst > 0:
        title = f"{job.run} on {job.set}: the recordings found worst"
        shown = picture(job.tagger.sample_rate, result.timed, result.timed.worst(worst), title)
        shown.savefig(folder / f"{name}-events.png", dpi=110)
    return row


def _lines(result: Result) -> Iterator[dict[str, Any]]:
    """What was heard in each clip."""
    found, events = result.found, result.timed.by_id if result.timed else {}
    for clip, targets, scores in zip(result.ids, found.targets, found.scores, strict=True):
        there = [found.labels[n] for n in np.flatnonzero(targets).tolist()]
        line = {"id": clip, "labels": there, "scores": [round(score, 6) for score in scores.tolist()]}
        yield line | ({"events": rounded(events[clip])} if clip in events else {})


def _worst(job: _Job, result: Result, count: int) -> str:
    """The clips in which a label that is there has least score."""
    found, lines = result.found, []
    own_scores = np.where(found.targets, found.scores, np.inf)
    for row in np.argsort(own_scores.min(1), kind="stable")[:count]:
        missed, best = int(own_scores[row].argmin()), int(found.scores[row].argmax())
        if found.targets[row].any() and not found.decisions[row, missed]:
            said = [f"{found.labels[n]} {found.scores[row, n]:.2f}" for n in (missed, best)]
            lines.append(f"{result.ids[row]}: is {said[0]}, highest is {said[1]}\n")
    return f"Least heard of {job.run} on {job.set}:\n{''.join(lines)}\n" if lines else ""


def _means(done: Sequence[tuple[_Job, Result]]) -> list[Row]:
    """The mean over runs, for each set of which they were tested on different clips."""
    rows = []
    for name in dict.fromkeys(job.set for job, _ in done):
        parts = [(job, result) for job, result in done if job.set == name]
        ids = [clip for _, result in parts for clip in result.ids]
        if len(parts) > 1 and len(set(ids)) == len(ids) and len({result.found.labels for _, result in parts}) == 1:
            rows.append(_row(f"mean of {len(parts)}", name, [result for _, result in parts]))
    return rows


def _row(run: str, name: str, results: Sequence[Result]) -> Row:
    """The mean over results, of which there may be one."""
    parts = [result.found for result in results]
    exclusive = all(part.exclusive for part in parts)
    timed = [result.timed for result in results if result.timed]
    return Row(
        run=run,
        set=name,
        accuracy=_mean("accuracy", results) if exclusive else None,
        accuracy_interval=_interval("accuracy", results) if exclusive else None,
        mean_average_precision=_mean("mean_average_precision", results),
        mean_average_precision_interval=_interval("mean_average_precision", results),
        mean_auc=_mean("mean_auc", results),
        d_prime=_mean("d_prime", results),
        clips=sum(len(result.ids) for result in results),
        classes=len(parts[0].labels),
        absent=max(part.absent for part in parts),
        seconds=round(sum(result.seconds for result in results), 3),
        rtf=round(sum(result.spent for result in results) / sum(result.seconds for result in results), 5),
        events=InTime.of(timed) if len(timed) == len(results) else None,
    )


def _mean(measure: str, results: Sequence[Result]) -> float:
    return float(np.mean([getattr(result.found, measure)() for result in results]))


def _interval(measure: str, results: Sequence[Result]) -> Interval:
    """Of the mean over results."""
    drawn = [result.drawn(measure, seed) for seed, result in enumerate(results)]
    least = min(map(len, drawn))
    return interval(measure, np.mean([draws[:least] for draws in drawn], axis=0), _mean(measure, results))
