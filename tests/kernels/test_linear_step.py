"""`speechkit::linear_step`: against float64, row by row, in every variant for an instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import speechkit_kernels
import torch
import torch.nn.functional as F
from instruction_sets import instruction_set
from speechkit_kernels import build, plain
from torch import Tensor

KINDS = (torch.float32, torch.bfloat16, torch.int8)
Step = Callable[..., Tensor]


@pytest.fixture(params=build.isas("linear_step"))
def compiled(request: pytest.FixtureRequest) -> Iterator[Step]:
    """The operator as this instruction set computes it."""
    with instruction_set(request.param):
        yield torch.ops.speechkit.linear_step


@pytest.fixture(params=["rows", "packed"])
def form(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """A weight as the operator takes it."""
    return {"rows": lambda weight: weight, "packed": plain.linear_pack}[request.param]


def random_map(N: int, K: int, kind: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weight, its scale where it has one, bias."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(N, K, generator=generator), torch.randn(N, generator=generator)
    if kind != torch.int8:
        return weight.to(kind), None, bias
    scale = weight.abs().amax(1).clamp(min=1e-8) / 127 if K else torch.ones(N)
    return (weight / scale[:, None]).round().to(torch.int8), scale, bias


def random_rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, silu: bool) -> Tensor:
    """In float64, a loop over the rows of the weight."""
    rows = weight.double() if scale is None else weight.double() * scale.double()[:, None]
    y = torch.stack([(x.double() * row).sum(-1) for row in rows], dim=-1)
    y = y if bias is None else y + bias.double()
    return y * torch.sigmoid(y) if silu else y


def room(x: Tensor, weight: Tensor, scale: Tensor | None, form: Tensor) -> Tensor | float:
    """How far a result may move where numbers of x are multiplied as whole ones, 32767 for the largest."""
    if form.dim() == 2 or scale is None or speechkit_kernels.instruction_set() not in ("avx512bf16", "amx"):
        return 0.0
    sizes = (weight.double().abs() * scale[:, None]).sum(1)
    return 0.55 * x.abs().amax(-1, keepdim=True) / 32767 * sizes  # SiLU is nowhere steeper than 1.1


def assert_near(found: Tensor, expected: Tensor, far: float, room: Tensor | float) -> None:
    apart = (found.double() - expected).abs()
    assert (apart <= far * (expected.abs() + 1) + room).all(), f"{float(apart.max())} apart"


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("N, K", [(64, 256), (1, 1), (50, 10), (33, 131), (97, 1040), (16, 2050)])
def test_every_variant_equals_float64(compiled: Step, kind: torch.dtype, N: int, K: int) -> None:
    weight, scale, bias = random_map(N, K, kind)
    for M in (1, 2, 3, 4, 5, 6, 7, 8, 13, 19):
        x = random_rows(M, K)
        for options in ({"bias": bias, "silu": True}, {"bias": None, "silu": False}):
            expected = exact(x, weight, options["bias"], scale, bool(options["silu"]))
            for form in (weight, plain.linear_pack(weight)):
                if form.dim() == 3 and options["bias"] is None and N % 16:
                    continue  # nothing says where it ends
                y = compiled(x, form, options["bias"], scale=scale, silu=options["silu"])
                assert y.dtype == torch.float32
                assert_near(y, expected, 2e-6 * K**0.5, room(x, weight, scale, form))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_plain_pytorch_equals_float64(kind: torch.dtype) -> None:
    weight, scale, bias = random_map(33, 131, kind)
    x = random_rows(2, 3, 131)
    y = plain.linear_step(x, weight, bias, scale=scale, silu=True)
    torch.testing.assert_close(y.double(), exact(x, weight, bias, scale, True), rtol=2e-6, atol=2e-5)
    assert torch.equal(plain.linear_step(x, plain.linear_pack(weight), bias, scale=scale, silu=True), y)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("N, K", [(33, 5), (32, 7), (1, 1), (0, 4), (20, 0)])
def test_a_packed_weight_holds_every_number_once_and_zeros_and_can_be_unpacked(
    kind: torch.dtype, N: int, K: int
) -> None:
    weight, _, _ = random_map(N, K, kind)
    packed = torch.ops.speechkit.linear_pack(weight)
    assert packed.dtype == kind and packed.shape == (-(-N // 16), K, 16) and packed.is_contiguous()
    for row in range(16 * len(packed)):
        expected = weight[row] if row < N else torch.zeros(K, dtype=kind)
        assert torch.equal(packed[row // 16, :, row % 16], expected)
    assert torch.equal(plain.linear_unpack(packed, N), weight)
    assert torch.equal(plain.linear_pack(weight.t().contiguous().t()), packed)


def test_what_is_no_matrix_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match=r"^linear_pack: weight must be \[any, any\], but has the shape \[2, 3, 16\]"):
        plain.linear_pack(torch.zeros(2, 3, 16))


def surrounded(M: int, N: int, K: int) -> dict[str, Tensor | float]:
    """A layer norm before the map and something that half of its result is added to."""
    norm = {"norm_weight": 1 + 0.3 * random_rows(K), "norm_bias": random_rows(K).flip(0), "eps": 1e-3}
    return {**norm, "add": random_rows(M, N).flip(0), "factor": 0.5}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("N, K", [(64, 256), (1, 1), (50, 10), (33, 131), (16, 2050)])
@pytest.mark.parametrize("by", ["compiled", "plain"])
def test_norm_before_and_sum_behind_equal_float64(compiled: Step, kind: torch.dtype, N: int, K: int, by: str) -> None:
    step = compiled if by == "compiled" else plain.linear_step
    weight, scale, bias = random_map(N, K, kind)
    for M in (1, 5, 6, 7, 19):
        x, options = 3 + random_rows(M, K), surrounded(M, N, K)
        apart = x.double() - x.double().mean(1, keepdim=True)
        normed = apart / (apart.square().mean(1, keepdim=True) + 1e-3).sqrt()
        normed = normed * options["norm_weight"] + options["norm_bias"]
        for silu in (False, True):
            expected = options["add"] + 0.5 * exact(normed, weight, bias, scale, silu)
            for form in (weight, plain.linear_pack(weight)):
                y = step(x, form, bias, scale=scale, silu=silu, **options)
                assert_near(y, expected, 1e-5 * K**0.5, 0.0 if by == "plain" else room(normed, weight, scale, form))


Form = Callable[[Tensor], Tensor]


def test_a_row_with_norm_and_sum_is_bit_for_bit_the_same_whatever_comes_along(compiled: Step, form: Form) -> None:
    weight, _, bias = random_map(101, 275, torch.float32)
    weight = form(weight)
    x, options = random_rows(29, 275), surrounded(29, 101, 275)
    alone = torch.stack(
        [compiled(row, weight, bias, **{**options, "add": add}) for row, add in zip(x, options["add"], strict=True)]
    )
    for M in (1, 5, 6, 13, 29):
        assert torch.equal(compiled(x[:M], weight, bias, **{**options, "add": options["add"][:M]}), alone[:M])
    poisoned = torch.where(torch.arange(29)[:, None] == 3, torch.nan, x)
    others = torch.arange(29) != 3
    assert torch.equal(compiled(poisoned, weight, bias, **options)[others], alone[others])


def test_what_is_added_and_the_norm_may_stand_anywhere(compiled: Step) -> None:
    weight, _, bias = random_map(40, 30, torch.float32)
    x = random_rows(5, 3, 30)
    spread = {name: random_rows(60)[::2] for name in ("norm_weight", "norm_bias")}
    for add in (
        random_rows(5, 3, 80)[..., ::2],
        random_rows(3, 5, 40).transpose(0, 1),
        random_rows(40).expand(5, 3, 40),
    ):
        expected = compiled(x, weight, bias, **{n: s.contiguous() for n, s in spread.items()}, add=add.contiguous())
        assert torch.equal(compiled(x, weight, bias, **spread, add=add), expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("N, K", [(100, 300), (130, 1024), (40, 10)])
def test_a_row_is_bit_for_bit_the_same_whatever_comes_along(
    compiled: Step, form: Form, kind: torch.dtype, N: int, K: int
) -> None:
    weight, scale, bias = random_map(N, K, kind)
    weight = form(weight)
    x = random_rows(29, K)
    alone = torch.stack([compiled(row, weight, bias, scale=scale, silu=True) for row in x])
    for M in range(1, 30):
        assert torch.equal(compiled(x[:M], weight, bias, scale=scale, silu=True), alone[:M]), f"{M} rows"
    assert torch.equal(compiled(x.flip(0), weight, bias, scale=scale, silu=True), alone.flip(0))
    poisoned = torch.where(torch.arange(29)[:, None] == 3, torch.nan, x)
    others = torch.arange(29) != 3
    assert torch.equal(compiled(poisoned, weight, bias, scale=scale, silu=True)[others], alone[others])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_column_is_the_same_bit_for_bit_whatever_rows_the_weight_has(
    compiled: Step, form: Form, kind: torch.dtype
) -> None:
    weight, scale, bias = random_map(101, 272, kind)
    x = random_rows(7, 272)
    whole = compiled(x, form(weight), bias, scale=scale)
    for some in (slice(0, 1), slice(3, 52), slice(99, 101)):
        part = compiled(x, form(weight[some]), bias[some], scale=None if scale is None else scale[some])
        assert torch.equal(part, whole[:, some])


def test_the_number_of_threads_changes_nothing(compiled: Step, form: Form) -> None:
    weight, _, bias = random_map(1000, 520, torch.float32)
    weight = form(weight)
    x, before = random_rows(9, 520), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = compiled(x, weight, bias)
        torch.set_num_threads(3)
        three = compiled(x, weight, bias)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_may_stand_anywhere(compiled: Step, kind: torch.dtype) -> None:
    weight, scale, bias = random_map(40, 30, kind)
    whole = random_rows(5, 8, 60)
    spread = torch.randn(80)[::2]  # a bias every other number of which counts
    wide = torch.zeros(40, 47, dtype=kind)
    wide[:, 5:35] = weight
    for x in (whole[:, :3, 7:37], whole[..., ::2], whole[:, 2, :30], whole.transpose(0, 1)[..., 30:], whole[0, 0, :30]):
        expected = compiled(x.contiguous(), weight, bias, scale=scale)
        assert expected.shape == (*x.shape[:-1], 40)
        assert torch.equal(compiled(x, weight, bias, scale=scale), expected)
        assert torch.equal(compiled(x, wide[:, 5:35], bias, scale=scale), expected)
        assert torch.equal(compiled(x, weight, spread, scale=scale), compiled(x, weight, spread.clone(), scale=scale))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_few_bits_lose_only_what_the_weight_loses(compiled: Step, kind: torch.dtype) -> None:
    weight, scale, bias = random_map(96, 512, kind)
    x = 100 * random_rows(8, 512)  # numbers that neither bfloat16 nor int8 has
    rounded = weight.float() if scale is None else weight.float() * scale[:, None]
    worst = (compiled(x, weight, bias, scale=scale) - F.linear(x, rounded, bias)).abs().max()
    assert worst < 1e-6 * float(x.norm(dim=-1).max() * rounded.norm(dim=-1).max())


@pytest.mark.parametrize("outlier", (1, 100))
def test_a_packed_int8_weight_loses_far_more_by_itself_than_by_what_x_is_rounded_to(
    compiled: Step, outlier: int
) -> None:
    weight, scale, _ = random_map(96, 1024, torch.int8)
    x = 100 * random_rows(8, 1024)
    x[:, 5] *= outlier
    original = torch.randn(96, 1024, generator=torch.Generator().manual_seed(0))
    rounded, found = exact(x, weight, None, scale, False), compiled(x, plain.linear_pack(weight), None, scale=scale)
    lost = (rounded - exact(x, original, None, None, False)).square().mean().sqrt()
    assert (found - rounded).square().mean().sqrt() < 0.02 * lost


def test_rows_of_a_packed_int8_weight_that_no_number_fits_stay_what_they_are(compiled: Step) -> None:
    weight, scale, bias = random_map(37, 203, torch.int8)
    x = random_rows(6, 203)
    x[1, 202], x[2, 0], x[3], x[4] = torch.nan, torch.inf, 0, 1e-3
    x[5] *= 1e30
    y = compiled(x, plain.linear_pack(weight), bias, scale=scale)
    expected = plain.linear_step(x, weight, bias, scale=scale)
    assert not y[1:3].isfinite().any() and torch.equal(y[3], bias)
    for row in (0, 4, 5):
        assert_near(y[row] / x[row].norm(), expected[row].double() / x[row].norm(), 1e-4, 0.0)


@pytest.mark.parametrize("silu", (False, True))
def test_nan_and_infinity_go_where_those_of_pytorch_go(compiled: Step, form: Form, silu: bool) -> None:
    weight, _, bias = random_map(37, 83, torch.float32)
    x = random_rows(6, 83)
    x[1, 82], x[2, 0], x[3, 40], x[4, 7] = torch.nan, torch.inf, -torch.inf, 1e38
    weight[5, 81], weight[36, 3], bias[7] = torch.inf, torch.nan, -torch.inf
    y, expected = compiled(x, form(weight), bias, silu=silu), plain.linear_step(x, weight, bias, silu=silu)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nothing_in_gives_nothing_or_the_bias(compiled: Step, form: Form, kind: torch.dtype) -> None:
    weight, scale, bias = random_map(20, 12, kind)
    assert compiled(torch.empty(3, 0, 12), form(weight), bias, scale=scale).shape == (3, 0, 20)
    assert compiled(torch.empty(0, 12), form(weight), bias, scale=scale).shape == (0, 20)
    none = compiled(torch.empty(4, 12), form(weight[:0]), bias[:0], scale=None if scale is None else scale[:0])
    assert none.shape == (4, 0)
    empty, scale, bias = random_map(20, 0, kind)
    assert torch.equal(compiled(torch.empty(4, 0), form(empty), bias, scale=scale), bias.expand(4, 20))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_operator_keeps_the_rules_of_torch_library(kind: torch.dtype) -> None:
    speechkit_kernels.ready()
    weight, scale, bias = random_map(20, 48, kind)
    options = {"scale": scale, "silu": True}
    around = {"norm_weight": torch.ones(48), "norm_bias": torch.zeros(48), "add": random_rows(2, 3, 20), "factor": 2.0}
    args = (random_rows(2, 3, 48), weight, bias)
    torch.library.opcheck(torch.ops.speechkit.linear_step.default, args, options | around)
    torch.library.opcheck(torch.ops.speechkit.linear_step.default, (random_rows(48), weight, None), options)
    packed = plain.linear_pack(weight)
    torch.library.opcheck(torch.ops.speechkit.linear_step.default, (args[0], packed, bias), options | around)
    whole = random_map(32, 48, kind)
    whole_options = {"scale": whole[1], "silu": True}
    whole_args = (random_rows(48), plain.linear_pack(whole[0]), None)
    torch.library.opcheck(torch.ops.speechkit.linear_step.default, whole_args, whole_options)
    torch.library.opcheck(torch.ops.speechkit.linear_pack.default, (weight,))


def test_it_compiles_into_one_graph() -> None:
    speechkit_kernels.ready()
    weight, scale, bias = random_map(20, 48, torch.int8)
    x = random_rows(2, 5, 64)

    def model(x: Tensor) -> Tensor:
        step, packed = torch.ops.speechkit.linear_step, torch.ops.speechkit.linear_pack(weight)
        return sum(step(x[..., 8:56] + 1, form, bias, scale=scale, silu=True) * 2 for form in (weight, packed))

    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


BAD = {
    "x must be torch.float32": {"x": torch.zeros(2, 8, dtype=torch.float64)},
    r"x must be \[..., 8\], but has the shape \[2, 7\]": {"x": torch.zeros(2, 7)},
    r"x must be \[..., 8\], but has the shape \[\]": {"x": torch.zeros(())},
    "weight must be .* but has the shape": {"weight": torch.zeros(8)},
    r"weight must be \[any, any, 16\], but has the shape \[1, 8, 8\]": {"weight": torch.zeros(1, 8, 8)},
    "weight must be contiguous where it is packed": {"weight": torch.zeros(1, 16, 8).transpose(1, 2)},
    r"bias must have 17 to 32 numbers with a packed weight of the shape \[2, 8, 16\], .* but has 5": {
        "weight": torch.zeros(2, 8, 16)
    },
    r"bias must have 1 to 16 numbers .* but has 17": {"weight": torch.zeros(1, 8, 16), "bias": torch.zeros(17)},
    "weight must be torch.float32, torch.bfloat16 or torch.int8": {"weight": torch.zeros(5, 8, dtype=torch.float64)},
    "weight must have the numbers of a row side by side, .* stride is 5": {"weight": torch.zeros(8, 5).t()},
    r"bias must be \[5\], but has the shape \[8\]": {"bias": torch.zeros(8)},
    "bias must be torch.float32, but is torch.bfloat16": {"bias": torch.zeros(5, dtype=torch.bfloat16)},
    "scale must be given with a weight of torch.int8 .* is None": {"weight": torch.zeros(5, 8, dtype=torch.int8)},
    "scale must be given with a weight of torch.int8 .* is given": {"scale": torch.ones(5)},
    r"scale must be \[5\]": {"weight": torch.zeros(5, 8, dtype=torch.int8), "scale": torch.ones(1)},
    "norm_weight and norm_bias must be given together": {"norm_weight": torch.ones(8)},
    r"norm_weight must be \[8\]": {"norm_weight": torch.ones(5), "norm_bias": torch.ones(8)},
    r"norm_bias must be \[8\]": {"norm_weight": torch.ones(8), "norm_bias": torch.ones(1)},
    r"add must be \[2, 5\], but has the shape \[5\]": {"add": torch.ones(5)},
    "add must be torch.float32, but is torch.float64": {"add": torch.ones(2, 5, dtype=torch.float64)},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("by", ["compiled", "plain"])
def test_a_bad_argument_is_named_in_one_sentence(message: str, by: str) -> None:
    if by == "compiled" and speechkit_kernels.instruction_set() is None:
        pytest.skip("no compiled kernels here")
    step = torch.ops.speechkit.linear_step if by == "compiled" else plain.linear_step
    given = {"x": torch.zeros(2, 8), "weight": torch.zeros(5, 8), "bias": torch.zeros(5)} | BAD[message]
    with pytest.raises(ValueError, match=f"^linear_step: {message}.*") as error:
        step(**given)
    assert str(error.value).count("\n") == 0


VIEWS = {
    "one frame a row, its stride a leftover": lambda x: x[:, 0].as_strided((6, 1, 24), (x.stride(0), 1, 1)),
    "one row, its stride a leftover": lambda x: x[0].as_strided((1, 5, 24), (7, 24, 1)),
    "frames first": lambda x: x.transpose(0, 1),
    "every other row": lambda x: x[::2],
    "every other frame": lambda x: x[:, ::2],
    "one frame of a longer call": lambda x: x[:, 2:3],
    "the same row again": lambda x: x[:1, :1].expand(4, 3, 24),
    "every other number": lambda x: torch.cat([x, x], dim=-1)[..., ::2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_any_view_of_x_is_read_where_it_lies(view: str) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(10, 24, generator=generator)
    x = VIEWS[view](torch.randn(6, 5, 24, generator=generator))
    speechkit_kernels.ready()
    torch.testing.assert_close(torch.ops.speechkit.linear_step(x, weight, None), F.linear(x, weight))
