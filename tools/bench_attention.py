"""Attention over long audio: the windowed path against dense masking, side by side in one run.

    python tools/bench_attention.py [--threads 1] [--repeats 7]

Each row is one length of utterance under ``Context(left=64, chunk=16)``. The candidates take turns, so whatever else
the machine does falls on all of them alike; medians are compared, and the outputs are checked to be equal first.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from speechkit.attention import RelativePosition, attend
from speechkit.stream import Context, fresh_span

CONTEXT = Context(left=64, chunk=16)
KERNELS = ("reference", "sdpa", "windowed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"B=2, H=4, K=64, {CONTEXT}, relative positions, float32")
    print(f"{arguments.threads} thread(s), torch {torch.__version__}")
    print(f"{'frames':>7} {'':>9} {'reference':>10} {'sdpa':>10} {'windowed':>10}   windowed against reference, sdpa")
    for frames in (250, 500, 1000, 1500):
        for backward in (False, True):
            times = measure(frames, backward, arguments.repeats)
            dense, fused, windowed = (times[kernel] * 1e3 for kernel in KERNELS)
            name = "fwd+bwd" if backward else "forward"
            print(
                f"{frames:>7} {name:>9} {dense:>7.1f} ms {fused:>7.1f} ms {windowed:>7.1f} ms"
                f"   {dense / windowed:.1f}x, {fused / windowed:.1f}x"
            )


def measure(frames: int, backward: bool, repeats: int) -> dict[str, float]:
    """Median seconds of each kernel."""
    torch.manual_seed(0)
    term = RelativePosition(dim=256, heads=4)
    q, k, v = (torch.randn(2, frames, 4, 64, requires_grad=True) for _ in range(3))
    span = fresh_span(torch.tensor([frames, frames - 7]), CONTEXT)

    def run(kernel: str) -> Tensor:
        with torch.set_grad_enabled(backward):
            out = attend(*term.place(q, k, span.positions(frames)), v, span, term=term, kernel=kernel)  # type: ignore[arg-type]
            if backward:
                torch.autograd.grad(out.square().sum(), [q, k, v, *term.parameters()])
        return out[1, : frames - 7]

    outs = [run(kernel) for kernel in KERNELS]
    assert all(torch.allclose(out, outs[0], atol=1e-5) for out in outs), "the candidates must agree"
    times: dict[str, list[float]] = {kernel: [] for kernel in KERNELS}
    for _ in range(repeats):
        for kernel in KERNELS:
            start = time.perf_counter()
            run(kernel)
            times[kernel].append(time.perf_counter() - start)
    return {kernel: statistics.median(seconds) for kernel, seconds in times.items()}


if __name__ == "__main__":
    main()
