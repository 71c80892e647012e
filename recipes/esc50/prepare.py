"""ESC-50: environmental sounds of 50 classes, in the five folds of its authors; and its part ESC-10.

Sound: clips of Freesound that Karol J. Piczak chose and cut to 5 s (karolpiczak/ESC-50; ACM Multimedia 2015), 40 of
each class, 44.1 kHz. Licence: CC BY-NC 3.0 for the set, CC BY 3.0 for the part ESC-10. Hours: 2.8. All clips of one
recording are in one fold, and results are comparable only with these folds.

    speechkit prepare esc50 --corpus ESC-50-master    # data/esc50

The corpus is the unpacked archive of the repository: ``meta/esc50.csv`` and ``audio``. Written are

================= ====================================================================================================
clips.jsonl       2,000 clips with ``label``, ``fold`` (1 to 5) and ``recording``; labels.txt in the order of ``target``
esc10/clips.jsonl the 400 of them that are ESC-10, and esc10/labels.txt
================= ====================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from speechkit.data import tagged

TABLE = "meta/esc50.csv"
COLUMNS = ("filename", "fold", "target", "category", "esc10", "src_file")


def prepare(corpus: Path | None, out: Path) -> None:
    """Write the manifests and lists named above into ``out``.

    Raises:
        ValueError: if the corpus is not given, or not as its author gives it out; naming a file that cannot be read.
    """
    home = tagged.official(corpus, "esc50", (TABLE, "audio"))
    rows = tagged.table(home / TABLE, COLUMNS)
    clips = dict(
        zip([row["filename"] for row in rows], tagged.measured([_record(home, row) for row in rows]), strict=True)
    )
    ten = [row for row in rows if row["esc10"] == "True"]
    tagged.write(out, {"clips": list(clips.values())}, _labels(rows))
    tagged.write(out / "esc10", {"clips": [clips[row["filename"]] for row in ten]}, _labels(ten))


def _record(home: Path, row: dict[str, str]) -> tagged.Record:
    return {
        "id": Path(row["filename"]).stem,
        "audio": str(home / "audio" / row["filename"]),
        "label": row["category"],
        "fold": int(row["fold"]),
        "recording": row["src_file"],
    }


def _labels(rows: Sequence[dict[str, str]]) -> list[str]:
    names = {int(row["target"]): row["category"] for row in rows}
    return [names[number] for number in sorted(names)]
