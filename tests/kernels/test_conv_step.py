"""The convolution step against its definition by index in float64, and against the module whose inside it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from speechkit_kernels import plain
from torch import Tensor

from speechkit.layers import BatchNorm, Convolution, LayerNorm

OPERATOR = "conv_step"
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}


@dataclass(frozen=True)
class Call:
    """The arguments of one call, poisoned with NaN wherever nothing may look."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    cache: Tensor
    slots: Tensor
    qlen: Tensor
    options: dict = field(default_factory=dict)

    @classmethod
    def random(
        cls, B: int, C: int, D: int, K: int, *, gated: bool = True, norm: bool = True, bias: bool = True, spare: int = 2
    ) -> Call:
        x = torch.randn(B, C, 2 * D if gated else D, dtype=torch.float64)
        qlen = torch.randint(0, C + 1, (B,))
        for row, length in zip(x, qlen, strict=True):
            row[length:] = torch.nan
        slots = torch.randperm(B + spare)[:B]
        cache = torch.full((B + spare, K - 1, D), torch.nan, dtype=torch.float64)
        cache[slots] = torch.randn(B, K - 1, D, dtype=torch.float64)
        options: dict = {"gated": gated}
        if norm:
            options |= {"norm_weight": torch.randn(D).double(), "norm_bias": torch.randn(D).double(), "eps": 1e-3}
        weight = torch.randn(D, K, dtype=torch.float64) / K**0.5
        return cls(x, weight, torch.randn(D).double() if bias else None, cache, slots, qlen, options)

    def to(self, dtype: torch.dtype) -> Call:
        """The same in another type, sharing no memory."""

        def cast(value: Any) -> Any:
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype, copy=True) if is_float else value

        tensors = (cast(t) for t in (self.x, self.weight, self.bias, self.cache))
        return Call(*tensors, self.slots, self.qlen, {name: cast(value) for name, value in self.options.items()})

    def run(self, step: Any) -> Tensor:
        return step(self.x, self.weight, self.bias, self.cache, self.slots, self.qlen, **self.options)


def by_index(call: Call) -> tuple[Tensor, Tensor]:
    """What comes out and what is remembered: each number by the formula, in float64."""
    call = call.to(torch.float64)
    K, D = call.weight.shape[1], call.weight.shape[0]
    out, cache = torch.zeros(*call.x.shape[:2], D, dtype=torch.float64), call.cache.clone()
    for b, (slot, length) in enumerate(zip(call.slots.tolist(), call.qlen.tolist(), strict=True)):
        heard = [*call.cache[slot]]
        for t in range(length):
            frame = call.x[b, t]
            heard.append(
                frame[:D] / (1 + (-frame[D:]).exp()) if call.options["gated"] else frame / (1 + (-frame).exp())
            )
            y = sum(call.weight[:, k] * heard[t + k] for k in range(K))
            y = y if call.bias is None else y + call.bias
            if "norm_weight" in call.options:
                scale = 1 / ((y - y.mean()).square().mean() + call.options["eps"]).sqrt()
                y = (y - y.mean()) * scale * call.options["norm_weight"] + call.options["norm_bias"]
            out[b, t] = y / (1 + (-y).exp())
        for k in range(K - 1):
            cache[slot, k] = heard[length + k]
    return out, cache


def assert_near(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=10 * tolerance, atol=10 * tolerance, equal_nan=True)
    error = (found.double() - expected).nan_to_num().norm()
    assert error <= tolerance * expected.nan_to_num().norm(), error


SHAPES = [
    (1, 1, 1, 1), (1, 1, 16, 3), (3, 16, 144, 31), (2, 14, 37, 9), (4, 5, 100, 1), (2, 64, 70, 15), (5, 2, 64, 4),
    (1, 70, 130, 31), (9, 3, 8, 2),
]  # fmt: skip


