"""A traced step does what the step does, for whatever comes later in the same shape."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import speechkit_kernels
import tiny
import torch
from test_contract import names
from test_contract import tiny as tiny_encoder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from speechkit import kernels
from speechkit.layers import Linear, shrink
from speechkit.stream import Context, State, clone_state, leaves
from speechkit.testing import verify_stream
from speechkit.traced import Traced, trace
from speechkit.types import EncoderOutput

CONTEXT = Context(left=8, chunk=4)


class OneCall:
    """An encoder whose streams go through a traced step, except where gradients are asked for."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.step = encoder, Traced(encoder.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def stream(self, chunk: Tensor, lengths: Tensor, state: State, *, context: Context) -> tuple[Any, State]:
        stream = self.encoder.stream if torch.is_grad_enabled() else self.step
        return stream(chunk, lengths, state, context=context)


PAIRS = [("conformer_s", attention) for attention in names("attention")]
PAIRS += [("squeezeformer_xs", "relative"), ("squeezeformer_xs", "rotary"), ("fastconformer_l", "relative")]


@pytest.mark.parametrize("encoder, attention", PAIRS)
def test_a_traced_step_keeps_the_streaming_contract(encoder: str, attention: str) -> None:
    verify_stream(OneCall(tiny_encoder(encoder, attention)), features=8, context=CONTEXT, long=False)


