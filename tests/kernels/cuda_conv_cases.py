"""Calls of conv_step that its CUDA kernel is tried on, emulated and on a GPU, and what is said of the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from speechkit_kernels import plain
from torch import Tensor

NAN = float("nan")
B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {F32: 1e-6, B16: 4e-3, F16: 5e-4}  # relative Frobenius error, as of the CPU's kernel


@dataclass(frozen=True)
class Case:
    """``qlen``: new frames of each row; ``offset``: numbers that x and the memory are moved by, against alignment."""

    name: str
    dtype: torch.dtype = B16
    frames: int = 16
    width: int = 64
    taps: int = 9
    qlen: tuple[int, ...] = (16, 3, 0, 9)
    gated: bool = True
    norm: bool = True
    bias: bool = True
    offset: int = 0
    wide: bool = True  # int64 counts


CASES = [
    Case("bf16"),
    Case("bf16, one frame", frames=1, qlen=(1, 0, 1)),
    Case("bf16, without a norm, many blocks", width=600, frames=5, qlen=(5, 2), norm=False),
    Case("bf16, 31 taps, two tiles", width=96, taps=31, frames=40, qlen=(40, 17, 32)),
    Case("bf16, an odd number of channels", width=37, frames=7, qlen=(7, 6), wide=False),
    Case("bf16, rows that are not aligned", offset=1, frames=4, qlen=(4, 1)),
    Case("fp16, not gated", dtype=F16, gated=False, taps=15, frames=14, qlen=(14, 5)),
    Case("fp16, no norm, no bias, one tap", dtype=F16, taps=1, norm=False, bias=False, frames=3, qlen=(3, 0)),
    Case("fp16, four channels a thread", dtype=F16, width=2304, taps=3, frames=2, qlen=(2, 1)),
    Case("float32", dtype=F32, width=144, taps=31, frames=6, qlen=(6, 4)),
    Case("float32, plain batch norm", dtype=F32, width=70, norm=False, taps=7, frames=20, qlen=(20, 11), wide=False),
    Case("float32, neither gate nor bias", dtype=F32, gated=False, bias=False, width=32, taps=2, frames=1, qlen=(1,)),
]


def build(case: Case, seed: int = 0) -> dict[str, Any]:
    """Arguments of `plain.conv_step`; whatever must not be read is NaN."""
    g = torch.Generator().manual_seed(seed)
    B, C, D, K = len(case.qlen), case.frames, case.width, case.taps

    def noise(*shape: int, offset: int = 0) -> Tensor:
        return torch.randn(torch.Size(shape).numel() + offset, generator=g).to(case.dtype)[offset:].view(shape)

    counts = torch.int64 if case.wide else torch.int32
    slots = torch.randperm(B + 2, generator=g)[:B]
    made: dict[str, Any] = {
        "x": noise(B, C, 2 * D if case.gated else D, offset=case.offset),
        "weight": (noise(D, K) / K**0.5).t().contiguous().t() if seed % 2 else noise(D, K) / K**0.5,
        "bias": noise(D) if case.bias else None,
        "cache": noise(B + 2, K - 1, D, offset=case.offset),
        "slots": slots.to(counts), "qlen": torch.tensor(case.qlen, dtype=counts), "gated": case.gated,
    }  # fmt: skip
    if case.norm:
        made |= {"norm_weight": noise(D), "norm_bias": noise(D), "eps": 1e-3}
    for row, length in zip(made["x"], case.qlen, strict=True):
        row[length:] = NAN
    spare = torch.ones(B + 2, dtype=torch.bool)
    spare[slots] = False
    made["cache"][spare] = NAN
    return made


def copied(made: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in made.items()}


def answer(made: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What plain PyTorch gives in float64, of frames rounded to the type as the memory rounds them; the memory then."""
    exact = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in copied(made).items()}
    value, gate = exact["x"].chunk(2, -1) if made["gated"] else (exact["x"], exact["x"])
    gated = (value * gate.sigmoid()).to(made["x"].dtype).double()
    ahead = torch.full_like(gated, 1e4)  # a gate that passes all
    exact |= {"x": torch.cat([gated, ahead], -1), "gated": True}
    return plain.conv_step(**exact), exact["cache"]


def check(case: Case, out: Tensor, memory: Tensor, expected: Tensor, remembered: Tensor) -> None:
    """Out within the tolerance of its type, no frame ten times worse; the memory within a rounding, NaN as it was."""
    tolerance, out, memory = TOLERANCE[case.dtype], out.double().cpu(), memory.double().cpu()
    assert out.isfinite().all()
    assert (out - expected).norm() <= tolerance * expected.norm()
    assert ((out - expected).norm(dim=-1) <= 10 * tolerance * expected.norm(dim=-1)).all()
    torch.testing.assert_close(memory, remembered, rtol=2 * tolerance, atol=1e-7, equal_nan=True)


def alone(made: dict[str, Any], b: int) -> dict[str, Any]:
    """Row b of a call, with its memory in another slot."""
    slot = int(made["slots"][b])
    cache = torch.stack([torch.full_like(made["cache"][slot], NAN), made["cache"][slot]])
    row = {"x": made["x"][b : b + 1].clone(), "qlen": made["qlen"][b : b + 1].clone()}
    return made | row | {"cache": cache, "slots": torch.ones_like(made["slots"][:1])}
