"""csrc/cuda/stream_attn.cu, run on the CPU one fiber a CUDA thread, against plain PyTorch in float64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_cases import CASES, Case, alone, answer, build, case, check, later
from speechkit_kernels import cuda, plain
from torch import Tensor

SOURCES = Path(cuda.__file__).parent / "csrc"
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulator is compiled with g++, which is not on the PATH")

HOPPER = 227 * 1024  # bytes of shared memory that a block may ask for
SMALL = 99 * 1024  # on consumer GPUs

Run = Callable[..., Tensor]


class Range(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("bytes", ctypes.c_longlong), ("writable", ctypes.c_int))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    """The library of a variant, with the kernel's text changed in one place where asked."""
    made: dict[Any, ctypes.CDLL] = {}

    def compiled(variant: cuda.Variant, bug: tuple[str, str] | None = None) -> ctypes.CDLL:
        if (variant, bug) not in made:
            folder = tmp_path_factory.mktemp("emulated")
            text = (SOURCES / "cuda" / "stream_attn.cu").read_text()
            if bug is not None:
                if text.count(bug[0]) != 1:
                    raise LookupError(f"what a planted bug changes must stand once in the kernel: {bug[0]}")
                text = text.replace(*bug)
            (folder / "stream_attn.cu").write_text(text)
            shutil.copy(SOURCES / "emu" / "stream_attn_emu.cpp", folder)
            subprocess.run(
                [COMPILER, "-O1", "-std=c++17", "-shared", "-fPIC", "-w", *variant.defines(),
                 f"-I{SOURCES / 'emu'}", f"-I{SOURCES / 'cuda'}",
                 str(folder / "stream_attn_emu.cpp"), "-o", str(folder / "emulated.so")],
                check=True,
            )  # fmt: skip
            made[variant, bug] = ctypes.CDLL(str(folder / "emulated.so"))
            made[variant, bug].stream_attn_emulated.restype = ctypes.c_char_p
        return made[variant, bug]

    return compiled


@pytest.fixture(scope="module")
def run(compiled: Callable[..., ctypes.CDLL]) -> Run:
    """Runs a call; its ``cache`` is changed in place, as everywhere."""

    def run(
        made: dict[str, Any],
        seed: int = 0,
        limit: int = HOPPER,
        blocks: int = 2,
        stages: int = 2,
        bug: tuple[str, str] | None = None,
    ) -> Tensor:
        out = torch.full_like(made["q"], float("nan"))
        call = cuda.describe(**made, out=out, limit=limit)
        assert isinstance(call, cuda.Call)
        variant = replace(call.variant, STAGES=stages)
        shared_bytes = variant.shared_bytes(made["left"], made["q"].shape[1])
        kept = [(x, name in ("cache", "cache_bias")) for name, x in made.items() if isinstance(x, Tensor)]
        kept += [(out, True), *((x, False) for x in call.held)]
        ranges = (Range * len(kept))(*(Range(x.data_ptr(), x.numel() * x.element_size(), w) for x, w in kept))
        grid = (ctypes.c_int * 3)(min(blocks, call.grid[0]), *call.grid[1:])
        library = compiled(variant, bug)
        trouble = library.stream_attn_emulated(ctypes.byref(call.args), grid, shared_bytes, seed, ranges, len(kept))
        if trouble:
            raise RuntimeError(trouble.decode())
        return out

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
def test_a_table_too_long_for_shared_memory_comes_with_the_keys(case: Case, run: Run) -> None:
    made = build(case)
    expected, exact = answer(made)
    call = cuda.describe(**made, out=torch.empty_like(made["q"]), limit=SMALL)
    assert isinstance(call, cuda.Call) and call.variant.TABLE == 2
    check(case, run(made, limit=SMALL), made, expected, exact)


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
    assert torch.equal(run(again, seed=1, blocks=1, stages=3), run(made))


def test_what_the_kernel_does_not_serve_is_said() -> None:
    made = build(CASES[0])
    wide = build(replace(CASES[0], width=136))
    double = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in made.items()}
    strided = made | {"cache": made["cache"].transpose(3, 4).contiguous().transpose(3, 4)}
    for call, why in ((double, "q is torch.float64"), (wide, "q's are 136"), (strided, "its stride is 80")):
        answer = cuda.describe(**call, out=torch.empty_like(call["q"]), limit=HOPPER)
        assert isinstance(answer, str) and why in answer
    assert "too few" in str(cuda.describe(**made, out=torch.empty_like(made["q"]), limit=4096))


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


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, run: Run) -> None:
    """Three stages and tiles a part, a ring that wraps, frames that are not kept; a few schedules, one must tell."""
    hard = case("hard", left=150, rows=((1000, 16, 11), (40, 9, 9), (160, 16, 16)))

    def right(seed: int, bug: tuple[str, str] | None) -> bool:
        made = build(hard, seed)
        try:
            expected, exact = answer(made)
            check(hard, run(made, seed, bug=bug), made, expected, exact)
        except (AssertionError, RuntimeError):
            return False
        return True

    assert all(right(seed, None) for seed in range(4))
    assert not all(right(seed, BUGS[bug]) for seed in range(4))
