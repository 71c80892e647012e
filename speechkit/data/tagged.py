"""What the preparations of tagging corpora share: where a corpus lies, its tables, its manifests and its classes.

A prepared corpus is manifests whose lines have ``label`` (or ``labels``, where several are heard at once), and
``labels.txt``: the names of the classes, one a line, in the order in which a model has them.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speechkit import audio
from speechkit.data.corpora import write_manifest

Record = dict[str, Any]
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"  # beside the project


def sample(corpus: Path | None, name: str) -> list[Record]:
    """The lines of ``name/manifest.jsonl``, their ``audio`` being where the files lie.

    Args:
        corpus: the folder that holds the folder ``name``; by default SPEECHKIT_DATA, or ``../shared/data`` beside the
            project.

    Raises:
        ValueError: if it is not there.
    """
    home = Path(corpus or os.environ.get("SPEECHKIT_DATA") or SHARED).resolve()
    manifest = home / name / "manifest.jsonl"
    if not manifest.is_file():
        raise ValueError(
            f"{home} must hold {name}/manifest.jsonl, but does not; name the folder that does with --corpus, or in "
            f"SPEECHKIT_DATA."
        )
    records = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    return [{"id": Path(r["audio"]).stem, **r, "audio": str(manifest.parent / r["audio"])} for r in records]


def official(corpus: Path | None, recipe: str, parts: Sequence[str]) -> Path:
    """The folder of a corpus as its authors give it out.

    Args:
        recipe: whose corpus it is, for what is said if it is not.
        parts: files and folders that must be in it.

    Raises:
        ValueError: naming the first that is not.
    """
    if corpus is None:
        raise ValueError(
            f"The {recipe} recipe must be given its corpus, but is not; add --corpus and the folder that holds "
            f"{' and '.join(parts)}."
        )
    lacking = [part for part in parts if not (corpus / part).exists()]
    if lacking:
        raise ValueError(
            f"{corpus} must hold {' and '.join(parts)}, but has no {lacking[0]}; give the folder as it was unpacked, "
            f"or unpack it again."
        )
    return corpus.resolve()


def table(path: Path, columns: Collection[str]) -> list[dict[str, str]]:
    """The rows of a CSV file.

    Raises:
        ValueError: naming a column that it lacks.
    """
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        lacking = [column for column in columns if column not in (rows.fieldnames or ())]
        if lacking:
            raise ValueError(
                f"{path} must have the columns {', '.join(columns)}, but has no {lacking[0]} among "
                f"{', '.join(rows.fieldnames or ()) or 'none'}; take the file that its authors give out."
            )
        return list(rows)


def readable(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Those whose file can be read, with their ``duration``, and what is wrong with the files of the others."""
    found, faults = [], []
    for record in records:
        try:
            found.append({**record, "duration": round(audio.info(record["audio"]).seconds, 4)})
        except ValueError as fault:
            faults.append(str(fault))
    return found, faults


def measured(records: Sequence[Record]) -> list[Record]:
    """Records with the ``duration`` of their files.

    Raises:
        ValueError: naming the first file that is missing or broken, and how many more there are.
    """
    found, faults = readable(records)
    if faults:
        raise ValueError(faults[0] + (f" ({len(faults) - 1} more files have faults.)" if len(faults) > 1 else ""))
    return found


def write(out: Path, manifests: Mapping[str, Sequence[Record]], labels: Sequence[str]) -> None:
    """Write ``out/NAME.jsonl`` of each manifest and ``out/labels.txt``, and say what is in them.

    Raises:
        ValueError: for a manifest without a line, or a label that is no class.
    """
    for name, records in manifests.items():
        _check(out / f"{name}.jsonl", records, labels)
    for name, records in manifests.items():
        write_manifest(out / f"{name}.jsonl", records)
    (out / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    print(*_report(out, manifests, labels), sep="\n")


def write_splits(out: Path, records: Sequence[Record], keys: Collection[str]) -> None:
    """`write` a manifest of each ``split`` of the records, with these keys; the classes in alphabetical order.

    Raises:
        ValueError: as `measured` and `write`.
    """
    splits: dict[str, list[Record]] = {}
    for record in measured([{key: record[key] for key in keys} for record in records]):
        splits.setdefault(record["split"], []).append(record)
    write(out, splits, sorted({record["label"] for record in records}))


def _check(path: Path, records: Sequence[Record], labels: Sequence[str]) -> None:
    if not records:
        raise ValueError(f"{path} must have at least one clip, but none was found; see that the corpus is complete.")
    strange = sorted({label for record in records for label in _heard(record)} - set(labels))
    if strange:
        raise ValueError(
            f"Every clip of {path} must have labels of the {len(labels)} classes, but {strange[0]!r} is none of them; "
            f"correct the table of the corpus."
        )


def _heard(record: Record) -> list[str]:
    return list(record["labels"]) if "labels" in record else [record["label"]]


def _report(out: Path, manifests: Mapping[str, Sequence[Record]], labels: Sequence[str]) -> Iterator[str]:
    yield f"{out}: {len(labels)} classes"
    for name, records in _parts(manifests).items():
        heard = Counter(label for record in records for label in _heard(record))
        hours = sum(record["duration"] for record in records) / 3600
        yield f"  {name}: {len(records):,} clips, {hours:.2f} h"
        if absent := [label for label in labels if not heard[label]]:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            yield f"  {name} has no example of {', '.join(absent[:3])}{more}: of that it can teach and measure nothing."


def _parts(manifests: Mapping[str, Sequence[Record]]) -> dict[str, list[Record]]:
    """Folds, where there are any, and manifests otherwise."""
    parts: dict[str, list[Record]] = {}
    for name, records in manifests.items():
        for record in sorted(records, key=lambda record: record.get("fold", 0)):
            parts.setdefault(f"fold {record['fold']}" if "fold" in record else name, []).append(record)
    return parts
