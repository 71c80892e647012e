"""Wake words: which of six words is said.

Sound: the wake word benchmark of Picovoice (Picovoice/wake-word-benchmark), recorded by more than 50 people: 46 clips
each of alexa, computer, jarvis, smart mirror, snowboy and view glass, 0.6 to 3.5 s, 16 kHz. Licence: Apache-2.0. Hours:
0.22. Who speaks was not published, so the splits (192 / 42 / 42) may share speakers.

    speechkit prepare wakewords [--corpus FOLDER]     # data/wakewords

FOLDER holds ``wakewords_picovoice`` with its manifest.jsonl. Written are train.jsonl, dev.jsonl and test.jsonl, with
``label``, and labels.txt.
"""

from __future__ import annotations

from pathlib import Path

from speechkit.data import tagged


def prepare(corpus: Path | None, out: Path) -> None:
    """Write the manifests and labels.txt into ``out``.

    Raises:
        ValueError: if the recordings are not there; naming a file that cannot be read.
    """
    tagged.write_splits(out, tagged.sample(corpus, "wakewords_picovoice"), ("id", "audio", "label", "split"))