@pytest.mark.parametrize("B, C, D, K", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_kernel_is_its_definition(kernel: Any, dtype: torch.dtype, B: int, C: int, D: int, K: int) -> None:
    _check_definition(kernel, dtype, B, C, D, K)


@pytest.mark.parametrize("B, C, D, K", SHAPES)
def test_the_plain_operator_is_its_definition(B: int, C: int, D: int, K: int) -> None:
    _check_definition(plain.conv_step, torch.float64, B, C, D, K)


def _check_definition(step: Any, dtype: torch.dtype, *shape: int) -> None:
    for gated, norm, bias in ((True, True, True), (False, True, False), (True, False, True), (False, False, False)):
        call = Call.random(*shape, gated=gated, norm=norm, bias=bias).to(dtype)
        out, cache = by_index(call)
        found = call.run(step)
        assert found.dtype == dtype and found.shape == out.shape
        assert_near(found, out)
        assert_near(call.cache, cache)


def test_rows_and_strides_may_lie_anywhere(kernel: Any) -> None:
    """x and the memory are parts of wider tensors, the filters lie tap by tap or are every second one of others."""
    call = Call.random(3, 7, 24, 5).to(torch.float32)
    out, cache = by_index(call)
    x = torch.full((7, 3, 60), torch.nan)
    x[:, :, 5:53] = call.x.transpose(0, 1)
    memory = torch.full((5, 9, 30), torch.nan)
    memory[:, 1::2, 3:27] = call.cache
    spread = torch.full((24, 10), torch.nan)
    spread[:, ::2] = call.weight
    for weight in (call.weight.t().contiguous().t(), spread[:, ::2]):
        own = memory.clone()
        moved = replace(call, x=x.transpose(0, 1)[:, :, 5:53], weight=weight, cache=own[:, 1::2, 3:27])
        assert_near(moved.run(kernel), out)
        assert_near(moved.cache, cache)
        own[:, 1::2, 3:27] = torch.nan
        assert own.isnan().all(), "nothing beside the memory is written"


def test_every_second_channel_is_gathered_first(kernel: Any) -> None:
    call = Call.random(2, 3, 8, 3).to(torch.float32)
    out, _ = by_index(call)
    spread = torch.stack([call.x, torch.full_like(call.x, torch.nan)], dim=-1).flatten(2)[..., ::2]
    norm_bias = torch.stack([call.options["norm_bias"]] * 2, dim=1)[:, 0]
    assert_near(replace(call, x=spread, options={**call.options, "norm_bias": norm_bias}).run(kernel), out)


def test_slots_and_lengths_are_of_either_integer_type(step: Any) -> None:
    call = Call.random(3, 4, 16, 5).to(torch.float32)
    out, _ = by_index(call)
    assert_near(replace(call, slots=call.slots.int(), qlen=call.qlen.int()).run(step), out)


def test_a_row_is_equal_bit_for_bit_alone_and_in_a_batch(kernel: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = Call.random(5, 13, 150, 9).to(dtype)
        before = call.cache.clone()
        out = call.run(kernel)
        for b in range(5):
            row = slice(b, b + 1)
            alone = replace(call, x=call.x[row], cache=before.clone(), slots=call.slots[row], qlen=call.qlen[row])
            assert torch.equal(alone.run(kernel), out[row])
            assert torch.equal(alone.cache[call.slots[b]], call.cache[call.slots[b]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stream_is_equal_bit_for_bit_in_calls_of_any_size(kernel: Any, dtype: torch.dtype) -> None:
    call = Call.random(1, 37, 70, 15).to(dtype)
    call = replace(call, x=torch.randn_like(call.x), qlen=torch.tensor([37]))
    before = call.cache.clone()
    out = call.run(kernel)
    for size in (1, 2, 3, 5, 8, 36):
        own, outs = before.clone(), []
        for part in call.x.split(size, dim=1):
            outs.append(replace(call, x=part, cache=own, qlen=torch.tensor([part.shape[1]])).run(kernel))
        assert torch.equal(torch.cat(outs, dim=1), out) and torch.equal(own[call.slots], call.cache[call.slots])


def test_the_number_of_threads_changes_nothing(kernel: Any) -> None:
    calls = [Call.random(B, 16, 256, 31, norm=norm).to(torch.float32) for B in (1, 2, 7) for norm in (True, False)]
    alone = [replace(call, cache=call.cache.clone()) for call in calls]
    outs = [call.run(kernel) for call in alone]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(call.run(kernel), out) for call, out in zip(calls, outs, strict=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a.cache[a.slots], c.cache[c.slots]) for a, c in zip(alone, calls, strict=True))


def test_an_empty_batch_and_rows_without_frames_change_nothing(step: Any) -> None:
    call = Call.random(0, 4, 8, 3, spare=2).to(torch.float32)
    assert call.run(step).shape == (0, 4, 8)
    call = Call.random(3, 4, 8, 3).to(torch.float32)
    before = call.cache.clone()
    out = replace(call, x=torch.full_like(call.x, torch.nan), qlen=torch.zeros(3, dtype=torch.int64)).run(step)
    assert not out.any()
    torch.testing.assert_close(call.cache, before, rtol=0, atol=0, equal_nan=True)


def test_no_frames_at_all_give_none_back(kernel: Any) -> None:
    call = Call.random(2, 0, 8, 3).to(torch.float32)
    before = call.cache.clone()
    assert call.run(kernel).shape == (2, 0, 8)
    torch.testing.assert_close(call.cache, before, rtol=0, atol=0, equal_nan=True)


def test_a_broken_frame_stays_in_its_own_stream_and_channel(step: Any) -> None:
    call = Call.random(2, 6, 20, 3, norm=False).to(torch.float32)
    call = replace(call, x=torch.randn_like(call.x), qlen=torch.tensor([6, 6]))
    call.x[0, 2, 7] = torch.nan
    out = call.run(step)
    expected = torch.zeros(2, 6, 20, dtype=torch.bool)
    expected[0, 2:5, 7] = True  # three taps hear it
    assert torch.equal(out.isnan(), expected)


def test_the_sigmoid_is_right_to_a_millionth_of_itself_everywhere(kernel: Any) -> None:
    """One tap of 1 and no norm leaves silu(silu(x)); a gate beside a frame of 1 is the sigmoid itself, remembered."""
    gate = torch.cat([torch.linspace(-87, 30, 200_001), torch.tensor([1e-30, -1e-30, 0.0, 88.5, 1e4, 3e38])])
    x = torch.stack([torch.ones_like(gate), gate])[None].reshape(1, 1, -1)
    cache = torch.zeros(1, 1, gate.numel())
    only = torch.zeros(1, dtype=torch.int64)
    kernel(x, torch.zeros(gate.numel(), 2), None, cache, only, only + 1, gated=True)
    exact = torch.sigmoid(gate.double())
    assert ((cache[0, 0].double() - exact) / exact).abs().max() <= 1e-6


def test_the_sigmoid_ends_where_floats_do(kernel: Any) -> None:
    ends = torch.tensor([-torch.inf, -1e30, -200.0, -100.0, 200.0, torch.inf, torch.nan])
    x = torch.stack([torch.ones_like(ends), ends]).reshape(1, 1, -1)
    cache, only = torch.zeros(1, 1, 7), torch.zeros(1, dtype=torch.int64)
    kernel(x, torch.zeros(7, 2), None, cache, only, only + 1, gated=True)
    expected = torch.tensor([0, 0, 0, 0, 1, 1, torch.nan])
    torch.testing.assert_close(cache[0, 0], expected, rtol=0, atol=1e-38, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_remembered_frames_are_rounded_as_torch_rounds(kernel: Any, dtype: torch.dtype) -> None:
    """Gates far above 0 pass a frame on unchanged, so the memory holds every bit pattern again after one call."""
    frames = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.cat([frames, torch.full_like(frames, 100)])[None, None]
    cache, only = torch.zeros(1, 1, 2**16, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    kernel(x, torch.zeros(2**16, 2, dtype=dtype), None, cache, only, only + 1, gated=True)
    torch.testing.assert_close(cache[0, 0], frames, rtol=0, atol=0, equal_nan=True)
    values = torch.cat([torch.randn(5000), torch.randn(5000) * 2e-5, torch.randn(5000) * 1e-7])
    halves = values.to(dtype)
    x = torch.cat([halves, halves])[None, None]
    cache = torch.zeros(1, 1, 15000, dtype=dtype)
    kernel(x, torch.zeros(15000, 2, dtype=dtype), None, cache, only, only + 1, gated=True)
    exact = (halves.double() * torch.sigmoid(halves.double())).float()
    between = (exact.to(dtype).view(torch.int16).int() - cache[0, 0].view(torch.int16).int()).abs()
    assert between.max() <= 1 and (between == 1).double().mean() < 0.01  # ties of the float result, if anything


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("norm", [LayerNorm, BatchNorm])
@pytest.mark.parametrize("taps", [1, 7])
def test_the_convolution_module_streams_the_same(step: Any, gated: bool, norm: type, taps: int) -> None:
    """Streams join, pause, speak on and start anew; the module hears each alone and whole."""
    module = Convolution(dim=24, kernel=taps, gated=gated, norm=norm).eval().double()
    _randomise(module)
    slots, chunk, steps = 4, 5, 12
    weight, bias, options = _folded(module)
    cache = torch.zeros(slots, taps - 1, weight.shape[0], dtype=torch.float64)
    fed: list[list[Tensor]] = [[] for _ in range(slots)]
    heard: list[list[Tensor]] = [[] for _ in range(slots)]
    for _ in range(steps):
        for slot in range(slots):
            if torch.rand(()) < 0.1:
                _assert_whole(module, fed[slot], heard[slot])
                cache[slot], fed[slot], heard[slot] = 0, [], []
        rows = torch.randperm(slots)[: torch.randint(1, slots + 1, ())]
        x = torch.randn(len(rows), chunk, 24, dtype=torch.float64)
        lengths = torch.randint(0, chunk + 1, (len(rows),))
        wide = module.widen(x)
        for b, length in enumerate(lengths):
            wide[b, length:] = torch.nan
        y = module.project(step(wide, weight, bias, cache, rows, lengths, gated=gated, **options))
        for b, (slot, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
            fed[slot].append(x[b, :length])
            heard[slot].append(y[b, :length])
    for slot in range(slots):
        _assert_whole(module, fed[slot], heard[slot])


def _assert_whole(module: Convolution, fed: list[Tensor], heard: list[Tensor]) -> None:
    if sum(map(len, fed)):
        whole = torch.cat(fed)[None]
        expected, _ = module(whole, torch.tensor([whole.shape[1]]))
        torch.testing.assert_close(torch.cat(heard), expected[0], rtol=1e-10, atol=1e-10)


def _randomise(module: Convolution) -> None:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if isinstance(module.norm, BatchNorm):
        torch.nn.init.normal_(module.norm.norm.running_mean)
        torch.nn.init.uniform_(module.norm.norm.running_var, 0.5, 2)


def _folded(module: Convolution) -> tuple[Tensor, Tensor, dict]:
    """Filters, biases and options for the operator; a batch norm is a factor and a shift of each channel's filter."""
    weight, bias = module.depthwise.conv.weight[:, 0].detach(), module.depthwise.conv.bias.detach()
    norm = module.norm
    if isinstance(norm, LayerNorm):
        return weight, bias, {"norm_weight": norm.weight.detach(), "norm_bias": norm.bias.detach(), "eps": norm.eps}
    norm = norm.norm
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    return weight * factor[:, None], (bias - norm.running_mean) * factor + norm.bias.detach(), {}


BAD = {
    "x": ({"x": torch.zeros(2, 3, 7)}, "x must be .*8.*, but has the shape .2, 3, 7."),
    "weight": ({"weight": torch.zeros(4)}, "weight must be .*, but has the shape .4."),
    "cache": ({"cache": torch.zeros(4, 3, 4)}, "cache must be .*2, 4., but has the shape .4, 3, 4."),
    "bias": ({"bias": torch.zeros(5)}, "bias must be .4., but has the shape .5."),
    "dtype": ({"weight": torch.zeros(4, 3).double()}, "weight must be torch.float32, but is torch.float64"),
    "norm": ({"norm_weight": torch.zeros(4)}, "norm_weight and norm_bias must be given together"),
    "norm width": (
        {"norm_weight": torch.zeros(4), "norm_bias": torch.zeros(1)},
        "norm_bias must be .4., but has the shape .1.",
    ),
    "slots": ({"slots": torch.zeros(3, dtype=torch.int64)}, "slots must be .2., but has the shape .3."),
    "qlen": ({"qlen": torch.zeros(2)}, "qlen must be int32 or int64, but is torch.float32"),
}


@pytest.mark.parametrize("change, sentence", BAD.values(), ids=BAD)
def test_a_wrong_argument_is_named(step: Any, change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^conv_step: {sentence}"):
        step(**_call(**change))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"slots": torch.tensor([1, 4])}, "slots must be from 0 to 3, but holds 4"),
        ({"slots": torch.tensor([-1, 0])}, "slots must be from 0 to 3, but holds -1"),
        ({"qlen": torch.tensor([0, 4])}, "qlen must be from 0 to 3, but holds 4"),
        ({"cache": torch.zeros(4, 2, 8)[..., ::2]}, "cache must have its channels side by side, but .* is 2"),
        ({"x": torch.zeros(2, 3, 8).int()}, "must be torch.int32, but is torch.float32"),
    ],
    ids=["slot", "negative slot", "qlen", "stride", "integers"],
)
def test_what_would_leave_the_memory_is_refused(kernel: Any, change: dict, sentence: str) -> None:
    arguments = _call(**change)
    with pytest.raises(ValueError, match=f"^conv_step: .*{sentence}"):
        kernel(**arguments)
    assert not arguments["cache"].any()


def _call(**change: Any) -> dict:
    arguments: dict = {"x": torch.zeros(2, 3, 8), "weight": torch.zeros(4, 3), "bias": None, "gated": True}
    arguments |= {"cache": torch.zeros(4, 2, 4), "slots": torch.tensor([0, 1]), "qlen": torch.tensor([1, 2])}
    return arguments | change


def test_torch_accepts_the_operator(kernel: Any) -> None:
    call = Call.random(2, 3, 20, 5).to(torch.float32)
    names = ("x", "weight", "bias", "cache", "slots", "qlen")
    arguments = tuple(
        getattr(call, name).nan_to_num() if name in ("x", "cache") else getattr(call, name) for name in names
    )
    torch.library.opcheck(torch.ops.speechkit.conv_step.default, arguments, call.options)


def test_a_compiled_step_is_the_eager_step_and_writes_the_callers_memory(kernel: Any) -> None:
    call = Call.random(2, 3, 20, 5).to(torch.float32)
    own = replace(call, cache=call.cache.clone())

    def around(x: Tensor, cache: Tensor) -> Tensor:
        return F.relu(replace(call, x=x, cache=cache).run(torch.ops.speechkit.conv_step))

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")(own.x, own.cache)
    assert torch.equal(compiled, F.relu(call.run(kernel)))
    torch.testing.assert_close(own.cache, call.cache, rtol=0, atol=0, equal_nan=True)
