"""stream_attn, for every instruction set of this machine and in plain PyTorch, against sums written by index."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import speechkit_kernels
import torch
from instruction_sets import instruction_set
from speechkit_kernels import build, plain
from torch import Tensor

from speechkit.attention.attend import attend
from speechkit.attention.positions import Alibi, RelativePosition
from speechkit.stream import Context, Span

Call = dict[str, Any]
Operator = Callable[..., Tensor]
PLAIN = "plain"
EMULATED = "amx, emulated"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
OPTIONS = ("keep", "q_pos", "bias_u", "bias_v", "rel", "key_bias", "slopes")


@pytest.fixture(params=[*build.ISAS, EMULATED, PLAIN])
def operator(request: pytest.FixtureRequest) -> Iterator[Operator]:
    if request.param == PLAIN:
        yield plain.stream_attn
        return
    if request.param == EMULATED:
        yield request.getfixturevalue("tiles").stream_attn
        return
    with instruction_set(request.param):
        yield torch.ops.speechkit.stream_attn


@pytest.fixture
def compiled() -> Operator:
    if speechkit_kernels.instruction_set() is None:
        pytest.skip("the compiled kernels are not there: " + str(speechkit_kernels.explain()[0]))
    return torch.ops.speechkit.stream_attn


def make(
    B: int = 3, C: int = 5, H: int = 4, G: int = 2, D: int = 16, left: int = 6, chunk: int = 0, spare: int = 3,
    options: tuple[str, ...] = OPTIONS, dtype: torch.dtype = torch.float32, rows: torch.dtype = torch.int32,
) -> Call:  # fmt: skip
    """Arguments of a call in the middle of some streams; what the ring holds outside their reach is NaN."""
    S, W, back = B + 2, left + C + spare, left + (chunk or C) - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    pos = torch.randint(0, 5, (B,)) * (chunk or W // 2 + 1)
    qlen = torch.randint(0, C + 1, (B,))
    qlen[:1] = C
    call: Call = dict(q=normal(B, C, H, D), k=normal(B, C, G, D), v=normal(B, C, G, D), cache=normal(S, 2, G, W, D))
    call |= dict(slots=torch.randperm(S)[:B].to(rows), pos=pos.to(rows), qlen=qlen.to(rows))
    call |= dict(left=left, chunk=chunk, scale=D**-0.5)
    extra: Call = dict(q_pos=normal(B, C, H, D), bias_u=normal(H, D) / 2, bias_v=normal(H, D) / 2)
    extra |= dict(rel=normal(H, back + 1 + C, D) / 2, slopes=torch.rand(H), keep=(torch.rand(B) * (qlen + 1)).to(rows))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    extra["key_bias"] = normal(B, C, H).to(real)
    call |= {name: extra[name] for name in options}
    if "rel" in options:
        call["rel_zero"] = back
    if "key_bias" in options:
        call["cache_bias"] = normal(S, H, W).to(real)
    dead = torch.ones(S, W, dtype=torch.bool)
    for s, t in zip(call["slots"].tolist(), pos.tolist(), strict=True):
        dead[s, [past % W for past in range(max(0, t - left - (chunk and chunk - 1)), t)]] = False
    call["cache"].masked_fill_(dead[:, None, None, :, None], math.nan)
    if "key_bias" in options:
        call["cache_bias"].masked_fill_(dead[:, None], math.nan)
    return call


def copy(call: Call, double: bool = False) -> Call:
    def each(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        return x.double() if double and x.is_floating_point() else x.clone()

    return {name: each(x) for name, x in call.items()}


def by_index(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """The definition, one number at a time in float64: output, ring, and ring of key biases."""
    c = copy(call, double=True)
    (B, C, H, D), (_, _, G, W, _) = c["q"].shape, c["cache"].shape
    keep, out = c.get("keep", c["qlen"]), torch.zeros(B, C, H, D, dtype=torch.float64)
    ring, ring_bias = c["cache"].clone(), c["cache_bias"].clone() if "cache_bias" in c else None
    for b in range(B):
        slot, pos, qlen = (int(c[name][b]) for name in ("slots", "pos", "qlen"))
        for i in range(qlen):
            t = pos + i
            first, size = (t - t % c["chunk"], c["chunk"]) if c["chunk"] else (pos, qlen)
            times = [j for j in range(max(0, first - c["left"]), first + size) if pos - (W - C) <= j < pos + qlen]
            for h in range(H):
                out[b, i, h] = _one(c, b, i, h, h // (H // G), slot, pos, times)
        for i in range(int(keep[b])):
            ring[slot, 0, :, (pos + i) % W], ring[slot, 1, :, (pos + i) % W] = c["k"][b, i], c["v"][b, i]
            if ring_bias is not None:
                ring_bias[slot, :, (pos + i) % W] = c["key_bias"][b, i]
    return out, ring, ring_bias


def _one(c: Call, b: int, i: int, h: int, g: int, slot: int, pos: int, times: list[int]) -> Tensor:
    W, zero = c["cache"].shape[3], torch.zeros(())
    u, v = (c[name][h] if name in c else zero for name in ("bias_u", "bias_v"))
    scores, values = [], []
    for t in times:
        key, value = (
            c["cache"][slot, n, g, t % W] if t < pos else new[b, t - pos, g] for n, new in enumerate((c["k"], c["v"]))
        )
        score = (c["q"][b, i, h] + u) @ key
        if "rel" in c:
            score = score + (c.get("q_pos", c["q"])[b, i, h] + v) @ c["rel"][h, c["rel_zero"] + t - pos - i]
        score = score * c["scale"]
        if "key_bias" in c:
            score = score + (c["cache_bias"][slot, h, t % W] if t < pos else c["key_bias"][b, t - pos, h])
        if "slopes" in c:
            score = score - c["slopes"][h] * abs(pos + i - t)
        scores.append(score)
        values.append(value)
    return torch.softmax(torch.stack(scores), 0) @ torch.stack(values)


def assert_as_defined(operator: Operator, call: Call, tolerance: float) -> None:
    expected, ring, ring_bias = by_index(call)
    out = operator(**call)
    assert out.dtype == call["q"].dtype and out.isfinite().all()
    error = (out.double() - expected).flatten(2).norm(dim=2)
    assert error.norm() <= tolerance * expected.norm()
    assert (error <= 10 * tolerance * expected.norm() / max(1, (error > 0).sum()) ** 0.5).all(), "one row is far off"
    torch.testing.assert_close(call["cache"].double(), ring, rtol=0, atol=0, equal_nan=True)
    if ring_bias is not None:
        torch.testing.assert_close(call["cache_bias"].double(), ring_bias, rtol=0, atol=0, equal_nan=True)


def tolerance_of(operator: Operator, dtype: torch.dtype) -> float:
    # PyTorch rounds to half precision between the products, the kernels once at the end
    return TOLERANCE[dtype] * (4 if operator is plain.stream_attn and dtype.itemsize == 2 else 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", [(), *((name,) for name in OPTIONS), OPTIONS], ids="+".join)
def test_every_option_alone_and_all_together_mean_what_is_defined(
    operator: Operator, options: tuple[str, ...], dtype: torch.dtype
) -> None:
    for frames in (3, 10):
        assert_as_defined(operator, make(C=frames, D=32, options=options, dtype=dtype), tolerance_of(operator, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 2, 5, 16, 33, 36, 49, 64, 80, 81, 96, 128])
def test_any_width_is_served(operator: Operator, width: int, dtype: torch.dtype) -> None:
    for frames in (2, 17):
        assert_as_defined(operator, make(2, frames, 2, 1, width, dtype=dtype), tolerance_of(operator, dtype))


@pytest.mark.parametrize("frames", [1, 2, 4, 6, 7, 8, 9, 15, 16, 25])
def test_any_number_of_frames_is_served(operator: Operator, frames: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for left in (0, 1, 21):
            call = make(2, frames, 1, 1, 32, left=left, spare=left % 2, dtype=dtype)
            assert_as_defined(operator, call, tolerance_of(operator, dtype))


@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 16])
def test_a_call_may_bring_several_chunks(operator: Operator, chunk: int) -> None:
    for chunks in (1, 3):
        assert_as_defined(operator, make(C=chunk * chunks, left=7, chunk=chunk, spare=chunk), TOLERANCE[torch.float32])


@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (6, 2), (6, 6)])
def test_heads_may_share_keys(operator: Operator, heads: tuple[int, int]) -> None:
    assert_as_defined(operator, make(H=heads[0], G=heads[1]), TOLERANCE[torch.float32])


def test_rows_are_int32_or_int64_and_may_be_strided(operator: Operator) -> None:
    call = make(rows=torch.int64)
    for name in ("slots", "pos", "qlen"):
        call[name] = torch.stack([call[name], call[name] * 0 - 1], dim=1)[:, 0]
    assert_as_defined(operator, call, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arguments_may_be_views(operator: Operator, dtype: torch.dtype) -> None:
    call = make(G=4, dtype=dtype)
    call["q"], call["k"], call["v"] = torch.cat([call["q"], call["k"], call["v"]], dim=3).chunk(3, dim=3)
    call["rel"] = call["rel"].transpose(0, 1).contiguous().transpose(0, 1)
    call["key_bias"] = call["key_bias"].transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((*call["cache"].shape[:4], 40), math.nan, dtype=dtype)
    call["cache"] = wide[..., 3:19].copy_(call["cache"])
    assert_as_defined(operator, call, tolerance_of(operator, dtype))
    assert wide[..., :3].isnan().all() and wide[..., 19:].isnan().all()


def test_a_stream_is_the_same_alone_and_in_a_batch(operator: Operator) -> None:
    if operator is plain.stream_attn:
        pytest.skip("PyTorch chooses its sums by the size of the batch")
    for dtype in (torch.float32, torch.bfloat16):
        for frames in (1, 5, 16, 20):
            call = make(B=5, C=frames, D=36, left=30, dtype=dtype)
            together = operator(**copy(call))
            for b in range(5):
                alone = copy(call)
                for name in ("q", "k", "v", "q_pos", "key_bias", "slots", "pos", "qlen", "keep"):
                    alone[name] = alone[name][b : b + 1]
                assert torch.equal(operator(**alone)[0], together[b])


def test_neither_the_slot_nor_the_lap_nor_the_threads_matter(operator: Operator) -> None:
    call = make(B=4, C=9, D=64, left=20)
    expected = operator(**copy(call))
    moved, order = copy(call), torch.randperm(6)
    moved["cache"][order], moved["cache_bias"][order] = call["cache"].clone(), call["cache_bias"].clone()
    moved["slots"] = order[call["slots"].long()]
    lap = copy(call)
    old = call["pos"] >= 20  # a young stream would see its past grow
    lap["pos"] = call["pos"] + old * 7 * call["cache"].shape[3]
    assert torch.equal(operator(**moved), expected)
    assert torch.equal(operator(**lap), expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(operator(**copy(call)), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("position", [None, RelativePosition, Alibi])
def test_a_stream_cut_at_any_chunk_borders_equals_attend_on_the_whole(operator: Operator, position: Any) -> None:
    chunk, left, H, D, frames = 3, 7, 2, 8, 40
    q, k, v = (torch.randn(1, frames, H, D, dtype=torch.float64) for _ in range(3))
    context, options = Context(left=left, chunk=chunk), {}
    term = position(dim=H * D, heads=H).double().requires_grad_(False) if position else None
    if position is RelativePosition:
        term.v.normal_()
        options = dict(
            rel=term._table(left + chunk - 1, left + chunk + 12, q), rel_zero=left + chunk - 1, bias_v=term.v
        )
    elif position is Alibi:
        options = dict(slopes=term.slopes)
    span = Span(torch.zeros(1, dtype=torch.long), torch.tensor([frames]), context)
    with torch.no_grad():
        whole = attend(q, k, v, span, term=term, kernel="reference")
    for seed in range(3):
        dice, pos, outs = random.Random(seed), 0, []
        cache = torch.full((1, 2, H, left + 12, D), math.nan, dtype=torch.float64)
        while pos < frames:
            size = min(chunk * dice.randint(1, 4), frames - pos)
            new = (x[:, pos : pos + size] for x in (q, k, v))
            row = torch.tensor([0]), torch.tensor([pos]), torch.tensor([size])
            outs.append(operator(*new, cache, *row, chunk=chunk, left=left, scale=D**-0.5, **options))
            pos += size
        torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=0, atol=1e-12)


def test_streams_that_join_pause_reset_and_revise_never_see_each_other(operator: Operator) -> None:
    S, C, H, D, left = 5, 6, 2, 16, 9
    dice = random.Random(0)
    cache = torch.full((S, 2, H, left + C + 1, D), math.nan)
    history: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(S)]
    for _ in range(60):
        slots = dice.sample(range(S), dice.randint(1, S))
        for s in slots:
            if dice.random() < 0.1:
                history[s] = []
        qlen = [dice.randint(0, C) for _ in slots]
        keep = [dice.randint(0, n) for n in qlen]
        q, k, v = (torch.randn(len(slots), C, H, D) for _ in range(3))
        for b, n in enumerate(qlen):
            for x in (q, k, v):
                x[b, n:] = math.nan
        pos = torch.tensor([len(history[s]) for s in slots])
        rows = torch.tensor(slots), pos, torch.tensor(qlen)
        out = operator(q, k, v, cache, *rows, keep=torch.tensor(keep), left=left, scale=0.25)
        for b, s in enumerate(slots):
            new = list(zip(k[b], v[b], strict=True))
            seen = history[s][-left:] + new[: qlen[b]]
            history[s] += new[: keep[b]]
            assert (out[b, qlen[b] :] == 0).all()
            if qlen[b]:
                keys, values = (torch.stack(x).double() for x in zip(*seen, strict=True))
                weights = torch.softmax(torch.einsum("ihd,jhd->hij", q[b, : qlen[b]].double(), keys) / 4, dim=-1)
                expected = torch.einsum("hij,jhd->ihd", weights, values)
                torch.testing.assert_close(out[b, : qlen[b]].double(), expected, rtol=1e-5, atol=2e-6)


def test_nothing_new_gives_zeros_and_leaves_the_ring(operator: Operator) -> None:
    call = make(options=())
    call["qlen"].zero_()
    before = call["cache"].clone()
    assert (operator(**call) == 0).all()
    torch.testing.assert_close(call["cache"], before, rtol=0, atol=0, equal_nan=True)


def test_an_empty_batch_and_a_call_without_frames_are_served(operator: Operator) -> None:
    assert operator(**make(B=1, C=0, options=())).shape == (1, 0, 4, 16)
    call = make(B=1, options=())
    for name in ("q", "k", "v", "slots", "pos", "qlen"):
        call[name] = call[name][:0]
    assert operator(**call).shape == (0, 5, 4, 16)


@pytest.mark.parametrize("frames", [2, 12])
def test_scores_of_ten_thousand_choose_one_key(operator: Operator, frames: int) -> None:
    call = make(C=frames, D=64, options=("bias_u", "rel"))
    call["q"] *= 1e4
    expected, _, _ = by_index(call)
    torch.testing.assert_close(operator(**call).double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("frames", [2, 12])
def test_a_key_whose_bias_is_minus_infinity_has_no_weight(operator: Operator, frames: int) -> None:
    call = make(C=frames, left=20, options=("key_bias",))
    call["key_bias"][:, 0] = -math.inf
    call["v"][:, 0] = 1e30
    call["qlen"][:] = frames
    assert_as_defined(operator, call, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [2, 12])
def test_nan_in_a_live_key_reaches_those_who_see_it_and_nobody_else(
    operator: Operator, frames: int, dtype: torch.dtype
) -> None:
    for name in ("k",) if operator is plain.stream_attn else ("k", "v"):  # PyTorch multiplies hidden values by 0
        call = make(C=2 * frames, H=2, G=2, D=36, chunk=frames, dtype=dtype, options=())
        call["qlen"][:] = 2 * frames
        call["pos"] *= 0
        call[name][0, frames, 0, 3] = math.nan
        out = operator(**call).isnan().any(-1) if name == "k" else operator(**call)[..., 3].isnan()
        expected = torch.zeros_like(out)
        expected[0, frames:, 0] = True  # the second chunk, in that stream and head
        assert torch.equal(out, expected)


def bad(**changes: Any) -> Callable[[Call], Call]:
    return lambda call: call | {name: x(call) if callable(x) else x for name, x in changes.items()}


BAD = {
    "q must": bad(q=lambda c: c["q"][0]),
    "k must": bad(k=lambda c: c["k"][:, :, :1].expand(-1, -1, 3, -1)),
    "v must": bad(v=lambda c: c["v"][:, 1:]),
    "v must be torch.float32": bad(v=lambda c: c["v"].double()),
    "cache must be torch.float32": bad(cache=lambda c: c["cache"].half()),
    "cache must": bad(cache=lambda c: c["cache"][:, :1]),
    "cache must remember at least left": bad(left=10),
    "chunk and left must": bad(chunk=-1),
    "left must": bad(left=-1),
    "rel must have rows": bad(rel=lambda c: c["rel"][:, :-2]),
    "rel must have rows for": bad(rel_zero=3),
    "q_pos must": bad(q_pos=lambda c: c["q_pos"][..., :8]),
    "cache_bias and key_bias must": bad(key_bias=None),
    "cache_bias must": bad(cache_bias=lambda c: c["cache_bias"][:, :, :5]),
    "cache_bias must be torch.float32": bad(cache_bias=lambda c: c["cache_bias"].double()),
    "key_bias must": bad(key_bias=lambda c: c["key_bias"][:, :, :1]),
    "slots must": bad(slots=lambda c: c["slots"][:2]),
    "pos must be int32 or int64": bad(pos=lambda c: c["pos"].float()),
    "qlen must": bad(qlen=lambda c: c["qlen"][:, None]),
    "keep must": bad(keep=lambda c: c["keep"].bool()),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_argument_is_named(operator: Operator, name: str) -> None:
    call = make()
    before = call["cache"].clone()
    with pytest.raises(ValueError, match=rf"^stream_attn: .*{name}"):
        operator(**BAD[name](call))
    torch.testing.assert_close(call["cache"], before, rtol=0, atol=0, equal_nan=True)


UNSAFE = {
    "slots must be from 0 to 4": bad(slots=lambda c: c["slots"] * 0 + 5),
    "slots must": bad(slots=lambda c: c["slots"] * 0 - 1),
    "pos must": bad(pos=lambda c: c["pos"] * 0 - 1),
    "pos must be": bad(pos=lambda c: c["pos"].long() * 0 + 2**63 - 1),
    "chunk must": bad(chunk=2**63 - 1),
    "rel must": bad(rel_zero=2**63 - 1),
    "qlen must be from 0 to 5": bad(qlen=lambda c: c["qlen"] * 0 + 6),
    "keep must": bad(keep=lambda c: c["keep"] * 0 - 1),
    "bias_u must": bad(bias_u=lambda c: c["bias_u"][:1]),
    "slopes must": bad(slopes=lambda c: c["slopes"][:1]),
    "q must have the stride 1": bad(q=lambda c: c["q"].transpose(2, 3).contiguous().transpose(2, 3)),
    "cache must have the stride 1": bad(cache=lambda c: c["cache"].mT.contiguous().mT),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_what_could_touch_foreign_memory_is_refused(compiled: Operator, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^stream_attn: {name}"):
        compiled(**UNSAFE[name](make()))


def test_a_slot_named_twice_is_refused_when_debugging(compiled: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make()
    call["slots"][:] = 1
    monkeypatch.setenv("SPEECHKIT_DEBUG", "1")
    with pytest.raises(ValueError, match="slots must name each row of the cache once, but name 1 twice"):
        compiled(**call)


@pytest.mark.parametrize("options", [(), OPTIONS], ids=["bare", "all"])
def test_the_operator_passes_every_check_of_torch(compiled: Operator, options: tuple[str, ...]) -> None:
    call = {name: x.nan_to_num() if isinstance(x, Tensor) else x for name, x in make(options=options).items()}
    args = [call.pop(name) for name in ("q", "k", "v", "cache", "slots", "pos", "qlen")]
    torch.library.opcheck(compiled.default, args, call)


def test_a_compiled_graph_writes_into_the_cache_of_its_caller(compiled: Operator) -> None:
    from torch._inductor.utils import run_and_get_code

    def step(q: Tensor, cache: Tensor, **rest: Any) -> Tensor:
        return compiled(q * 2, cache=cache, **rest) + 1

    call = make()
    eager, inductor = copy(call), copy(call)
    address = inductor["cache"].data_ptr()
    with torch.no_grad():
        out, (code,) = run_and_get_code(torch.compile(step, fullgraph=True), **inductor)
        torch.testing.assert_close(out, step(**eager), rtol=0, atol=0)
    torch.testing.assert_close(inductor["cache"], eager["cache"], rtol=0, atol=0, equal_nan=True)
    assert inductor["cache"].data_ptr() == address
    assert "speechkit.stream_attn" in code and "clone" not in code
