"""The subsampling step against its definition by index in float64, and against the module whose stages it computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from speechkit_kernels import plain
from torch import Tensor

from speechkit import kernels
from speechkit.layers import Subsampling
from speechkit.stream import State, clone_state
from speechkit.traced import trace

OPERATOR = "subsample_step"


@dataclass(frozen=True)
class Call:
    """The arguments of one call; frames past a row's length are NaN."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    tail: Tensor
    lengths: Tensor
    options: dict[str, Any]

    @classmethod
    def random(
        cls, B: int, T: int, bands: int, C: int, D: int, before: int, *, twice: bool = False, bias: bool = True
    ) -> Call:
        lengths = torch.randint(0, T + 1, (B,))
        lengths[0] = T
        x = torch.randn(B, T, bands, C)
        for row, length in zip(x, lengths, strict=True):
            row[length:] = torch.nan
        options: dict[str, Any] = {"relu": twice or bias}
        if twice:
            tail = torch.randn(B, before, (bands + before) // 2, D)
            options |= {"depthwise": torch.randn(D, 3, 3), "depthwise_tail": tail}
            options |= {"depthwise_bias": torch.randn(D)} if bias else {}
        own = torch.randn(D) if bias else None
        return cls(x, torch.randn(D, 3, 3) / 3, own, torch.randn(B, before, bands, C), lengths, options)

    def run(self, step: Any) -> Tensor:
        return step(self.x, self.weight, self.bias, self.tail, self.lengths, **self.options)

    def copy(self, rows: slice = slice(None)) -> Call:
        """Some rows, with memories of their own."""
        options = dict(self.options)
        if "depthwise_tail" in options:
            options["depthwise_tail"] = options["depthwise_tail"][rows].clone()
        tail, lengths = self.tail[rows].clone(), self.lengths[rows]
        return replace(self, x=self.x[rows], tail=tail, lengths=lengths, options=options)

    def tails(self) -> list[Tensor]:
        return [self.tail, *([self.options["depthwise_tail"]] if "depthwise_tail" in self.options else [])]


def by_index(call: Call) -> list[Tensor]:
    """What comes out, and what is remembered by each stage: number by number as defined, in float64."""
    y, tail = halved(call.x, call.weight, call.bias, call.tail, call.lengths)
    y = y.clamp(min=0) if call.options["relu"] else y
    if "depthwise" not in call.options:
        return [y, tail]
    more = [call.options.get(name) for name in ("depthwise", "depthwise_bias", "depthwise_tail")]
    z, between = halved(y, *more, (call.lengths + 1) // 2)
    return [z, tail, between]


def halved(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = x.double(), weight.double()
    B, T, bands, C = x.shape
    S, D = tail.shape[1], len(weight)
    out, after = torch.zeros(B, -(-T // 2), (bands + S) // 2, D, dtype=torch.float64), torch.zeros_like(tail)
    for b, length in enumerate(lengths.tolist()):
        heard = torch.cat([tail[b].double(), x[b, :length], torch.zeros(2, bands, C, dtype=torch.float64)])
        wide = torch.cat([torch.zeros(len(heard), S, C), heard, torch.zeros(len(heard), 2, C)], dim=1)
        for u in range(-(-length // 2)):
            for g in range(out.shape[2]):
                products = wide[2 * u : 2 * u + 3, 2 * g : 2 * g + 3] * weight.permute(1, 2, 0)  # [3, 3, D]
                out[b, u, g] = products.sum((0, 1)) + (0 if bias is None else bias.double())
        after[b] = heard[length : length + S]
    return out, after


SHAPES = [  # B, T, bands, C, D, before
    (1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 2), (2, 8, 80, 1, 33, 1), (1, 9, 128, 1, 16, 2), (3, 7, 13, 1, 300, 2),
    (2, 5, 3, 1, 47, 1), (4, 4, 2, 20, 20, 2), (2, 9, 65, 64, 64, 2), (1, 6, 130, 8, 8, 1), (3, 3, 9, 70, 70, 1),
    (2, 2, 5, 3, 3, 2), (2, 12, 33, 100, 100, 1),
]  # fmt: skip


def assert_is_its_definition(step: Any, shape: tuple[int, ...]) -> None:
    for twice in (False, True):
        for bias in (True, False):
            call = Call.random(*shape, twice=twice, bias=bias)
            out, *tails = by_index(call)
            found = call.run(step)
            torch.testing.assert_close(found.double(), out, rtol=1e-5, atol=1e-5)
            assert all(torch.equal(a, b) for a, b in zip(call.tails()[:1], tails[:1], strict=True))
            for own, expected in zip(call.tails()[1:], tails[1:], strict=True):
                torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_variant_is_its_definition(kernel: Any, shape: tuple[int, ...]) -> None:
    assert_is_its_definition(kernel, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_plain_operator_is_its_definition(shape: tuple[int, ...]) -> None:
    assert_is_its_definition(plain.subsample_step, shape)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("length", range(7))
def test_any_length_leaves_what_the_next_call_needs(step: Any, before: int, length: int, twice: bool) -> None:
    call = Call.random(1, 6, 9, 1, 5, before, twice=twice)
    call.lengths[0] = length
    call.x[:, length:] = torch.nan
    out, *tails = by_index(call)
    torch.testing.assert_close(call.run(step).double(), out, rtol=1e-5, atol=1e-5)
    for own, expected in zip(call.tails(), tails, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def test_a_row_is_equal_bit_for_bit_alone_and_in_a_batch(kernel: Any) -> None:
    for shape in ((5, 11, 21, 1, 150, 2), (4, 8, 10, 70, 70, 1)):
        for twice in (False, True):
            call = Call.random(*shape, twice=twice)
            before, out = call.copy(), call.run(kernel)
            for b in range(len(out)):
                alone = before.copy(slice(b, b + 1))
                assert torch.equal(alone.run(kernel), out[b : b + 1])
                assert all(torch.equal(own[0], of[b]) for own, of in zip(alone.tails(), call.tails(), strict=True))


def test_the_number_of_threads_changes_nothing(kernel: Any) -> None:
    calls = [Call.random(B, 32, 80, 1, 256, 2, twice=twice) for B in (1, 3) for twice in (False, True)]
    alone = [call.copy() for call in calls]
    outs = [call.run(kernel) for call in alone]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(call.run(kernel), out) for call, out in zip(calls, outs, strict=True))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(x, y) for a, c in zip(alone, calls, strict=True) for x, y in zip(a.tails(), c.tails(), strict=True)
    )


@pytest.mark.parametrize("twice", [False, True])
def test_a_broken_frame_stays_in_its_own_stream(step: Any, twice: bool) -> None:
    call = Call.random(2, 8, 10, 1, 20, 2, twice=twice)
    call = replace(call, x=torch.randn_like(call.x), lengths=torch.tensor([8, 8]))
    call.x[0, 3, 4] = torch.nan
    out = call.run(step)
    assert out[0].isnan().any() and not out[0, 0].isnan().any() and not out[1].isnan().any()


def test_a_number_that_is_none_is_not_rectified(step: Any) -> None:
    call = Call.random(1, 2, 3, 1, 20, 1)
    call.x[0, 0, 0] = torch.nan
    assert call.run(step)[0, 0, 0].isnan().all()


@pytest.mark.parametrize("twice", [False, True])
def test_rows_without_frames_and_calls_without_any_change_nothing(step: Any, twice: bool) -> None:
    for shape in ((2, 4, 8, 1, 6, 2), (2, 0, 8, 1, 6, 1), (0, 4, 8, 1, 6, 2)):
        call = Call.random(2, *shape[1:], twice=twice).copy(slice(shape[0]))
        call = replace(call, lengths=torch.zeros_like(call.lengths))
        before = [tail.clone() for tail in call.tails()]
        out = call.run(step)
        assert out.shape[0] == shape[0] and not out.any()
        assert all(torch.equal(own, was) for own, was in zip(call.tails(), before, strict=True))


def test_arguments_may_lie_anywhere(step: Any) -> None:
    """x is transposed, the filters and the bias are every second of others, the memory a part of a wider one."""
    call = Call.random(3, 7, 9, 6, 6, 2)
    out, tail = by_index(call)
    wide = torch.full((6, 4, 9, 6), torch.nan)
    wide[::2, 1:3] = call.tail
    spread = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in (call.weight, call.bias)]
    x = call.x.transpose(1, 3).contiguous().transpose(1, 3)
    moved = replace(call, x=x, weight=spread[0], bias=spread[1], tail=wide[::2, 1:3], lengths=call.lengths.int())
    torch.testing.assert_close(moved.run(step).double(), out, rtol=1e-5, atol=1e-5)
    assert torch.equal(moved.tail, tail)
    wide[::2, 1:3] = torch.nan
    assert wide.isnan().all(), "nothing beside the memory is written"


def _call(**change: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 3, 8, 1), "weight": torch.zeros(4, 3, 3), "bias": None}
    arguments |= {"tail": torch.zeros(2, 1, 8, 1), "lengths": torch.tensor([0, 3])}
    return arguments | change


FILTERS = torch.zeros(4, 3, 3)
BAD = {
    "weight": ({"weight": torch.zeros(4, 9)}, "weight must be .any, 3, 3., but has the shape .4, 9."),
    "x": ({"x": torch.zeros(2, 3, 8)}, "x must be .any, any, any, any., but has the shape .2, 3, 8."),
    "channels": ({"x": torch.zeros(2, 3, 8, 2)}, "x must have 1 channel or the 4 of weight, but has 2"),
    "tail": ({"tail": torch.zeros(2, 1, 7, 1)}, "tail must be .2, any, 8, 1., but has the shape .2, 1, 7, 1."),
    "memory": ({"tail": torch.zeros(2, 3, 8, 1)}, "tail must hold 1 or 2 frames, but holds 3"),
    "bias": ({"bias": torch.zeros(5)}, "bias must be .4., but has the shape .5."),
    "dtype": ({"weight": torch.zeros(4, 3, 3).double()}, "weight must be torch.float32, but is torch.float64"),
    "lengths": ({"lengths": torch.zeros(3, dtype=torch.int64)}, "lengths must be .2., but has the shape .3."),
    "counts": ({"lengths": torch.zeros(2)}, "lengths must be int32 or int64, but is torch.float32"),
    "alone": ({"depthwise": FILTERS}, "depthwise and depthwise_tail must be given together"),
    "bias alone": ({"depthwise_bias": torch.zeros(4)}, "depthwise and depthwise_tail must be given together"),
    "filters": (
        {"depthwise": torch.zeros(5, 3, 3), "depthwise_tail": torch.zeros(2, 1, 4, 4)},
        "depthwise must be .4, 3, 3., but has the shape .5, 3, 3.",
    ),
    "second memory": (
        {"depthwise": FILTERS, "depthwise_tail": torch.zeros(2, 2, 4, 4)},
        "depthwise_tail must be .2, 1, 4, 4., but has the shape .2, 2, 4, 4.",
    ),
}


@pytest.mark.parametrize("change, sentence", BAD.values(), ids=BAD)
def test_a_wrong_argument_is_named(step: Any, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^subsample_step: {sentence}"):
        step(**_call(**change))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"lengths": torch.tensor([0, 4])}, "lengths must be from 0 to 3, but holds 4"),
        ({"lengths": torch.tensor([-1, 0])}, "lengths must be from 0 to 3, but holds -1"),
        ({"tail": torch.zeros(2, 1, 16, 1)[:, :, ::2]}, "tail must have the bands .* are 2 and .*; make it contiguous"),
        ({"x": torch.zeros(2, 3, 8, 1).double()}, "x must be torch.float32, but is torch.float64"),
    ],
    ids=["length", "negative length", "stride", "type"],
)
def test_what_would_leave_the_memory_is_refused(kernel: Any, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^subsample_step: {sentence}"):
        kernel(**_call(**change))


@pytest.mark.parametrize("twice", [False, True])
def test_torch_accepts_the_operator(kernel: Any, twice: bool) -> None:
    call = Call.random(2, 6, 9, 1, 20, 2, twice=twice)
    arguments = (call.x.nan_to_num(), call.weight, call.bias, call.tail, call.lengths)
    torch.library.opcheck(torch.ops.speechkit.subsample_step.default, arguments, call.options)


def test_a_compiled_step_is_the_eager_step_and_writes_the_callers_memory(kernel: Any) -> None:
    call = Call.random(2, 5, 9, 1, 20, 2, twice=True)
    own = call.copy()

    def around(x: Tensor, tail: Tensor, between: Tensor) -> Tensor:
        options = {**call.options, "depthwise_tail": between}
        return F.silu(replace(call, x=x, tail=tail, options=options).run(torch.ops.speechkit.subsample_step))

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")(own.x, *own.tails())
    assert torch.equal(compiled, F.silu(call.run(kernel)))
    assert all(torch.equal(a, b) for a, b in zip(own.tails(), call.tails(), strict=True))


MODULES = {
    "FastConformer's": {"stages": 3, "separable": True, "before": 2, "channels": 24},
    "Squeezeformer's": {"stages": 2, "separable": True},
    "Conformer's": {"stages": 2},
    "one stage": {"stages": 1, "separable": True},
}


def module_of(name: str) -> Subsampling:
    torch.manual_seed(0)
    module = Subsampling(features=21, dim=16, **MODULES[name]).eval()
    return module.apply(lambda part: torch.nn.init.normal_(part.bias) if getattr(part, "bias", None) is not None else 0)


def streamed(module: Any, x: Tensor, lengths: Tensor, chunk: int) -> tuple[list[Tensor], State]:
    """Frames of each call, padding NaN; streams end, and a third one pauses in the second call."""
    state, outs, left = module.init_state(len(x)), [], lengths.clone()
    heard = torch.zeros_like(lengths)
    for call in range(x.shape[1] // chunk + 1):
        now = left.clamp(max=chunk) * (torch.arange(len(x)) != 2 if call == 1 else 1)
        part = torch.full((len(x), chunk, x.shape[2]), torch.nan)
        for b, (first, count) in enumerate(zip(heard.tolist(), now.tolist(), strict=True)):
            part[b, :count] = x[b, first : first + count]
        y, frames, state = module(part, now, state)
        outs.append(torch.cat([row[:count] for row, count in zip(y, frames.tolist(), strict=True)]))
        heard, left = heard + now, left - now
    return outs, state


@pytest.mark.parametrize("name", MODULES)
def test_the_module_streams_as_it_does_without_the_operator(name: str) -> None:
    module, lengths = module_of(name), torch.tensor([48, 21, 40])
    if not kernels.serves("subsample_step", torch.zeros(1)):
        pytest.skip(kernels.explain())
    x = torch.randn(3, 48, 21)
    with torch.no_grad():
        outs, state = streamed(module, x, lengths, 16)
        with mock.patch.object(kernels, "serves", lambda *_: False):
            expected, plain_state = streamed(module, x, lengths, 16)
    for found, wanted in zip([*outs, *state], [*expected, *plain_state], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_a_traced_module_is_the_module_in_fewer_operators(name: str) -> None:
    module = module_of(name)
    x, lengths, state = torch.randn(2, 16, 21), torch.tensor([16, 9]), module.init_state(2)

    def call(x: Tensor, lengths: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, frames, after = module(x, lengths, state)
        return (y, frames, *after)

    with torch.inference_mode():
        traced = trace(call, x, lengths, *clone_state(state))
        for _ in range(2):
            own = clone_state(state)
            found, expected = traced(x, lengths, *own), call(x, lengths, *state)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            state = expected[2:]


def test_gradients_and_other_types_go_the_plain_way() -> None:
    module, x, lengths = module_of("FastConformer's"), torch.randn(1, 16, 21), torch.tensor([16])
    module(x, lengths, module.init_state(1))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    with torch.no_grad():
        y, _, state = module.double()(x.double(), lengths, tuple(t.double() for t in module.init_state(1)))
    assert y.dtype == torch.float64 and all(tail.dtype == torch.float64 for tail in state)
