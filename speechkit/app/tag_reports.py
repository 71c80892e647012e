"""What ``speechkit evaluate`` says of taggers: a line for each run and set, a report of each class."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from speechkit.app.tag_events import Interval, InTime, Timed
from speechkit.metrics import Tagging
from speechkit.types import Seconds

SHOWN = 20  # classes of a report on the terminal: those found worst
CLASS = {  # how the columns of a report read
    "label": "class",
    "clips": "clips",
    "precision": "precision %",
    "recall": "recall %",
    "f1": "F1 %",
    "average_precision": "AP %",
    "auc": "AUC %",
    "events": "events",
    "segment_f1": "segment F1 %",
    "event_f1": "event F1 %",
}
Cells = list[list[str]]


@dataclass(frozen=True)
class Row:
    """One line of the table. Measures are shares but d', with the 95 % interval of drawing clips anew."""

    run: str
    set: str
    accuracy: float | None  # where classes exclude each other
    accuracy_interval: Interval | None
    mean_average_precision: float
    mean_average_precision_interval: Interval
    mean_auc: float
    d_prime: float
    clips: int
    classes: int
    absent: int  # classes that no clip has
    seconds: Seconds
    rtf: float
    events: InTime | None = None  # where clips have them


def tables(rows: Sequence[Row]) -> list[Table]:
    """Clips, and below them events where there are any; shares in percent."""
    return [_table(columns) for columns in (_cells(rows), _event_cells(rows)) if columns]


def _table(columns: Cells) -> Table:
    table = Table(header_style="bold")
    kept = [column for column in columns if any(cell != "-" for cell in column[1:])]
    for number, (name, *_) in enumerate(kept):
        table.add_column(name, justify="right" if number > 1 else "left", overflow="fold")
    for line in zip(*(cells for _, *cells in kept), strict=True):
        table.add_row(*map(escape, line), style="bold" if line[0].startswith("mean of ") else None)
    return table


def _cells(rows: Sequence[Row]) -> Cells:
    """The columns of the table, each with its name first."""
    show: dict[str, Callable[[Row], str]] = {
        "run": lambda row: row.run,
        "set": lambda row: row.set,
        "accuracy %": lambda row: _percent(row.accuracy),
        "95 % of it": lambda row: _range(row.accuracy_interval),
        "mAP %": lambda row: _percent(row.mean_average_precision),
        "95 %": lambda row: _range(row.mean_average_precision_interval),
        "mAUC %": lambda row: _percent(row.mean_auc),
        "d'": lambda row: "-" if math.isnan(row.d_prime) else f"{row.d_prime:.3f}",
        "clips": lambda row: f"{row.clips:,}",
        "classes": lambda row: f"{row.classes - row.absent} of {row.classes}" if row.absent else str(row.classes),
        "audio s": lambda row: f"{row.seconds:,.0f}",
        "RTF": lambda row: f"{row.rtf:.3f}",
    }
    return [[name, *(cell(row) for row in rows)] for name, cell in show.items()]


def _event_cells(rows: Sequence[Row]) -> Cells:
    """The columns of the table of events; none where no row has any."""
    timed = [(row, row.events) for row in rows if row.events]
    show: list[tuple[str, Callable[[InTime], str]]] = [
        ("segment F1 %", lambda found: _percent(found.segment_micro)),
        ("95 %", lambda found: _range(found.segment_micro_interval)),
        ("macro %", lambda found: _percent(found.segment_macro)),
        ("95 %", lambda found: _range(found.segment_macro_interval)),
        ("event F1 %", lambda found: _percent(found.event_micro)),
        ("95 %", lambda found: _range(found.event_micro_interval)),
        ("macro %", lambda found: _percent(found.event_macro)),
        ("95 %", lambda found: _range(found.event_macro_interval)),
    ]
    first = [
        ["run", *(row.run for row, _ in timed)],
        ["set", *(row.set for row, _ in timed)],
        ["with events", *(f"{found.recordings:,} of {row.clips:,}" for row, found in timed)],
    ]
    return [*first, *([name, *(cell(found) for _, found in timed)] for name, cell in show)] if timed else []


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def _range(interval: Interval | None) -> str:
    return "-" if interval is None or math.isnan(interval[0]) else " - ".join(_percent(value) for value in interval)


def report(folder: Path, name: str, row: Row, found: Tagging, timed: Timed | None) -> None:
    """Every class, as a table for people and one for programs."""
    rows = _classes(found, timed)
    with open(folder / f"{name}-classes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"# {row.run} on {row.set}"]
    for columns in (_cells([row]), _event_cells([row])):
        lines += ["", *_markdown([*zip(*columns, strict=True)])] if columns else []
    lines += ["", *_markdown([[CLASS[key] for key in rows[0]], *map(_shown, rows)])]
    (folder / f"{name}-report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _classes(found: Tagging, timed: Timed | None) -> list[dict[str, Any]]:
    """Every class by itself."""
    clips = [asdict(one) for one in found.report()]
    if timed is None:
        return clips
    columns = (timed.events.there.tolist(), timed.segments.f1.tolist(), timed.events.f1.tolist())
    events = (dict(zip(("events", "segment_f1", "event_f1"), row, strict=True)) for row in zip(*columns, strict=True))
    return [one | of_it for one, of_it in zip(clips, events, strict=True)]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in rows]
    return [f"| {cells[0]} |", "|---" * len(rows[0]) + "|", *(f"| {line} |" for line in cells[1:])]


def _shown(line: dict[str, Any]) -> list[str]:
    return [
        value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else _percent(value)
        for value in line.values()
    ]


def classes(found: Tagging, timed: Timed | None) -> Table:
    """Every class by itself, or those of lowest average precision where there are many."""
    rows = every = _classes(found, timed)
    if len(every) > SHOWN:
        rows = sorted((one for one in every if one["clips"]), key=lambda one: one["average_precision"])[:SHOWN]
    table = Table(header_style="bold", title="the classes found worst" if len(every) > SHOWN else None)
    for number, key in enumerate(every[0]):
        table.add_column(CLASS[key], justify="right" if number else "left")
    for one in rows:
        table.add_row(*map(escape, _shown(one)))
    return table


def finite(value: Any) -> Any:
    """JSON has no infinities, and nothing that is no number."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
