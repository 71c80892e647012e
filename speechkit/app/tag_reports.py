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

from speechkit.metrics import Tagging
from speechkit.metrics.tags import Class
from speechkit.types import Seconds

SHOWN = 20  # classes of a report on the terminal: those found worst
CLASS = ("class", "clips", "precision %", "recall %", "F1 %", "AP %", "AUC %")
Interval = tuple[float, float]


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


def table(rows: Sequence[Row]) -> Table:
    """Shares in percent."""
    table = Table(header_style="bold")
    for number, (name, *cells) in enumerate(_cells(rows)):
        if any(cell != "-" for cell in cells):
            table.add_column(name, justify="right" if number > 1 else "left", overflow="fold")
    kept = [cells for _, *cells in _cells(rows) if any(cell != "-" for cell in cells)]
    for line in zip(*kept, strict=True):
        table.add_row(*map(escape, line), style="bold" if line[0].startswith("mean of ") else None)
    return table


def _cells(rows: Sequence[Row]) -> list[list[str]]:
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


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def _range(interval: Interval | None) -> str:
    return "-" if interval is None else " - ".join(_percent(value) for value in interval)


def report(folder: Path, name: str, row: Row, found: Tagging) -> None:
    """Every class, as a table for people and one for programs."""
    rows = found.report()
    with open(folder / f"{name}-classes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(one) for one in rows)
    lines = [f"# {row.run} on {row.set}", "", *_markdown([list(cells) for cells in zip(*_cells([row]), strict=True)])]
    lines += ["", *_markdown([list(CLASS), *([*map(str, _shown(one))] for one in rows)])]
    (folder / f"{name}-report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in rows]
    return [f"| {cells[0]} |", "|---" * len(rows[0]) + "|", *(f"| {line} |" for line in cells[1:])]


def _shown(one: Class) -> tuple[str, ...]:
    shares = (one.precision, one.recall, one.f1, one.average_precision, one.auc)
    return (one.label, f"{one.clips:,}", *map(_percent, shares))


def classes(found: Tagging) -> Table:
    """Every class by itself, or those of lowest average precision where there are many."""
    rows = found.report()
    if len(rows) > SHOWN:
        worst = sorted((one for one in rows if one.clips), key=lambda one: one.average_precision)[:SHOWN]
        rows = tuple(worst)
    table = Table(header_style="bold", title="the classes found worst" if len(found.labels) > SHOWN else None)
    for number, name in enumerate(CLASS):
        table.add_column(name, justify="right" if number else "left")
    for one in rows:
        table.add_row(*map(escape, _shown(one)))
    return table


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinities, and nothing that is no number."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
