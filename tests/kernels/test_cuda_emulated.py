"""csrc/cuda/stream_attn.cu, launched as on a GPU and run on the CPU one fiber a CUDA thread, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_cases import CASES, Case, alone, answer, build, case, check, later
from cuda_emulator import HOPPER, SMALL, Bug, Emulator
from speechkit_kernels import plain
from torch import Tensor

Run = Callable[..., Tensor]


@pytest.fixture
def run(emulator: Emulator) -> Run:
    """Runs a call; its ``cache`` is changed in place, as everywhere."""

    def run(
        made: dict[str, Any],
        seed: int = 0,
        limit: int = HOPPER,
        blocks: int = 2,
        constants: Bug = ("", ""),
        bug: Bug | None = None,
    ) -> Tensor:
        emulator.start(bug, constants, shared_bytes=limit, blocks=blocks * made["q"].shape[2])
        return emulator.call("stream_attn", made, ("cache", "cache_bias"), seed)

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_kernel_equals_plain_pytorch(case: Case, run: Run) -> None:
    for seed in range(3):
        made = build(case, seed)
        expected, exact = answer(made)
        check(case, run(made, seed, blocks=1 + seed), made, expected, exact)


@pytest.mark.parametrize(
    "case",
    [
        case("bf16, long memory", width=128, left=290, heads=1, key_heads=1, rows=((1000, 16, 16), (20, 16, 16))),
        case("float32, 40 frames", dtype=torch.float32, width=128, frames=40, left=90, heads=1, key_heads=1,
             rows=((100, 40, 40), (3, 35, 7))),
    ],
    ids=lambda c: c.name,
)  # fmt: skip
def test_a_table_too_long_for_shared_memory_comes_with_the_keys(case: Case, run: Run, emulator: Emulator) -> None:
    made = build(case)
    expected, exact = answer(made)
    check(case, run(made, limit=SMALL), made, expected, exact)
    assert "TABLE=2" in emulator.asked[0]


def test_a_stream_gives_the_same_bits_alone_in_another_slot_and_after_the_ring_went_round(run: Run) -> None:
    made = build(replace(CASES[1], rows=((77, 14, 9), (80, 14, 14), (64, 6, 2))))
    singles = [alone(made, b) for b in range(3)]
    shifted = later({n: x.clone() if isinstance(x, Tensor) else x for n, x in made.items()}, 1 << 30)
    together = run(made, blocks=2)
    assert torch.equal(run(shifted, seed=1, blocks=3), together)
    for b, single in enumerate(singles):
        assert torch.equal(run(single, seed=b)[0], together[b])


@pytest.mark.parametrize("seed", range(8))
def test_warps_may_drift_as_they_like(seed: int, run: Run) -> None:
    made = build(CASES[0])
    first, used = run({**made, "cache": made["cache"].clone()}), {**made, "cache": made["cache"].clone()}
    assert torch.equal(run(used, seed=seed + 1, blocks=1), first)


def test_three_stages_in_flight_give_the_bits_of_two(run: Run) -> None:
    made = build(CASES[1])
    again = {n: x.clone() if isinstance(x, Tensor) else x for n, x in made.items()}
    assert torch.equal(run(again, seed=1, blocks=1, constants=("STAGES=2", "STAGES=3")), run(made))


def test_what_the_kernel_does_not_serve_goes_to_plain_pytorch(run: Run, emulator: Emulator) -> None:
    made = build(CASES[0])
    double = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in made.items()}
    strided = made | {"cache": made["cache"].transpose(3, 4).contiguous().transpose(3, 4)}
    for call, limit in (
        (double, HOPPER),
        (build(replace(CASES[0], width=136)), HOPPER),
        (strided, HOPPER),
        (made, 4096),
    ):
        exact = {n: x.clone() if isinstance(x, Tensor) else x for n, x in call.items()}
        out = run(call, limit=limit)
        assert emulator.machine.launches == 0
        assert torch.equal(out, plain.stream_attn(**exact))
        torch.testing.assert_close(call["cache"], exact["cache"], rtol=0, atol=0, equal_nan=True)


def test_other_layouts_and_types_are_put_right_first(run: Run, emulator: Emulator) -> None:
    """The launcher's copies are unknown to the emulator, so that the addresses are not checked here."""
    made = build(CASES[-4])
    expected, exact = answer(made)
    odd = dict(made)
    for name in ("q", "k", "v", "rel"):
        odd[name] = made[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    odd["slots"] = torch.stack([made["slots"], made["slots"]], 1)[:, 0]
    odd["bias_u"] = made["bias_u"].double()
    emulator.start()
    emulator.machine.unchecked = 1
    out = torch.ops.speechkit_emulated.stream_attn(**odd)
    check(CASES[-4], out, odd, expected, exact)


def test_a_row_whose_slot_or_time_does_not_exist_is_as_one_without_frames(run: Run) -> None:
    made = build(case("wrong", rows=((20, 16, 16), (30, 16, 16), (5, 16, 16), (64, 16, 16))))
    for name in ("q", "k", "v"):
        made[name].nan_to_num_()
    before = made["cache"].clone()
    made["slots"][0], made["slots"][1], made["pos"][2] = -1, 1000, -3
    out = run(made)
    assert not out[:3].any() and out[3].isfinite().all() and out[3].any()
    others = [s for s in range(len(before)) if s != made["slots"][3]]
    torch.testing.assert_close(made["cache"][others], before[others], rtol=0, atol=0, equal_nan=True)


def test_bf16_is_closer_to_the_truth_than_plain_pytorch_in_bf16(run: Run) -> None:
    made = build(CASES[0])
    expected, _ = answer(made)
    eager = plain.stream_attn(**{**made, "cache": made["cache"].clone()})
    assert (run(made).double() - expected).norm() <= 0.8 * (eager.double() - expected).norm()


BUGS = {
    "copies are not waited for": ("            copy_wait<STAGES - 2>();\n", ""),
    "no barrier in the loop": ("            barrier();  // this stage", "            // this stage"),
    "a stage is loaded before the barrier": (
        "            copy_wait<STAGES - 2>();\n            barrier();",
        "            load_next();\n            copy_wait<STAGES - 1>();\n            barrier();\nif (false)",
    ),
    "the band is not carried": (
        "w.band[j / 4][j % 4] = band[2 + j / 4][j % 4];",
        "w.band[j / 4][j % 4] = band[j / 4][j % 4];",
    ),
    "the wrong lane parity": ("(e == 1) != odd", "(e == 1) == odd"),
    "the table off by one row": ("- (ROWS - 1) + key", "- ROWS + key"),
    "the slab one block short": (
        "load_table(a, SLAB, 0, (a.left + a.frames + 15) / 16 * 16 + ROWS)",
        "load_table(a, SLAB, 0, (a.left + a.frames + 15) / 16 * 16 + ROWS - 16)",
    ),
    "unseen values are not zeros": (
        "seen ? value + piece * VEC : a.v.at, seen",
        "past ? value + piece * VEC : a.v.at, true",
    ),
    "parts meet without a barrier": (
        "        hand_in(w, warp, sums);\n        barrier();",
        "        hand_in(w, warp, sums);",
    ),
    "sums are written over values in use": ("        barrier();  // all are done with it", ""),
    "every new frame is kept": ("a.keep.at ? least((int)count(a.keep, b), s.qlen) : s.qlen", "s.qlen"),
    "the ring is not closed": ("at < a.W ? at : at - a.W", "at"),
    "heads share a ring that are not of one group": (
        "const int head = block_y() / a.group;\n    const bool first",
        "const int head = 0;\n    const bool first",
    ),
}


HARD = case("hard", left=150, rows=((1000, 16, 11), (40, 9, 9), (160, 16, 16)))


def is_right(run: Run, seed: int, bug: Bug | None = None) -> bool:
    """Three stages and tiles a part, a ring that wraps, frames that are not kept."""
    made = build(HARD, seed)
    try:
        expected, exact = answer(made)
        check(HARD, run(made, seed, bug=bug), made, expected, exact)
    except (AssertionError, RuntimeError):
        return False
    return True


def test_the_hard_call_is_right(run: Run) -> None:
    assert all(is_right(run, seed) for seed in range(4))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, run: Run) -> None:
    """A few schedules, of which one must tell."""
    assert not all(is_right(run, seed, BUGS[bug]) for seed in range(4))
