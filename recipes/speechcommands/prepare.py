"""Speech Commands, version 2: which of 35 words is said, in the splits of its authors.

Sound: 105,829 clips of at most 1 s by 2,618 people on their own devices (P. Warden, 1804.03209), 16 kHz. Licence: CC BY
4.0. Hours: 29. Train, dev and test have 84,843, 9,981 and 11,005 clips, and share no speakers. (Another archive, of 12
classes with silence and unknown words, has a test of 4,890 clips: results on it do not compare.)

    speechkit prepare speechcommands --corpus speech_commands_v0.02     # data/speechcommands

The corpus is the unpacked archive: a folder for each word, ``validation_list.txt``, ``testing_list.txt``. Written are

================================== ====================================================================================
train.jsonl, dev.jsonl, test.jsonl the clips, with ``label`` and ``speaker``; labels.txt in alphabetical order
noise.jsonl                        the recordings in ``_background_noise_``, to put under the clips
================================== ====================================================================================
"""

from __future__ import annotations

from pathlib import Path

from speechkit.data import tagged
from speechkit.data.corpora import write_manifest

LISTS = {"dev": "validation_list.txt", "test": "testing_list.txt"}
NOISE = "_background_noise_"


def prepare(corpus: Path | None, out: Path) -> None:
    """Write the manifests and labels.txt named above into ``out``.

    Raises:
        ValueError: if the corpus is not given, or not as its authors give it out; naming a clip of a list that is
            absent, or a file that cannot be read.
    """
    home = tagged.official(corpus, "speechcommands", tuple(LISTS.values()))
    clips = {file.relative_to(home).as_posix(): file for file in sorted(home.glob("*/*.wav"))}
    noise = [clips.pop(name) for name in list(clips) if name.startswith(NOISE)]
    splits = {split: _listed(home / name, clips) for split, name in LISTS.items()}
    rest = clips.keys() - splits["dev"] - splits["test"]
    chosen = {"train": rest, **splits}
    manifests = {
        split: tagged.measured([_record(clips[name]) for name in sorted(names)]) for split, names in chosen.items()
    }
    tagged.write(out, manifests, sorted({file.parent.name for file in clips.values()}))
    write_manifest(out / "noise.jsonl", tagged.measured([{"id": file.stem, "audio": str(file)} for file in noise]))


def _listed(path: Path, clips: dict[str, Path]) -> set[str]:
    names = set(path.read_text(encoding="utf-8").split())
    absent = sorted(names - clips.keys())
    if absent:
        raise ValueError(
            f"Every clip of {path} must be in the folders of the words, but {len(absent)} are not, such as "
            f"{absent[0]}; unpack the archive again."
        )
    return names


def _record(file: Path) -> tagged.Record:
    """The name of a clip is who says it, and how often that person has said the word before."""
    word = file.parent.name
    return {
        "id": f"{word}/{file.stem}",
        "audio": str(file),
        "label": word,
        "speaker": file.stem.partition("_nohash_")[0],
    }
