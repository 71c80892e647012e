"""Full, chunk, window and interval masks: every kernel against loops over queries and keys, in float64."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import hydra
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechkit.attention import RelativePosition, ScoreTerm, Softmax, attend, sinusoid
from speechkit.config import build, catalogue
from speechkit.encoders import Conformer, Squeezeformer
from speechkit.stream import Context, Interval, Span, fresh_span, keep_valid

KERNELS = ("reference", "sdpa", "windowed")
SCHEMES = sorted(p.stem for p in (catalogue() / "attention").glob("*.yaml"))


def mechanism(scheme: str) -> Softmax:
    """An attention of the catalogue, in float64 and with every parameter away from 0."""
    with hydra.initialize_config_dir(str(catalogue()), version_base="1.3"):
        config = hydra.compose(overrides=[f"+attention={scheme}"])
    module = build(config.model.attention, "model.attention")(dim=24, heads=4).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def drawn(batch: int, frames: int, *, inside: Context | None = None) -> Interval:
    """An interval for each query, empty for some, in a context or with no other limit."""
    inside = inside or Context()
    t = torch.arange(frames)
    lo, length = t - torch.randint(0, 12, (batch, frames)), torch.randint(-2, 20, (batch, frames))
    return Interval(inside.left, inside.chunk, inside.right, lo=lo, hi=lo + length)


def chunked(batch: int, frames: int) -> Interval:
    """Chunks of another length for each utterance, the last of them the whole utterance."""
    chunk = torch.tensor([4, 7, 1, 1000])[:batch, None]
    first = torch.arange(frames) // chunk * chunk
    return Interval(left=18, chunk=1, right=1000, lo=first.int() - 12, hi=(first + chunk).int())


def masks(batch: int, frames: int) -> dict[str, Context]:
    return {
        "full": Context(),
        "chunk": Context(left=8, chunk=4),
        "chunk, nothing before": Context(left=0, chunk=3),
        "chunk, all before": Context(chunk=4),
        "chunk, two chunks ahead": Context(left=6, chunk=3, right=6),
        "chunk as long as a block": Context(left=5, chunk=40),
        "window, causal": Context(left=5, chunk=1),
        "window": Context(left=5, chunk=1, right=3),
        "window, ahead only": Context(left=0, chunk=1, right=9),
        "window, wider than the utterance": Context(left=90, chunk=1, right=80),
        "window, all before": Context(chunk=1, right=2),
        "window, all after": Context(left=4, chunk=1, right=None),
        "interval": drawn(batch, frames),
        "interval in a window": drawn(batch, frames, inside=Context(left=7, chunk=1, right=6)),
        "interval of chunks": chunked(batch, frames),
    }


def has_ends(context: Context) -> bool:
    return None not in (context.left, context.chunk, context.right)


def seen(context: Context, b: int, t: int, length: int) -> range:
    """The keys of one query, out of the formulas; ``None`` is no bound."""
    lo, hi = 0, length
    if context.chunk is not None:
        first = t // context.chunk * context.chunk
        lo = lo if context.left is None else max(lo, first - context.left)
        hi = hi if context.right is None else min(hi, first + context.chunk + context.right)
    if isinstance(context, Interval):
        lo, hi = max(lo, int(context.lo[b, t])), min(hi, int(context.hi[b, t]))
    return range(lo, max(lo, hi)) if t < length else range(0)


def by_hand(q: Tensor, k: Tensor, v: Tensor, span: Span, position: RelativePosition) -> Tensor:
    """``softmax(((q + u) . k + (q + v) . r[i - j]) / sqrt(K)) v``, one query and one head at a time."""
    B, U, H, K = q.shape
    out = torch.zeros_like(v)
    table = (sinusoid(torch.arange(-U, U + 1), H * K, torch.float64) @ position.linear.weight.T).view(-1, H, K)
    for b, i, h in ((b, i, h) for b in range(B) for i in range(U) for h in range(H)):
        keys = list(seen(span.context, b, i, int(span.lengths[b])))
        scores = [
            ((q[b, i, h] + position.u[h]) @ k[b, j, h] + (q[b, i, h] + position.v[h]) @ table[i - j + U, h]) / K**0.5
            for j in keys
        ]
        if keys:
            out[b, i, h] = torch.softmax(torch.stack(scores), 0) @ v[b, keys, h]
    return out


def relative(heads: int = 2, width: int = 4) -> RelativePosition:
    position = RelativePosition(dim=heads * width, heads=heads).double()
    for parameter in position.parameters():
        nn.init.normal_(parameter, std=0.3)
    return position


def qkv(batch: int, frames: int, heads: int = 2, width: int = 4) -> list[Tensor]:
    return [torch.randn(batch, frames, heads, width, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("name", masks(3, 11))
def test_every_kernel_is_the_definition_written_out(name: str) -> None:
    position, (q, k, v) = relative(), qkv(3, 11)
    span = fresh_span(torch.tensor([11, 7, 0]), masks(3, 11)[name])
    with torch.no_grad():
        expected = by_hand(q, k, v, span, position)
        for kernel in KERNELS if has_ends(span.context) else KERNELS[:2]:
            out = attend(q + position.u, k, v, span, term=position, kernel=kernel)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frames", [3, 32, 75])
@pytest.mark.parametrize("name", masks(4, 75))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kernel_equals_the_reference_forward_and_backward(scheme: str, name: str, frames: int) -> None:
    module, x = mechanism(scheme), torch.randn(4, frames, 24, dtype=torch.float64, requires_grad=True)
    span = fresh_span(torch.tensor([frames, frames // 2, 1, 0]), masks(4, frames)[name])
    found = []
    for module.kernel in KERNELS if has_ends(span.context) else KERNELS[:2]:
        y, _ = module(x, span)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        parameters = list(module.parameters())
        gradients = torch.autograd.grad((y * weights).sum(), [x, *parameters], allow_unused=True)
        found.append([y, *(torch.zeros(()) if g is None else g for g in gradients)])
    for others in found[1:]:
        for ours, expected in zip(others, found[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ["reference", "windowed"])
@pytest.mark.parametrize("context", [Context(left=3, chunk=2), Context(left=2, chunk=1, right=3)], ids=str)
def test_gradients_are_those_of_finite_differences(kernel: str, context: Context) -> None:
    position, (q, k, v) = relative(heads=1, width=2), qkv(2, 35, heads=1, width=2)
    span = fresh_span(torch.tensor([35, 33]), context)

    def run(q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor) -> Tensor:
        return attend(q + position.u, k, v, span, term=position, kernel=kernel)

    assert torch.autograd.gradcheck(run, (q, k, v, *position.parameters()), fast_mode=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_query_that_sees_nothing_gives_zero_and_has_no_gradient(kernel: str) -> None:
    position, (q, k, v) = relative(), qkv(2, 40)
    t = torch.arange(40).expand(2, -1)
    blind = t % 5 == 2
    context = Interval(left=9, chunk=1, right=9, lo=t - 3, hi=torch.where(blind, t - 3, t + 4))
    out = attend(q + position.u, k, v, fresh_span(torch.tensor([40, 0]), context), term=position, kernel=kernel)
    gradients = torch.autograd.grad(out.sum(), [q, k, v])
    assert out[0][blind[0]].abs().max() == 0 and out[0][~blind[0]].abs().min() > 0
    assert gradients[0][0][blind[0]].abs().max() == 0
    assert all(not x[1].any() for x in (out, *gradients)), "an utterance of length 0"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("remembered", [0, 6])
def test_nan_in_padding_and_in_slots_before_the_start_does_not_pass(kernel: str, remembered: int) -> None:
    position, (q, k, v) = relative(), qkv(3, 40 + remembered)
    span = Span(torch.tensor([0, 4, 8]), torch.tensor([40, 17, 0]), Context(left=6, chunk=2, right=4))
    key = span.positions(40, remembered)
    real = (key >= 0) & (key < (span.start + span.lengths)[:, None])
    results = []
    for rest in (0.0, torch.nan):
        q1, k1, v1 = (torch.where(real[:, :, None, None], x.detach(), rest).requires_grad_() for x in (q, k, v))
        out = attend(q1[:, remembered:] + position.u, k1, v1, span, term=position, kernel=kernel)
        results.append([out, *torch.autograd.grad(out.square().sum(), [q1, k1, v1, *position.parameters()])])
    for clean, ours in zip(*results, strict=True):
        assert bool(ours.isfinite().all())
        assert torch.equal(ours, clean)


@pytest.mark.parametrize("remembered", [0, 2, 6, 20])
@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_keys_are_those_that_are_remembered_be_they_fewer_or_more_than_are_seen(kernel: str, remembered: int) -> None:
    position, (q, k, v) = relative(), qkv(2, 70 + remembered)
    span = Span(torch.tensor([0, 9]), torch.tensor([70, 41]), Context(left=6, chunk=3, right=3))
    q = q[:, remembered:] + position.u
    outs = [attend(q, k, v, span, term=position, kernel=name) for name in ("reference", kernel)]
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("context", [Context(left=5, chunk=1), Context(left=6, chunk=3)], ids=str)
def test_a_stream_in_any_division_equals_the_whole(scheme: str, context: Context) -> None:
    module = mechanism(scheme)
    module.kernel = "windowed"
    lengths = torch.tensor([90, 47, 1])
    with torch.no_grad():
        x = torch.randn(3, 90, 24, dtype=torch.float64)
        whole = keep_valid(module(x, fresh_span(lengths, context))[0], lengths)
        module.kernel = "auto"
        state, start, y = module.init_state(3, context), 0, []
        while start < 90:
            step = context.latency() * int(torch.randint(1, 15, ()))
            now = (lengths - start).clamp(0, step)
            out, state = module(x[:, start : start + step], Span(torch.full((3,), start), now, context), state)
            y.append(out)
            start += step
    torch.testing.assert_close(keep_valid(torch.cat(y, dim=1), lengths), whole, rtol=0, atol=1e-12)


def test_chunks_of_each_utterances_own_equal_each_utterance_in_its_own_context() -> None:
    position, (q, k, v), lengths = relative(), qkv(4, 50), torch.tensor([50, 31, 44, 50])
    q = q + position.u
    together = attend(q, k, v, fresh_span(lengths, chunked(4, 50)), term=position)
    for b, chunk in enumerate((4, 7, 1, None)):
        own = Context(None if chunk is None else 12, chunk)
        alone = attend(*(x[b : b + 1] for x in (q, k, v)), fresh_span(lengths[b : b + 1], own), term=position)
        if chunk is not None:
            torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-12)
            continue
        near = fresh_span(lengths[b : b + 1], Context(left=18, chunk=1, right=None))  # the frame around the intervals
        alone = attend(*(x[b : b + 1] for x in (q, k, v)), near, term=position)
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("frames", [0, 5])
@pytest.mark.parametrize("kernel", ["sdpa", "windowed"])
def test_nothing_in_gives_nothing_out(kernel: str, batch: int, frames: int) -> None:
    position, (q, k, v) = relative(), qkv(batch, frames)
    span = fresh_span(torch.full((batch,), frames), Context(left=4, chunk=2, right=1))
    assert attend(q, k, v, span, term=position, kernel=kernel).shape == (batch, frames, 2, 4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_real_encoder_takes_windows_and_intervals_on_whole_utterances(kernel: str) -> None:
    encoder = Conformer(
        features=8, dim=24, heads=4, layers=2, attention=lambda **d: Softmax(**d, position=RelativePosition)
    )
    encoder = encoder.double().eval()
    for block in encoder.blocks:
        block.attention.kernel = kernel
    x, lengths = torch.randn(2, 200, 8, dtype=torch.float64), torch.tensor([200, 113])
    window = Context(left=6, chunk=1, right=4)
    t = torch.arange(50).expand(2, -1)
    with torch.no_grad():
        expected = encoder(x, lengths, context=window)
        again = encoder(x, lengths, context=Interval(left=9, chunk=1, right=9, lo=t - 6, hi=t + 5))
        alone = encoder(x[1:, :113], lengths[1:], context=window)
        wider = encoder(x, lengths, context=Context(left=6, chunk=1, right=5))
    torch.testing.assert_close(again.frames, expected.frames, rtol=0, atol=1e-12)
    torch.testing.assert_close(alone.frames[0], expected.frames[1, :29], rtol=0, atol=1e-12)
    assert not torch.allclose(wider.frames[0], expected.frames[0])


# What each kernel does of the work


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of scores that each call of torch's operator makes."""
    fused, counts = F.scaled_dot_product_attention, []

    def counted(q: Tensor, k: Tensor, *rest: Tensor, **options: object) -> Tensor:
        counts.append(q.shape[0] * q.shape[2] * k.shape[2])
        return fused(q, k, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sys.modules["speechkit.attention.attend"].F, "scaled_dot_product_attention", counted)
    yield counts


