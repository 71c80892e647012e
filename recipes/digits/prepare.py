"""Connected English digits, spoken by espeak-ng while you wait: nothing is downloaded.

Sound: synthesised by espeak-ng (the library comes with the pip package espeakng-loader, GPL-3.0; the licence of a
program does not extend to what it says). About 70 voices in eight accents of English, one to eight digits an utterance.
Hours: 3.6 in the default 6,000 training utterances. Files are 16 kHz mono FLAC.

    speechkit prepare digits [--corpus FOLDER]        # data/digits, a minute
    speechkit prepare digits --train 20000            # for the full recipe

Where FOLDER, ``$SPEECHKIT_DATA`` or ``../shared/data`` beside the project has ``fsdd/manifest.jsonl``, real.jsonl names
those recordings of real digits (Jakobovski/free-spoken-digit-dataset, CC BY-SA 4.0), to be evaluated on as well.

Voices of dev and test are of families that training never hears. Training utterances are clean, and noise is added
while training; dev and test carry theirs in the files, so every run is measured on the same sound.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track

from speechkit import audio
from speechkit.data.augment import Augment, Hiss, Noise, Room, chance
from speechkit.data.corpora import Cut, once, read_corpus, speaker_of, text_of, write_manifest
from speechkit.features import Resampler
from speechkit.text import normalise

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en", "en-us", "en-us-nyc", "en-029", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd")

# Variants are formant settings over an accent. Some are near copies of others (by the mean and deviation of their
# log-mel bands and their pitch), so a split has whole families. Robots, whisperers and squeakers are left out.
# fmt: off
VOICES = {
    "train": [
        "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5", "Alex", "Alicia", "Andy",
        "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo", "Lee", "Mario", "Michael", "Mike", "Nguyen",
        "Reed", "RicishayMax", "Tweaky", "adam", "anika", "announcer", "antonio", "aunty", "benjamin", "croak",
        "ed", "edward2", "grandpa", "gustave", "iven", "iven2", "iven3", "iven4", "john", "klatt", "klatt2",
        "klatt6", "max", "michel", "miguel", "mike2", "pablo", "paul", "pedro", "rob", "robert", "steph",
        "steph2", "steph3", "victor",
    ],
    "dev": [
        "Annie", "Jacky", "belinda", "boris", "kaukovalta", "linda", "quincy", "sandro",
    ],
    "test": [
        "Andrea", "Marco", "Storm", "david", "edward", "grandma", "marcelo", "norbert", "shelby", "travis",
    ],
}
# fmt: on
DISTURBED = Augment(
    effects={"room": Room(probability=0.3), "noise": Noise(source=Hiss(), snr_db=(5.0, 30.0), probability=0.75)}
)
SAMPLE_RATE = 16000
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SHARD = 250  # utterances a process speaks


class Utterance(NamedTuple):
    """What is said, how, and with how much silence around it. Ranges of pitch and speed are espeak's."""

    id: str
    words: tuple[str, ...]
    spoken: str
    voice: str
    rate: int
    pitch: int
    range: int
    gap: int
    before: float
    after: float


def prepare(
    corpus: Path | None, out: Path, *, train: int = 6000, dev: int = 200, test: int = 300, seed: int = 0
) -> None:
    """Write ``out/{train,dev,test}.jsonl`` and their audio; return at once if they are there.

    An utterance depends on the seed, its split and its number alone, so a larger set begins with the smaller one, and
    dev and test are the same whatever the size of train.

    Args:
        corpus: a folder with real digits in ``fsdd``, to be evaluated on as well.
        out: the folder, for example ``data/digits``.
        train, dev, test: utterances of each split.

    Raises:
        ValueError: if a corpus is given that has no real digits.
    """
    real = Path(corpus or os.environ.get("SPEECHKIT_DATA") or SHARED, "fsdd", "manifest.jsonl").resolve()
    if corpus and not real.is_file():
        raise ValueError(f"{corpus} must have real digits in fsdd/manifest.jsonl, but has not; leave --corpus out.")
    sizes = {"train": train, "dev": dev, "test": test}
    once(out, {"recipe": "digits 1", "seed": seed, **sizes}, lambda: _speak_all(out, sizes, seed))
    if real.is_file():
        write_manifest(out / "real.jsonl", [_recorded(cut) for cut in read_corpus(real)])


