"""stream_attn by tiles of AMX, emulated: what it may touch, how exact it is, and bugs planted in its text."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import speechkit_kernels
import torch
from speechkit_kernels import build, plain
from test_stream_attn import Call, assert_as_defined, by_index, copy, make
from tiles_emulator import FORBIDDEN, Bug, TilesEmulator
from torch import Tensor

# Several tiles of queries, the last with 8; rings that wrap inside a tile; heads that share keys; and, in the second, a
# width whose last slice overlaps the one before.
HARD: tuple[dict[str, Any], ...] = (
    dict(B=3, C=40, H=4, G=2, D=64, left=70, spare=3),
    dict(B=2, C=9, H=2, G=2, D=80, left=21, spare=0, options=("rel", "bias_v")),
)


def forbid(call: Call) -> Call:
    """What nobody may see is marked so that the emulator refuses to load it: dead slots, new frames past a row's, and
    what lies around the new frames in memory."""
    bits = call["cache"].view(torch.int16)
    bits[call["cache"].isnan()] = FORBIDDEN
    for name in ("k", "v"):
        B, C, G, D = call[name].shape
        around = torch.full((B, C + 32, G, D), FORBIDDEN, dtype=torch.int16).view(torch.bfloat16)
        for b, n in enumerate(call["qlen"].tolist()):
            around[b, 16 : 16 + n] = call[name][b, :n]
        call[name] = around[:, 16 : 16 + C]
    return call


@cache
def hard(seed: int) -> tuple[tuple[Call, Tensor], ...]:
    """Calls, and what they give in float64."""
    torch.manual_seed(seed)
    calls = [forbid(make(**sizes, dtype=torch.bfloat16)) for sizes in HARD]
    return tuple((call, plain.stream_attn(**copy(call, double=True))) for call in calls)


def is_right(tiles: TilesEmulator, seed: int) -> bool:
    for call, expected in hard(seed):
        try:
            error = (tiles.stream_attn(**copy(call)).double() - expected).norm(dim=(-1, -2))
        except RuntimeError:
            return False
        if not (error <= 1e-2 * expected.norm(dim=(-1, -2))).all():  # NaN is not
            return False
    return True


def test_a_product_of_tiles_rounds_step_by_step_as_the_manual_says(tiles: TilesEmulator) -> None:
    """Float64 holds each product of bfloat16, and its sum with a float32 of similar size, exactly."""
    torch.manual_seed(0)
    total, a, b = torch.randn(16, 16) * 8, torch.randn(16, 32).bfloat16(), torch.randn(16, 16, 2).bfloat16()
    two = torch.zeros(2, 16, 16)  # sums of even and of odd places
    for k in range(16):
        for odd in range(2):
            product = a[:, 2 * k + odd, None].double() * b[k, :, odd].double()
            two[odd] = (two[odd].double() + product).float()
    expected = total + (two[0] + two[1])
    tiles.product(total, a, b)
    assert torch.equal(total, expected)


def test_subnormal_numbers_are_zeros_to_tiles(tiles: TilesEmulator) -> None:
    tiny = 2.0**-126
    total, a, b = torch.zeros(16, 16), torch.zeros(16, 32).bfloat16(), torch.zeros(16, 16, 2).bfloat16()
    a[0, 0], b[0, 0, 0] = tiny / 2, 2.0**100  # a subnormal factor
    a[1, 0], b[0, 1, 0] = tiny, 0.5  # a subnormal product
    a[2, 0], b[0, 2, 0], total[2, 2] = tiny, 1.5, -tiny  # a subnormal sum
    a[3, 0], b[0, 3, 0] = tiny, 1.0  # the least that counts
    tiles.product(total, a, b)
    assert total.diagonal()[:4].tolist() == [0, 0, 0, tiny]


def test_nothing_is_loaded_that_nobody_may_see(tiles: TilesEmulator) -> None:
    assert all(is_right(tiles, seed) for seed in range(4))


@pytest.mark.parametrize(
    "sizes",
    [
        dict(C=3 * 16, chunk=16, left=7, spare=16),
        dict(C=6, chunk=3, left=40),
        dict(H=6, G=1, C=17),
        dict(H=6, G=2, C=17, D=64),
    ],
    ids=str,
)
def test_a_call_may_bring_several_chunks_and_heads_may_share_keys(tiles: TilesEmulator, sizes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    assert_as_defined(tiles.stream_attn, make(**{"B": 2, "H": 2, "D": 32} | sizes, dtype=torch.bfloat16), 5e-3)


def test_neither_the_slot_nor_the_lap_nor_the_threads_matter(tiles: TilesEmulator) -> None:
    torch.manual_seed(0)
    call = make(B=4, C=18, D=64, left=20, dtype=torch.bfloat16)
    expected = tiles.stream_attn(**copy(call))
    moved, order = copy(call), torch.randperm(6)
    moved["cache"][order], moved["cache_bias"][order] = call["cache"].clone(), call["cache_bias"].clone()
    moved["slots"] = order[call["slots"].long()]
    lap = copy(call)
    lap["pos"] = call["pos"] + (call["pos"] >= 20) * 7 * call["cache"].shape[3]
    assert torch.equal(tiles.stream_attn(**moved), expected)
    assert torch.equal(tiles.stream_attn(**lap), expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(tiles.stream_attn(**copy(call)), expected)
    finally:
        torch.set_num_threads(threads)


def test_a_key_whose_bias_is_minus_infinity_has_no_weight_and_large_scores_choose_one_key(
    tiles: TilesEmulator,
) -> None:
    torch.manual_seed(0)
    call = make(C=12, left=20, options=("key_bias",), dtype=torch.bfloat16)
    call["key_bias"][:, 0] = -math.inf
    call["v"][:, 0] = 1e30
    call["qlen"][:] = 12
    assert_as_defined(tiles.stream_attn, call, 5e-3)
    call = make(C=12, D=64, options=("rel",), dtype=torch.bfloat16)
    call["q"] *= 1e4
    expected, _, _ = by_index(call)
    torch.testing.assert_close(tiles.stream_attn(**call).double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("frames", [3, 16, 20])
def test_tiles_are_closer_to_the_truth_than_plain_pytorch_in_bfloat16(tiles: TilesEmulator, frames: int) -> None:
    call = make(B=2, C=frames, H=4, G=4, D=64, left=64, dtype=torch.bfloat16, options=("bias_u", "bias_v", "rel"))
    expected, _, _ = by_index(call)

    def error(out: Tensor) -> Tensor:
        return (out.double() - expected).norm()

    assert error(tiles.stream_attn(**copy(call))) <= 0.8 * error(plain.stream_attn(**copy(call)))


def test_only_bfloat16_of_more_than_two_frames_is_multiplied_in_tiles(tiles: TilesEmulator) -> None:
    def equal(call: Call) -> bool:
        return torch.equal(tiles.stream_attn(**copy(call)), torch.ops.speechkit.stream_attn(**copy(call)))

    torch.manual_seed(0)
    assert equal(make(C=2, D=64, left=40, dtype=torch.bfloat16))
    assert not equal(make(C=3, D=64, left=40, dtype=torch.bfloat16))  # in last bits: another order of sums
    with pytest.raises(ValueError, match=r"q must be torch\.bfloat16 for tiles"):
        torch.ops.speechkit_tiles.stream_attn(**make())


def test_amx_is_an_instruction_set_of_attention_alone() -> None:
    if "amx" not in build.ISAS:
        pytest.skip("tiles are of x86")
    assert build.isas("stream_attn")[:2] == ["amx", "avx512bf16"]
    assert build.isas("conv_step")[0] == "avx512bf16"
    compiled = [(unit.source, unit.isa) for unit in build.UNITS if unit.isa == "amx"]
    assert compiled == [("stream_attn.cpp", "amx")]


@pytest.mark.parametrize("isa", ["amx", "avx512bf16", "avx2"])
def test_explain_names_the_instruction_set_each_operator_runs_in(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if speechkit_kernels.instruction_set() is None or isa not in build.ISAS:
        pytest.skip("there are no compiled kernels of x86")
    monkeypatch.setattr(speechkit_kernels.serving, "instruction_set", lambda: isa)
    said = {s.operator: s for s in speechkit_kernels.explain() if s.device == "cpu"}
    assert said["stream_attn"].kernel == isa
    assert said["linear_step"].kernel == ("avx512bf16" if isa == "amx" else isa)
    assert ("amx" in said["stream_attn"].reason) == (isa != "amx")
    assert all("amx" not in each.reason for name, each in said.items() if name != "stream_attn")
    assert all(each.reason.endswith(".") or not each.reason for each in said.values())


BUGS: dict[str, Bug] = {
    "tiles have one row too few": (
        "rows[16] = {16, 16, 16, 16, 16, 16, 16, 16}",
        "rows[16] = {15, 15, 15, 15, 15, 15, 15, 15}",
    ),
    "tiles are not configured": ("    tiles_configure(&shapes);\n", ""),
    "tiles are left in use": ("  ~Tiles() { tiles_release(); }", "  ~Tiles() {}"),
    "a tile reaches past the last key": (" && first + L - 1 <= last", ""),
    "the end of the ring is ignored": (" && rows.stretch(first + L - 1) == s", ""),
    "the band is off by one row": ("m - (L - rows),", "m - (L - rows) + 1,"),
    "the band does not reach into the next tile": ("if (a.rel) fill(j + L);", "if (a.rel) fill(j);"),
    "the keys of a pair are swapped": (
        "one + start(u), two ? two + start(u) : nullptr",
        "two ? two + start(u) : one, one + start(u)",
    ),
    "weights past the last key are left from before": (
        "    memset(scores + words * L, 0, (blocks * L - words) * kRow);\n",
        "",
    ),
    "values are those of another head": ("!memcmp(&held, &values, sizeof held)", "true"),
    "numbers of two slices count twice": ("    memset(last, 0, (kSlice - rest) * L * sizeof(Number));\n", ""),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, tiles: TilesEmulator) -> None:
    tiles.start(BUGS[bug])
    assert not all(is_right(tiles, seed) for seed in range(4))


@pytest.mark.parametrize(
    ("bug", "sentence"),
    [
        ("tiles have one row too few", "the shapes of three tiles do not make a product"),
        ("tiles are not configured", "of tile 0 while tiles are not configured"),
        ("tiles are left in use", "tiles are left in use at the end of a call"),
        ("a tile reaches past the last key", r"row \d+ of a load holds what nobody may see"),
    ],
)
def test_what_a_processor_would_refuse_or_nobody_notice_is_said_in_a_sentence(
    bug: str, sentence: str, tiles: TilesEmulator
) -> None:
    tiles.start(BUGS[bug])
    with pytest.raises(RuntimeError, match=sentence):
        tiles.stream_attn(**copy(hard(0)[0][0]))
