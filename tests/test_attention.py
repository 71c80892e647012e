"""Attention: every kernel against the definition, every position scheme against its paper's formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from speechkit.attention import AbsoluteKey, Alibi, RelativePosition, Rotary, ScoreTerm, Softmax, attend, sinusoid
from speechkit.attention.patterns import Dilated
from speechkit.stream import Context, Everything, Span, fresh_span, keep_valid, valid

TERMS = [ScoreTerm, RelativePosition, AbsoluteKey, Rotary, Alibi]
CONTEXTS = [
    Context(),
    Context(left=8, chunk=4),
    Context(left=0, chunk=3),
    Context(left=5, chunk=1),
    Context(left=None, chunk=4),
    Context(left=7, chunk=5),
]
CASES = [("sdpa", context) for context in CONTEXTS] + [
    ("windowed", context) for context in CONTEXTS if None not in (context.chunk, context.left)
]
LENGTHS = torch.tensor([29, 13, 1, 0])


def drawn(term: type[ScoreTerm], heads: int = 4, width: int = 6, frames: int = 29) -> tuple[ScoreTerm, list[Tensor]]:
    torch.manual_seed(0)
    made = term(dim=heads * width, heads=heads).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made, [torch.randn(4, frames, heads, width, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("pattern", [None, Dilated(step=3, near=2)], ids=["dense", "dilated"])
@pytest.mark.parametrize(("kernel", "context"), CASES, ids=str)
@pytest.mark.parametrize("term", TERMS)
def test_every_kernel_equals_the_reference_forward_and_backward(kernel, term, context, pattern) -> None:
    position, (q, k, v) = drawn(term)
    span = fresh_span(LENGTHS, context)
    found = []
    for name in ("reference", kernel):
        placed_q, placed_k = position.place(q, k, span.positions(q.shape[1]))
        out = attend(placed_q, placed_k, v, span, term=position, pattern=pattern, kernel=name)
        out = keep_valid(out, LENGTHS)
        inputs = [q, k, v, *position.parameters()]
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        gradients = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
        found.append([out, *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True))])
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", [None, Dilated(step=3, near=2)], ids=["dense", "dilated"])
@pytest.mark.parametrize("term", TERMS)
def test_everything_is_the_whole_context_where_no_frame_is_padding(term, pattern) -> None:
    position, (q, k, v) = drawn(term)
    lengths = torch.full((4,), 29)
    q, k = position.place(q, k, fresh_span(lengths, Context()).positions(29))
    expected, ours, blind = (
        attend(q, k, v, fresh_span(n, context), term=position, pattern=pattern, kernel=kernel)
        for n, context, kernel in (
            (lengths, Context(), "reference"),
            (lengths, Everything(), "auto"),
            (LENGTHS, Everything(), "auto"),
        )
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    if pattern is None and term in (ScoreTerm, Rotary):
        assert torch.equal(ours, blind)


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
@pytest.mark.parametrize("term", TERMS)
def test_what_is_past_the_length_gives_zero_and_is_not_looked_at(term: type[ScoreTerm], kernel) -> None:
    position, (q, k, v) = drawn(term)
    real = valid(LENGTHS, 29)[:, :, None, None]
    q, k, v = (torch.where(real, x, torch.nan) for x in (q, k, v))
    out = attend(q, k, v, fresh_span(LENGTHS, Context()), term=position, kernel=kernel)
    assert torch.isfinite(out).all()
    assert all(not row[length:].any() for row, length in zip(out, LENGTHS.tolist(), strict=True))


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_reference_is_the_definition_written_out(context: Context) -> None:
    position, (q, k, v) = drawn(RelativePosition, heads=2, width=4, frames=9)
    q, k, v = q[:1], k[:1], v[:1]
    span = fresh_span(torch.tensor([8]), context)
    placed, _ = position.place(q, k, span.positions(9))
    out = attend(placed, k, v, span, term=position, kernel="reference")
    table = (sinusoid(torch.arange(-9, 10), 8, torch.float64) @ position.linear.weight.T).view(19, 2, 4)
    for h in range(2):
        for i in range(8):
            keys = [j for j in range(8) if bool(context.visible(torch.tensor([[i]]), torch.tensor([[j]])))]
            scores = torch.stack([
                ((q[0, i, h] + position.u[h]) @ k[0, j, h] + (q[0, i, h] + position.v[h]) @ table[i - j + 9, h]) / 2
                for j in keys
            ])  # fmt: skip
            expected = torch.softmax(scores, 0) @ v[0, keys, h]
            torch.testing.assert_close(out[0, i, h], expected, rtol=0, atol=1e-12)


def test_absolute_key_equals_wenets_two_products() -> None:
    """(q + u) . k + (q + v) . p_j, all over the root of the width: WeNet's attention without its relative shift."""
    position, (q, k, _) = drawn(AbsoluteKey)
    span = Span(torch.tensor([12] * 4), torch.tensor([29] * 4), Context())
    placed_q, placed_k = position.place(q, k, span.positions(29))
    ours = torch.einsum("buhk,bshk->bhus", placed_q, placed_k) / math.sqrt(6)
    ours = ours + position.bias(placed_q, span.positions(29), span.positions(29))
    p = position.linear(sinusoid(torch.arange(12, 41), 24, torch.float64)).view(29, 4, 6)
    expected = torch.einsum("buhk,bshk->bhus", q + position.u, k) + torch.einsum("buhk,shk->bhus", q + position.v, p)
    torch.testing.assert_close(ours, expected / math.sqrt(6), rtol=0, atol=1e-12)


