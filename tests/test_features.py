"""Features: against torchaudio, against float64 written out slowly, and streamed in every division against whole."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio.compliance.kaldi as kaldi
import torchaudio.functional as taf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from speechkit import audio, features
from speechkit.features import (
    FixedNorm,
    FrontEnd,
    GlobalNorm,
    LogMel,
    Resampler,
    SpecAugment,
    StreamingNorm,
    Tempo,
    resampling,
)
from speechkit.stream import put, state_bytes, take
from speechkit.types import FeatureOutput

RATES = [(44100, 16000), (48000, 16000), (8000, 16000), (96000, 16000), (22050, 16000), (16000, 44100), (16000, 16000)]


def _ragged(lengths: list[int], *width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise with NaN in every padded place."""
    x = torch.randn(len(lengths), max(lengths), *width, generator=torch.Generator().manual_seed(seed)) * 0.1
    for row, length in enumerate(lengths):
        x[row, length:] = torch.nan
    return x, torch.tensor(lengths)


def _streamed(part, x: Tensor, lengths: Tensor, seed: int, longest: int) -> list[Tensor]:
    """What each row gives when every call brings it a random number of new items, often none, always with NaN after."""
    dice, state, at = np.random.default_rng(seed), part.init_state(len(x)), torch.zeros_like(lengths)
    rows: list[list[Tensor]] = [[] for _ in x]
    while (at < lengths).any():
        step = torch.from_numpy(dice.integers(0, longest + 1, len(x)) * (dice.random(len(x)) < 0.7))
        step = torch.minimum(step, lengths - at)
        chunk = x.new_full((len(x), int(step.max()) + int(dice.integers(0, 3)), *x.shape[2:]), torch.nan)
        for row, (n, p) in enumerate(zip(step.tolist(), at.tolist(), strict=True)):
            chunk[row, :n] = x[row, p : p + n]
        (out, counts), state = part.stream(chunk, step, state)
        at = at + step
        for row, n in enumerate(counts.tolist()):
            rows[row].append(out[row, :n])
            assert not out[row, n:].any(), "padded places must be zero"
    if hasattr(part, "finish"):
        out, counts = part.finish(state)
        for row, n in enumerate(counts.tolist()):
            rows[row].append(out[row, :n])
    return [torch.cat(pieces) for pieces in rows]


