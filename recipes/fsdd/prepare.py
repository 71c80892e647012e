"""Connected digits of real voices: clips of the Free Spoken Digit Dataset joined, and digit strings of speechocean762.

Sound: FSDD (Jakobovski/free-spoken-digit-dataset, 4 of its speakers, 1,200 clips, 8.6 minutes, CC BY-SA 4.0: what is
joined from it keeps that licence). Its clips were recorded at 8 kHz, so nothing is above 4 kHz. speechocean762
(jimbozhang/speechocean762, Apache-2.0, short English sentences of non-native speakers, 4.6 hours) has 151 strings of
digits by 52 more speakers; the words of most of them are cut out (words.jsonl says where) and joined anew. For more
voices, 6,000 utterances of the digits recipe (espeak-ng).
Hours: about 3.2 and 3.3 of joined words, 0.13 of real strings, 3.6 of synthetic ones.

    speechkit prepare fsdd [--corpus FOLDER]          # data/fsdd

FOLDER holds ``fsdd``, ``speechocean762_more`` and ``speechocean762_sample``, each with a manifest.jsonl. Written are

====================== ================================================================================================
train.jsonl            joined clips of george and jackson
voices.jsonl           joined words of the speakers of real.jsonl
dev.jsonl, test.jsonl  joined clips of nicolas and of theo, the same in every run
real.jsonl             the digit strings of speechocean762, all for training
english/*.jsonl        everything in speechocean762, to pretrain an encoder; its own splits, disjoint in speakers
digits/*.jsonl         the synthetic digits
====================== ================================================================================================
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lhotse.cut import Cut
from rich.progress import track

from speechkit import audio
from speechkit.data.augment import Hiss, Telephone, chance, mix, power
from speechkit.data.corpora import Source, once, read_corpus, speaker_of, split_of, text_of, write_manifest
from speechkit.data.loading import load
from speechkit.text import normalise
from speechkit.types import Seconds

RECIPES = Path(__file__).resolve().parents[1]
DIGITS = runpy.run_path(str(RECIPES / "digits" / "prepare.py"))
SAMPLE_RATE = 16000
WORDS = Path(__file__).with_name("words.jsonl")  # made by tools/cut_words.py
SPEECHOCEAN = ("speechocean762_more", "speechocean762_sample")


def prepare(
    corpus: Path | None,
    out: Path,
    *,
    train: int = 4000,
    dev: int = 200,
    test: int = 200,
    synthetic: int = 6000,
    seed: int = 0,
) -> None:
    """Write the manifests named above, and the audio of the joined and the synthetic ones, into ``out``.

    Args:
        corpus: the folder of recordings; by default SPEECHKIT_DATA, or ``../shared/data`` beside the project.
        out: the folder, for example ``data/fsdd``.
        train, dev, test: joined strings of each split; as many synthetic ones of dev and test, and as many joined of
            other voices as of train.
        synthetic: training utterances of the digits recipe.

    Raises:
        ValueError: if the recordings are not there.
    """
    home = _home(corpus)
    sizes = {"train": train, "dev": dev, "test": test}
    DIGITS["prepare"](None, out / "digits", train=synthetic, dev=dev, test=test, seed=seed)
    once(out, {"recipe": "fsdd 3", "seed": seed, "corpus": str(home), **sizes}, lambda: _write(home, out, sizes, seed))


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``speechkit prepare fsdd``."""
    parser.add_argument("--train", type=int, default=4000, help="joined training strings")
    parser.add_argument("--dev", type=int, default=200, help="joined development strings")
    parser.add_argument("--test", type=int, default=200, help="joined test strings")
    parser.add_argument("--synthetic", type=int, default=6000, help="training utterances of the digits recipe")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")


def _home(corpus: Path | None) -> Path:
    home = Path(corpus or os.environ.get("SPEECHKIT_DATA") or RECIPES.parent.parent / "shared" / "data").resolve()
    missing = [name for name in ("fsdd", *SPEECHOCEAN) if not (home / name / "manifest.jsonl").is_file()]
    if missing:
        raise ValueError(
            f"{home} must hold fsdd and {' and '.join(SPEECHOCEAN)} with a manifest.jsonl each, but has no "
            f"{missing[0]}; name the folder that does with --corpus, or in SPEECHKIT_DATA."
        )
    return home


def _write(home: Path, out: Path, sizes: dict[str, int], seed: int) -> None:
    english = [cut for name in SPEECHOCEAN for cut in read_corpus(home / name / "manifest.jsonl")]
    for split in ("train", "dev", "test"):
        write_manifest(out / "english" / f"{split}.jsonl", _records(c for c in english if split_of(c) == split))
    strings = [cut for cut in english if split_of(cut) == "train" and _is_digits(cut)]
    write_manifest(out / "real.jsonl", _records(strings))
    for split, size in sizes.items():
        cuts = Source(path=str(home / "fsdd" / "manifest.jsonl"), split=split).cuts()
        _join_all(Clips((str(speaker_of(cut)), cut, text_of(cut)) for cut in cuts), out, split, split, size, seed)
    _join_all(Clips(_words(strings)), out, "voices", "train", sizes["train"], seed)


