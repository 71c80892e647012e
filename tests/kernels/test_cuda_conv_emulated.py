"""csrc/cuda/conv_step.cu, launched as on a GPU and run on the CPU one fiber a CUDA thread, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_conv_cases import B16, CASES, F32, Case, alone, answer, build, check, copied
from cuda_emulator import Bug, Emulator
from speechkit_kernels import plain
from torch import Tensor

Run = Callable[..., Tensor]


@pytest.fixture
def run(emulator: Emulator) -> Run:
    """Runs a call; its ``cache`` is changed in place, as everywhere."""

    def run(made: dict[str, Any], seed: int = 0, bug: Bug | None = None) -> Tensor:
        emulator.start(bug)
        return emulator.call("conv_step", made, ("cache",), seed)

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_kernel_equals_plain_pytorch(case: Case, run: Run) -> None:
    for seed in range(2):
        made = build(case, seed)
        expected, memory = answer(made)
        check(case, run(made, seed), made["cache"], expected, memory)


@pytest.mark.parametrize("dtype", [B16, F32], ids=str)
def test_a_row_is_equal_bit_for_bit_alone_and_in_a_batch(dtype: torch.dtype, run: Run) -> None:
    made = build(Case("rows", dtype=dtype, qlen=(16, 5, 12)))
    singles = [alone(made, b) for b in range(3)]
    together = run(made, seed=1)
    for b, single in enumerate(singles):
        assert torch.equal(run(single)[0], together[b])
        assert torch.equal(single["cache"][1], made["cache"][made["slots"][b]])


@pytest.mark.parametrize("dtype", [B16, F32], ids=str)
def test_a_stream_is_equal_bit_for_bit_in_calls_of_any_size(dtype: torch.dtype, run: Run) -> None:
    made = build(Case("pieces", dtype=dtype, width=100, frames=23, qlen=(23,)))
    whole, memory = run(copied(made)), None
    for size in (1, 8, 22):
        own, outs = copied(made), []
        for part in own["x"].split(size, dim=1):
            piece = own | {"x": part.clone(), "qlen": torch.tensor([part.shape[1]])}
            outs.append(run(piece, seed=size))
        assert torch.equal(torch.cat(outs, 1), whole)
        assert memory is None or torch.equal(own["cache"].nan_to_num(), memory)
        memory = own["cache"].nan_to_num()


def test_a_broken_frame_stays_in_its_own_stream_and_channel(run: Run) -> None:
    made = build(Case("broken", norm=False, taps=3, frames=6, qlen=(6, 6)))
    made["x"][0, 2, 7] = torch.nan
    expected = torch.zeros(2, 6, 64, dtype=torch.bool)
    expected[0, 2:5, 7] = True  # three taps hear it
    assert torch.equal(run(made).isnan(), expected)


def test_a_row_whose_slot_does_not_exist_is_as_one_without_frames(run: Run) -> None:
    made = build(Case("wrong", qlen=(16, 16, 16)))
    made["slots"][0], made["slots"][1] = -1, 1000
    before = made["cache"].clone()
    out = run(made)
    assert not out[:2].any() and out[2].any()
    others = [s for s in range(len(before)) if s != made["slots"][2]]
    torch.testing.assert_close(made["cache"][others], before[others], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "case",
    [Case("filters too long", taps=300, frames=4, qlen=(4,)),
     Case("too many channels for a block", width=5001, taps=3, frames=1, qlen=(1,))],
    ids=lambda c: c.name,
)  # fmt: skip
def test_what_the_kernel_does_not_serve_goes_to_plain_pytorch(case: Case, run: Run, emulator: Emulator) -> None:
    for dtype in (B16, torch.float64):
        made = {
            n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in build(case).items()
        }
        exact = copied(made)
        out = run(made)
        assert emulator.machine.launches == 0
        assert torch.equal(out, plain.conv_step(**exact))
        torch.testing.assert_close(made["cache"], exact["cache"], rtol=0, atol=0, equal_nan=True)


def test_the_sigmoid_is_near_wherever_floats_are_and_ends_where_they_do(run: Run) -> None:
    """A gate beside a frame of 1 is the sigmoid itself, remembered."""
    gate = torch.cat([torch.linspace(-87, 30, 2000), torch.tensor([0.0, 88.5, 3e38, -3e38, torch.inf, -torch.inf])])
    gate = torch.cat([gate, torch.tensor([torch.nan, 1.0])])
    x = torch.stack([torch.ones_like(gate), gate]).reshape(1, 1, -1)
    made = {"x": x, "weight": torch.zeros(gate.numel(), 2), "bias": None, "cache": torch.zeros(1, 1, gate.numel())}
    run(made | {"slots": torch.zeros(1, dtype=torch.int64), "qlen": torch.ones(1, dtype=torch.int64), "gated": True})
    found, exact = made["cache"][0, 0].double(), torch.sigmoid(gate.double())
    bound = (4 + gate.double().abs().clamp(max=100)) * 2**-23 * exact + 1e-38
    assert ((found - exact).abs() <= bound)[:-2].all() and found[-2].isnan()


BUGS: dict[str, Bug] = {
    "frames are not rounded as the memory does": ("rounded(silu(", "(silu("),
    "value and gate are swapped": (
        "silu(value[e], GATED ? by[e] : value[e])",
        "silu(GATED ? by[e] : value[e], value[e])",
    ),
    "the gate is another frame's": ("load(by, from + f * a.x.frame + a.width", "load(by, from + a.width"),
    "one tap serves for all": ("k++, at += a.weight.tap", "k++"),
    "the channels of a thread share a filter": ("single(at + e * a.weight.channel)", "single(at)"),
    "the memory moves on by a whole tile": ("advance(seen, real)", "advance(seen, FRAMES)"),
    "the memory of a row without frames is written": (
        "        if (s.qlen) store(s.memory + i",
        "        store(s.memory + i",
    ),
    "frames that are not there are read": (
        "if (f < real) {\n            load(value",
        "if (true) {\n            load(value",
    ),
    "sums meet without a barrier": ("    barrier();\n", ""),
    "the two sums share their memory": ("sum_channels(sums, WARPS * FRAMES * 4)", "sum_channels(sums, 0)"),
    "threads without channels count": ("sums[f] += s.mine ? y[f][e] : 0.f", "sums[f] += y[f][e]"),
    "their squares count": (
        "s.mine ? multiply_add(y[f][e], y[f][e], sums[f]) : 0.f",
        "multiply_add(y[f][e], y[f][e], sums[f])",
    ),
    "a lane has another frame's sum": ("shuffle(whole, f * SHARE)", "shuffle(whole, f)"),
    "halves of a warp keep the wrong numbers": ("(upper ? x[i + HALF] : x[i]) +", "(upper ? x[i] : x[i + HALF]) +"),
    "absent frames are left as they are": ("store(to + f * a.out.frame, nothing)", "(void)nothing"),
    "threads without channels write": ("    if (!s.mine) return;\n", ""),
    "a slot that does not exist is used": (
        "const bool there = slot >= 0 && slot < a.places",
        "const bool there = true",
    ),
    "eps is forgotten": ("sums[f] / a.width + a.eps", "sums[f] / a.width"),
}  # fmt: skip


HARD = Case("hard", width=164, frames=20, taps=9, qlen=(20, 7, 0, 18, 20))


def hard(seed: int, norm: bool) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Three warps, the last of them half empty, two tiles, ragged rows, a quiet one, the first without a slot."""
    made = build(replace(HARD, norm=norm, bias=not norm), seed)
    if norm:
        made["norm_bias"].mul_(0.1), made["x"][3].mul_(0.01), made["cache"][made["slots"][3]].mul_(0.01)  # eps matters
    spare = next(slot for slot in range(7) if slot not in made["slots"])
    absent = {"slots": torch.tensor([spare, *made["slots"][1:]]), "qlen": torch.tensor([0, *made["qlen"][1:]])}
    expected, memory = answer(made | absent)
    made["slots"][0] = 7
    return made, expected, memory


def is_right(run: Run, seed: int, norm: bool, bug: Bug | None = None) -> bool:
    made, expected, memory = hard(seed, norm)
    try:
        out = run(made, seed, bug=bug)
        check(HARD, out, made["cache"], expected, memory)
    except (AssertionError, RuntimeError):
        return False
    return (out == expected.to(out.dtype)).double().mean().item() > 0.98


TRIES = [(seed, norm) for seed in range(3) for norm in (True, False)]


def test_the_hard_calls_are_right(run: Run) -> None:
    assert all(is_right(run, *each) for each in TRIES)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, run: Run) -> None:
    """One schedule must tell, with a norm or without."""
    assert not all(is_right(run, *each, BUGS[bug]) for each in TRIES)
