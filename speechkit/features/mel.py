"""Samples to frames: Kaldi's log-mel filter bank and its relatives, or the samples themselves."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.features.windows import full_precision, slide, still
from speechkit.stream import State, keep_valid
from speechkit.types import FeatureOutput, Seconds

PREEMPHASIS = 0.97


class LogMel(nn.Module):
    """Kaldi's log-mel filter bank: mean removal, pre-emphasis, Povey window, power spectrum, mel triangles, logarithm.

    Gives what ``torchaudio.compliance.kaldi.fbank`` gives without dither. Frame t covers the samples
    ``[hop * (t + 1) - window, hop * (t + 1))``: the signal has ``window - hop`` zeros put before it, so N samples give
    ``N // hop`` frames and no frame waits for what comes after its hop. With ``snip_edges``, frame t covers
    ``[hop * t, hop * t + window)``, and N samples give ``(N - window) // hop + 1``, none where they are fewer than a
    window.

    Args:
        sample_rate: in Hz.
        bands: mel bands, the F of the frames.
        window_seconds, hop_seconds: length and distance of the frames.
        low_hz, high_hz: edges of the lowest and the highest triangle; a ``high_hz`` of 0 or less counts down from half
            the sample rate.
        floor: the least energy of a band. 1.0 is a tenth of what rounding to 16 bits alone leaves in one. Kaldi adds
            dither and then needs no floor (its own is 1.2e-7); without, a muted microphone or a made-up silence would
            lie seven deviations below any room, and a normalisation measured with it would flatten the speech.
        scale: samples are multiplied by it first. Kaldi reads 16-bit integers, hence 32768; checkpoints that were
            trained on samples between -1 and 1 want 1. It decides how far above the floor of the logarithm speech lies.
        hann_power: the window is a Hann window to this power: 0.85 is Kaldi's "povey", 1 its "hanning".
        snip_edges: begin with the first whole window, as Kaldi does unless told otherwise, and put no zeros before it.
        float32_tables: compute window and triangles in float32, as torchaudio does, instead of rounding them when they
            are done. Either is as good, but quiet bands differ by up to 0.002, so a checkpoint wants what it had.
    """

    taper: Float[Tensor, "W"]
    mel: Float[Tensor, "W F"]

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        bands: int = 80,
        window_seconds: Seconds = 0.025,
        hop_seconds: Seconds = 0.010,
        low_hz: float = 20.0,
        high_hz: float = 0.0,
        scale: float = 32768.0,
        floor: float = 1.0,
        hann_power: float = 0.85,
        snip_edges: bool = False,
        float32_tables: bool = False,
    ) -> None:
        super().__init__()
        # Kaldi cuts off fractions of a sample; the millionth is for products like 0.0999...
        self.window, self.hop = (int(sample_rate * seconds + 1e-6) for seconds in (window_seconds, hop_seconds))
        if not 1 <= self.hop <= self.window:
            raise ValueError(
                f"LogMel.hop_seconds must be at least one sample at {sample_rate} Hz and at most window_seconds "
                f"({window_seconds}), or samples are skipped, but is {hop_seconds}; 0.01 and 16000 Hz are customary."
            )
        self.sample_rate, self.dim, self.floor = sample_rate, bands, floor
        self.fft = 1 << (self.window - 1).bit_length()
        self.before = 0 if snip_edges else self.window - self.hop  # zeros put before the signal
        dtype = torch.float32 if float32_tables else torch.float64
        taper = scale * torch.hann_window(self.window, periodic=False, dtype=dtype) ** hann_power
        self.register_buffer("taper", taper.float(), persistent=False)
        mel = _mel_triangles(sample_rate, self.fft, bands, low_hz, high_hz, dtype)
        self.register_buffer("mel", mel.float(), persistent=False)

    def forward(self, samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"]) -> FeatureOutput:
        """Whole recordings, of which the first ``lengths`` samples are real."""
        (frames, counts), _ = self.stream(samples, lengths, self.init_state(len(samples)))
        whole = max(0, (self.before + samples.shape[1] - self.window) // self.hop + 1)
        return FeatureOutput(frames[:, :whole], counts)

    def init_state(self, batch: int) -> State:
        """The samples heard last, and how many of them belong to the next frame."""
        return still(self.taper, batch, self.window, self.before)

    def stream(
        self, samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"], state: State
    ) -> tuple[FeatureOutput, State]:
        """The frames that the next samples of each stream complete; samples left over wait in the state.

        ``frames`` has ``ceil(N / hop)`` rows, so chunks of whole hops have no row to spare, and shapes never depend on
        the data.
        """
        windows, counts, state = slide(samples, lengths, state, self.hop)
        with full_precision(samples):
            return FeatureOutput(keep_valid(self._log_mel(windows), counts), counts), state

    def _log_mel(self, windows: Float[Tensor, "B T W"]) -> Float[Tensor, "B T F"]:
        x = windows - windows.mean(dim=-1, keepdim=True)
        # Kaldi takes the sample before the first to equal the first.
        x = x - PREEMPHASIS * torch.cat([x[..., :1], x[..., :-1]], dim=-1)
        spectrum = torch.fft.rfft(x * self.taper, n=self.fft)
        power = spectrum.real.square() + spectrum.imag.square()  # [B, T, fft / 2 + 1]
        return (power @ self.mel).clamp(min=self.floor).log()


class CentredMel(LogMel):
    """The filter bank of PaSST (2110.05069): pre-emphasis of the whole signal, Hann window, power, mel, logarithm.

    Frame t covers a window around sample ``hop * t`` of ``y[n] = x[n + 1] - 0.97 x[n]``. The original mirrors the
    recording at both ends; here it begins out of silence and ends with the last whole window, so that the first two
    frames of a recording are others, and the last two are left out.

    Args:
        sample_rate: in Hz.
        bands: mel bands, the F of the frames.
        window_seconds, hop_seconds: length and distance of the frames.
        low_hz, high_hz: edges of the lowest and the highest triangle.
        offset: added to the energy of a band before its logarithm.
    """

    def __init__(
        self,
        *,
        sample_rate: int = 32000,
        bands: int = 128,
        window_seconds: Seconds = 0.025,
        hop_seconds: Seconds = 0.010,
        low_hz: float = 0.0,
        high_hz: float = 15000.0,
        offset: float = 1e-5,
    ) -> None:
        super().__init__(
            sample_rate=sample_rate,
            bands=bands,
            window_seconds=window_seconds,
            hop_seconds=hop_seconds,
            low_hz=low_hz,
            high_hz=high_hz,
            scale=1.0,
            floor=offset,
            hann_power=1.0,
            float32_tables=True,
        )
        self.before, self.window = self.window // 2, self.window + 1  # a difference takes one sample more

    def _log_mel(self, windows: Float[Tensor, "B T W"]) -> Float[Tensor, "B T F"]:
        x = windows[..., 1:] - PREEMPHASIS * windows[..., :-1]
        spectrum = torch.fft.rfft(x * self.taper, n=self.fft)
        power = spectrum.real.square() + spectrum.imag.square()
        return (power @ self.mel + self.floor).log()


class Samples(nn.Module):
    """The samples themselves as feature frames of one number each, for encoders that begin with a waveform.

    It stands where a filter bank does, and streams as one does.

    Args:
        sample_rate: in Hz.
    """

    dim = hop = window = 1

    def __init__(self, *, sample_rate: int = 16000) -> None:
        super().__init__()
        self.sample_rate = sample_rate

    def forward(self, samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"]) -> FeatureOutput:
        """Whole recordings, of which the first ``lengths`` samples are real: ``[B, N, 1]``."""
        return FeatureOutput(keep_valid(samples, lengths)[..., None], lengths)

    def init_state(self, batch: int) -> State:
        """Nothing."""
        return ()

    def stream(
        self, samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"], state: State
    ) -> tuple[FeatureOutput, State]:
        """The next samples of each stream."""
        return self(samples, lengths), state


def _mel_triangles(
    sample_rate: int, fft: int, bands: int, low_hz: float, high_hz: float, dtype: torch.dtype
) -> Float[Tensor, "W F"]:
    """Kaldi's triangles, evenly spaced and linear on the mel scale, as a matrix from power spectrum to bands."""
    half = sample_rate / 2
    high = high_hz if high_hz > 0 else half + high_hz
    if not 0 <= low_hz < high <= half:
        raise ValueError(
            f"LogMel must have 0 <= low_hz < high_hz <= {half:g}, half the sample rate, but low_hz is {low_hz:g} and "
            f"high_hz {high:g}; a high_hz of 0 is half the sample rate."
        )
    low, high = (1127 * math.log1p(hz / 700) for hz in (low_hz, high))
    start, top, end = (low + (torch.arange(bands, dtype=dtype) + n) * ((high - low) / (bands + 1)) for n in range(3))
    mel = 1127 * torch.log(1 + torch.arange(fft // 2 + 1, dtype=dtype) * (sample_rate / fft) / 700)[:, None]
    return torch.minimum((mel - start) / (top - start), (end - mel) / (end - top)).clamp(min=0)
