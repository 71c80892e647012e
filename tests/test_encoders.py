"""The encoders are the published ones, and each of their parts does what it says."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from speechkit.attention import RelativePosition, Softmax
from speechkit.encoders import AudioEncoder, Conformer, Squeezeformer, StreamingEncoder
from speechkit.layers import BatchNorm, Convolution, DepthwiseConv, FeedForward, Subsampling
from speechkit.stream import Context, keep_valid
from speechkit.testing import compare

ATTENTION = partial(Softmax, position=RelativePosition)


def millions(module: nn.Module) -> float:
    """Parameters and running statistics, as frameworks that print a model's total count them."""
    tensors = [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]
    return sum(t.numel() for t in tensors) / 1e6


@pytest.mark.parametrize(
    ("dim", "heads", "layers", "published"),
    [
        (144, 4, 16, 9.0),
        (196, 4, 18, 18.6),
        (256, 4, 16, 28.2),
        (324, 4, 20, 55.6),
        (512, 8, 18, 125.1),
        (640, 8, 22, 236.3),
    ],
)
def test_squeezeformer_sizes_are_the_published_ones(dim: int, heads: int, layers: int, published: float) -> None:
    """With the authors' CTC head over 128 pieces (sp.model of their repository)."""
    with torch.device("meta"):
        encoder = Squeezeformer(features=80, dim=dim, heads=heads, layers=layers, attention=ATTENTION)
        head = nn.Linear(dim, 128)
    assert round(millions(encoder) + millions(head), 1) == published
    assert (encoder.reduce, encoder.recover) == (layers // 2 - 1, layers - 1)


def transducer_decoder(encoder: int, decoder: int, *, pieces: int = 1000, width: int = 320) -> float:
    """Millions of parameters of the decoder the paper counts in: embedding, one LSTM layer, joint network.

    Table 1 gives the LSTM's width (320 / 640 / 640) and section 3.2 the 1k pieces; embedding and joint widths are not
    published. 320 for both is the choice that fits all three totals best.
    """
    embedding = pieces * width
    lstm = 4 * decoder * (width + decoder + 1)
    joint = width * (encoder + 1) + width * (decoder + 1) + pieces * (width + 1)
    return (embedding + lstm + joint) / 1e6


@pytest.mark.parametrize(
    ("dim", "heads", "layers", "decoder", "published"),
    [(144, 4, 16, 320, 10.3), (256, 4, 16, 640, 30.7), (512, 8, 17, 640, 118.8)],
)
def test_conformer_with_the_papers_decoder_has_the_papers_size(dim, heads, layers, decoder, published) -> None:
    convolution = partial(Convolution, kernel=32, norm=BatchNorm)
    with torch.device("meta"):
        encoder = Conformer(
            features=80, dim=dim, heads=heads, layers=layers, attention=ATTENTION, convolution=convolution
        )
    total = sum(p.numel() for p in encoder.parameters()) / 1e6 + transducer_decoder(dim, decoder)
    assert total == pytest.approx(published, rel=0.0025)


def tiny(**changes) -> Conformer:
    return Conformer(**{"features": 8, "dim": 24, "heads": 4, "layers": 2, "attention": ATTENTION} | changes).eval()


def test_the_classes_meet_their_protocols() -> None:
    for encoder in (tiny(), Squeezeformer(features=8, dim=24, heads=4, layers=4, attention=ATTENTION)):
        assert isinstance(encoder, StreamingEncoder) and isinstance(encoder, AudioEncoder)


def test_a_layer_has_its_own_attention() -> None:
    encoder = tiny()
    assert encoder.blocks[0].attention is not encoder.blocks[1].attention


def test_centred_convolutions_encode_whole_utterances_and_refuse_to_stream() -> None:
    encoder = tiny(convolution=partial(Convolution, causal=False, norm=BatchNorm))
    x, lengths = torch.randn(3, 40, 8), torch.tensor([40, 23, 5])
    x = torch.where(torch.arange(40)[None, :, None] < lengths[:, None, None], x, torch.nan)
    batched = encoder(x, lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = encoder(x[b : b + 1, :n], lengths[b : b + 1]).frames[0]
        compare("centred", alone, batched.frames[b, : len(alone)], 1e-5)
    with pytest.raises(ValueError, match=r"centred convolution.*cannot stream.*causal=true"):
        encoder.init_state(1, context=Context(left=8, chunk=4))


def test_a_centred_convolution_sees_both_sides_and_a_causal_one_the_past() -> None:
    for causal, expected in ((True, {6, 7, 8, 9, 10}), (False, {4, 5, 6, 7, 8})):
        conv = DepthwiseConv(dim=1, kernel=5, causal=causal)
        x = torch.zeros(1, 12, 1)
        x[0, 6] = 1
        changed = conv(x, torch.tensor([12]))[0] - conv(torch.zeros_like(x), torch.tensor([12]))[0]
        assert set(changed.flatten().nonzero().flatten().tolist()) == expected


def test_depthwise_convolution_is_torchs_with_zeros_before() -> None:
    conv = DepthwiseConv(dim=3, kernel=5, stride=2)
    x = torch.randn(2, 9, 3)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (3, 1)), conv.conv.weight, conv.conv.bias, stride=2, groups=3)
    torch.testing.assert_close(conv(x, torch.tensor([9, 9]))[0], expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("stages", "separable", "before", "stride"), [(2, False, 1, 4), (2, True, 1, 4), (3, True, 1, 8), (3, True, 2, 8)]
)
def test_a_frame_sees_up_to_the_last_or_the_first_feature_of_its_own_stride(stages, separable, before, stride) -> None:
    module = Subsampling(features=8, dim=6, stages=stages, separable=separable, before=before).eval()
    assert module.stride == stride
    x = torch.randn(1, 5 * stride, 8)
    base = module(x, torch.tensor([5 * stride]))[0]
    for t in range(5 * stride if before == 1 else 4 * stride + 1):
        moved = x.clone()
        moved[0, t] += 1
        changed = (module(moved, torch.tensor([5 * stride]))[0] - base).abs().amax(-1)[0] > 1e-7
        first = t // stride if before == 1 else -(-t // stride)
        assert changed.nonzero().min() == first, "earlier frames must not hear it, its own must"


