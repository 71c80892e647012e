"""Files at the rate a model wants, and streams of any rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit import audio
from speechkit.features.windows import full_precision, slide, still
from speechkit.stream import State, ceil_div, keep_valid
from speechkit.types import Seconds

AT_ONCE = 1 << 20  # samples resampled together; more only costs memory


class SampleOutput(NamedTuple):
    """What a resampler gives: samples and how many of them are real."""

    samples: Float[Tensor, "B N"]
    lengths: Int[Tensor, "B"]


def read(
    path: audio.AnyPath, sample_rate: int, *, start: Seconds = 0.0, duration: Seconds | None = None
) -> Float[np.ndarray, "N"]:
    """Mono samples of a file, or of a section of it, at ``sample_rate``; raises what `speechkit.audio.read` raises."""
    samples, source_hz = audio.read(path, start=start, duration=duration)
    pieces = np.split(samples, range(AT_ONCE, len(samples), AT_ONCE))
    return np.concatenate(list(_resampled(pieces, source_hz, sample_rate)))


def blocks(path: audio.AnyPath, sample_rate: int, seconds: Seconds) -> Iterator[Float[np.ndarray, "N"]]:
    """What `read` gives, in blocks of about ``seconds`` and in constant memory, for files of any length."""
    source_hz, pieces = audio.blocks(path, seconds)
    return _resampled(pieces, source_hz, sample_rate)


class Resampler(nn.Module):
    """Another sample rate, by interpolation with a windowed sinc (J. O. Smith, Digital Audio Resampling).

    The kernel is that of torchaudio: six zero crossings, roll-off 0.99, Hann window. N samples give
    ``ceil(N * target_hz / source_hz)``. A stream holds back at most ``latency`` samples, and `finish` gives them up at
    its end. Equal rates give back what came in, at once.

    Rates with hardly a common divisor (11127 and 16000 Hz) would need a gigabyte of weights. There the nearest ratio
    that needs 64 MiB stands in: the speed is wrong by at most 0.02 %, as that of a sound card may be.
    """

    kernel: Float[Tensor, "W M"]

    def __init__(self, *, source_hz: int, target_hz: int) -> None:
        super().__init__()
        for name, rate in (("source_hz", source_hz), ("target_hz", target_hz)):
            if rate < 1:
                raise ValueError(f"Resampler.{name} must be a sample rate of at least 1 Hz, but is {rate}.")
        ratio = Fraction(source_hz, target_hz).limit_denominator(max(1, math.isqrt(2**24 * target_hz // source_hz)))
        kernel, self.width = _sinc_kernel(ratio)
        self.source_block, self.target_block = kernel.shape[0] - 2 * self.width, kernel.shape[1]
        self.register_buffer("kernel", kernel.float(), persistent=False)

    @property
    def latency(self) -> int:
        """Samples, at the source's rate, that a stream holds back at most."""
        return self.width + self.source_block - 1

    def forward(self, samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"]) -> SampleOutput:
        """Whole recordings, of which the first ``lengths`` samples are real."""
        silence = self.width + self.source_block
        padded = F.pad(keep_valid(samples, lengths), (0, silence))
        (out, _), _ = self.stream(padded, lengths + silence, self.init_state(len(samples)))
        size = -(-samples.shape[1] * self.target_block // self.source_block)
        return _samples(out[:, :size], self._total(lengths))

    def init_state(self, batch: int) -> State:
        """The samples heard last, and how many of them belong to the next block."""
        return still(self.kernel, batch, len(self.kernel), self.width)

    def stream(
        self, samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"], state: State
    ) -> tuple[SampleOutput, State]:
        """What can be said after the next samples of each stream: all but the last ``latency`` at most."""
        windows, blocks, state = slide(samples, lengths, state, self.source_block)
        with full_precision(samples):
            return _samples((windows @ self.kernel).flatten(1), blocks * self.target_block), state

    def finish(self, state: State) -> SampleOutput:
        """What each stream still holds back; one stream of a batch ends with ``finish(take(state, [row]))``."""
        tail, pending = state
        silence = tail.new_zeros(len(tail), self.width + self.source_block)
        (out, _), _ = self.stream(silence, torch.full_like(pending, silence.shape[1]), state)
        return _samples(out, self._total(pending - self.width))

    def _total(self, lengths: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        return ceil_div(lengths * self.target_block, self.source_block)


def _samples(samples: Tensor, lengths: Tensor) -> SampleOutput:
    return SampleOutput(keep_valid(samples, lengths), lengths)


def _resampled(pieces: Iterable[np.ndarray], source_hz: int, target_hz: int) -> Iterator[np.ndarray]:
    resampler = _resampler(source_hz, target_hz)
    state = resampler.init_state(1)
    for piece in pieces:
        (out, lengths), state = resampler.stream(torch.from_numpy(piece)[None], torch.tensor([len(piece)]), state)
        yield out[0, : int(lengths)].numpy()
    out, lengths = resampler.finish(state)
    yield out[0, : int(lengths)].numpy()


@lru_cache(maxsize=16)
def _resampler(source_hz: int, target_hz: int) -> Resampler:
    return Resampler(source_hz=source_hz, target_hz=target_hz)


def _sinc_kernel(ratio: Fraction) -> tuple[Float[Tensor, "W M"], int]:
    """What turns a window of W source samples into M target samples, and how far it looks beyond its block.

    On the source's clock, target sample j sits at ``j * ratio``, so ``y[j] = sum_i x[i] h(i - j * ratio)`` with
    ``h(d) = c sinc(c d) cos^2(pi c d / 12)`` out to the sixth zero crossing. The cut-off c is 0.99 of the lower of the
    two Nyquist frequencies. As ``ratio = block / made``, the weights of ``y[j + made]`` are those of ``y[j]``, moved by
    ``block`` source samples: one matrix serves all blocks.
    """
    if ratio == 1:
        return torch.ones(1, 1), 0
    cutoff = 0.99 * min(1.0, ratio.denominator / ratio.numerator)
    width = math.ceil(6 / cutoff)
    # Blocks of at least the overlap of neighbouring windows keep them all together at twice the signal's memory.
    repeats = math.ceil(2 * width / ratio.numerator)
    block, made = repeats * ratio.numerator, repeats * ratio.denominator
    source = torch.arange(-width, block + width, dtype=torch.float64)
    target = torch.arange(made, dtype=torch.float64) * ratio.numerator / ratio.denominator
    distance = (cutoff * (source[:, None] - target)).clamp(-6, 6)
    return cutoff * torch.sinc(distance) * torch.cos(distance * math.pi / 12).square(), width