class Count(TorchDispatchMode):
    """How often each operator was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_a_traced_recogniser_hears_the_same_with_fewer_operators() -> None:
    recogniser, context = tiny.tiny(), Context(left=16, chunk=8)
    step, state = Traced(recogniser.stream), recogniser.init_state(2, context=context)
    size = context.latency() * recogniser.frame_samples
    traced = clone_state(state)
    for turn in range(6):
        samples = torch.stack([tiny.sound(size / 16000, seed=turn), tiny.sound(size / 16000, seed=50 + turn)])
        lengths = torch.tensor([size, 0 if turn == 3 else size])
        with torch.inference_mode(), Count() as eager:
            expected, state = recogniser.stream(samples, lengths, state, context=context)
        with Count() as short:
            found, traced = step(samples, lengths, traced, context=context)
        assert found.lengths.tolist() == expected.lengths.tolist()
        for row, frames in enumerate(found.lengths.tolist()):
            torch.testing.assert_close(found.frames[row, :frames], expected.frames[row, :frames], rtol=0, atol=1e-5)
    assert type(found) is type(expected)
    assert short.calls.total() < 0.7 * eager.calls.total(), "that is what it is for"


def test_tracing_changes_neither_what_it_is_given_nor_what_comes_out_later() -> None:
    encoder = tiny_encoder("conformer_s", "relative")
    step, state = Traced(encoder.stream), encoder.init_state(1, context=CONTEXT)
    x, lengths = torch.randn(1, 16, 8), torch.tensor([16])
    before = [leaf.clone() for leaf in leaves(state)]
    step.know(x, lengths, state, context=CONTEXT)
    assert all(torch.equal(a, b) for a, b in zip(leaves(state), before, strict=True))
    first, _ = step(x, lengths, clone_state(state), context=CONTEXT)
    again, _ = step(x, lengths, clone_state(state), context=CONTEXT)
    assert torch.equal(first.frames, again.frames)


def test_what_depends_on_a_value_cannot_be_traced() -> None:
    with pytest.raises(RuntimeError, match="value out of a tracing tensor"):
        trace(lambda x: (x * 2 if x.sum() > 0 else x,), torch.ones(3))


def written_between(x: Tensor) -> tuple[Tensor, ...]:
    y = x.clone()
    before = y + 1
    y.mul_(2)
    return before, y + 1, y


def written_through_a_view(x: Tensor) -> tuple[Tensor, ...]:
    y = x.clone()
    before = y.sum()
    y[1:].fill_(7)
    return before, y.sum(), y


def two_copies(x: Tensor) -> tuple[Tensor, ...]:
    a, b = x.clone(), x.clone()
    a.add_(1)
    return a, b


def constant_written(x: Tensor) -> tuple[Tensor, ...]:
    a = torch.zeros(4)
    b = a + 1
    a.add_(x[0])
    return a + 1, b


@pytest.mark.parametrize("function", [written_between, written_through_a_view, two_copies, constant_written])
def test_what_is_written_in_place_is_read_in_order(function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    run = trace(function, torch.ones(4, 4))
    x = torch.randn(4, 4)
    for found, expected in zip(run(x), function(x), strict=True):
        torch.testing.assert_close(found, expected)


SAID = {
    "a list of tensors": lambda x: (torch.cat([x, x * 2], dim=1),),
    "one of several results": lambda x: (x.max(dim=1).values, x.split([1, 3], dim=1)[1]),
    "nothing": lambda x: (x.clamp(min=0), None, x[:, torch.tensor([2, 0])]),
    "a whole number for a broken one": lambda x: (torch.nn.functional.leaky_relu(x, 2), x.sub(x, alpha=3) / 2),
    "a type": lambda x: (x.to(torch.float64), x.to(torch.int32) // 2, torch.arange(3, dtype=torch.int16)),
    "an order in memory": lambda x: (x[None, None].contiguous(memory_format=torch.channels_last), x.t().contiguous()),
    "no sizes, and no bound": lambda x: (x.new_zeros(()), x.clamp(max=float("inf"))),
    "what it was given": lambda x: (x,),
}


@pytest.mark.parametrize("name", SAID)
def test_whatever_an_operator_is_told_it_is_told_again(name: str) -> None:
    run = trace(SAID[name], torch.ones(4, 4))
    x = torch.randn(4, 4)
    for found, expected in zip(run(x), SAID[name](x), strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert found.dtype == expected.dtype and found.stride() == expected.stride()
            torch.testing.assert_close(found, expected)


@torch.inference_mode()
def test_a_value_that_an_operator_refuses_is_a_value_error_in_its_own_words() -> None:
    speechkit_kernels.ready()
    if not kernels.serves("conv_step", torch.zeros(1)):
        pytest.skip(kernels.explain())

    def function(x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        weight, cache = torch.ones(8, 3), torch.zeros(1, 2, 8)
        return (torch.ops.speechkit.conv_step(x, weight, None, cache, torch.zeros(1).int(), lengths, gated=False),)

    x = torch.randn(1, 4, 8)
    run = trace(function, x, torch.tensor([4]))
    with pytest.raises(ValueError, match=r"^conv_step: qlen must be from 0 to 4, but holds 5") as refused:
        run(x, torch.tensor([5]))
    assert "\n" not in str(refused.value)
    torch.testing.assert_close(run(x, torch.tensor([3])), function(x, torch.tensor([3])))


def test_an_error_that_is_not_about_a_value_stays_what_it_is() -> None:
    run = trace(lambda x, i: (x[i],), torch.ones(3), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="index 7 is out of bounds"):
        run(torch.ones(3), torch.tensor([7]))


class Around(nn.Module):
    """A linear map as the operator, with something around it."""

    def __init__(self, around: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.map, self.around = nn.LayerNorm(12), nn.Linear(12, 12), around
        nn.init.normal_(self.norm.weight)

    def linear(self, x: Tensor) -> Tensor:
        return torch.ops.speechkit.linear_step(x, self.map.weight, self.map.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out = self.around(self, x)
        return out if isinstance(out, tuple) else (out,)


silu = torch.nn.functional.silu
TAKEN = {
    "a norm before": lambda m, x: m.linear(m.norm(x)),
    "a norm before two": lambda m, x: (m.linear(m.norm(x)), silu(m.linear(m.norm(x)))),
    "silu behind": lambda m, x: silu(m.linear(x)),
    "a residual": lambda m, x: x + m.linear(x),
    "half a residual": lambda m, x: x + 0.5 * m.linear(x),
    "all of it": lambda m, x: 0.5 * silu(m.linear(m.norm(x))) + x,
    "a chain": lambda m, x: x + m.linear(silu(m.linear(m.norm(x)))),
}
LEFT = {
    "a norm that others need": lambda m, x: m.linear(m.norm(x)) + m.norm(x) * 3,
    "silu of a half": lambda m, x: silu(0.5 * m.linear(x)),
    "half of a sum": lambda m, x: 0.5 * (x + m.linear(x)),
    "a sum that is spread": lambda m, x: m.linear(x) + x[:1, :1],
    "a sum that is squared": lambda m, x: (m.linear(x) + x.new_ones(2, *x.shape)).square(),
    "a map that others need": lambda m, x: (silu(m.linear(x)), m.linear(x) * 2),
    "a scaled sum": lambda m, x: torch.add(x, m.linear(x), alpha=3),
    "added to itself": lambda m, x: (lambda y: y + y)(m.linear(x)),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", [*TAKEN, *LEFT])
def test_what_stands_around_a_linear_map_is_taken_where_it_fits_and_else_left(name: str) -> None:
    speechkit_kernels.ready()
    module = Around((TAKEN | LEFT)[name])
    run = trace(lambda x: module(x), torch.randn(2, 3, 12))
    x = torch.randn(2, 3, 12)
    with Count() as count:
        out = run(x)
    for found, expected in zip(out, module(x), strict=True):
        torch.testing.assert_close(found, expected)
    others = {call for call in count.calls if call != "speechkit::linear_step"}
    assert not others if name in TAKEN else others


class Weights(TorchDispatchMode):
    """The dimensions of each linear map's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.dims: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "speechkit::linear_step":
            self.dims.append(args[1].dim())
        return func(*args, **(kwargs or {}))


