"""Calls of stream_attn that its CUDA kernel is tried on, emulated and on a GPU, and what is said of the answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from speechkit_kernels import plain
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # relative Frobenius error
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """``rows``: per stream of the call (pos, qlen, keep); ``slack``: frames of the ring beyond the least."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    width: int = 64
    frames: int = 16
    left: int = 64
    heads: int = 2
    key_heads: int = 2
    rows: tuple[tuple[int, int, int], ...] = ((1000, 16, 16), (3, 16, 16), (0, 16, 16))
    chunk: int = 0
    slack: int = 0
    options: frozenset[str] = field(default_factory=lambda: frozenset({"rel", "bias_u", "bias_v"}))
    offset: int = 0  # numbers that q, k, v and the ring are moved by in memory, which spoils their alignment
    wide: bool = False  # int64 counts


def case(name: str, options: str = "rel bias_u bias_v", **fields: Any) -> Case:
    return Case(name, options=frozenset(options.split()), **fields)


B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    case("bf16"),
    case("bf16, wrap-around, slack, keep below qlen", frames=14, slack=9,
         rows=((77, 14, 9), (80, 14, 14), (5, 6, 2), (900, 0, 0), (0, 1, 0))),
    case("one frame", frames=1, left=70, rows=((1, 1, 1), (200, 1, 1), (0, 1, 1), (70, 0, 0))),
    case("seven frames, own position query", "rel q_pos bias_u bias_v", frames=7, left=20,
         rows=((64, 7, 7), (0, 7, 5), (6, 3, 3)), wide=True),
    case("own position query without biases", "rel q_pos", frames=7, left=20, rows=((64, 7, 7), (3, 7, 7)), wide=True),
    case("fp16, twenty frames", dtype=F16, frames=20, left=50, rows=((51, 20, 20), (7, 13, 4), (0, 20, 20))),
    case("fp16, no positions, nothing remembered", "bias_u", dtype=F16, left=0, rows=((32, 16, 16), (0, 9, 9))),
    case("33 frames in three chunks", frames=33, left=22, chunk=11,
         rows=((44, 33, 33), (0, 33, 22), (11, 20, 20), (22, 3, 1))),
    case("64 frames in chunks of one", "rel", frames=64, left=30, chunk=1, heads=1, key_heads=1,
         rows=((100, 64, 64), (0, 40, 40))),
    case("grouped heads", "rel bias_u", heads=4, key_heads=1, width=32, left=33, rows=((10, 16, 16), (99, 12, 5))),
    case("grouped heads, slopes and key bias", "slopes key_bias", heads=4, key_heads=2, width=32, left=33,
         rows=((10, 16, 16), (99, 12, 5))),
    case("everything at once", "rel q_pos bias_u bias_v slopes key_bias", heads=4, key_heads=2, width=80, frames=12,
         left=24, chunk=6, slack=3, rows=((42, 12, 6), (6, 7, 7), (0, 12, 12))),
    case("float32", dtype=F32, left=40, rows=((100, 16, 16), (3, 11, 7))),
    case("float32, width 128, twenty frames", "rel q_pos bias_v", dtype=F32, width=128, frames=20, left=20, heads=1,
         key_heads=1, rows=((100, 20, 20), (3, 11, 7))),
    case("float32, width 16, without positions", "slopes", dtype=F32, width=16, frames=5, left=9,
         rows=((9, 5, 5), (2, 1, 1))),
    case("bf16, width 128", width=128, frames=16, left=100, heads=1, key_heads=1),
    case("width 36", width=36, left=30, rows=((42, 16, 16), (1, 16, 3)) * 3),
    case("width 49, odd rows", width=49, left=30, rows=((42, 16, 16), (1, 16, 3)) * 3),
    case("rows that are not aligned", width=32, left=30, offset=1, rows=((42, 16, 16), (1, 16, 3))),
]  # fmt: skip


