"""The convolution step of a streaming layer: the fused operator against the same computation by PyTorch's operators.

    python tools/bench_conv_step.py [--device cpu] [--dtype float32] [--threads 1] [--rounds 60] [--norm none]

Each row is one case. The candidates take turns within a round, so whatever else the machine does falls on all of them
alike; their outputs and memories are compared first. Times are microseconds: median (lower quartile - upper quartile);
with one thread of a CPU they are the thread's own time, which the turns of other programs do not enter.
"packed" is the operator with its filters stored tap by tap, as `weight.t().contiguous().t()`; "as is" with a plain
contiguous weight. Ratios are of medians, against the faster of the two PyTorch forms.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import speechkit_kernels
import torch
import torch.nn.functional as F
from torch import Tensor

CASES = [*itertools.product((1, 4, 16), (2, 4, 16), (144, 256, 512, 1024), (9, 31))]
Candidate = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--isa", help="instruction set of the CPU kernel; the best unless given")
    parser.add_argument("--norm", choices=("layer", "none"), default="layer", help="none: folded into the filters")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    speechkit_kernels.instruction_set(arguments.isa)
    clock = time.thread_time if arguments.device == "cpu" and arguments.threads == 1 else time.perf_counter
    print(*speechkit_kernels.explain(), sep="\n")
    print(f"{arguments.threads} thread(s), {arguments.dtype}, {arguments.norm} norm, torch {torch.__version__}")
    print(f"{'B':>3} {'C':>3} {'D':>5} {'K':>3} " + "".join(f"{name:>22}" for name in NAMES) + "   ratio packed, as is")
    ratios = []
    for case in CASES:
        times = measure(candidates(*case, arguments), arguments.rounds, clock)
        medians = [statistics.median(t) for t in times]
        ratio = [min(medians[:2]) / median for median in medians[2:]]
        ratios.append(ratio)
        cells = "".join(f"{cell(t):>22}" for t in times)
        print(
            "".join(f"{n:>{w}} " for n, w in zip(case, (3, 3, 5, 3), strict=True))
            + cells
            + f"   {ratio[0]:.1f}x {ratio[1]:.1f}x"
        )
    for name, column in zip(NAMES[2:], zip(*ratios, strict=True), strict=True):
        print(f"{name}: {min(column):.1f}x to {max(column):.1f}x, median {statistics.median(column):.1f}x")


NAMES = ("eager", "eager, channels first", "packed", "as is")


def candidates(B: int, C: int, D: int, K: int, arguments: argparse.Namespace) -> list[Candidate]:
    """What is compared, in the order of `NAMES`, each with a memory of its own."""
    torch.manual_seed(0)
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    x = torch.randn(B, C, 2 * D, **options)
    weight, bias = torch.randn(D, K, **options) / K**0.5, torch.randn(D, **options)
    norm = [torch.randn(D, **options) for _ in range(2)] if arguments.norm == "layer" else None
    memory = torch.randn(B, K - 1, D, **options)
    slots = torch.arange(B, device=arguments.device)
    qlen = torch.full((B,), C, device=arguments.device)
    index = torch.arange(K - 1, device=arguments.device)[:, None]

    def finish(y: Tensor) -> Tensor:
        return F.silu(F.layer_norm(y, (D,), *norm) if norm else y)

    def eager(memory: Tensor, filters: Tensor) -> Tensor:
        seen = torch.cat([memory, F.glu(x, dim=-1)], dim=1)
        memory.copy_(seen.gather(1, (qlen[:, None, None] + index).expand(-1, -1, D)))
        return finish(F.conv1d(seen.transpose(1, 2), filters, bias, groups=D).transpose(1, 2))

    def eager_channels_first(memory: Tensor, filters: Tensor) -> Tensor:
        seen = torch.cat([memory, F.glu(x, dim=-1)], dim=1)
        memory.copy_(seen.gather(1, (qlen[:, None, None] + index).expand(-1, -1, D)))
        return finish(F.conv1d(seen.transpose(1, 2).contiguous(), filters, bias, groups=D).transpose(1, 2).contiguous())

    def fused(memory: Tensor, filters: Tensor) -> Tensor:
        more = {"norm_weight": norm[0], "norm_bias": norm[1]} if norm else {}
        return torch.ops.speechkit.conv_step(x, filters, bias, memory, slots, qlen, gated=True, **more)

    def bind(step: Callable[[Tensor, Tensor], Tensor], filters: Tensor) -> Candidate:
        own = memory.clone()
        return lambda: step(own, filters)

    dense = weight[:, None]
    made = [bind(eager, dense), bind(eager_channels_first, dense)]
    made += [bind(fused, weight.t().contiguous().t()), bind(fused, weight)]
    tolerance = 1e-5 if arguments.dtype == "float32" else 0.1
    for _ in range(2):  # the second call hears what the first remembered
        outs = [candidate() for candidate in made]
        assert all(torch.allclose(out, outs[0], atol=tolerance, rtol=tolerance) for out in outs), "they must agree"
    return made


def measure(made: list[Candidate], rounds: int, clock: Callable[[], float]) -> list[list[float]]:
    """Microseconds of each candidate in each round."""
    times: list[list[float]] = [[] for _ in made]
    with torch.inference_mode():
        for _ in range(rounds):
            for candidate, own in zip(made, times, strict=True):
                own.append(seconds(candidate, clock) * 1e6)
    return times


def seconds(candidate: Candidate, clock: Callable[[], float], calls: int = 5) -> float:
    candidate()  # its memory and its code come back into the cache
    synchronise()
    start = clock()
    for _ in range(calls):
        candidate()
    synchronise()
    return (clock() - start) / calls


def synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def cell(times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.0f} ({low:.0f}-{high:.0f})"


if __name__ == "__main__":
    main()
