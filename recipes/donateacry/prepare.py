"""Donate-a-cry: why a baby cries, as its parents believe.

Sound: recordings that users of a phone app gave (gveres/donateacry-corpus), here 55 clips of 32 installations of the
app, about 7 s, made at 8 kHz: nothing is above 4 kHz. Licence: Open Database License 1.0, contents under the Database
Contents License 1.0. Hours: 0.11. The labels are guesses. No installation is in two splits, and test has no example of
burping.

    speechkit prepare donateacry [--corpus FOLDER]    # data/donateacry

FOLDER holds ``donateacry_sample`` with its manifest.jsonl. Written are train.jsonl, dev.jsonl and test.jsonl, with
``label`` and ``speaker`` (the installation), and labels.txt.
"""

from __future__ import annotations

from pathlib import Path

from speechkit.data import tagged

KEPT = ("id", "audio", "label", "speaker", "baby_gender", "baby_age", "split")


def prepare(corpus: Path | None, out: Path) -> None:
    """Write the manifests and labels.txt into ``out``.

    Raises:
        ValueError: if the recordings are not there; naming a file that cannot be read.
    """
    tagged.write_splits(out, tagged.sample(corpus, "donateacry_sample"), KEPT)