def _words(strings: Iterable[Cut]) -> Iterator[tuple[str, Cut, str]]:
    """Speaker, piece and word of what words.jsonl names in the strings."""
    by_id = {_id(cut): cut for cut in strings}
    for line in WORDS.read_text(encoding="utf-8").splitlines():
        said = json.loads(line)
        for word, start, end in said["words"] if said["id"] in by_id else ():
            cut = by_id[said["id"]]
            yield f"speechocean/{speaker_of(cut)}", cut.truncate(offset=start, duration=end - start), word.lower()


def _join_all(clips: Clips, out: Path, name: str, split: str, size: int, seed: int) -> None:
    numbers = track(range(size), description=f"Joining {size} strings for {name}")
    write_manifest(out / f"{name}.jsonl", [_join(clips, out, name, split, number, seed) for number in numbers])


def _is_digits(cut: Cut) -> bool:
    return all(word in DIGITS["WORDS"] for word in text_of(cut).lower().split())


def _records(cuts: Iterable[Cut]) -> list[dict[str, Any]]:
    """Lines of a manifest that point at the recordings where they lie."""
    return [
        {
            "id": _id(cut),
            "audio": cut.recording.sources[0].source,
            "text": normalise(text_of(cut)),
            "duration": round(cut.duration, 4),
            "speaker": f"speechocean/{speaker_of(cut)}",
            "lang": "en",
            "split": split_of(cut),
        }
        for cut in cuts
    ]


def _id(cut: Cut) -> str:
    return f"speechocean/{Path(cut.id).name}"


class Clips:
    """Spoken words, decoded once, by speaker. A speaker of fewer than four says too little to draw from."""

    def __init__(self, clips: Iterable[tuple[str, Cut, str]]) -> None:
        spoken: dict[str, list[tuple[str, np.ndarray]]] = {}
        for speaker, cut, word in clips:
            spoken.setdefault(speaker, []).append((word, load(cut, SAMPLE_RATE)))
        self.spoken = {speaker: words for speaker, words in sorted(spoken.items()) if len(words) >= 4}
        self.rooms = {speaker: _room(samples for _, samples in words) for speaker, words in self.spoken.items()}

    def draw(self, dice: random.Random) -> tuple[str, list[str], list[np.ndarray]]:
        """A speaker, and one to seven words of theirs."""
        speaker = dice.choice(list(self.spoken))
        drawn = dice.choices(self.spoken[speaker], k=dice.randint(1, 7))
        return speaker, [word for word, _ in drawn], [samples for _, samples in drawn]


def _room(clips: Iterable[np.ndarray]) -> float:
    """How loud a speaker's room is, over how loud the speaker is, both as powers.

    A clip that is cut close has no moment without speech, so the room is what a tenth of the clips go down to.
    """
    return float(np.quantile([_floor(clip) / (power(clip) or 1.0) for clip in clips], 0.1))


def _join(clips: Clips, out: Path, name: str, split: str, number: int, seed: int) -> dict[str, Any]:
    dice = chance("fsdd", seed, name, number)
    speaker, words, parts = clips.draw(dice)
    levels = [dice.uniform(-3.0, 3.0) for _ in parts]  # dB: a speaker does not say every word as loud
    pauses = [dice.uniform(0.05, 0.3), *(dice.choice([0.02, 0.1, 0.4]) * dice.uniform(0.5, 1.5) for _ in parts[1:])]
    samples = join(parts, levels, [*pauses, dice.uniform(0.05, 0.3)], clips.rooms[speaker], dice)
    file = f"audio/{name}/{name}-{number:05d}.flac"
    audio.write(out / file, samples, SAMPLE_RATE)
    return {
        "id": f"{name}-{number:05d}",
        "audio": file,
        "text": normalise(" ".join(words)),
        "duration": len(samples) / SAMPLE_RATE,
        "speaker": speaker,
        "lang": "en",
        "split": split,
    }


def join(
    parts: Sequence[np.ndarray],
    levels_db: Sequence[float],
    pauses: Sequence[Seconds],
    room: float,
    dice: random.Random,
) -> np.ndarray:
    """Clips one after the other, ``pauses[i]`` before clip i and the last one after all of them.

    A pause of zeros would tell a model where the clips meet, which no real recording does. So the whole string gets
    noise, ``room`` times as powerful as its clips on average, and like them it has nothing above 4 kHz.
    """
    pieces = [np.zeros(round(pauses[0] * SAMPLE_RATE), np.float32)]
    for part, level, pause in zip(parts, levels_db, pauses[1:], strict=True):
        pieces += [part * 10 ** (level / 20), np.zeros(round(pause * SAMPLE_RATE), np.float32)]
    joined = np.concatenate(pieces).astype(np.float32)
    noise = Telephone()(Hiss(slope=(0.0, 1.0))(len(joined), SAMPLE_RATE, dice), SAMPLE_RATE, dice)
    speech = float(np.mean([power(part) for part in parts]))
    return mix(joined, noise, 10 * np.log10(power(joined) / (room * speech))) if room * speech else joined


def _floor(part: np.ndarray) -> float:
    """Power of the quietest tenth of a clip's frames of 10 ms."""
    frames = part[: len(part) // 160 * 160].reshape(-1, 160)
    return float(np.quantile(np.square(frames, dtype=np.float64).mean(axis=1), 0.1))