def _recorded(cut: Cut) -> dict[str, Any]:
    """The line of a recording where it lies."""
    source, text = cut.recording.sources[0].source, normalise(text_of(cut))
    return {"id": cut.id, "audio": source, "text": text, "duration": cut.duration, "speaker": speaker_of(cut)}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``speechkit prepare digits``."""
    parser.add_argument("--train", type=int, default=6000, help="training utterances")
    parser.add_argument("--dev", type=int, default=200, help="development utterances")
    parser.add_argument("--test", type=int, default=300, help="test utterances")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")


def _speak_all(out: Path, sizes: dict[str, int], seed: int) -> None:
    _library()
    shards = [
        (split, range(first, min(first + SHARD, size)))
        for split, size in sizes.items()
        for first in range(0, size, SHARD)
    ]
    jobs = os.cpu_count() or 1
    waves = [shards[first : first + jobs] for first in range(0, len(shards), jobs)]
    for wave in track(waves, description=f"Speaking {sum(sizes.values())} utterances"):
        _in_fresh_processes([(out, split, [utterance(split, n, seed) for n in numbers]) for split, numbers in wave])
    for split, size in sizes.items():
        write_manifest(out / f"{split}.jsonl", (_record(out, split, utterance(split, n, seed)) for n in range(size)))


def _in_fresh_processes(shards: Sequence[tuple[Path, str, list[Utterance]]]) -> None:
    # espeak-ng carries the phase of its oscillators from one utterance into the next, and cannot be reset, so what a
    # voice sounds like depends on what was said before. A new process for each shard says the same, always.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_speak, args=shard) for shard in shards]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise ValueError(
            f"Every utterance must be written to {shards[0][0]}, but that failed for the reason above; "
            f"prepare again when it is gone."
        )


def utterance(split: str, number: int, seed: int) -> Utterance:
    """The utterance of that number."""
    dice = chance("digits", seed, split, number)
    words = tuple(dice.choices(WORDS, k=dice.randint(1, 8)))
    return Utterance(
        id=f"{split}-{number:05d}",
        words=words,
        spoken=_with_pauses(words, dice),
        voice=f"{dice.choice(ACCENTS)}+{dice.choice(VOICES[split])}",
        rate=dice.randint(110, 220),
        pitch=dice.randint(25, 80),
        range=dice.randint(10, 90),
        gap=dice.choice([0, 0, dice.randint(1, 12)]),
        before=dice.uniform(0.0, 0.4),
        after=dice.uniform(0.05, 0.4),
    )


def _with_pauses(words: Sequence[str], dice: random.Random) -> str:
    """Some read a number in groups, most in one go."""
    share = dice.choice([0.0, 0.0, 0.3])
    return " ".join(word + ("," if dice.random() < share else "") for word in words)


def _record(out: Path, split: str, said: Utterance) -> dict[str, Any]:
    file = _file(split, said)
    return {
        "id": said.id,
        "audio": file,
        "text": normalise(" ".join(said.words)),
        "duration": round(audio.info(out / file).seconds, 4),
        "speaker": said.voice,
        "lang": "en",
        "split": split,
        "rate": said.rate,
        "pitch": said.pitch,
    }


def _file(split: str, said: Utterance) -> str:
    return f"audio/{split}/{said.id}.flac"


def _speak(out: Path, split: str, shard: Sequence[Utterance]) -> None:
    """Say a shard into files; runs in a process of its own."""
    torch.set_num_threads(1)
    try:
        _say(out, split, shard, Espeak())
    except ValueError as error:
        sys.exit(str(error))


def _say(out: Path, split: str, shard: Sequence[Utterance], espeak: Espeak) -> None:
    resample = Resampler(source_hz=espeak.sample_rate, target_hz=SAMPLE_RATE)
    for said in shard:
        dry = torch.from_numpy(espeak.say(said))[None]
        with torch.inference_mode():  # some voices reach full scale, and resampling overshoots
            samples = 0.7 * resample(dry, torch.tensor([dry.shape[1]])).samples[0].numpy()
        samples = np.pad(samples, [round(seconds * SAMPLE_RATE) for seconds in (said.before, said.after)])
        if split != "train":
            samples = DISTURBED(samples, SAMPLE_RATE, said.id)
        audio.write(out / _file(split, said), samples, SAMPLE_RATE)


class Espeak:
    """The C library, of which a process can have one. Constants are those of its header speak_lib.h."""

    RETRIEVE, RATE, PITCH, RANGE, WORD_GAP, UTF8 = 2, 1, 3, 4, 7, 1
    CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    def __init__(self) -> None:
        path, data = _library()
        self.library = ctypes.CDLL(path)
        self.sample_rate = self.library.espeak_Initialize(self.RETRIEVE, 0, os.fsencode(Path(data).parent), 0)
        if self.sample_rate <= 0:
            raise ValueError(f"espeak-ng must find its voices in {data}, but does not; install espeakng-loader again.")
        self.pieces: list[np.ndarray] = []
        self.callback = self.CALLBACK(self._keep)  # held, or it would be collected while the library calls it
        self.library.espeak_SetSynthCallback(self.callback)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # of the breath some voices have

    def _keep(self, samples: Any, count: int, events: int | None) -> int:
        if samples and count:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).astype(np.float32) / 32768)
        return 0

    def say(self, said: Utterance) -> np.ndarray:
        """Samples ``[N]`` at ``sample_rate``, between -1 and 1."""
        self.pieces.clear()
        if self.library.espeak_SetVoiceByName(said.voice.encode()):
            raise ValueError(
                f"espeak-ng must have the voice {said.voice}, but does not; install espeakng-loader >= 0.2.4."
            )
        for parameter, value in self._settings(said):
            self.library.espeak_SetParameter(parameter, value, 0)
        text = said.spoken.encode()
        self.library.espeak_Synth(text, len(text) + 1, 0, 0, 0, self.UTF8, None, None)
        self.library.espeak_Synchronize()
        return np.concatenate(self.pieces)

    def _settings(self, said: Utterance) -> Iterator[tuple[int, int]]:
        yield from (
            (self.RATE, said.rate),
            (self.PITCH, said.pitch),
            (self.RANGE, said.range),
            (self.WORD_GAP, said.gap),
        )


def _library() -> tuple[str, str]:
    """Where the library and its voices lie."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise ValueError(
            "The digits are spoken by espeak-ng, which must be installed, but is not; "
            "install it with: pip install 'speechkit[digits]'"
        ) from error
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
