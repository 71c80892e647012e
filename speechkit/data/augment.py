"""Augmentation: every epoch hears an utterance differently, and the same epoch hears it the same.

All chance comes from a key that names the seed, the epoch and the utterance, so the worker that draws it, the order and
a restart change nothing. The speed is drawn apart from the rest, because batches are planned with it before a sample
is read. The other effects keep the length: each takes samples ``[N]``, their rate and dice, and gives samples ``[N]``.

Levels are powers over the whole utterance, pauses included.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from lhotse import CutSet, Recording
from lhotse.augmentation.torchaudio import Narrowband, Speed
from lhotse.augmentation.utils import convolve1d, next_fast_len

from speechkit.audio import Samples
from speechkit.data.corpora import read_corpus
from speechkit.data.loading import load

Interval = Sequence[float]
LOWEST_HZ = 62.5  # the first octave of speech ends at 125 Hz
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".au"}


def chance(*key: object) -> random.Random:
    """Dice that fall the same for the same key, on every machine and Python."""
    return random.Random("/".join(map(str, key)))


class Effect(Protocol):
    """Something done to samples ``[N]`` that leaves their number as it is, with this ``probability``."""

    probability: float

    def __call__(self, samples: Samples, sample_rate: int, dice: random.Random) -> Samples: ...


class Augment:
    """Speed, then one effect after the other.

    Args:
        speeds: factors of which one is drawn, pitch and all (Ko et al., "Audio Augmentation for Speech Recognition").
        effects: applied in this order, each with its own probability. Their names are for configs to refer to.
    """

    def __init__(self, *, speeds: Sequence[float] = (1.0,), effects: Mapping[str, Effect] | None = None) -> None:
        if not speeds or min(speeds) <= 0:
            raise ValueError(
                f"Augment.speeds must be one or more factors above 0, but is {list(speeds)}; [1.0] is none."
            )
        self.speeds = tuple(speeds)
        self.effects = dict(effects or {})

    def speed(self, key: str) -> float:
        """The factor the utterance with this key is played at; its length is divided by it."""
        # Not `random.Random`, whose seeding costs 10 us: this is drawn for the whole corpus before an epoch begins.
        return self.speeds[int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) % len(self.speeds)]

    def __call__(self, samples: Samples, sample_rate: int, key: str) -> Samples:
        speed, dice = self.speed(key), chance(key)
        if speed != 1.0:
            samples = Speed(speed)(samples[None], sample_rate)[0]
        for effect in self.effects.values():
            if dice.random() < effect.probability:
                samples = effect(samples, sample_rate, dice).astype(np.float32, copy=False)
        return samples.astype(np.float32, copy=False)


class Gain:
    """Another level, within ``db``."""

    def __init__(self, *, db: Interval = (-15.0, 6.0), probability: float = 1.0) -> None:
        self.db, self.probability = interval("Gain.db", db), probability

    def __call__(self, samples: Samples, sample_rate: int, dice: random.Random) -> Samples:
        return samples * 10 ** (dice.uniform(*self.db) / 20)


class Shift:
    """Earlier or later by at most ``seconds``; what leaves at one end comes in at the other."""

    def __init__(self, *, seconds: float = 0.1, probability: float = 1.0) -> None:
        self.seconds, self.probability = seconds, probability

    def __call__(self, samples: Samples, sample_rate: int, dice: random.Random) -> Samples:
        return np.roll(samples, round(dice.uniform(-self.seconds, self.seconds) * sample_rate))


class Microphone:
    """The frequency response of another microphone: a gain for every octave, ``db`` at most, straight lines between.

    The idea is FilterAugment's (2110.03282), here on samples, so that any features may follow. Phase and power stay.
    """

    def __init__(self, *, db: float = 9.0, probability: float = 1.0) -> None:
        if db < 0:
            raise ValueError(
                f"Microphone.db must be the largest gain or loss, 0 or more, but is {db}; leave out the sign."
            )
        self.db, self.probability = db, probability

    def __call__(self, samples: Samples, sample_rate: int, dice: random.Random) -> Samples:
        octaves = np.arange(math.ceil(math.log2(sample_rate / 2 / LOWEST_HZ)) + 1)
        gains = [dice.uniform(-self.db, self.db) for _ in octaves]
        size = next_fast_len(len(samples))
        hertz = np.fft.rfftfreq(size, 1 / sample_rate)
        response = 10 ** (np.interp(np.log2(np.maximum(hertz, LOWEST_HZ) / LOWEST_HZ), octaves, gains) / 20)
        heard = np.fft.irfft(np.fft.rfft(samples, size) * response, size)[: len(samples)]
        return heard * np.sqrt(power(samples) / power(heard)) if power(heard) else samples


class Telephone:
    """A telephone line: 8 kHz, mu-law, nothing above 4 kHz."""

    def __init__(self, *, probability: float = 1.0) -> None:
        self.probability = probability

    def __call__(self, samples: Samples, sample_rate: int, dice: random.Random) -> Samples:
        return Narrowband("mulaw", sample_rate, restore_orig_sr=True)(samples[None], sample_rate)[0]


class Noise:
    """Noise underneath, at a signal-to-noise ratio within ``snr_db``.

    Args:
        source: where the noise comes from: `Hiss`, `Recorded`, or any ``source(count, sample_rate, dice) -> [N]``.
    """

    def __init__(self, *, source: NoiseSource, snr_db: Interval = (5.0, 25.0), probability: float = 1.0) -> None:
        self.source, self.snr_db, self.probability = source, interval("Noise.snr_db", snr_db), probability

    def __call__(self, samples: Samples, sample_rate: int, dice: random.Random) -> Samples:
        return mix(samples, self.source(len(samples), sample_rate, dice), dice.uniform(*self.snr_db))


def mix(samples: Samples, noise: Samples, snr_db: float) -> Samples:
    """``samples`` with ``noise`` underneath, ``snr_db`` less powerful; unchanged where one of them is silent."""
    wanted = power(samples) * 10 ** (-snr_db / 10)
    return samples + noise * np.sqrt(wanted / power(noise)) if wanted and power(noise) else samples


def power(samples: Samples) -> float:
    return float(np.mean(np.square(samples, dtype=np.float64)))


class NoiseSource(Protocol):
    """Gives ``count`` samples of noise at any level."""

    def __call__(self, count: int, sample_rate: int, dice: random.Random) -> Samples: ...


class Hiss:
    """Noise whose power falls as ``1 / f ** slope``: 0 is white, 1 pink, 2 brown; one within ``slope`` is drawn."""

    def __init__(self, *, slope: Interval = (0.0, 2.0)) -> None:
        self.slope = interval("Hiss.slope", slope)

    def __call__(self, count: int, sample_rate: int, dice: random.Random) -> Samples:
        size = next_fast_len(count)
        generator = np.random.Generator(np.random.PCG64(dice.getrandbits(64)))
        spectrum = generator.standard_normal((size // 2 + 1, 2), dtype=np.float32).view(np.complex64)[:, 0]
        # Flat below 50 Hz: there is no speech there, and 1 / f would put all of the power into the first bins.
        hertz = np.maximum(np.arange(len(spectrum), dtype=np.float32) * (sample_rate / size), 50.0)
        return np.fft.irfft(spectrum * (hertz / 50.0) ** np.float32(-dice.uniform(*self.slope) / 2), n=size)[:count]


class Recorded:
    """Noise out of recordings: a piece of one of them, or ``voices`` pieces on top of each other.

    With the training corpus itself as ``path`` and ``voices=[3, 8]`` this is babble.

    Args:
        path: a folder of audio files, a manifest (texts are not needed) or a lhotse CutSet.
        voices: how many pieces are added up, all at the same power.
    """

    def __init__(self, *, path: str, voices: Sequence[int] = (1, 1)) -> None:
        self.cuts = tuple(recordings(path))
        fewest, most = interval("Recorded.voices", voices)
        self.voices = int(fewest), int(most)

    def __call__(self, count: int, sample_rate: int, dice: random.Random) -> Samples:
        pieces = [self._piece(count, sample_rate, dice) for _ in range(dice.randint(*self.voices))]
        return sum(piece / np.sqrt(power(piece) or 1.0) for piece in pieces)

    def _piece(self, count: int, sample_rate: int, dice: random.Random) -> Samples:
        cut = dice.choice(self.cuts)
        start = dice.uniform(0.0, max(0.0, cut.duration - count / sample_rate))
        piece = load(cut, sample_rate, start=start, duration=min(cut.duration - start, count / sample_rate))
        return np.resize(piece, count)  # repeated where the recording is shorter


def recordings(path: str) -> CutSet:
    """The cuts of a manifest, or of every audio file in a folder and below."""
    if not Path(path).is_dir():
        return read_corpus(path, transcribed=False)
    files = sorted(file for file in Path(path).rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise ValueError(
            f"{path} must hold at least one audio file ({', '.join(sorted(AUDIO_SUFFIXES))}), but holds none."
        )
    return CutSet([Recording.from_file(file).to_cut() for file in files])


class Room:
    """Reverberation of a made-up room: the direct sound, then noise that decays exponentially (Polack's model).

    Args:
        t60: seconds until the reverberation has lost 60 dB.
        direct_db: power of the direct sound over that of the reverberation: the distance of the microphone.
    """

    def __init__(
        self, *, t60: Interval = (0.1, 0.6), direct_db: Interval = (-3.0, 12.0), probability: float = 1.0
    ) -> None:
        self.t60, self.direct_db = interval("Room.t60", t60), interval("Room.direct_db", direct_db)
        self.probability = probability

    def __call__(self, samples: Samples, sample_rate: int, dice: random.Random) -> Samples:
        return reverberate(samples, self.response(sample_rate, dice))

    def response(self, sample_rate: int, dice: random.Random) -> Samples:
        """An impulse response as long as its ``t60``."""
        t60 = dice.uniform(*self.t60)
        seconds = np.arange(1, max(2, round(t60 * sample_rate)), dtype=np.float32) / sample_rate
        generator = np.random.Generator(np.random.PCG64(dice.getrandbits(64)))
        tail = generator.standard_normal(len(seconds), dtype=np.float32) * 10 ** (-3 * seconds / t60)
        tail *= np.sqrt(10 ** (-dice.uniform(*self.direct_db) / 10) / np.sum(tail**2))
        return np.concatenate([np.ones(1, np.float32), tail])


class RecordedRoom:
    """Reverberation of real rooms, from impulse responses.

    Args:
        path: a folder of impulse responses, a manifest or a lhotse CutSet.
    """

    def __init__(self, *, path: str, probability: float = 1.0) -> None:
        self.cuts, self.probability = tuple(recordings(path)), probability

    def __call__(self, samples: Samples, sample_rate: int, dice: random.Random) -> Samples:
        return reverberate(samples, load(dice.choice(self.cuts), sample_rate))


def reverberate(samples: Samples, response: Samples) -> Samples:
    """``samples`` heard through an impulse response: aligned to its strongest tap, of the same length and power."""
    wet = convolve1d(torch.from_numpy(samples), torch.from_numpy(response)).numpy()
    wet = wet[int(np.argmax(np.abs(response))) :][: len(samples)]
    return wet * np.sqrt(power(samples) / power(wet)) if power(wet) else samples


def interval(name: str, bounds: Sequence[float]) -> tuple[float, float]:
    """Two bounds in order.

    Raises:
        ValueError: naming what they are of.
    """
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise ValueError(f"{name} must be two numbers, the smaller one first, but is {list(bounds)}.")
    return bounds[0], bounds[1]
