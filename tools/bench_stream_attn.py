"""What one step of streaming attention costs, against every way PyTorch has to do it.

    python tools/bench_stream_attn.py [--quick] [--threads 1] [--device cpu|cuda] [--seconds 1]

Each candidate does what a layer does in a step: attention of C new frames with Transformer-XL positions over L
remembered ones (H heads of width D), and the update of its cache. Candidates take turns call by call, in random order,
so that whatever else the machine does, and what the one before left in the caches, hits all alike; times are medians
with quartiles, ratios those of medians. On a GPU every candidate is also captured in a CUDA graph.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import speechkit_kernels
import torch
import torch.nn.functional as F
from speechkit_kernels import plain
from torch import Tensor

from speechkit.graphs import captured

H, D = 8, 64
Step = Callable[[], object]


class Layer:
    """Inputs of a step, the same for every candidate."""

    def __init__(self, B: int, C: int, L: int, dtype: torch.dtype, device: str) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        self.B, self.C, self.L, self.dtype, self.device = B, C, L, dtype, device
        self.q, self.k, self.v = normal(B, C, 3, H, D).unbind(2)  # views of one fused projection
        self.u, self.bias_v, self.table = normal(H, D), normal(H, D), normal(H, L + 2 * C, D)
        self.old_k, self.old_v = normal(B, L, H, D), normal(B, L, H, D)
        self.x, self.old_x = normal(B, C, H * D), normal(B, L, H * D)
        self.weight_kv = normal(2 * H * D, H * D) * (H * D) ** -0.5

    def flops(self) -> float:
        return 6 * self.B * H * self.C * (self.L + self.C) * D

    def bytes(self) -> float:
        """Window read, frames appended, q, k, v in and the result out."""
        return (2 * (self.L + self.C) + 4 * self.C) * self.B * H * D * self.dtype.itemsize


def concatenated(layer: Layer) -> tuple[Tensor, Tensor]:
    k, v = torch.cat([layer.old_k, layer.k], 1), torch.cat([layer.old_v, layer.v], 1)
    layer.old_k, layer.old_v = k[:, -layer.L :], v[:, -layer.L :]  # as WeNet and transformers remember
    return k, v


def position_scores(layer: Layer) -> Tensor:
    """The band ``[B, H, C, L + C]`` of (q + v) . table, scaled, read along its diagonals as a view."""
    C, S = layer.C, layer.L + layer.C
    scores = ((layer.q + layer.bias_v).transpose(1, 2) * D**-0.5) @ layer.table.mT
    rows = scores.shape[-1]
    flat = scores.flatten(-2)[..., C - 1 : C - 1 + C * (rows - 1)]
    return flat.unflatten(-1, (C, rows - 1))[..., :S]


def eager(layer: Layer, k: Tensor, v: Tensor) -> Tensor:
    scores = ((layer.q + layer.u).transpose(1, 2) @ k.permute(0, 2, 3, 1)) * D**-0.5 + position_scores(layer)
    return (torch.softmax(scores, dim=-1) @ v.transpose(1, 2)).transpose(1, 2)


def wenet(layer: Layer) -> Step:
    return lambda: eager(layer, *concatenated(layer))


def nemo(layer: Layer) -> Step:
    """Remembers what enters the layer, and projects keys and values of all of it again."""

    def step() -> Tensor:
        x = torch.cat([layer.old_x, layer.x], 1)
        layer.old_x = x[:, -layer.L :]
        return eager(layer, *F.linear(x, layer.weight_kv).unflatten(-1, (2, H, D)).unbind(2))

    return step


def sdpa(layer: Layer) -> Step:
    def step() -> Tensor:
        k, v = (x.transpose(1, 2) for x in concatenated(layer))
        q = (layer.q + layer.u).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=position_scores(layer)).transpose(1, 2)

    return step


def flex(layer: Layer) -> Step:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # one for each size and type; past the limit it runs uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)

    def step() -> Tensor:
        k, v = (x.transpose(1, 2) for x in concatenated(layer))
        band = position_scores(layer)
        q = (layer.q + layer.u).transpose(1, 2)
        return compiled(q, k, v, score_mod=lambda score, b, h, i, j: score + band[b, h, i, j])

    step()
    return step


def operator(layer: Layer, function: Callable[..., Tensor]) -> Step:
    B, C, L = layer.B, layer.C, layer.L
    cache = torch.randn(B, 2, H, L + 2 * C, D, device=layer.device).to(layer.dtype)
    slots = torch.randperm(B, device=layer.device, dtype=torch.int32)
    pos, qlen = torch.full_like(slots, 100 * C * L), torch.full_like(slots, C)
    table = layer.table[:, :-1].contiguous()

    def step() -> Tensor:
        pos.add_(C)
        return function(
            layer.q, layer.k, layer.v, cache, slots, pos, qlen, bias_u=layer.u, bias_v=layer.bias_v, rel=table,
            rel_zero=L + C - 1, left=L, scale=D**-0.5,
        )  # fmt: skip

    return step


PEERS: dict[str, Callable[[Layer], Step]] = {
    "ours": lambda layer: operator(layer, torch.ops.speechkit.stream_attn),
    "SDPA+bias": sdpa,
    "WeNet form": wenet,
    "NeMo form": nemo,
    "flex+bias": flex,
    "operator in PyTorch": lambda layer: operator(layer, plain.stream_attn),
}


def candidates(layer: Layer, names: list[str], skipped: dict[str, str]) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    for name in names:
        try:
            steps[name] = PEERS[name](layer)
            steps[name]()
            if layer.device == "cuda":
                steps[f"{name}, graph"] = captured(PEERS[name](layer))
        except Exception as error:  # a peer that does not run here is a line of the report
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:140]}"
    return steps


def interleaved(steps: dict[str, Step], seconds: float, device: str) -> dict[str, list[float]]:
    """Sorted microseconds of each candidate."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, step in steps.items():
            times[name].append(_timed(step, device))
    return {name: sorted(each) for name, each in times.items()}