def _assert_close(ours: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == other.shape
    assert torch.isfinite(ours).all()
    assert ours.numel() == 0 or (ours - other).abs().max() <= tolerance


# --- resampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), RATES)
def test_resampling_agrees_with_torchaudio(source: int, target: int) -> None:
    x, lengths = _ragged([source // 3 + 7, source // 5, 1])
    out = Resampler(source_hz=source, target_hz=target)(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        expected = taf.resample(x[row, :length].double(), source, target)
        assert out.lengths[row] == len(expected)
        _assert_close(out.samples[row, : len(expected)].double(), expected, 1e-6)
        assert not out.samples[row, len(expected) :].any()


@pytest.mark.parametrize(("source", "target"), RATES)
@pytest.mark.parametrize("longest", [1, 50, 1000, 20000])
def test_resampling_a_stream_equals_resampling_the_whole(source: int, target: int, longest: int) -> None:
    size = {1: 300, 50: 4000}.get(longest, 30000)
    x, lengths = _ragged([size, size // 2 + 1, 3, 0, size - 1])
    resampler = Resampler(source_hz=source, target_hz=target)
    whole = resampler(x, lengths)
    for row, streamed in enumerate(_streamed(resampler, x, lengths, seed=longest, longest=longest)):
        _assert_close(streamed, whole.samples[row, : whole.lengths[row]])


@pytest.mark.parametrize(("source", "target"), RATES)
def test_a_resampled_stream_holds_back_no_more_than_its_latency(source: int, target: int) -> None:
    resampler, given, made = Resampler(source_hz=source, target_hz=target), 0, 0
    state, worst = resampler.init_state(1), 0.0
    for n in [1, 7, 100, 441, 3, 160, 1000, 1, 1, 480] * 5:
        out, state = resampler.stream(torch.zeros(1, n), torch.tensor([n]), state)
        given, made = given + n, made + int(out.lengths)
        worst = max(worst, given - made * source / target)
    assert worst <= resampler.latency <= max(0.021 * source, 20)
    assert made + int(resampler.finish(state).lengths) == math.ceil(given * target / source)


def test_one_stream_of_a_batch_can_finish_alone() -> None:
    resampler = Resampler(source_hz=44100, target_hz=16000)
    x = torch.randn(2, 5000)
    out, state = resampler.stream(x, torch.tensor([5000, 4000]), resampler.init_state(2))
    rest = resampler.finish(take(state, [1]))
    whole = resampler(x[1:, :4000], torch.tensor([4000]))
    joined = torch.cat([out.samples[1, : out.lengths[1]], rest.samples[0, : rest.lengths[0]]])
    _assert_close(joined, whole.samples[0])
    more, _ = resampler.stream(x, torch.tensor([5000, 0]), state)
    whole = resampler(torch.cat([x[:1], x[:1]], 1), torch.tensor([10000]))
    joined = torch.cat([out.samples[0, : out.lengths[0]], more.samples[0, : more.lengths[0]]])
    _assert_close(joined, whole.samples[0, : len(joined)])


@pytest.mark.parametrize("source", [11127, 12345])
def test_odd_rates_keep_pitch_and_length(source: int) -> None:
    time = torch.arange(source, dtype=torch.float64) / source
    tone = torch.sin(2 * math.pi * 440 * time).float()[None]
    out = Resampler(source_hz=source, target_hz=16000)(tone, torch.tensor([source]))
    assert abs(int(out.lengths) - 16000) <= 1
    expected = torch.sin(2 * math.pi * 440 * torch.arange(16000, dtype=torch.float64) / 16000).float()
    # the roll-off of the kernel passes 440 Hz unchanged to a thousandth; the ends hear the silence around
    _assert_close(out.samples[0, 100:15900], expected[100:15900], 5e-3)


def test_equal_rates_give_back_what_came_in() -> None:
    x, resampler = torch.randn(2, 100), Resampler(source_hz=16000, target_hz=16000)
    out, _ = resampler.stream(x, torch.tensor([100, 100]), resampler.init_state(2))
    assert torch.equal(out.samples, x) and resampler.latency == 0


def test_a_rate_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"Resampler\.source_hz must be .* but is 0"):
        Resampler(source_hz=0, target_hz=16000)


# --- log-mel ----------------------------------------------------------------------------------------------------------


def _assert_kaldi(mel: LogMel, samples: Tensor, **options) -> None:
    """As close to Kaldi in float64 as Kaldi in float32 is; between strong bands a faint one loses digits in both."""
    padded = torch.cat([samples.new_zeros(mel.window - mel.hop), samples])[None] * 32768
    options |= {"num_mel_bins": mel.dim, "sample_frequency": mel.sample_rate}
    exact, single = kaldi.fbank(padded.double(), **options), kaldi.fbank(padded, **options)
    (ours, lengths), error = mel(samples[None], torch.tensor([len(samples)])), (single - exact).abs()
    assert ours.shape[1] == lengths == len(exact)
    assert (ours[0] - exact).abs().mean() <= 1.5 * error.mean() + 1e-5
    assert (ours[0] - exact).abs().max() <= 2 * error.max() + 1e-4
    assert error.max() < 0.03


@pytest.mark.parametrize(("rate", "bands"), [(16000, 80), (16000, 40), (8000, 64), (22050, 80), (44100, 128)])
def test_log_mel_agrees_with_kaldi(rate: int, bands: int) -> None:
    noise = torch.randn(rate + 77) * 0.1
    _assert_kaldi(LogMel(sample_rate=rate, bands=bands), noise)
    _assert_kaldi(LogMel(sample_rate=rate, bands=bands), noise + 0.3)  # a microphone with an offset


def test_log_mel_agrees_with_kaldi_on_other_bands_and_edges() -> None:
    mel = LogMel(low_hz=60.0, high_hz=-400.0, window_seconds=0.02)
    _assert_kaldi(mel, torch.randn(16000) * 0.1, low_freq=60.0, high_freq=-400.0, frame_length=20.0)


def test_log_mel_agrees_with_the_formula_in_float64() -> None:
    samples = np.random.default_rng(0).standard_normal(16000) * 0.1
    fine = np.concatenate([np.zeros(240), samples]) * 32768

    def to_mel(hz):
        return 1127 * np.log(1 + np.asarray(hz) / 700)

    edges = np.linspace(to_mel(20), to_mel(8000), 82)
    bins = to_mel(np.arange(256) * 16000 / 512)
    expected = np.zeros((100, 80))
    for t in range(100):
        frame = fine[160 * t : 160 * t + 400]
        frame = frame - frame.mean()
        frame = np.concatenate([[0.03 * frame[0]], frame[1:] - 0.97 * frame[:-1]])
        frame *= (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
        power = np.abs(np.fft.rfft(frame, 512))[:256] ** 2
        for band, (left, top, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
            weights = np.minimum((bins - left) / (top - left), (right - bins) / (right - top)).clip(0)
            expected[t, band] = np.log(max(power @ weights, 1.1920929e-07))
    ours = LogMel()(torch.from_numpy(samples).float()[None], torch.tensor([16000])).frames[0]
    _assert_close(ours.double(), torch.from_numpy(expected), 1e-4)


@pytest.mark.parametrize("longest", [1, 159, 500, 1600, 9000])
@pytest.mark.parametrize("seed", [0, 1])
def test_log_mel_of_a_stream_equals_log_mel_of_the_whole(longest: int, seed: int) -> None:
    size = 500 if longest == 1 else 20000
    x, lengths = _ragged([size, size // 2 + 1, 399, 160, 159, 0])
    mel = LogMel()
    whole = mel(x, lengths)
    assert whole.lengths.tolist() == [n // 160 for n in lengths.tolist()]
    for row, streamed in enumerate(_streamed(mel, x, lengths, seed=seed, longest=longest)):
        _assert_close(streamed, whole.frames[row, : whole.lengths[row]])


def test_whole_hops_give_whole_chunks_of_frames() -> None:
    mel = LogMel()
    state = mel.init_state(2)
    for hops in (1, 16, 5):
        out, state = mel.stream(torch.randn(2, 160 * hops), torch.tensor([160 * hops, 0]), state)
        assert out.frames.shape == (2, hops, 80) and out.lengths.tolist() == [hops, 0]


def test_a_frame_hears_nothing_after_its_hop() -> None:
    x = torch.randn(1, 3200)
    y = x.clone()
    y[:, 1600:] = 0
    whole, cut = (LogMel()(z, torch.tensor([3200])).frames for z in (x, y))
    assert torch.equal(whole[:, :10], cut[:, :10]) and not torch.equal(whole[:, 10], cut[:, 10])


def test_a_row_does_not_depend_on_the_batch() -> None:
    front = FrontEnd(mel=LogMel(), norm=StreamingNorm(dim=80))
    x, lengths = _ragged([16000, 9999, 1234])
    batched = front(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = front(x[row : row + 1, :length], lengths[row : row + 1])
        _assert_close(batched.frames[row, : length // 160], alone.frames[0])
        assert not batched.frames[row, length // 160 :].any()


def test_a_slot_can_be_given_to_another_stream() -> None:
    front = FrontEnd(mel=LogMel(), norm=StreamingNorm(dim=80))
    x = torch.randn(2, 5000)
    _, state = front.stream(x, torch.tensor([5000, 4321]), front.init_state(2))
    state = put(state, [1], front.init_state(1))
    (frames, lengths), _ = front.stream(x, torch.tensor([0, 5000]), state)
    _assert_close(frames[1, : lengths[1]], front(x[1:], torch.tensor([5000])).frames[0])


def test_the_state_does_not_grow() -> None:
    for part in (FrontEnd(mel=LogMel(), norm=StreamingNorm(dim=80)), Resampler(source_hz=44100, target_hz=16000)):
        state = part.init_state(3)
        before = state_bytes(state)
        for _ in range(20):
            _, state = part.stream(torch.randn(3, 1234), torch.tensor([1234, 0, 55]), state)
        assert state_bytes(state) == before


def test_gradients_of_real_samples_survive_nan_in_the_padding() -> None:
    x, lengths = _ragged([1600, 1000, 399])
    for part in (LogMel(), FrontEnd(mel=LogMel(), norm=StreamingNorm(dim=80)), Resampler(source_hz=3, target_hz=2)):
        leaf = x.clone().requires_grad_()
        part(leaf, lengths)[0].square().sum().backward()
        for row, length in enumerate(lengths.tolist()):
            assert torch.isfinite(leaf.grad[row]).all() and leaf.grad[row, : length // 160 * 160].any()


def test_everything_stays_on_the_gpu_and_reads_nothing_back() -> None:
    """Fake tensors know their device and have no values, so a mixed device and an ``item()`` both raise."""
    with FakeTensorMode():
        x, lengths = torch.empty(3, 5000, device="cuda"), torch.empty(3, dtype=torch.long, device="cuda")
        front = FrontEnd(mel=LogMel(), norm=StreamingNorm(dim=80)).to("cuda")
        resampler = Resampler(source_hz=44100, target_hz=16000).to("cuda")
        for part in (front, resampler):
            (out, counts), state = part.stream(x, lengths, part.init_state(3))
            leaves = [out, counts, *tree_leaves(state), *part(x, lengths)]
            assert {leaf.device.type for leaf in leaves} == {"cuda"}
        assert resampler.finish(state).samples.device.type == "cuda"
        assert SpecAugment()(front(x, lengths).frames, lengths // 160).device.type == "cuda"


def test_digital_silence_is_finite() -> None:
    frames = FrontEnd(mel=LogMel(), norm=StreamingNorm(dim=80))(torch.zeros(1, 160000), torch.tensor([160000])).frames
    assert torch.isfinite(frames).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_changes_no_feature(dtype: torch.dtype) -> None:
    x, lengths = torch.randn(2, 16000), torch.tensor([16000, 16000])
    for part in (FrontEnd(mel=LogMel(), norm=StreamingNorm(dim=80)), Resampler(source_hz=48000, target_hz=16000)):
        with torch.autocast("cpu", dtype=dtype):
            mixed = part(x, lengths)[0]
        assert mixed.dtype == torch.float32 and torch.equal(mixed, part(x, lengths)[0])


def test_log_mel_says_which_setting_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"LogMel must have .* <= 4000, .* high_hz 8000; a high_hz of 0"):
        LogMel(sample_rate=8000, high_hz=8000.0)
    with pytest.raises(ValueError, match=r"LogMel\.hop_seconds must be .* at 16000 Hz .* \(0.025\), .* but is 0.03"):
        LogMel(hop_seconds=0.03)
    with pytest.raises(ValueError, match=r"FrontEnd\.norm must have the 80 bands of mel, but has 40; set its dim"):
        FrontEnd(mel=LogMel(), norm=GlobalNorm(dim=40))


def test_nothing_of_the_filter_bank_is_saved_and_all_of_the_normalisation() -> None:
    front = FrontEnd(mel=LogMel(), norm=StreamingNorm(dim=80))
    assert set(front.state_dict()) == {"norm.mean", "norm.std"}


# --- normalisation ----------------------------------------------------------------------------------------------------


def test_global_norm_is_fitted_on_real_frames_only() -> None:
    frames, lengths = _ragged([500, 300, 7], 20)
    frames = frames * torch.arange(1, 21) + torch.arange(20)
    norm = GlobalNorm(dim=20)
    norm.fit(FeatureOutput(frames[b : b + 2], lengths[b : b + 2]) for b in (0, 2))
    real = torch.cat([row[:n] for row, n in zip(frames, lengths.tolist(), strict=True)]).double()
    torch.testing.assert_close(norm.mean.double(), real.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.std.double(), real.std(0, unbiased=False), atol=1e-5, rtol=1e-5)
    out = norm(frames, lengths)
    _assert_close(out.frames[1, :300].double(), (real[500:800] - real.mean(0)) / real.std(0, unbiased=False), 1e-4)
    assert not out.frames[2, 7:].any()


def test_given_statistics_are_not_measured_again() -> None:
    frames, lengths = _ragged([50, 20], 4)
    norm = FixedNorm(dim=4, mean=-6.5, std=10.0)
    assert not hasattr(norm, "fit")
    _assert_close(norm(frames, lengths).frames[0], (frames[0] + 6.5) / 10.0, 1e-6)
    assert not norm(frames, lengths).frames[1, 20:].any()


def test_a_band_that_never_changes_is_not_blown_up() -> None:
    norm = GlobalNorm(dim=2)
    norm.fit([FeatureOutput(torch.tensor([[[3.0, 1.0], [3.0, 2.0]]]), torch.tensor([2]))])
    assert norm.std[0] == 1 and norm(torch.full((1, 1, 2), 3.0), torch.tensor([1])).frames[0, 0, 0] == 0


def test_fitting_on_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"StreamingNorm\.fit must see at least one frame"):
        StreamingNorm(dim=3).fit([])


def _slow_norm(frames: np.ndarray, norm: StreamingNorm, prior: int, memory: int) -> np.ndarray:
    """The definition, one weighted mean a frame."""
    z = (frames - norm.mean.double().numpy()) / norm.std.double().numpy()
    out = np.zeros_like(z)
    for t in range(len(z)):
        weights = (1 - 1 / memory) ** np.arange(t, -1, -1)[:, None]
        total = prior + weights.sum()
        mean = (weights * z[: t + 1]).sum(0) / total
        second = (prior + (weights * z[: t + 1] ** 2).sum(0)) / total
        out[t] = (z[t] - mean) / np.sqrt(second - mean**2)
    return out


@pytest.mark.parametrize(("prior", "memory", "frames"), [(100, 1000, 700), (1, 5, 300), (10, 1, 50)])
def test_streaming_norm_agrees_with_its_definition_in_float64(prior: int, memory: int, frames: int) -> None:
    norm = StreamingNorm(dim=4, prior_frames=prior, memory_frames=memory)
    x = torch.randn(1, frames, 4) * 3 + torch.tensor([14.0, 10.0, -3.0, 20.0])
    expected = torch.from_numpy(_slow_norm(x[0].double().numpy(), norm, prior, memory))
    _assert_close(norm(x, torch.tensor([frames])).frames[0].double(), expected, 2e-5)


@pytest.mark.parametrize("longest", [1, 10, 100, 1000])
def test_streaming_norm_is_the_same_in_any_division(longest: int) -> None:
    size = 150 if longest == 1 else 5000
    x, lengths = _ragged([size, size // 2, 3, 0], 8)
    norm = StreamingNorm(dim=8, mean=0.0, std=0.1)
    whole = norm(x, lengths).frames
    for row, streamed in enumerate(_streamed(norm, x, lengths, seed=longest, longest=longest)):
        _assert_close(streamed, whole[row, : lengths[row]])


def test_streaming_norm_takes_away_the_microphone_and_forgets_the_speaker() -> None:
    norm = StreamingNorm(dim=1, prior_frames=100, memory_frames=1000)
    quiet, loud = torch.randn(1, 5000, 1) * 2 + 6, torch.randn(1, 5000, 1) * 4 + 18
    out = norm(torch.cat([quiet, loud], 1), torch.tensor([10000])).frames[0, :, 0]
    for settled in (out[3000:5000], out[8000:]):
        assert settled.mean().abs() < 0.3 and 0.6 < settled.std() < 1.4


def test_speech_after_a_muted_minute_stays_in_range() -> None:
    front = FrontEnd(mel=LogMel(), norm=StreamingNorm(dim=80))
    x = torch.cat([torch.zeros(1, 60 * 16000), torch.randn(1, 16000) * 0.1], 1)
    assert front(x, torch.tensor([x.shape[1]])).frames.abs().max() < 10


def test_streaming_norm_refuses_no_memory() -> None:
    with pytest.raises(ValueError, match=r"StreamingNorm\.memory_frames must be at least 1 frame, but is 0"):
        StreamingNorm(dim=80, memory_frames=0)


# --- SpecAugment ------------------------------------------------------------------------------------------------------


def test_spec_augment_masks_whole_bands_and_stretches_within_its_limits() -> None:
    augment = SpecAugment(frequency_masks=1, frequency_width=10, time_masks=1, time_width=100, time_share=0.2)
    lengths = torch.tensor([400, 100, 20, 3] * 50)
    masked = augment(torch.ones(200, 400, 40), lengths) == 0
    bands, times = masked.all(1), masked.all(2)
    assert torch.equal(masked, bands[:, None] | times[:, :, None])
    assert set(bands.sum(1).tolist()) == set(range(11))
    for start, limit in enumerate((80, 20, 4, 0)):
        widths = times[start::4].sum(1)
        assert widths.max() <= limit and (limit == 0 or widths.max() > limit / 2)
        assert not times[start::4, lengths[start] :].any()
    edges = (times[:, 1:] != times[:, :-1]).sum(1)
    assert edges.max() <= 2, "one mask is one stretch"


def test_spec_augment_reaches_the_first_and_the_last_frame_and_band() -> None:
    augment = SpecAugment(frequency_masks=1, frequency_width=5, time_masks=1, time_share=0.5)
    masked = augment(torch.ones(2000, 20, 10), torch.full((2000,), 20)) == 0
    assert masked.all(2).any(0).all() and masked.all(1).any(0).all()


def test_spec_augment_is_repeated_by_the_seed_and_unchanged_by_padding() -> None:
    augment, x, lengths = SpecAugment(), torch.randn(4, 300, 80), torch.tensor([300, 200, 100, 50])
    outs = []
    for padding in (0, 0, 50):
        torch.manual_seed(3)
        outs.append(augment(torch.nn.functional.pad(x, (0, 0, 0, padding)), lengths)[:, :300])
    assert torch.equal(outs[0], outs[1])
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(outs[0][row, :length], outs[2][row, :length])
    assert not torch.equal(outs[0][0] == 0, outs[0][1] == 0), "each utterance has masks of its own"


def test_spec_augment_rests_in_evaluation() -> None:
    x = torch.randn(2, 50, 80)
    assert torch.equal(SpecAugment().eval()(x, torch.tensor([50, 40])), x)
    assert torch.equal(SpecAugment(frequency_masks=0, time_masks=0)(x, torch.tensor([50, 40])), x)


def test_spec_augment_refuses_a_share_above_one() -> None:
    with pytest.raises(ValueError, match=r"SpecAugment\.time_share must be .* 0 to 1, but is 5.0"):
        SpecAugment(time_share=5.0)


# --- Tempo ------------------------------------------------------------------------------------------------------------


def test_tempo_reads_the_frames_at_another_pace_and_never_the_padding() -> None:
    lengths = torch.tensor([200, 120, 1, 0])
    ramp = torch.arange(200.0)[None, :, None].expand(4, 200, 3).clone()
    ramp[torch.arange(200)[None] >= lengths[:, None]] = torch.nan
    paces = []
    for seed in range(40):
        torch.manual_seed(seed)
        frames, counts = Tempo(slowest=0.8, fastest=1.6)(ramp, lengths)
        pace = float(frames[0, 1, 0])
        for row, (count, length) in enumerate(zip(counts.tolist(), lengths.tolist(), strict=True)):
            assert torch.allclose(frames[row, :count, 0], torch.arange(count) * pace, atol=1e-3)
            assert not frames[row, count:].any()
            assert count == 0 if length == 0 else (count - 1) * pace <= length - 1 < count * pace + 1e-3
        paces.append(pace)
    assert min(paces) < 0.9 and max(paces) > 1.5 and all(0.8 <= pace <= 1.6 for pace in paces)


def test_tempo_rests_in_evaluation_and_refuses_bounds_out_of_order() -> None:
    x, lengths = torch.randn(2, 50, 80), torch.tensor([50, 40])
    assert torch.equal(Tempo(slowest=0.5, fastest=2.0).eval()(x, lengths).frames, x)
    with pytest.raises(ValueError, match=r"Tempo\.slowest must be above 0 and at most fastest, but they are 2 and 1"):
        Tempo(slowest=2.0, fastest=1.0)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16000, 8000, 44100, 96000])
def test_a_file_is_read_at_the_rate_asked_for(tmp_path: Path, monkeypatch, rate: int) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * rate + 17).astype("f4")
    audio.write(tmp_path / "a.flac", noise, rate)
    decoded = torch.from_numpy(audio.read(tmp_path / "a.flac")[0])[None].double()
    expected = taf.resample(decoded, rate, 16000)[0].numpy()
    assert np.abs(features.read(tmp_path / "a.flac", 16000) - expected).max() < 1e-6
    joined = np.concatenate(list(features.blocks(tmp_path / "a.flac", 16000, 0.3)))
    assert joined.shape == expected.shape and np.abs(joined - expected).max() < 1e-6
    monkeypatch.setattr(resampling, "AT_ONCE", 1000)
    assert np.abs(features.read(tmp_path / "a.flac", 16000) - expected).max() < 1e-6
    assert len(features.read(tmp_path / "a.flac", 16000, start=1.0, duration=0.5)) == 8000


@pytest.mark.parametrize(
    "folder", ["librispeech_sample", "fsdd", "speechocean762_more", "cathy_fullband", "librosa_examples"]
)
def test_real_recordings_give_the_same_frames_chunked_and_whole(recordings: Path, folder: str) -> None:
    front = FrontEnd(mel=LogMel(), norm=StreamingNorm(dim=80))
    files = sorted((recordings / folder / "audio").rglob("*.*"))[:3]
    clips = [torch.from_numpy(features.read(path, 16000))[:80000] for path in files]
    lengths = torch.tensor([len(clip) for clip in clips])
    x = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=torch.nan)
    for part in (front.mel, front):
        whole = part(x, lengths)
        for longest in (5120, 777):
            for row, streamed in enumerate(_streamed(part, x, lengths, seed=longest, longest=longest)):
                _assert_close(streamed, whole.frames[row, : whole.lengths[row]])


def test_real_recordings_agree_with_kaldi(recordings: Path) -> None:
    for path in sorted((recordings / "librispeech_sample" / "audio").rglob("*.flac"))[:3]:
        mel = LogMel(floor=torch.finfo(torch.float32).eps)  # Kaldi's own
        _assert_kaldi(mel, torch.from_numpy(features.read(path, 16000)))


def test_a_muted_microphone_lies_at_the_floor_and_speech_above_it(recordings: Path) -> None:
    speech = torch.from_numpy(
        features.read(recordings / "librispeech_sample" / "audio" / "19" / "19-227-0000.flac", 16000)
    )
    samples = torch.stack([speech, torch.zeros_like(speech)])
    frames = LogMel()(samples, torch.tensor([len(speech)] * 2)).frames
    assert not frames[1].any(), "the logarithm of the floor, 1, is 0"
    assert frames[0].min() > 0, "rounding to 16 bits alone is above the floor"