def build(case: Case, seed: int = 0) -> dict[str, Any]:
    """Arguments of `plain.stream_attn`; whatever must not be read is NaN."""
    g = torch.Generator().manual_seed(seed)
    B, C, H, G, D = len(case.rows), case.frames, case.heads, case.key_heads, case.width
    W, S = case.left + C + case.slack, B + 2

    def noise(*shape: int) -> Tensor:
        flat = torch.randn(torch.Size(shape).numel() + case.offset, generator=g).to(case.dtype)
        return flat[case.offset :].view(shape)

    counts = torch.tensor(case.rows, dtype=torch.int64 if case.wide else torch.int32)
    slots = torch.randperm(S, generator=g)[:B].to(counts.dtype)
    made: dict[str, Any] = {
        "q": noise(B, C, H, D), "k": noise(B, C, G, D), "v": noise(B, C, G, D),
        "cache": noise(S, 2, G, W, D), "slots": slots, "pos": counts[:, 0].clone(), "qlen": counts[:, 1].clone(),
        "chunk": case.chunk, "left": case.left, "scale": D**-0.5,
    }  # fmt: skip
    if (counts[:, 1] != counts[:, 2]).any():
        made["keep"] = counts[:, 2].clone()
    optional = {
        "rel": lambda: noise(H, case.left + max(case.chunk, C) + C + 2, D),
        "q_pos": lambda: noise(B, C, H, D),
        "bias_u": lambda: torch.randn(H, D, generator=g),
        "bias_v": lambda: torch.randn(H, D, generator=g).to(case.dtype),
        "slopes": lambda: torch.rand(H, generator=g) / 8,
        "key_bias": lambda: torch.randn(B, C, H, generator=g),
    }
    made |= {name: draw() for name, draw in optional.items() if name in case.options}
    if "rel" in made:
        made["rel_zero"] = case.left + (case.chunk or C)
    if "key_bias" in made:
        made["cache_bias"] = torch.randn(S, H, W, generator=g)
    _poison(made, case)
    return made


def _poison(made: dict[str, Any], case: Case) -> None:
    W = made["cache"].shape[3]
    forbidden = torch.ones(made["cache"].shape[0], W, dtype=torch.bool)
    for b, (pos, qlen, _) in enumerate(case.rows):
        forbidden[made["slots"][b].item(), torch.arange(max(0, pos - case.left), pos) % W] = False
        for name in ("q", "k", "v", "q_pos", "key_bias"):
            if name in made:
                made[name][b, qlen:] = NAN
    made["cache"].transpose(1, 3)[forbidden] = NAN
    if "cache_bias" in made:
        made["cache_bias"].transpose(1, 2)[forbidden] = NAN


def answer(made: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """What plain PyTorch gives in float64, and the arguments after the call."""
    exact = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in made.items()}
    exact = {n: x.clone() if isinstance(x, Tensor) else x for n, x in exact.items()}
    return plain.stream_attn(**exact), exact


def check(case: Case, out: Tensor, used: dict[str, Any], expected: Tensor, exact: dict[str, Any]) -> None:
    """Out within the tolerance of its type, no row ten times worse, absent rows 0, rings equal to the bit."""
    tolerance, out = TOLERANCE[case.dtype], out.double().cpu()
    assert out.isfinite().all()
    assert (out - expected).norm() <= tolerance * expected.norm()
    assert ((out - expected).norm(dim=-1) <= 10 * tolerance * expected.norm(dim=-1)).all()
    for name in ("cache", "cache_bias"):
        if name in used:
            torch.testing.assert_close(used[name].double().cpu(), exact[name], rtol=0, atol=0, equal_nan=True)


def alone(made: dict[str, Any], b: int) -> dict[str, Any]:
    """Row b of a call, with its ring in another slot."""
    rows = {"q", "k", "v", "q_pos", "key_bias", "pos", "qlen", "keep"}
    one = {n: x[b : b + 1].clone() if n in rows else x for n, x in made.items()}
    slot = int(made["slots"][b])
    one["slots"] = torch.tensor([1], dtype=made["slots"].dtype)
    for name in ("cache", "cache_bias"):
        if name in one:
            one[name] = torch.stack([torch.full_like(one[name][slot], NAN), one[name][slot]])
    return one


def later(made: dict[str, Any], turns: int) -> dict[str, Any]:
    """The same call after the ring went round ``turns`` times more."""
    return made | {"pos": made["pos"].long() + turns * made["cache"].shape[3]}