def _timed(step: Step, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e6
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def quartiles(times: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return low, middle, high


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, kernels {speechkit_kernels.instruction_set()}, "
        f"{torch.get_num_threads()} of {os.cpu_count()} threads, load {os.getloadavg()[0]:.1f}, "
        f"torch {torch.__version__}"
    )


def cases(quick: bool) -> list[tuple[int, int, int]]:
    """(B, C, L): the sizes of Conformers, and of FastConformer's look-aheads."""
    if quick:
        return [(1, 16, 64), (4, 16, 256), (1, 2, 70)]
    return [(B, 16, L) for B in (1, 4, 16) for L in (64, 128, 256)] + [
        (B, C, 70) for B in (1, 8) for C in (1, 2, 7, 14)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three sizes, without flex_attention")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each size and type")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    speechkit_kernels.ready()
    print(machine(options.device))
    names = [name for name in PEERS if not (options.quick and name == "flex+bias")]
    skipped: dict[str, str] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for B, C, L in cases(options.quick):
            layer = Layer(B, C, L, dtype, options.device)
            steps = candidates(layer, [name for name in names if name not in skipped], skipped)
            report(layer, interleaved(steps, options.seconds, options.device))
    for name, reason in skipped.items():
        print(f"{name} was left out: {reason}")


def report(layer: Layer, times: dict[str, list[float]]) -> None:
    spread = {name: quartiles(each) for name, each in times.items()}
    best = min(spread["ours"][1], spread.get("ours, graph", spread["ours"])[1])
    print(
        f"\n{str(layer.dtype)[6:]} B={layer.B} C={layer.C} L={layer.L}: ours {layer.flops() / best / 1e3:.0f} GFLOP/s, "
        f"{layer.bytes() / best / 1e3:.1f} GB/s"
    )
    for name, (low, middle, high) in spread.items():
        print(f"  {name:28s} {middle:9.1f} us  ({low:9.1f} .. {high:9.1f})  {middle / best:6.2f} x ours")


if __name__ == "__main__":
    main()
