"""How far a long recording was heard: a bar on a terminal, a line now and then elsewhere; on stderr."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from speechkit.types import Seconds

EVERY: Seconds = 30.0  # between two lines


class Progress:
    """Called with the seconds of the recording that were heard."""

    def __init__(self, file: str, length: Seconds) -> None:
        self.name, self.length, self.said = Path(file).name, length, time.monotonic()
        console = Console(stderr=True)
        parts = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        clock = (TextColumn("{task.fields[at]}"), TimeRemainingColumn())
        self.bar = Bar(*parts, *clock, console=console, transient=True) if console.is_terminal else None
        self.task = self.bar.add_task(self.name, total=length, at="") if self.bar else None

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, heard: Seconds) -> None:
        at = f"{_clock(heard)} of {_clock(self.length)}"
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=heard, at=at)
        elif time.monotonic() - self.said >= EVERY:
            self.said = time.monotonic()
            print(f"speechkit: {self.name}: heard {at}", file=sys.stderr, flush=True)


def _clock(at: Seconds) -> str:
    return f"{int(at) // 3600}:{int(at) // 60 % 60:02}:{int(at) % 60:02}"