def mapped(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    return (torch.ops.speechkit.linear_step(x, weight, bias),)


WEIGHT, BIAS = torch.randn(70, 12, generator=torch.Generator().manual_seed(0)), torch.arange(70.0)
PACKED = {
    "with a bias": lambda x: mapped(x, WEIGHT, BIAS),
    "that fills panels": lambda x: mapped(x, WEIGHT[:64], None),
    "made of others": lambda x: mapped(x, torch.cat([WEIGHT, WEIGHT]) * 2, torch.cat([BIAS, BIAS])),
}
UNPACKED = {
    "that nothing says the end of": lambda x: mapped(x, WEIGHT, None),
    "of few rows": lambda x: mapped(x, WEIGHT[:32], None),
    "that depends on x": lambda x: mapped(x, WEIGHT * x[0, 0, 0], BIAS),
    "that is written": lambda x: mapped(x, WEIGHT.clone().add_(x[0, 0, 0]), BIAS),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", [*PACKED, *UNPACKED])
def test_a_weight_is_packed_where_it_is_constant_and_its_end_is_known(name: str) -> None:
    speechkit_kernels.ready()
    function = (PACKED | UNPACKED)[name]
    run = trace(function, torch.randn(2, 3, 12))
    x = torch.randn(2, 3, 12)
    with Weights() as weights:
        out = run(x)
    torch.testing.assert_close(out, function(x))
    assert weights.dims == [3 if name in PACKED else 2]


def held() -> int:
    """Bytes of all tensors there are."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_weights_are_packed_once_for_all_shapes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    map = Linear(256, 1024)
    if dtype != torch.float32:
        shrink(map, dtype)
    if not kernels.serves("linear_step", torch.zeros(1)):
        pytest.skip(kernels.explain())

    def stream(x: Tensor, lengths: Tensor, state: State, *, context: Context) -> tuple[Any, State]:
        return EncoderOutput(map(x), lengths), state

    step, before, size = Traced(stream), held(), map.weight.nbytes
    growth = []
    for batch in (1, 2, 3, 8):
        x, lengths = torch.randn(batch, 4, 256), torch.full((batch,), 4)
        with Weights() as weights:
            out, _ = step(x, lengths, (), context=CONTEXT)
        assert weights.dims[-1] == 3
        far = 1e-4 if dtype == torch.int8 else 1e-5  # packed int8 may be multiplied by whole numbers
        torch.testing.assert_close(out.frames, map(x), rtol=0, atol=far)
        del x, out
        growth.append(held() - before)
    assert size <= growth[0] < 1.1 * size and growth[-1] < 1.2 * size
