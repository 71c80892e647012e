"""From samples to frames: resampling, Kaldi's log-mel filter bank, normalisation, SpecAugment.

Everything but SpecAugment streams: `stream` takes any division of the input and gives what `forward` gives for the
whole, because `forward` is `stream` from a fresh state. Resampler and filter bank both look through a window that
slides over the samples, so they share one body, `_slide`.

All of it computes in the precision of its input, also under autocast: the power spectrum of 16-bit speech does not fit
into half precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from speechkit import audio
from speechkit.stream import State, carry, ceil_div, keep_valid
from speechkit.types import FeatureOutput, Seconds

AT_ONCE = 1 << 20  # samples resampled together; more only costs memory
PREEMPHASIS = 0.97


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
        return _still(self.kernel, batch, len(self.kernel), self.width)

    def stream(
        self, samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"], state: State
    ) -> tuple[SampleOutput, State]:
        """What can be said after the next samples of each stream: all but the last ``latency`` at most."""
        windows, blocks, state = _slide(samples, lengths, state, self.source_block)
        with _full_precision(samples):
            return _samples((windows @ self.kernel).flatten(1), blocks * self.target_block), state

    def finish(self, state: State) -> SampleOutput:
        """What each stream still holds back; one stream of a batch ends with ``finish(take(state, [row]))``."""
        tail, pending = state
        silence = tail.new_zeros(len(tail), self.width + self.source_block)
        (out, _), _ = self.stream(silence, torch.full_like(pending, silence.shape[1]), state)
        return _samples(out, self._total(pending - self.width))

    def _total(self, lengths: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        return ceil_div(lengths * self.target_block, self.source_block)


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
                f"LogMel.hop_seconds must be at least one sample and at most window_seconds ({window_seconds}), or "
                f"samples are skipped, but is {hop_seconds}."
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
        return _still(self.taper, batch, self.window, self.before)

    def stream(
        self, samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"], state: State
    ) -> tuple[FeatureOutput, State]:
        """The frames that the next samples of each stream complete; samples left over wait in the state.

        ``frames`` has ``ceil(N / hop)`` rows, so chunks of whole hops have no row to spare, and shapes never depend on
        the data.
        """
        windows, counts, state = _slide(samples, lengths, state, self.hop)
        with _full_precision(samples):
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
        with _full_precision(z):
            sums = _decayed_sums(
                torch.cat([state, torch.cat([torch.ones_like(z[..., :1]), z, z * z], -1)], 1), self.decay
            )
        _, state = carry(sums[:, :1], sums[:, 1:], lengths)
        weight, first, second = sums[:, 1:].split([1, self.dim, self.dim], dim=-1)
        weight = weight + self.prior_frames
        mean = first / weight
        std = ((second + self.prior_frames) / weight - mean.square()).sqrt()
        return FeatureOutput(keep_valid((z - mean) / std, lengths), lengths), state


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


def _full_precision(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


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


def _still(like: Tensor, batch: int, window: int, pending: int) -> State:
    """The state of `_slide` at the start: silence, of which ``pending`` samples belong to the first window."""
    return like.new_zeros(batch, window - 1), torch.full((batch,), pending, device=like.device)


def _slide(
    samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"], state: State, hop: int
) -> tuple[Float[Tensor, "B T W"], Int[Tensor, "B"], State]:
    """Windows that slide over each stream by ``hop``, in any division of the stream.

    The state holds the last W - 1 samples, the most that an unfinished window can have, and how many it has
    (``pending``): those at the end of the tail. So the next window starts ``pending`` before the new samples.

    Returns:
        Windows, T = ceil(N / hop) whatever the data; how many of them are complete; the next state.
    """
    tail, pending = state
    window = tail.shape[1] + 1
    seen, tail = carry(tail, F.pad(keep_valid(samples, lengths), (0, window)), lengths)
    heard = pending + lengths
    counts = ((heard - window) // hop + 1).clamp(min=0)
    most = max(1, -(-samples.shape[1] // hop))
    index = torch.arange((most - 1) * hop + window, device=samples.device)
    aligned = seen.gather(1, window - 1 - pending[:, None] + index)
    return aligned.unfold(1, window, hop), counts, (tail, heard - counts * hop)


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


def _stripes(size: int, lengths: Int[Tensor, "B"], widest: Int[Tensor, "B"], masks: int) -> Bool[Tensor, "B size"]:
    """``masks`` stripes for each row, 0 to ``widest`` wide and anywhere within ``lengths``, both uniform."""
    widths, starts = torch.rand(2, len(lengths), masks, device=lengths.device)
    widths = (widths * (widest[:, None] + 1)).long()
    starts = (starts * (lengths[:, None] - widths + 1)).long()
    place = torch.arange(size, device=lengths.device)
    return ((place >= starts[..., None]) & (place < (starts + widths)[..., None])).any(dim=1)


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
