"""``speechkit stream``: a microphone, or a file as a live stream; the text as it comes."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from speechkit import audio
from speechkit.app.microphone import Microphone, devices, sound_card
from speechkit.app.transcribe import ready, seconds
from speechkit.session import Session, Update, live_context, transcript
from speechkit.types import Seconds
from speechkit.vad import Vad

BLOCK: Seconds = 0.1  # of a file at a time, as a sound card would hand it over
REDRAW: Seconds = 0.05  # between two pictures of the level at least
QUIET_DB, METER = -60.0, "▏▎▍▌▋▊▉█"


def stream(
    *,
    model: str,
    file: str | None = None,
    mic: bool = False,
    device: str | None = None,
    list_devices: bool = False,
    chunk_ms: float | None = None,
    search: str | None = None,
    realtime: bool = False,
    vad: bool = False,
    card: Any = None,
) -> None:
    """Print the text as it grows, then all of it, with the latency and the real-time factor.

    Args:
        card: stands in for the module sounddevice.
    """
    if list_devices:
        print(*(devices(card or sound_card()) or ["This machine has no input device."]), sep="\n")
        return
    source = _File(file, realtime) if file is not None else Microphone(card or sound_card(), device)
    recogniser = ready(model, search)
    session = Session(recogniser, context=live_context(recogniser, seconds(chunk_ms)), vad=Vad() if vad else None)
    if mic or realtime:
        session.trace()  # worth its second or so where every step is waited for
    clock, finals, console = _Clock(), [], Console(highlight=False)
    with _Screen(console) if console.is_terminal else _Lines() as show, _open(source):
        for update in _updates(session, source, clock, show):
            show(update, clock)
            if update.final:
                finals.append(update)
    whole = transcript(finals)
    console.print(whole.text, style="bold", markup=False, soft_wrap=True)
    console.print(clock.report(session.chunk / recogniser.sample_rate), style="dim", soft_wrap=True)
    for fault in source.faults() if isinstance(source, Microphone) else ():
        print(f"speechkit: {fault}", file=sys.stderr)


class _File:
    """The blocks of a file, each with the time it was handed over."""

    def __init__(self, file: str, realtime: bool) -> None:
        self.sample_rate, self.blocks = audio.blocks(file, BLOCK)
        self.realtime = realtime

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        start, heard = time.monotonic(), 0.0
        for block in self.blocks:
            heard += len(block) / self.sample_rate
            if self.realtime:
                time.sleep(max(0.0, start + heard - time.monotonic()))
            yield time.perf_counter(), block


@contextmanager
def _open(source: _File | Microphone) -> Iterator[None]:
    if isinstance(source, Microphone):
        print(f"speechkit: listening at {source.sample_rate} Hz; Ctrl-C ends.", file=sys.stderr)
        with _interruptible(source.stop), source:
            yield
    else:
        yield


@contextmanager
def _interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C stops, a second one interrupts."""

    def first(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class _Clock:
    """What was heard when, how loud, and how long it took."""

    heard: Seconds = 0.0
    busy: Seconds = 0.0
    level_db: float = QUIET_DB
    latencies: list[Seconds] = field(default_factory=list)  # from the arrival of a chunk's end to its text

    def block(self, samples: np.ndarray, sample_rate: int) -> None:
        self.heard += len(samples) / sample_rate
        self.level_db = 10 * math.log10(max(float(np.square(samples).mean()), 1e-10))

    def report(self, chunk: Seconds) -> str:
        waits = [1000 * wait for wait in self.latencies] or [0.0]
        half, most = (quantiles(waits, n=20)[i] for i in (9, 18)) if len(waits) > 1 else waits * 2
        return (
            f"{self.heard:.2f} s of audio; latency: a chunk of {1000 * chunk:.0f} ms and {half:.0f} ms to hear it "
            f"(median; 95 %: {most:.0f} ms); real-time factor {self.busy / max(self.heard, chunk):.3f}"
        )


def _updates(session: Session, source: _File | Microphone, clock: _Clock, show: _Screen | _Lines) -> Iterator[Update]:
    slot = session.join(sample_rate=source.sample_rate)
    for arrived, block in source:
        start = time.perf_counter()
        session.push(slot, block)
        clock.block(block, source.sample_rate)
        clock.busy += time.perf_counter() - start
        yield from _timed(session, clock, arrived)
        show.level(clock)
    session.finish(slot)
    yield from _timed(session, clock, time.perf_counter())


def _timed(session: Session, clock: _Clock, arrived: float) -> Iterator[Update]:
    start = time.perf_counter()
    for update in session.drain():
        clock.busy += time.perf_counter() - start
        clock.latencies.append(time.perf_counter() - arrived)
        yield update
        start = time.perf_counter()
    clock.busy += time.perf_counter() - start


class _Screen:
    """A terminal: finished segments scroll away, the living one is redrawn, bright where it cannot change any more."""

    def __init__(self, console: Console) -> None:
        self.live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="visible")
        self.text, self.drawn = Text(), 0.0

    def __enter__(self) -> _Screen:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def __call__(self, update: Update, clock: _Clock) -> None:
        at = f"{update.seconds:7.2f} s  "
        if update.final and update.text:
            self.live.console.print(Text.assemble((at, "dim"), update.text))
        rest = "" if update.final else update.text[len(update.stable) :]
        stable = "" if update.final else update.stable
        self.text = Text.assemble((at, "dim"), (stable, "bold"), (rest, "dim"))
        self._draw(clock)

    def level(self, clock: _Clock) -> None:
        if time.monotonic() - self.drawn >= REDRAW:
            self._draw(clock)

    def _draw(self, clock: _Clock) -> None:
        self.drawn = time.monotonic()
        latency = f"{1000 * clock.latencies[-1]:.0f} ms" if clock.latencies else ""
        status = f"{clock.heard:7.2f} s  {_meter(clock.level_db)} {clock.level_db:4.0f} dB  {latency}"
        self.live.update(Group(self.text, Text(status, "dim")), refresh=True)


def _meter(level_db: float, width: int = 10) -> str:
    """A bar from `QUIET_DB` to full scale."""
    eighths = round(8 * width * min(max(1 - level_db / QUIET_DB, 0.0), 1.0))
    part = METER[eighths % 8 - 1] if eighths % 8 else ""
    return (METER[-1] * (eighths // 8) + part).ljust(width)


class _Lines:
    """No terminal: a line whenever the text has changed."""

    def __init__(self) -> None:
        self.last = ""

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None: ...

    def level(self, clock: _Clock) -> None: ...

    def __call__(self, update: Update, clock: _Clock) -> None:
        if update.text and update.text != self.last:
            print(f"{update.seconds:7.2f} s  {update.text}", flush=True)
        self.last = "" if update.final else update.text
