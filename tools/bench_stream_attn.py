"""What one step of streaming attention costs on a CPU, against every way PyTorch has to do it.

    python tools/bench_stream_attn.py [--quick] [--threads 1] [--seconds 1]

Each candidate does what a layer does in a step: attention of C new frames with Transformer-XL positions over L
remembered ones (H heads of width D), and the update of its cache. All hear the same, and must say the same at first.
Candidates take turns call by call, in random order, so that whatever else the machine does, and what the one before
left in the caches, hits all alike; times are medians with quartiles, ratios those of medians. `bench_cuda.py` measures
the same candidates on a GPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import speechkit_kernels
import torch
import torch.nn.functional as F
from speechkit_kernels import plain
from torch import Tensor

H, D = 8, 64
Step = Callable[[], Tensor]


class Layer:
    """Inputs of a step, the same for every candidate."""

    def __init__(self, B: int, C: int, L: int, dtype: torch.dtype, device: str = "cpu") -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        self.B, self.C, self.L, self.dtype, self.device = B, C, L, dtype, device
        self.x, self.old_x = normal(B, C, H * D), normal(B, L, H * D)
        self.weight_kv = normal(2 * H * D, H * D) * (H * D) ** -0.5
        fused = torch.cat([normal(B, C, H * D), F.linear(self.x, self.weight_kv)], -1)
        self.q, self.k, self.v = fused.unflatten(-1, (3, H, D)).unbind(2)
        self.old_k, self.old_v = (x.contiguous() for x in keys_and_values(self.old_x, self.weight_kv))
        self.u, self.bias_v, self.table = normal(H, D), normal(H, D), normal(H, L + 2 * C, D)

    def __str__(self) -> str:
        return f"B={self.B} C={self.C} L={self.L}"

    def flops(self) -> float:
        return 6 * self.B * H * self.C * (self.L + self.C) * D

    def bytes(self) -> float:
        """Window read, frames appended, q, k, v in and the result out."""
        return (2 * (self.L + self.C) + 4 * self.C) * self.B * H * D * self.dtype.itemsize


def keys_and_values(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return F.linear(x, weight).unflatten(-1, (2, H, D)).unbind(2)


def remembering(*past: Tensor) -> Callable[..., list[Tensor]]:
    """What came and what comes, joined; the last L are remembered as a view of that, as WeNet and transformers do."""
    kept, left = list(past), past[0].shape[1]

    def joined(*new: Tensor) -> list[Tensor]:
        whole = [torch.cat(pair, 1) for pair in zip(kept, new, strict=True)]
        kept[:] = [x[:, -left:] for x in whole]
        return whole

    return joined


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
    join = remembering(layer.old_k, layer.old_v)
    return lambda: eager(layer, *join(layer.k, layer.v))


def nemo(layer: Layer) -> Step:
    """Remembers what enters the layer, and projects keys and values of all of it again."""
    join = remembering(layer.old_x)
    return lambda: eager(layer, *keys_and_values(*join(layer.x), layer.weight_kv))


def sdpa(layer: Layer) -> Step:
    join = remembering(layer.old_k, layer.old_v)

    def step() -> Tensor:
        k, v = (x.transpose(1, 2) for x in join(layer.k, layer.v))
        q = (layer.q + layer.u).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=position_scores(layer)).transpose(1, 2)

    return step


def flex(layer: Layer) -> Step:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # one for each size and type; past the limit it runs uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)
    join = remembering(layer.old_k, layer.old_v)

    def step() -> Tensor:
        k, v = (x.transpose(1, 2) for x in join(layer.k, layer.v))
        band = position_scores(layer)
        q = (layer.q + layer.u).transpose(1, 2)
        return compiled(q, k, v, score_mod=lambda score, b, h, i, j: score + band[b, h, i, j]).transpose(1, 2)

    return step


def operator(layer: Layer, function: Callable[..., Tensor]) -> Step:
    """As one layer of many calls it: `pos` is moved on once a step, by the model."""
    B, C, L = layer.B, layer.C, layer.L
    slots = torch.randperm(B, device=layer.device, dtype=torch.int32)
    pos, qlen = torch.full_like(slots, 10 * (L + 2 * C)), torch.full_like(slots, C)  # the next frame's place is 0
    cache = torch.zeros(B, 2, H, L + 2 * C, D, device=layer.device, dtype=layer.dtype)
    cache[slots.long(), :, :, 2 * C :] = torch.stack([layer.old_k, layer.old_v], 1).transpose(2, 3)
    table = layer.table[:, :-1].contiguous()

    return lambda: function(
        layer.q, layer.k, layer.v, cache, slots, pos, qlen, bias_u=layer.u, bias_v=layer.bias_v, rel=table,
        rel_zero=L + C - 1, left=L, scale=D**-0.5,
    )  # fmt: skip


PEERS: dict[str, Callable[[Layer], Step]] = {
    "ours": lambda layer: operator(layer, torch.ops.speechkit.stream_attn),
    "SDPA+bias": sdpa,
    "WeNet form": wenet,
    "NeMo form": nemo,
    "flex+bias": flex,
    "operator in PyTorch": lambda layer: operator(layer, plain.stream_attn),
}


def candidates(layer: Layer, names: Iterable[str], skipped: dict[str, str]) -> tuple[dict[str, Step], dict[str, float]]:
    """Those that run here, and how far the first result of each is from WeNet's form."""
    steps: dict[str, Step] = {}
    outs: dict[str, Tensor] = {"WeNet form": wenet(layer)().float()}
    for name in names:
        try:
            step = PEERS[name](layer)
            outs[name] = step().float()
            steps[name] = step
        except Exception as error:  # a peer that does not run here is a line of the report
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:140]}"
    right = outs["WeNet form"]
    return steps, {name: float((outs[name] - right).norm() / right.norm()) for name in steps}


def interleaved(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Microseconds of each candidate."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name in random.sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[name]()
            times[name].append((time.perf_counter() - start) * 1e6)
    return times


def quartiles(times: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return low, middle, high


def kernels() -> str:
    used = speechkit_kernels.instruction_set()
    return "amx for bfloat16, avx512bf16 for float32" if used == "amx" else str(used)


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, kernels {kernels()}, "
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
    parser.add_argument("--seconds", type=float, default=1.0, help="for each size and type")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    speechkit_kernels.ready()
    print(machine())
    names = [name for name in PEERS if not (options.quick and name == "flex+bias")]
    skipped: dict[str, str] = {}
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for B, C, L in cases(options.quick):
            layer = Layer(B, C, L, dtype)
            steps, apart = candidates(layer, [name for name in names if name not in skipped], skipped)
            assert max(apart.values()) < allowed, f"the candidates must agree, but: {apart}"
            report(layer, interleaved(steps, options.seconds))
    for name, reason in skipped.items():
        print(f"{name} was left out: {reason}")


def report(layer: Layer, times: dict[str, list[float]]) -> None:
    spread = {name: quartiles(each) for name, each in times.items()}
    ours = spread["ours"][1]
    print(
        f"\n{str(layer.dtype)[6:]} {layer}: ours {layer.flops() / ours / 1e3:.0f} GFLOP/s, "
        f"{layer.bytes() / ours / 1e3:.1f} GB/s"
    )
    for name, (low, middle, high) in spread.items():
        print(f"  {name:20s} {middle:9.1f} us  ({low:9.1f} .. {high:9.1f})  {middle / ours:6.2f} x ours")


if __name__ == "__main__":
    main()