def test_subsampling_refuses_zeros_that_its_taps_cannot_span() -> None:
    with pytest.raises(ValueError, match=r"Subsampling.before must be 1 or 2, because .* but is 3"):
        Subsampling(features=8, dim=6, before=3)


def test_a_part_without_biases_has_none_outside_its_norm() -> None:
    convolution, feed_forward = Convolution(dim=8, bias=False), FeedForward(dim=8, hidden=16, dropout=0.0, bias=False)
    for part in (convolution, feed_forward, Softmax(dim=8, heads=2, bias=False)):
        assert [name for name, _ in part.named_parameters() if "bias" in name and not name.startswith("norm")] == []


@pytest.mark.parametrize("length", range(9))
def test_an_incomplete_last_frame_counts(length: int) -> None:
    module = Subsampling(features=8, dim=6).eval()
    frames, lengths, _ = module(torch.randn(1, 9, 8), torch.tensor([length]))
    assert lengths.item() == -(-length // 4) and frames.shape[1] == 3


def test_batch_norm_ignores_padding_in_training_and_equals_torchs() -> None:
    ours, theirs = BatchNorm(4), nn.BatchNorm1d(4)
    x, lengths = torch.randn(3, 7, 4), torch.tensor([7, 2, 4])
    real = torch.arange(7) < lengths[:, None]
    expected = theirs(x[real])
    padded = torch.where(real[..., None], x, torch.full((), 1e6))
    torch.testing.assert_close(ours(padded, lengths)[real], expected)
    torch.testing.assert_close(ours.norm.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.norm.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x, lengths)[real], theirs(x[real]))


def test_squeezeformer_refuses_a_chunk_that_is_odd_on_its_slow_clock() -> None:
    encoder = Squeezeformer(features=8, dim=24, heads=4, layers=4, attention=ATTENTION)
    with pytest.raises(ValueError, match=r"Context.chunk must be a multiple of 2"):
        encoder.init_state(1, context=Context(left=8, chunk=3))
    with pytest.raises(ValueError, match=r"0 <= reduce < recover < layers = 4, but reduce is 3"):
        Squeezeformer(features=8, dim=24, heads=4, layers=4, attention=ATTENTION, reduce=3, recover=3)


def test_the_middle_of_squeezeformer_runs_at_half_the_rate() -> None:
    encoder = Squeezeformer(features=8, dim=24, heads=4, layers=4, attention=ATTENTION).eval()
    frames = {}
    for i, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda module, inputs, out, i=i: frames.update({i: out[0].shape[1]}))
    encoder(torch.randn(1, 44, 8), torch.tensor([44]))
    assert frames == {0: 11, 1: 6, 2: 6, 3: 11}


def test_training_reaches_every_parameter() -> None:
    for encoder in (tiny(), Squeezeformer(features=8, dim=24, heads=4, layers=4, attention=ATTENTION)):
        encoder.train()
        out = encoder(torch.randn(2, 40, 8), torch.tensor([40, 31]), context=Context(left=4, chunk=2))
        keep_valid(out.frames, out.lengths).square().sum().backward()
        assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
