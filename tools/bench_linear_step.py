"""A few rows through a linear map: the operator, its weight in three formats, packed and not, against PyTorch's.

    python tools/bench_linear_step.py [--from memory] [--rows 1 8 32] [--shapes 512x2048] [--threads 1] [--rounds 16]

Each row of the table is one number of rows of x; a shape is K x N. The candidates take turns within a round, so what
else the machine does falls on all of them; their outputs are compared first. From memory, every candidate goes through
so many copies of the weight that they do not fit the cache together, packed ones lying one behind the other as in a
traced step; from the cache, it has one. Times are microseconds of a call: median (lower quartile -
upper quartile), then 10^9 bytes of the weight a second. Ratios are of medians, in float32, bfloat16 and int8 each:
float32 by PyTorch against ours packed, then ours against ours packed. "read" is a sum over as much memory as the weight
takes in float32: how fast PyTorch can read, and no more.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import speechkit_kernels
import torch
import torch.nn.functional as F
from speechkit_kernels.plain import linear_pack
from torch import Tensor

SHAPES = ("256x256", "256x1024", "1024x256", "512x512", "512x2048", "2048x512", "1024x4096")
ROWS = (1, 2, 4, 7, 14, 28, 56, 112)
COPIED = 136 << 20  # bytes of the copies of a weight: several times a cache
CALLS = 4  # in a round
KINDS = ("", " bf16", " int8")
Call = Callable[[Any], Tensor]  # a copy of the weight -> [M, N]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="place", choices=("memory", "cache"), default="memory")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(*(line for line in speechkit_kernels.explain() if line.operator == "linear_step"), sep="\n")
    print(f"{arguments.threads} thread(s), weights from {arguments.place}, torch {torch.__version__}")
    for shape in arguments.shapes:
        K, N = map(int, shape.split("x"))
        copies = make_copies(K, N, COPIED if arguments.place == "memory" else 1)
        print(f"\n{shape:>9}" + "".join(f"{name:>27}" for name in copies) + "   ratios")
        for M in arguments.rows:
            times = measure(candidates(torch.randn(M, K)), copies, arguments.rounds)
            middle = {name: statistics.median(own) for name, own in times.items()}
            pairs = [("F.linear", f"packed{kind}") for kind in KINDS] + [(f"ours{k}", f"packed{k}") for k in KINDS]
            ratios = [middle[other] / middle[own] for other, own in pairs]
            cells = [f"{cell(own, K * N * size_of(name)):>27}" for name, own in times.items()]
            print(f"{M:>9}" + "".join(cells) + "   " + " ".join(f"{ratio:.2f}" for ratio in ratios), flush=True)


def size_of(name: str) -> int:
    """Bytes of a number of the weight."""
    return 2 if "bf16" in name else 1 if "int8" in name else 4


def make_copies(K: int, N: int, least: int) -> dict[str, list[Any]]:
    """Of the weight of each candidate, at least ``least`` bytes of them."""
    torch.manual_seed(0)
    weight = torch.randn(N, K) / K**0.5
    scale = weight.abs().amax(1) / 127
    int8 = (weight / scale[:, None]).round().to(torch.int8)
    quantised = torch.quantize_per_channel(weight, scale.double(), torch.zeros(N, dtype=torch.long), 0, torch.qint8)
    make: dict[str, Callable[[], Any]] = {
        "read": weight.clone,
        "F.linear": weight.clone,
        "F.linear bf16": weight.bfloat16,
        "dynamic int8": lambda: torch.ops.quantized.linear_prepack(quantised, None),
        "ours": weight.clone,
        "ours bf16": weight.bfloat16,
        "ours int8": lambda: (int8.clone(), scale),
        "packed": lambda: linear_pack(weight),
        "packed bf16": lambda: linear_pack(weight.bfloat16()),
        "packed int8": lambda: linear_pack(int8),
    }
    copies = {name: [one() for _ in range(max(1, least // (K * N * size_of(name))))] for name, one in make.items()}
    for name in ("packed", "packed bf16", "packed int8"):
        copies[name] = list(torch.stack(copies[name]))
    copies["packed int8"] = [(one, scale) for one in copies["packed int8"]]
    return copies


def candidates(x: Tensor) -> dict[str, Call]:
    low, step = x.bfloat16(), torch.ops.speechkit.linear_step
    ours: dict[str, Call] = {
        "": lambda w: step(x, w, None),
        " bf16": lambda w: step(x, w, None),
        " int8": lambda w: step(x, w[0], None, scale=w[1]),
    }
    return {
        "read": lambda w: w.sum(),
        "F.linear": lambda w: F.linear(x, w),
        "F.linear bf16": lambda w: F.linear(low, w),
        "dynamic int8": lambda w: torch.ops.quantized.linear_dynamic(x, w),
        **{form + kind: call for form in ("ours", "packed") for kind, call in ours.items()},
    }


@torch.inference_mode()
def measure(calls: dict[str, Call], copies: dict[str, list[Any]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of each call of each candidate."""
    expected = calls["F.linear"](copies["F.linear"][0])
    for name in list(calls)[2:]:
        worst = float((calls[name](copies[name][0]).float() - expected).abs().max())
        allowed = 1e-4 if name in ("ours", "packed") else 0.2
        assert worst < allowed, f"the candidates must agree, but {name} differs by {worst:.2g}"
    turns = {name: itertools.cycle(copies[name]) for name in calls}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call(next(turns[name]))  # the code, x and a lone weight come back into the cache
            for weight in itertools.islice(turns[name], CALLS):
                start = time.perf_counter()
                call(weight)
                times[name].append((time.perf_counter() - start) * 1e6)
    return times


def cell(times: list[float], size: int) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.0f} ({low:.0f}-{high:.0f}) {size / middle / 1e3:.1f}"


if __name__ == "__main__":
    main()
