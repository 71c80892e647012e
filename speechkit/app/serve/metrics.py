"""What a server counts, in the text format of Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

EDGES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)  # seconds

COUNTED = {
    "speechkit_streams_joined_total": "Streams that were opened.",
    "speechkit_streams_resumed_total": "Streams that were taken up again after a lost connection.",
    "speechkit_streams_refused_total": "Clients that got an error instead of a stream, by its code.",
    "speechkit_streams_ended_total": "Streams that are over, by reason.",
    "speechkit_chunks_total": "Chunks heard, all streams together.",
    "speechkit_audio_seconds_total": "Seconds of audio received.",
}
TIMED = {
    "speechkit_step_seconds": "Time of a step of the model, for all streams that had a chunk.",
    "speechkit_latency_seconds": "From the arrival of a chunk's last sample to its text.",
}


class Histogram:
    """Counts of seconds in buckets that double."""

    def __init__(self) -> None:
        self.counts = [0] * (len(EDGES) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(EDGES, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> Iterator[str]:
        below = 0
        for edge, count in zip((*map(str, EDGES), "+Inf"), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{edge}"}} {below}'
        yield f"{name}_sum {self.total:g}"
        yield f"{name}_count {below}"


class Metrics:
    """Counters and histograms, by the names above."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.times = {name: Histogram() for name in TIMED}

    def count(self, name: str, by: float = 1, *, label: str = "") -> None:
        """Count ``by`` more; ``label`` is for example ``reason="idle"``."""
        self.counts[name, label] += by  # type: ignore[assignment]

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Everything as one page; ``gauges`` are what is measured now: a sentence and a value by name."""
        return "\n".join((*self._gauges(gauges), *self._counters(), *self._histograms(), ""))

    def _gauges(self, gauges: Mapping[str, tuple[str, float]]) -> Iterator[str]:
        for name, (says, value) in gauges.items():
            yield from _head(name, says, "gauge")
            yield f"{name} {value:g}"

    def _counters(self) -> Iterator[str]:
        for name, says in COUNTED.items():
            yield from _head(name, says, "counter")
            found = {label: value for (counted, label), value in self.counts.items() if counted == name}
            for label, value in sorted(found.items() or [("", 0)]):
                yield f"{name}{{{label}}} {value:.12g}" if label else f"{name} {value:.12g}"

    def _histograms(self) -> Iterator[str]:
        for name, says in TIMED.items():
            yield from _head(name, says, "histogram")
            yield from self.times[name].lines(name)


def _head(name: str, says: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {says}"
    yield f"# TYPE {name} {kind}"