@pytest.mark.parametrize("frames", [40, 400])
@pytest.mark.parametrize("name", masks(1, 400))
def test_auto_takes_the_windows_where_they_are_less_work(name: str, frames: int, pairs: list[int]) -> None:
    context = masks(1, frames)[name]
    (q, k, v), span = qkv(1, frames), fresh_span(torch.tensor([frames]), context)
    for kernel in ("sdpa", "auto", *(["windowed"] if has_ends(context) else [])):
        attend(q, k, v, span, kernel=kernel)
    dense, auto, *windowed = pairs
    assert dense == frames**2
    narrow = has_ends(context) and context.left + context.right < 100
    assert [auto] == (windowed if frames == 400 and narrow else [dense])
    assert auto < 0.25 * dense if frames == 400 and narrow else True


# Dropout


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_drops_its_share_of_the_weights_and_keeps_their_mean(kernel: str) -> None:
    """Values that are rows of the identity show the weights themselves: 1 / n each, over the keys a query sees."""
    q, v = torch.zeros(8, 64, 4, 64), torch.eye(64)[None, :, None].expand(8, 64, 4, 64)
    span = fresh_span(torch.full((8,), 64), Context(left=10, chunk=1, right=5))
    plain = attend(q, q, v, span, kernel=kernel)
    dropped = attend(q, q, v, span, dropout=0.3, kernel=kernel)
    visible = plain > 0
    kept = dropped[visible] > 0
    sigma = math.sqrt(0.3 * 0.7 / len(kept))
    assert abs(float(kept.float().mean()) - 0.7) < 4 * sigma
    torch.testing.assert_close(dropped[visible][kept], plain[visible][kept] / 0.7)
    assert dropped[~visible].abs().max() == 0
    assert not torch.equal(attend(q, q, v, span, dropout=0.3, kernel=kernel), dropped)


