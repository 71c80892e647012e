"""Frames of the mean and spread a model is used to: fixed, measured, adapting as it hears, or of the utterance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.features.windows import full_precision
from speechkit.stream import State, carry, keep_valid
from speechkit.types import FeatureOutput


class FixedNorm(nn.Module):
    """All bands minus one mean, divided by one deviation, as given: for a published training to be done again.

    Args:
        dim: bands.
        mean, std: of all of them; saved with the model.
    """

    mean: Float[Tensor, "F"]
    std: Float[Tensor, "F"]

    def __init__(self, *, dim: int, mean: float, std: float) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("mean", torch.full((dim,), mean))
        self.register_buffer("std", torch.full((dim,), std))

    def forward(self, frames: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"]) -> FeatureOutput:
        """Whole recordings, of which the first ``lengths`` frames are real."""
        return self.stream(frames, lengths, self.init_state(len(frames)))[0]

    def init_state(self, batch: int) -> State:
        """Nothing."""
        return ()

    def stream(
        self, frames: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"], state: State
    ) -> tuple[FeatureOutput, State]:
        """The next frames of each stream."""
        return FeatureOutput(keep_valid((frames - self.mean) / self.std, lengths), lengths), state


class GlobalNorm(FixedNorm):
    """Every band minus its mean, divided by its standard deviation, both measured once on training data by `fit`.

    Mean and deviation are saved with the model. Until `fit` has run they are the same two numbers for all bands.

    Args:
        dim: bands.
        mean, std: what to start from. Speech recorded at an ordinary level lies around 14 with a deviation of 4.
    """

    def __init__(self, *, dim: int, mean: float = 14.0, std: float = 4.0) -> None:
        super().__init__(dim=dim, mean=mean, std=std)

    @torch.no_grad()
    def fit(self, batches: Iterable[FeatureOutput]) -> None:
        """Measure mean and deviation on the real frames of ``batches``, for example ``mel(x, n) for x, n in loader``.

        Raises:
            ValueError: if there is no frame in them.
        """
        count, total, squares = 0, torch.zeros_like(self.mean.double()), torch.zeros_like(self.mean.double())
        for frames, lengths in batches:
            real = keep_valid(frames, lengths).double()
            count += int(lengths.sum())
            total += real.sum(dim=(0, 1))
            squares += real.square().sum(dim=(0, 1))
        if not count:
            raise ValueError(f"{type(self).__name__}.fit must see at least one frame, but saw none; check the data.")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-3, std, 1.0))  # a band that never changes


class StreamingNorm(GlobalNorm):
    """A `GlobalNorm` that goes on adapting to each stream: its microphone, its room, its speaker.

    Each frame is normalised by mean and variance of the stream up to and including that frame, in which

    - a frame k frames ago weighs ``(1 - 1 / memory_frames) ** k``, so a speaker who has left is forgotten: the weights
      add up to ``memory_frames``, half of them in the last ``0.69 * memory_frames``;
    - the training data count as ``prior_frames`` more that are never forgotten. They decide alone at the start, and
      keep the variance from vanishing when a microphone is muted.

    Causal, so streamed and whole are the same by definition.
    """

    def __init__(
        self, *, dim: int, mean: float = 14.0, std: float = 4.0, prior_frames: int = 100, memory_frames: int = 1000
    ) -> None:
        super().__init__(dim=dim, mean=mean, std=std)
        for name, frames in (("prior_frames", prior_frames), ("memory_frames", memory_frames)):
            if frames < 1:
                raise ValueError(f"StreamingNorm.{name} must be at least 1 frame, but is {frames}.")
        self.prior_frames, self.decay = prior_frames, 1 - 1 / memory_frames

    def init_state(self, batch: int) -> State:
        """Decayed sums over the stream of 1, of each band, and of each band squared: ``[B, 1, 1 + 2F]``."""
        return self.mean.new_zeros(batch, 1, 1 + 2 * self.dim)

    def stream(
        self, frames: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"], state: State
    ) -> tuple[FeatureOutput, State]:
        """The next frames of each stream."""
        # Sums of z-scores, in which the prior has mean 0 and variance 1, stay near 1 and lose no precision.
        (z, _), _ = super().stream(frames, lengths, ())
        with full_precision(z):
            sums = _decayed_sums(
                torch.cat([state, torch.cat([torch.ones_like(z[..., :1]), z, z * z], -1)], 1), self.decay
            )
        _, state = carry(sums[:, :1], sums[:, 1:], lengths)
        weight, first, second = sums[:, 1:].split([1, self.dim, self.dim], dim=-1)
        weight = weight + self.prior_frames
        mean = first / weight
        std = ((second + self.prior_frames) / weight - mean.square()).sqrt()
        return FeatureOutput(keep_valid((z - mean) / std, lengths), lengths), state


class UtteranceNorm(nn.Module):
    """Each utterance minus its own mean, divided by its own deviation, band by band (wav2vec 2.0, 2006.11477).

    Args:
        dim: bands.
        eps: added to the variance.
    """

    def __init__(self, *, dim: int = 1, eps: float = 1e-7) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, frames: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"]) -> FeatureOutput:
        """Whole recordings, of which the first ``lengths`` frames are real."""
        count = lengths.clamp(min=1)[:, None, None]
        away = keep_valid(frames - keep_valid(frames, lengths).sum(1, keepdim=True) / count, lengths)
        variance = away.square().sum(1, keepdim=True) / count
        return FeatureOutput(away / (variance + self.eps).sqrt(), lengths)

    def init_state(self, batch: int) -> NoReturn:
        """Refused: the mean is known when the utterance is over.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "UtteranceNorm must hear whole utterances, because their mean is known at their end, but a stream was "
            "asked for; use StreamingNorm, or whole utterances."
        )

    def stream(self, frames: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"], state: State) -> NoReturn:
        """Refused, as `init_state`."""
        self.init_state(len(frames))


def _decayed_sums(x: Float[Tensor, "B T C"], decay: float) -> Float[Tensor, "B T C"]:
    """``y[t] = decay * y[t - 1] + x[t]``, in blocks whose ends are summed by the same rule with a stronger decay."""
    frames, block = x.shape[1], 64
    steps = torch.arange(min(frames, block), device=x.device)
    powers = (decay ** (steps[:, None] - steps).clamp(min=0).double()).to(x.dtype).tril()
    if frames <= block:
        return powers @ x
    inside = powers @ F.pad(x, (0, 0, 0, -frames % block)).unflatten(1, (-1, block))  # [B, T / block, block, C]
    ends = _decayed_sums(inside[:, :, -1], decay**block)
    before = F.pad(ends[:, :-1], (0, 0, 1, 0))
    return (inside + decay * powers[:, :1] * before[:, :, None]).flatten(1, 2)[:, :frames]
