"""What training does to frames, so that a model hears them another way each time."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from speechkit.stream import keep_valid
from speechkit.types import FeatureOutput


class SpecAugment(nn.Module):
    """Bands and stretches of time set to 0 while training (arXiv 1904.08779); it belongs after a normalisation, where
    0 is the mean.

    As many time masks as wanted, each at most ``time_share`` of the utterance (arXiv 1912.05533, section 3), keep short
    utterances recognisable. Every utterance gets masks of its own, drawn from torch's global generator, and padding
    changes none of them.

    Args:
        frequency_masks, frequency_width: how many, and how many bands wide at most.
        time_masks, time_width, time_share: how many, how many frames wide at most, and what share of the utterance.
    """

    def __init__(
        self,
        *,
        frequency_masks: int = 2,
        frequency_width: int = 27,
        time_masks: int = 10,
        time_width: int = 100,
        time_share: float = 0.05,
    ) -> None:
        super().__init__()
        if not 0 <= time_share <= 1:
            raise ValueError(f"SpecAugment.time_share must be a share of the utterance, 0 to 1, but is {time_share}.")
        self.frequency_masks, self.frequency_width = frequency_masks, frequency_width
        self.time_masks, self.time_width, self.time_share = time_masks, time_width, time_share

    def forward(self, frames: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"]) -> Float[Tensor, "B T F"]:
        """Masked frames while training, and the frames as they are otherwise.

        Raises:
            ValueError: for samples, whose one band a mask of frequency would hide altogether.
        """
        if not self.training:
            return frames
        if frames.shape[2] == 1:
            raise ValueError(
                "SpecAugment must be given a spectrogram, but the features are samples, of one band; set "
                "task.spec_augment=null, and augment the samples themselves: augment=NAME."
            )
        bands = torch.full_like(lengths, frames.shape[2])
        widest = (lengths * self.time_share).long().clamp(max=self.time_width)
        hidden = _stripes(frames.shape[2], bands, bands.clamp(max=self.frequency_width), self.frequency_masks)[:, None]
        hidden = hidden | _stripes(frames.shape[1], lengths, widest, self.time_masks)[:, :, None]
        return frames.masked_fill(hidden, 0.0)


class Tempo(nn.Module):
    """Faster or slower speech at the same pitch, while training: the frames are read at another pace.

    Every batch gets one pace, drawn evenly from torch's global generator; what falls between two frames is their
    weighted mean. Unlike a change of speed it leaves the spectrum alone.

    Args:
        slowest, fastest: bounds of the pace; 2 is twice as fast.

    Raises:
        ValueError: unless ``0 < slowest <= fastest``.
    """

    def __init__(self, *, slowest: float, fastest: float) -> None:
        super().__init__()
        if not 0 < slowest <= fastest:
            raise ValueError(
                f"Tempo.slowest must be above 0 and at most fastest, but they are {slowest:g} and {fastest:g}; "
                f"1 and 1 leave speech as it is."
            )
        self.slowest, self.fastest = slowest, fastest

    def forward(self, frames: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"]) -> FeatureOutput:
        """Frames at another pace while training, and the frames as they are otherwise."""
        if not self.training:
            return FeatureOutput(frames, lengths)
        pace = self.slowest + (self.fastest - self.slowest) * float(torch.rand(()))
        counts = ((lengths - 1).clamp(min=0) / pace).long() + (lengths > 0).long()
        place = torch.arange(int(frames.shape[1] / pace) + 1, device=frames.device) * pace  # [T']
        before = place.long().clamp(max=frames.shape[1] - 1)
        after = torch.minimum(before + 1, (lengths - 1).clamp(min=0)[:, None])  # [B, T']: never into the padding
        share = (place - before)[:, None]
        later = frames.gather(1, after[..., None].expand(-1, -1, frames.shape[2]))
        return FeatureOutput(keep_valid(torch.lerp(frames[:, before], later, share), counts), counts)


def _stripes(size: int, lengths: Int[Tensor, "B"], widest: Int[Tensor, "B"], masks: int) -> Bool[Tensor, "B size"]:
    """``masks`` stripes for each row, 0 to ``widest`` wide and anywhere within ``lengths``, both uniform."""
    widths, starts = torch.rand(2, len(lengths), masks, device=lengths.device)
    widths = (widths * (widest[:, None] + 1)).long()
    starts = (starts * (lengths[:, None] - widths + 1)).long()
    place = torch.arange(size, device=lengths.device)
    return ((place >= starts[..., None]) & (place < (starts + widths)[..., None])).any(dim=1)
