"""Audio files in and out: whatever libsndfile reads, folded to mono, as float32 between -1 and 1.

What can be wrong with a file is said here, once, in a sentence that names the file: missing, a folder, not audio,
empty, cut short, not a number. Rates are left alone; `speechkit.features.read` also resamples.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import numpy as np
import soundfile
from jaxtyping import Float

from speechkit.files import replacing
from speechkit.types import Seconds

AnyPath = str | os.PathLike[str]
Samples = Float[np.ndarray, "N"]

log = logging.getLogger("speechkit")

# A program that writes into a pipe cannot know how long the sound will be, and puts one of these sizes in the header.
_UNKNOWN_BYTES = 0x7FFFF000
_UNKNOWN_FRAMES = 1 << 62

_READ_AT_ONCE = 1 << 20
_SUFFIXES = {".wav": "WAV", ".flac": "FLAC"}


class AudioError(ValueError):
    """A file that cannot be used as audio, in one sentence: the file, what it must be, what it is, the remedy."""


@dataclass(frozen=True)
class AudioInfo:
    """What the header of a file says. ``frames`` are samples of one channel."""

    sample_rate: int
    channels: int
    frames: int

    @property
    def seconds(self) -> Seconds:
        return self.frames / self.sample_rate


def info(path: AnyPath) -> AudioInfo:
    """Rate, channels and length of a file, without decoding it.

    Raises:
        AudioError: if the file is missing, a folder, not audio, empty, or cut short of what a WAV, AIFF, AU or CAF
            header promises. FLAC and MP3 show such a cut only when they are decoded, and Ogg promises no length.
    """
    with _open(path) as file:
        return _info(file)


def read(path: AnyPath, *, start: Seconds = 0.0, duration: Seconds | None = None) -> tuple[Samples, int]:
    """The samples ``[N]`` of a file folded to mono, and its sample rate.

    Args:
        start: where to begin.
        duration: how much to read at most; ``None`` is up to the end. Less comes back where the file ends earlier.

    Raises:
        AudioError: as `info`, and if ``start`` is not inside the file, if decoding stops before the length the header
            promises, or if a sample is NaN or infinite.
    """
    with _open(path) as file:
        first, count = _section(path, _info(file), start, duration)
        file.seek(first)
        return np.concatenate(list(_decode(path, file, count, _READ_AT_ONCE))), file.samplerate


def blocks(path: AnyPath, seconds: Seconds) -> tuple[int, Iterator[Samples]]:
    """The sample rate of a file, and its mono samples in blocks of ``seconds`` (the last one shorter).

    Memory does not grow with the length of the file.

    Raises:
        AudioError: as `read`; what is wrong inside the file is raised by the iterator when it gets there.
    """
    about = info(path)
    size = round(seconds * about.sample_rate)
    if size < 1:
        raise ValueError(f"seconds must be at least one sample (1/{about.sample_rate} s), but is {seconds}.")
    return about.sample_rate, _blocks(path, about.frames, size)


def write(path: AnyPath, samples: Samples, sample_rate: int) -> None:
    """Write mono samples as 16-bit FLAC or WAV, whichever the suffix says; beyond -1 and 1 they are clipped.

    The file appears whole or not at all: a full disk or a stopped program leaves what was there before.

    Raises:
        AudioError: for another suffix, for samples that are not one finite, non-empty row, or if the disk refuses.
    """
    path, samples = Path(path), np.asarray(samples, dtype=np.float32)
    if path.suffix.lower() not in _SUFFIXES:
        raise AudioError(f"{path} must end in .flac or .wav to be written, but ends in '{path.suffix}'; rename it.")
    if samples.ndim != 1 or not samples.size:
        raise AudioError(f"{path} must be given samples of shape [N], N > 0, but their shape is {list(samples.shape)}.")
    _refuse_not_finite(path, samples[:, None], 0, sample_rate)
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, sample_rate, format=_SUFFIXES[path.suffix.lower()], subtype="PCM_16")
    try:
        with replacing(path) as draft:
            draft.write_bytes(encoded.getvalue())
    except OSError as error:
        raise AudioError(
            f"{path} must be written in full, but the disk refused ({error.strerror}) and what was there before is "
            f"untouched; free some space or choose another folder."
        ) from error


@contextmanager
def _open(path: AnyPath) -> Iterator[soundfile.SoundFile]:
    if not os.path.isfile(path):
        what = "is a folder; name a file in it" if os.path.isdir(path) else "does not exist; check the path"
        raise AudioError(f"{path} must be an audio file, but {what}.")
    if not os.path.getsize(path):
        raise AudioError(f"{path} must be an audio file, but is empty (0 bytes); copy or record it again.")
    try:
        file = soundfile.SoundFile(os.fspath(path))
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path} must be audio that libsndfile reads (WAV, FLAC, Ogg, MP3, AIFF and others), but is not "
            f"({error.error_string.rstrip('.')}); convert it, for example with: ffmpeg -i {path} {Path(path).stem}.flac"
        ) from error
    with file:
        _refuse_bad_header(path, file)
        yield file


def _info(file: soundfile.SoundFile) -> AudioInfo:
    return AudioInfo(file.samplerate, file.channels, file.frames)


def _refuse_bad_header(path: AnyPath, file: soundfile.SoundFile) -> None:
    if file.frames > _UNKNOWN_FRAMES:
        raise AudioError(
            f"{path} must say its length in its header, but the program that wrote it left the length out; "
            f"rewrite it, for example with: ffmpeg -i {path} {Path(path).stem}_new.flac"
        )
    if not file.frames:
        raise AudioError(f"{path} must hold at least one sample, but holds 0 frames; record it again or leave it out.")
    # libsndfile shortens a cut WAV, AIFF, AU or CAF and tells only its log, "data : 160000 (should be 79978)".
    for promised, there in re.findall(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", file.extra_info):
        if int(there) < int(promised) < _UNKNOWN_BYTES:
            _refuse_cut(path, file, file.frames, round(file.frames * int(promised) / int(there)))


def _refuse_cut(path: AnyPath, file: soundfile.SoundFile, there: int, promised: int) -> NoReturn:
    raise AudioError(
        f"{path} must hold the {promised / file.samplerate:.2f} s its header promises, but is cut short or damaged "
        f"after {there / file.samplerate:.2f} s; copy it again, or keep what is there, for example with: "
        f"ffmpeg -i {path} {Path(path).stem}_cut.flac"
    )


def _refuse_not_finite(path: AnyPath, frames: Float[np.ndarray, "N C"], position: int, sample_rate: int) -> None:
    if np.isfinite(frames).all():
        return
    at, channel = np.argwhere(~np.isfinite(frames))[0]
    raise AudioError(
        f"{path} must hold finite samples, but sample {position + at} ({(position + at) / sample_rate:.3f} s) is "
        f"{frames[at, channel]}; export it again from the program that made it."
    )


def _section(path: AnyPath, about: AudioInfo, start: Seconds, duration: Seconds | None) -> tuple[int, int]:
    """First frame and number of frames of a section."""
    first = round(start * about.sample_rate)
    if not 0 <= first < about.frames:
        raise AudioError(f"{path} is {about.seconds:.3f} s long, so start must be from 0 to less, but is {start}.")
    if duration is None:
        return first, about.frames - first
    if duration <= 0:
        raise AudioError(f"{path} must be read for more than 0 s, but duration is {duration}; None reads to the end.")
    return first, min(max(1, round(duration * about.sample_rate)), about.frames - first)


def _decode(path: AnyPath, file: soundfile.SoundFile, count: int, size: int) -> Iterator[Samples]:
    """The next ``count`` frames as mono blocks of ``size``, each checked."""
    if file.channels > 1:
        _notice_folding(os.fspath(path), file.channels)
    while count:
        position, expected = file.tell(), min(size, count)
        try:
            frames = file.read(expected, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:
            _refuse_cut(path, file, file.tell(), file.frames)
        if len(frames) < expected:
            _refuse_cut(path, file, position + len(frames), file.frames)
        _refuse_not_finite(path, frames, position, file.samplerate)
        yield frames.mean(axis=1) if file.channels > 1 else frames[:, 0]
        count -= expected


def _blocks(path: AnyPath, count: int, size: int) -> Iterator[Samples]:
    with _open(path) as file:
        yield from _decode(path, file, count, size)


@lru_cache(maxsize=100_000)
def _notice_folding(path: str, channels: int) -> None:
    """Said once a file, however many epochs read it."""
    log.warning("%s has %d channels, which are folded to mono by averaging them.", path, channels)