# What other toolkits score by, carried by our parameters or by a ScoreTerm of a few lines


def shifted(scores: Tensor) -> Tensor:
    """Rows that begin with distance T - 1, moved to distance i - j as Transformer-XL's authors do it: pad and fold."""
    B, H, T, R = scores.shape
    return F.pad(scores, (1, 0)).view(B, H, R + 1, T)[:, :, 1:].reshape(B, H, T, R)[..., :T]


def other(scores: Tensor, v: Tensor, span: Span) -> Tensor:
    """Dense attention from given scores."""
    query = span.positions(v.shape[1])
    hidden = ~span.context.visible(query, query) | (query >= span.lengths[:, None])[:, None]
    weights = torch.softmax(scores.masked_fill(hidden[:, None], -10000.0), -1).masked_fill(hidden[:, None], 0.0)
    return keep_valid(torch.einsum("bhus,bshv->buhv", weights, v), span.lengths)


class ByDistance(ScoreTerm):
    """Any rule that turns a distance into a vector of each head."""

    def row(self, distance: Tensor) -> Tensor:
        raise NotImplementedError

    def bias(self, q: Tensor, query: Tensor, key: Tensor, ahead: int = 0) -> Tensor:
        rows = self.row(query[0, :, None] - key[0])  # [U, S, H, K]
        return torch.einsum("buhk,ushk->bhus", q, rows) * self.width**-0.5


