"""All the sound there is, without a label: to pretrain an encoder of audio spectrograms.

Sound: the folders of small samples of public corpora that the other recipes use (LibriSpeech, speechocean762, CMU
Arctic prompts, VCTK, FSDD, AISHELL-1, AMI, Picovoice's wake words, ESC-10, UrbanSound8K, RAVDESS, Donate-a-cry and
others), or any folders of your own with a manifest.jsonl each. Licences are those of the folders: of the samples
UrbanSound8K, RAVDESS and a few clips of librosa's examples are for non-commercial use only, and so is what is trained
with them.
Hours: 5.9 of speech and 0.3 of other sounds in the samples, and 0.1 of both for dev.

    speechkit prepare sounds_mae [--corpus FOLDER]          # data/sounds_mae

Every folder in FOLDER with a manifest.jsonl is read. Written are

============= =========================================================================================================
speech.jsonl  everything in which people speak
sounds.jsonl  everything else: the folders whose names begin as `SOUNDS` do
dev.jsonl     what the folders that are tagged (`TAGGED`) have for dev
============= =========================================================================================================

Of the folders that are tagged, nothing of a test split is written, and dev is not trained on. Recordings longer than
ten seconds become pieces of equal length, since an epoch takes one piece of each; those shorter than a second are left
out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from speechkit.data.corpora import once, read_corpus, split_of, write_manifest
from speechkit.types import Seconds

TAGGED = ("donateacry", "esc", "ravdess", "speechcommands", "urbansound8k", "wakewords")
SOUNDS = ("audioset", "donateacry", "esc", "librosa_examples", "rir_noise", "urbansound8k")
SHORTEST: Seconds = 1.0
LONGEST: Seconds = 10.0


def prepare(corpus: Path | None, out: Path) -> None:
    """Write the manifests named above into ``out``; their audio stays where it is.

    Args:
        corpus: a folder of folders; by default SPEECHKIT_DATA, or ``../shared/data`` beside the project.
        out: the folder, for example ``data/sounds_mae``.

    Raises:
        ValueError: where no folder has a manifest.
    """
    shared = Path(__file__).resolve().parents[3] / "shared" / "data"
    home = Path(corpus or os.environ.get("SPEECHKIT_DATA") or shared).resolve()
    manifests = sorted(home.glob("*/manifest.jsonl"))
    if not manifests:
        raise ValueError(
            f"{home} must hold folders with a manifest.jsonl each, but holds none; name the folder that does with "
            f"--corpus, or in SPEECHKIT_DATA."
        )
    found = {str(path): path.stat().st_mtime_ns for path in manifests}
    once(out, {"recipe": "sounds_mae 1", **found}, lambda: _write(manifests, out))


def _write(manifests: list[Path], out: Path) -> None:
    lines: dict[str, list[dict[str, Any]]] = {"speech": [], "sounds": [], "dev": []}
    for path in manifests:
        name = path.parent.name
        tagged, kind = name.startswith(TAGGED), "sounds" if name.startswith(SOUNDS) else "speech"
        for cut in read_corpus(path, transcribed=False):
            split = split_of(cut) if tagged else "train"
            if split in ("train", "dev"):
                lines[kind if split == "train" else "dev"] += _pieces(cut, name)
    for kind, records in lines.items():
        write_manifest(out / f"{kind}.jsonl", records)


def _pieces(cut: Cut, name: str) -> Iterator[dict[str, Any]]:
    """Lines of a manifest that point at a recording where it lies."""
    if cut.duration < SHORTEST:
        return
    count = -(-cut.duration // LONGEST)
    length = cut.duration / count
    for number in range(int(count)):
        start = {"start": round(cut.start + number * length, 4)} if count > 1 or cut.start else {}
        yield {
            "id": f"{name}/{cut.id}" + (f"@{number}" if count > 1 else ""),
            "audio": cut.recording.sources[0].source,
            **start,
            "duration": round(length, 4),
        }
