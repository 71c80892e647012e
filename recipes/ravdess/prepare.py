"""RAVDESS: with which of eight emotions a sentence is spoken, by actors who were never trained on.

Sound: the Ryerson Audio-Visual Database of Emotional Speech (S. R. Livingstone, F. A. Russo, PLoS ONE 13(5) e0196391,
2018), here 180 clips of 18 of its 24 actors, two sentences, 16 kHz. Licence: CC BY-NC-SA 4.0, not for commercial use.
Hours: 0.18. Actors 1 to 12 are for training, 13 to 15 dev, 16 to 18 test.

    speechkit prepare ravdess [--corpus FOLDER]       # data/ravdess

FOLDER holds ``ravdess_sample`` with its manifest.jsonl. Written are train.jsonl, dev.jsonl and test.jsonl, with
``label``, ``speaker`` and ``intensity``, and labels.txt.
"""

from __future__ import annotations

from pathlib import Path

from speechkit.data import tagged

KEPT = ("id", "audio", "label", "speaker", "gender", "intensity", "text", "split")


def prepare(corpus: Path | None, out: Path) -> None:
    """Write the manifests and labels.txt into ``out``.

    Raises:
        ValueError: if the recordings are not there; naming a file that cannot be read.
    """
    tagged.write_splits(out, tagged.sample(corpus, "ravdess_sample"), KEPT)
