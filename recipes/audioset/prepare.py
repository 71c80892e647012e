"""AudioSet: which of 527 sounds are heard in ten seconds of a video; several may be at once.

Sound: pieces of 10 s of YouTube videos with labels by people (J. F. Gemmeke et al., ICASSP 2017): lists of 22,160
clips (balanced), 2,041,789 (unbalanced) and 20,371 (eval). Licence of the lists and labels: CC BY 4.0; the sound
belongs to those who uploaded it. Hours: 5,800 by the lists. Videos vanish, so everybody has another part of them, and a
result says on how many clips it was measured.

    speechkit prepare audioset --corpus FOLDER        # data/audioset

FOLDER holds ``balanced_train_segments.csv``, ``eval_segments.csv`` and ``class_labels_indices.csv``, with
``unbalanced_train_segments.csv`` where one has it, and below ``audio`` the clips, cut to their ten seconds, in any
format that libsndfile reads, named by the id of the video: ``ID.wav``, ``YID.wav`` or ``ID_30.000.wav``. Written are

======================================= ===============================================================================
balanced.jsonl, full.jsonl, eval.jsonl  the clips that are there, with ``labels``; full is balanced and unbalanced
labels.txt                              the names of the classes in the order of class_labels_indices.csv
======================================= ===============================================================================
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from speechkit.data import tagged
from speechkit.data.augment import AUDIO_SUFFIXES

LISTS = {
    "balanced": "balanced_train_segments.csv",
    "unbalanced": "unbalanced_train_segments.csv",
    "eval": "eval_segments.csv",
}
CLASSES = "class_labels_indices.csv"
NAME = re.compile(r"Y?([\w-]{11})(_\d.*)?")  # of a file: the id of a video has eleven characters


def prepare(corpus: Path | None, out: Path) -> None:
    """Write the manifests and labels.txt named above into ``out``, and say how many clips of each list there are.

    Files that cannot be read are left out like those that are absent, and counted.

    Raises:
        ValueError: if the corpus is not given or not as described, or a list has a label that is no class.
    """
    home = tagged.official(corpus, "audioset", (LISTS["balanced"], LISTS["eval"], CLASSES, "audio"))
    classes = {
        row["mid"]: row["display_name"] for row in tagged.table(home / CLASSES, ("index", "mid", "display_name"))
    }
    files = {match[1]: file for file in _audio(home / "audio") if (match := NAME.fullmatch(file.stem))}
    found = {name: _found(home / file, classes, files) for name, file in LISTS.items() if (home / file).exists()}
    full = found.pop("unbalanced", None)
    manifests = found if full is None else {**found, "full": [*found["balanced"], *full]}
    tagged.write(out, manifests, list(classes.values()))


def _audio(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in AUDIO_SUFFIXES)


def _found(path: Path, classes: dict[str, str], files: dict[str, Path]) -> list[tagged.Record]:
    listed = dict(_segments(path))
    wanted = [
        {"id": video, "audio": str(files[video]), "labels": [_name(mid, classes, path) for mid in mids]}
        for video, mids in listed.items()
        if video in files
    ]
    clips, faults = tagged.readable(wanted)
    print(
        f"{path.name}: {len(clips):,} of {len(listed):,} clips are there"
        + (f", {len(faults):,} cannot be read: {faults[0]}" if faults else ".")
    )
    return clips


def _segments(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Video and labels of each line: ``YTID, start, end, "label,label"`` after a head of lines that begin with #."""
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.reader((line for line in file if not line.startswith("#")), skipinitialspace=True):
            if len(row) != 4:
                raise ValueError(
                    f"A line of {path} must be a video, start, end and labels, but is {row!r:.80}; take the list that "
                    f"its authors give out."
                )
            yield row[0], row[3].split(",")


def _name(mid: str, classes: dict[str, str], path: Path) -> str:
    if mid not in classes:
        raise ValueError(
            f"Every label of {path} must be in {CLASSES}, but {mid} is not; take both files from the same place."
        )
    return classes[mid]
