"""UrbanSound8K: sounds of a city of 10 classes, in the ten folds of its authors.

Sound: 8,732 slices, of at most 4 s and many sample rates, of Freesound recordings (J. Salamon, C. Jacoby, J. P. Bello,
A Dataset and Taxonomy for Urban Sound Research, ACM Multimedia 2014). Licence: CC BY-NC 3.0, not for commercial use.
Hours: 8.8. All slices of one recording are in one fold, and results are comparable only with these folds.

    speechkit prepare urbansound8k --corpus UrbanSound8K      # data/urbansound8k
    speechkit prepare urbansound8k [--corpus FOLDER]          # of the small sample in FOLDER/urbansound8k_sample

The corpus is the unpacked archive: ``metadata/UrbanSound8K.csv`` and ``audio/fold1`` to ``fold10``. Without, the sample
that lies beside the project is taken: 79 slices of folds 1 to 3 at 16 kHz, 5.3 minutes. Written are clips.jsonl, with
``label``, ``fold`` and ``recording``, and labels.txt in the order of the class numbers.
"""

from __future__ import annotations

from pathlib import Path

from speechkit.data import tagged

TABLE = "metadata/UrbanSound8K.csv"
COLUMNS = ("slice_file_name", "fsID", "fold", "classID", "class")


def prepare(corpus: Path | None, out: Path) -> None:
    """Write clips.jsonl and labels.txt into ``out``.

    Raises:
        ValueError: if there are neither the corpus nor the sample; naming a file that cannot be read.
    """
    whole = corpus is not None and not (corpus / "urbansound8k_sample").is_dir()
    lines = _whole(corpus) if whole else _sample(corpus)
    names = {line.pop("class_id"): line["label"] for line in lines}
    tagged.write(out, {"clips": tagged.measured(lines)}, [names[number] for number in sorted(names)])


def _whole(corpus: Path | None) -> list[tagged.Record]:
    home = tagged.official(corpus, "urbansound8k", (TABLE, "audio"))
    return [
        {
            "id": Path(row["slice_file_name"]).stem,
            "audio": str(home / "audio" / f"fold{row['fold']}" / row["slice_file_name"]),
            "label": row["class"],
            "class_id": int(row["classID"]),
            "fold": int(row["fold"]),
            "recording": row["fsID"],
        }
        for row in tagged.table(home / TABLE, COLUMNS)
    ]


def _sample(corpus: Path | None) -> list[tagged.Record]:
    kept = ("id", "audio", "label", "class_id", "fold")
    return [
        {**{key: line[key] for key in kept}, "recording": line["freesound_id"]}
        for line in tagged.sample(corpus, "urbansound8k_sample")
    ]