WIDE = fresh_span(torch.tensor([70, 41]), Context(left=8, chunk=4, right=4))


@pytest.mark.parametrize("kernel", KERNELS)
def test_relative_positions_equal_nemos(kernel: str) -> None:
    """A table of 2 T - 1 rows from the left-most position on, and the shift by padding."""
    position, (q, k, v) = relative(), qkv(2, 70)
    table = position.linear(sinusoid(torch.arange(69, -70, -1), 8, torch.float64)).view(139, 2, 4)
    scores = torch.einsum("buhk,bshk->bhus", q + position.u, k)
    scores = scores + shifted(torch.einsum("buhk,rhk->bhur", q + position.v, table))
    ours = attend(q + position.u, k, v, WIDE, term=position, kernel=kernel)
    torch.testing.assert_close(ours, other(scores / 2, v, WIDE), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_speechbrains_scale_is_a_factor_of_the_weights_and_its_table_a_rule(kernel: str) -> None:
    """Its scores are divided by the root of the model's width, its biases [K, H] are read as [H, K], and its sine is
    that of the distance without a sign."""
    linear, u, v_bias = nn.Linear(8, 8, bias=False).double(), torch.randn(4, 2).double(), torch.randn(4, 2).double()
    q, k, v = qkv(2, 70)
    table = linear(sinusoid(torch.arange(69, -70, -1).abs(), 8, torch.float64)).view(139, 2, 4)
    scores = torch.einsum("buhk,bshk->bhus", q + u.view(2, 4), k)
    scores = scores + shifted(torch.einsum("buhk,rhk->bhur", q + v_bias.view(2, 4), table))
    expected = other(scores / math.sqrt(8), v, WIDE)

    class Unsigned(ByDistance):
        def row(self, distance: Tensor) -> Tensor:
            return linear(sinusoid(distance.abs(), 8, torch.float64)).unflatten(-1, (2, 4))

        def bias(self, q: Tensor, query: Tensor, key: Tensor, ahead: int = 0) -> Tensor:
            return super().bias(q + factor * (v_bias - u).view(2, 4), query, key, ahead)

    factor = math.sqrt(4) / math.sqrt(8)  # into the query's weights and both biases, once, when they are loaded
    ours = attend(factor * (q + u.view(2, 4)), k, v, WIDE, term=Unsigned(dim=8, heads=2), kernel=kernel)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_relative_keys_that_end_at_a_distance_are_a_rule(kernel: str) -> None:
    """Shaw et al. (1803.02155, equations 4 and 5): one vector a distance, all far ones the same."""
    table = torch.randn(7, 2, 4, dtype=torch.float64)
    q, k, v = qkv(2, 70)

    class Clamped(ByDistance):
        def row(self, distance: Tensor) -> Tensor:
            return table[distance.clamp(-3, 3) + 3]

    scores = torch.zeros(2, 2, 70, 70, dtype=torch.float64)
    for i in range(70):
        for j in range(70):
            key = k[:, j] + table[max(-3, min(3, i - j)) + 3]
            scores[:, :, i, j] = (q[:, i] * key).sum(-1) / 2
    ours = attend(q, k, v, WIDE, term=Clamped(dim=8, heads=2), kernel=kernel)
    torch.testing.assert_close(ours, other(scores, v, WIDE), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_zipformers_own_positional_query_rides_in_the_query(kernel: str) -> None:
    """``q . k + s . r[j - i]`` without a scale, r narrower than q: s lies beside q, against zeros of the key."""
    table = torch.randn(139, 2, 3, dtype=torch.float64)
    (q, k, v), s = qkv(2, 70), torch.randn(2, 70, 2, 3, dtype=torch.float64)
    scores = torch.einsum("buhk,bshk->bhus", q, k) + shifted(torch.einsum("buhk,rhk->bhur", s, table))

    class Own(ByDistance):
        def row(self, distance: Tensor) -> Tensor:
            return F.pad(table[69 - distance.clamp(-69, 69)], (4, 0))

    beside = torch.cat([q, s], dim=-1) * math.sqrt(7)  # undoes 1 / sqrt(K)
    ours = attend(beside, F.pad(k, (0, 3)), v, WIDE, term=Own(dim=14, heads=2), kernel=kernel)
    torch.testing.assert_close(ours, other(scores, v, WIDE), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_score_of_each_key_shifts_nothing_where_constant_and_hides_where_infinite(kernel: str) -> None:
    q, k, v = qkv(2, 70)

    class Each(ScoreTerm):
        def bias(self, q: Tensor, query: Tensor, key: Tensor, ahead: int = 0) -> Tensor:
            return torch.where(key % 3 == 1, self.odd, 5.0).to(q.dtype)[:, None, None]

    term = Each(dim=8, heads=2)
    term.odd = 5.0
    plain = attend(q, k, v, WIDE, kernel=kernel)
    torch.testing.assert_close(attend(q, k, v, WIDE, term=term, kernel=kernel), plain, rtol=0, atol=1e-12)
    term.odd = -torch.inf
    hidden = attend(q, k, v, WIDE, term=term, kernel=kernel)
    expected = attend(q, k, v, WIDE, pattern=lambda query, key: (key % 3 != 1) & (query >= 0), kernel="reference")
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)


# Bad input


def test_a_context_that_cannot_stream_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"Context.right must be 0 to stream.*but is 4; pass a larger chunk.*forward"):
        Softmax(dim=8, heads=2).init_state(1, Context(left=4, chunk=1, right=4))
    with pytest.raises(ValueError, match=r"Context.right must be 0 to stream.*but is None"):
        Context(left=4, chunk=1, right=None).latency()
    with pytest.raises(ValueError, match=r"Interval must be used on whole utterances.*pass for example Context"):
        drawn(1, 5, inside=Context(left=4, chunk=2)).memory()


def test_an_interval_has_one_pair_of_bounds_a_frame() -> None:
    (q, k, v), span = qkv(2, 9), fresh_span(torch.tensor([9, 4]), drawn(2, 8))
    for kernel in ("reference", "sdpa"):
        with pytest.raises(ValueError, match=r"Interval.lo must be \[streams, frames\] = \[2, 9\].*but is \[2, 8\]"):
            attend(q, k, v, span, kernel=kernel)


def test_an_interval_refuses_a_slower_clock() -> None:
    encoder = Squeezeformer(features=8, dim=24, heads=4, layers=4, attention=Softmax)
    with pytest.raises(ValueError, match=r"Interval must stay on its own clock.*2 times slower; pass a Context"):
        encoder(torch.randn(1, 40, 8), torch.tensor([40]), context=drawn(1, 10))


def test_a_window_without_an_end_has_no_blocks() -> None:
    (q, k, v), span = qkv(1, 9), fresh_span(torch.tensor([9]), Context(left=4, chunk=1, right=None))
    with pytest.raises(ValueError, match=r"windowed.*finite left, chunk and right.*right=None.*use kernel='auto'"):
        attend(q, k, v, span, kernel="windowed")
