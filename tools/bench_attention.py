"""Attention over long audio: the windowed path against dense masking, side by side in one run.

    python tools/bench_attention.py [--threads 1] [--repeats 7]

Each row is one length of utterance in one context: chunks, a causal window and a centred one. The candidates take
turns, so whatever else the machine does falls on all of them alike; the outputs are checked to be equal first. Times
are medians with their quartiles. The last columns are the time of the others in units of that of ``windowed``, the
median over the turns.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from speechkit.attention import RelativePosition, attend
from speechkit.stream import Context, fresh_span

CONTEXTS = (Context(left=64, chunk=16), Context(left=64, chunk=1), Context(left=64, chunk=1, right=64))
KERNELS = ("reference", "sdpa", "windowed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("B=2, H=4, K=64, relative positions, float32")
    print(f"{arguments.threads} thread(s), torch {torch.__version__}")
    for context in CONTEXTS:
        print(f"\n{context}; milliseconds")
        print(f"{'frames':>7} {'':>8}" + "".join(f"{kernel:>26}" for kernel in KERNELS) + "   reference and sdpa took")
        for frames in (250, 500, 1000, 1500):
            for backward in (False, True):
                times = measure(context, frames, backward, arguments.repeats)
                name = "fwd+bwd" if backward else "forward"
                ratios = [times[kernel] / times["windowed"] for kernel in KERNELS[:2]]
                print(
                    f"{frames:>7} {name:>8}"
                    + "".join(f"{shown(1e3 * times[kernel]):>26}" for kernel in KERNELS)
                    + "".join(f"   {float(ratio.median()):5.1f}x" for ratio in ratios)
                )


def shown(times: Tensor) -> str:
    low, middle, high = torch.quantile(times, torch.tensor([0.25, 0.5, 0.75], dtype=times.dtype)).tolist()
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


def measure(context: Context, frames: int, backward: bool, repeats: int) -> dict[str, Tensor]:
    """Seconds of each kernel in each turn."""
    torch.manual_seed(0)
    term = RelativePosition(dim=256, heads=4)
    q, k, v = (torch.randn(2, frames, 4, 64, requires_grad=True) for _ in range(3))
    span = fresh_span(torch.tensor([frames, frames - 7]), context)

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
    return {kernel: torch.tensor(seconds, dtype=torch.float64) for kernel, seconds in times.items()}


if __name__ == "__main__":
    main()