@pytest.mark.parametrize("term", [RelativePosition, Rotary, Alibi])
def test_relative_schemes_see_distances_only(term: type[ScoreTerm]) -> None:
    position, (q, k, v) = drawn(term)
    outs = []
    for start in (0, 1_000_000):
        span = Span(torch.full((4,), start), torch.full((4,), 29), Context())
        outs.append(attend(*position.place(q, k, span.positions(29)), v, span, term=position))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-9)


def test_rotary_turns_each_pair_by_position_times_frequency() -> None:
    position = Rotary(dim=5, heads=1).double()
    x = torch.randn(1, 1, 1, 5, dtype=torch.float64)
    turned, _ = position.place(x, x, torch.tensor([[7]]))
    for pair in range(2):
        angle = 7 * 10000.0 ** (-2 * pair / 4)
        z = complex(float(x[0, 0, 0, pair]), float(x[0, 0, 0, pair + 2])) * complex(math.cos(angle), math.sin(angle))
        assert math.isclose(float(turned[0, 0, 0, pair]), z.real, abs_tol=1e-12)
        assert math.isclose(float(turned[0, 0, 0, pair + 2]), z.imag, abs_tol=1e-12)
    assert turned[..., 4] == x[..., 4], "an odd last coordinate stays"


@pytest.mark.parametrize(("heads", "first"), [(8, 0.5), (4, 0.25)])
def test_alibi_slopes_are_the_papers(heads: int, first: float) -> None:
    slopes = Alibi(dim=heads, heads=heads).slopes
    assert torch.allclose(slopes, torch.tensor([first ** (i + 1) for i in range(heads)]))
    assert len(Alibi(dim=6, heads=6).slopes) == 6


def test_grouped_heads_equal_full_heads_with_repeated_keys() -> None:
    torch.manual_seed(1)
    grouped = Softmax(dim=24, heads=4, kv_heads=2)
    full = Softmax(dim=24, heads=4)
    state = grouped.state_dict()
    for name in ("key", "value"):
        for kind in ("weight", "bias"):
            tensor = state[f"{name}.{kind}"].unflatten(0, (2, 6)).repeat_interleave(2, dim=0).flatten(0, 1)
            state[f"{name}.{kind}"] = tensor
    full.load_state_dict(state)
    x, span = torch.randn(2, 11, 24), fresh_span(torch.tensor([11, 7]), Context(left=4, chunk=2))
    torch.testing.assert_close(grouped(x, span)[0], full(x, span)[0])


def test_softmax_without_context_is_torchs_multihead_attention() -> None:
    ours, theirs = Softmax(dim=24, heads=4), torch.nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, lengths = torch.randn(3, 10, 24), torch.tensor([10, 4, 7])
    padding = torch.arange(10) >= lengths[:, None]
    expected = theirs(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(
        keep_valid(ours(x, fresh_span(lengths, Context()))[0], lengths), keep_valid(expected, lengths)
    )


def test_a_query_that_sees_nothing_gives_zero() -> None:
    _, (q, k, v) = drawn(ScoreTerm)
    span = fresh_span(torch.tensor([29] * 4), Context())
    for kernel in ("reference", "sdpa"):
        out = attend(q, k, v, span, pattern=lambda query, key: (query != 5) & (key >= 0), kernel=kernel)
        assert out[:, 5].abs().max() == 0 and out[:, 6].abs().min() > 0


def test_a_pattern_can_only_narrow_the_context() -> None:
    _, (q, k, v) = drawn(ScoreTerm)
    span = fresh_span(torch.tensor([29] * 4), Context(left=4, chunk=2))
    everything = attend(q, k, v, span, pattern=lambda query, key: query + key > -1)
    torch.testing.assert_close(everything, attend(q, k, v, span))


def test_the_kept_table_follows_the_weights() -> None:
    position, (q, k, v) = drawn(RelativePosition)
    span = fresh_span(torch.tensor([29] * 4), Context())
    with torch.no_grad():
        before = attend(q, k, v, span, term=position)
        assert torch.equal(attend(q, k, v, span, term=position), before)
        position.linear.weight.mul_(2)
        assert not torch.allclose(attend(q, k, v, span, term=position), before)


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    module = Softmax(dim=8, heads=2, dropout=0.5)
    x, span = torch.randn(1, 6, 8), fresh_span(torch.tensor([6]), Context())
    module.eval()
    steady = module(x, span)[0]
    assert torch.equal(module(x, span)[0], steady)
    module.train()
    mean = torch.stack([module(x, span)[0] for _ in range(3000)]).mean(0)
    assert not torch.equal(module(x, span)[0], steady)
    torch.testing.assert_close(mean, steady, rtol=0, atol=0.05)


def test_bad_shapes_are_told_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"Softmax.dim must be a multiple of heads, 4, but is 10"):
        Softmax(dim=10, heads=4)
    with pytest.raises(ValueError, match=r"Softmax.kv_heads must divide heads, 4, but is 3"):
        Softmax(dim=8, heads=4, kv_heads=3)
    _, (q, k, v) = drawn(ScoreTerm)
    with pytest.raises(ValueError, match=r"windowed.*finite left, chunk and right.*use kernel='auto'"):
        attend(q, k, v, fresh_span(LENGTHS, Context()), kernel="windowed")
    with pytest.raises(ValueError, match=r"AbsoluteKey needs as many key heads as heads, 4.*there are 2"):
        Softmax(dim=24, heads=4, kv_heads=2, position=AbsoluteKey)(
            torch.randn(1, 3, 24), fresh_span(torch.tensor([3]), Context())
        )
