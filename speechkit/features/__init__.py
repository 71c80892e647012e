"""From samples to frames: resampling, Kaldi's log-mel filter bank, normalisation, SpecAugment.

Everything but SpecAugment streams: `stream` takes any division of the input and gives what `forward` gives for the
whole, because `forward` is `stream` from a fresh state. Resampler and filter bank both look through a window that
slides over the samples, so they share `windows.slide`.

All of it computes in the precision of its input, also under autocast: the power spectrum of 16-bit speech does not fit
into half precision.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.features.mel import CentredMel, LogMel, Samples
from speechkit.features.norms import FixedNorm, GlobalNorm, StreamingNorm, UtteranceNorm
from speechkit.features.resampling import Resampler, SampleOutput, blocks, read
from speechkit.features.variations import SpecAugment, Tempo
from speechkit.stream import State
from speechkit.types import FeatureOutput

__all__ = [
    "CentredMel",
    "FixedNorm",
    "FrontEnd",
    "GlobalNorm",
    "LogMel",
    "Resampler",
    "SampleOutput",
    "Samples",
    "SpecAugment",
    "StreamingNorm",
    "Tempo",
    "UtteranceNorm",
    "blocks",
    "read",
]


class FrontEnd(nn.Module):
    """Filter bank and normalisation: what a recogniser has between samples and encoder.

    Args:
        mel: the filter bank, `LogMel` or `CentredMel`; or `Samples`.
        norm: `GlobalNorm`, `StreamingNorm`, `FixedNorm` or `UtteranceNorm`; ``None`` leaves the frames as they are.
    """

    def __init__(self, *, mel: LogMel | Samples, norm: FixedNorm | UtteranceNorm | None = None) -> None:
        super().__init__()
        if norm is not None and norm.dim != mel.dim:
            raise ValueError(f"FrontEnd.norm must have the {mel.dim} bands of mel, but has {norm.dim}; set its dim.")
        self.mel, self.norm = mel, norm
        self.sample_rate, self.hop, self.dim = mel.sample_rate, mel.hop, mel.dim

    def forward(self, samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"]) -> FeatureOutput:
        """Whole recordings, of which the first ``lengths`` samples are real; N samples give ``N // hop`` frames."""
        features = self.mel(samples, lengths)
        return features if self.norm is None else self.norm(*features)

    def init_state(self, batch: int) -> State:
        """The states of filter bank and normalisation."""
        return self.mel.init_state(batch), None if self.norm is None else self.norm.init_state(batch)

    def stream(
        self, samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"], state: State
    ) -> tuple[FeatureOutput, State]:
        """The frames that the next samples of each stream complete."""
        mel, norm = state
        features, mel = self.mel.stream(samples, lengths, mel)
        if self.norm is not None:
            features, norm = self.norm.stream(*features, norm)
        return features, (mel, norm)
