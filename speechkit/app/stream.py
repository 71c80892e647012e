"""``speechkit stream``: one file as a live stream, the text as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import quantiles

from rich.console import Console
from rich.live import Live
from rich.text import Text

from speechkit import audio
from speechkit.app.transcribe import ready, seconds
from speechkit.session import Session, Update, live_context, transcript
from speechkit.types import Seconds

BLOCK: Seconds = 0.1  # what a sound card hands over at a time


def stream(
    *, model: str, file: str, chunk_ms: float | None = None, search: str | None = None, realtime: bool = False
) -> None:
    """Print the text of a file as it grows, then all of it, with the latency and the real-time factor."""
    recogniser = ready(model, search)
    session = Session(recogniser, context=live_context(recogniser, seconds(chunk_ms)))
    clock, finals, console = _Clock(), [], Console(highlight=False)
    with _Screen(console) if console.is_terminal else _Lines() as show:
        for update in _updates(session, file, clock, realtime):
            show(update)
            if update.final:
                finals.append(update)
    whole = transcript(finals)
    console.print(whole.text, style="bold", markup=False, soft_wrap=True)
    chunk = session.chunk / recogniser.sample_rate
    console.print(clock.report(chunk, whole.seconds), style="dim", soft_wrap=True)


@dataclass
class _Clock:
    """How long each step took."""

    steps: list[Seconds] = field(default_factory=list)

    def report(self, chunk: Seconds, heard: Seconds) -> str:
        half, most = (quantiles(self.steps, n=20)[i] for i in (9, 18)) if len(self.steps) > 1 else self.steps * 2
        return (
            f"{heard:.2f} s of audio; latency: a chunk of {1000 * chunk:.0f} ms and {1000 * half:.0f} ms to hear it "
            f"(median; 95 %: {1000 * most:.0f} ms); real-time factor {sum(self.steps) / max(heard, chunk):.3f}"
        )


def _updates(session: Session, file: str, clock: _Clock, realtime: bool) -> Iterator[Update]:
    rate, blocks = audio.blocks(file, BLOCK)
    slot, start, heard = session.join(sample_rate=rate), time.monotonic(), 0.0
    for block in blocks:
        heard += len(block) / rate
        if realtime:
            time.sleep(max(0.0, start + heard - time.monotonic()))
        session.push(slot, block)
        yield from _timed(session, clock)
    session.finish(slot)
    yield from _timed(session, clock)


def _timed(session: Session, clock: _Clock) -> Iterator[Update]:
    start = time.perf_counter()
    for update in session.drain():
        clock.steps.append(time.perf_counter() - start)
        yield update
        start = time.perf_counter()


class _Screen:
    """A terminal: finished segments scroll away, the living one is redrawn, bright where it cannot change any more."""

    def __init__(self, console: Console) -> None:
        self.live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="visible")

    def __enter__(self) -> _Screen:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def __call__(self, update: Update) -> None:
        clock = f"{update.seconds:7.2f} s  "
        if update.final and update.text:
            self.live.console.print(Text.assemble((clock, "dim"), update.text))
        rest = "" if update.final else update.text[len(update.stable) :]
        stable = "" if update.final else update.stable
        self.live.update(Text.assemble((clock, "dim"), (stable, "bold"), (rest, "dim")), refresh=True)


class _Lines:
    """No terminal: a line whenever the text has changed."""

    def __init__(self) -> None:
        self.last = ""

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, update: Update) -> None:
        if update.text and update.text != self.last:
            print(f"{update.seconds:7.2f} s  {update.text}", flush=True)
        self.last = "" if update.final else update.text
