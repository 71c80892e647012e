"""A whole step of a streaming encoder: ours against transformers' cache-aware FastConformer, same weights, one run.

    python tools/bench_step.py [--sizes 20M 109M] [--batches 1 8] [--steps 30] [--threads 1] [--subsampling 256 512]

Each row is one chunk size. A random `NemotronAsrStreamingEncoder` is saved, and `speechkit.load` reads it, so both hold
the same weights; the outputs of every step are compared. The candidates take turns, step by step, with full caches, so
whatever else the machine does falls on all of them.

With ``--subsampling`` it is our subsampling alone, of these widths: with `subsample_step` and without, both traced.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.models.nemotron_asr_streaming import NemotronAsrStreamingEncoder, NemotronAsrStreamingEncoderConfig

import speechkit
from speechkit import kernels
from speechkit.layers import Subsampling
from speechkit.pretrained.nemotron import context
from speechkit.stream import Context
from speechkit.traced import Traced, trace

SIZES = {
    "20M": {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 1024},
    "109M": {"hidden_size": 512, "num_hidden_layers": 17, "num_attention_heads": 8, "intermediate_size": 2048},
}
WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
LOOKAHEADS = (0, 1, 6, 13)
STRIDE, FRAME_MS, FEATURES = 8, 80, 80
Step = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--subsampling", nargs="+", type=int, metavar="WIDTH")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} thread(s), torch {torch.__version__}\n{kernels.explain()}")
    if arguments.subsampling:
        return report_subsampling(arguments)
    print("milliseconds, median (quartiles); x: transformers' median over ours; d: largest difference to float32")
    for size in arguments.sizes:
        theirs, ours = pair(SIZES[size])
        for batch in arguments.batches:
            for lookahead in LOOKAHEADS:
                times, differences = measure(theirs, ours, batch, lookahead, arguments.steps)
                print(f"{size}, B={batch}, chunk {FRAME_MS * (lookahead + 1)} ms")
                for name, (low, middle, high) in times.items():
                    ratio = times["transformers"][1] / middle
                    apart = f"  d {differences[name]:.1e}" if name in differences else ""
                    print(f"  {name:>14} {middle:8.2f} ({low:.2f} - {high:.2f})  {ratio:5.1f}x{apart}")


def pair(changes: dict[str, int]) -> tuple[nn.Module, dict[str, Any]]:
    """Their encoder, and ours with its weights in each precision."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        theirs = NemotronAsrStreamingEncoder(NemotronAsrStreamingEncoderConfig(**changes)).eval()
        theirs.save_pretrained(folder)
        return theirs, {f"fused {name}": speechkit.load(folder, weights=dtype) for name, dtype in WEIGHTS.items()}


def of_theirs(model: nn.Module, lookahead: int) -> Step:
    """Their stream. It begins with the ``8 L + 1`` features that its first chunk needs, so seven are always waiting."""
    past: dict[str, Any] = {"past_key_values": None, "padding_cache": None}
    waiting: list[Tensor] = []

    def step(x: Tensor) -> Tensor:
        x = torch.cat([*waiting, x], dim=1)
        waiting[:] = [x[:, 1 - STRIDE :]]
        out = model(x[:, : 1 - STRIDE], num_lookahead_tokens=lookahead, use_cache=True, **past)
        past.update(past_key_values=out.past_key_values, padding_cache=out.padding_cache)
        return out.last_hidden_state

    return step


def of_ours(encoder: Any, batch: int, now: Context, fused: bool) -> Step:
    state, lengths = encoder.init_state(batch, context=now), torch.full((batch,), now.latency() * STRIDE)
    stream = Traced(encoder.stream) if fused else encoder.stream

    def step(x: Tensor) -> Tensor:
        nonlocal state
        with contextlib.nullcontext() if fused else mock.patch.object(kernels, "serves", lambda *_: False):
            out, state = stream(x, lengths, state, context=now)
        return out.frames

    return step


@torch.inference_mode()
def measure(
    theirs: nn.Module, ours: dict[str, Any], batch: int, lookahead: int, steps: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Quartiles of a step's milliseconds for each candidate, and how far rounded weights are from float32."""
    now = context(left=theirs.config.sliding_window - 1, lookahead=lookahead)
    candidates = {
        "transformers": of_theirs(theirs, lookahead),
        "plain PyTorch": of_ours(ours["fused float32"], batch, now, fused=False),
        **{name: of_ours(encoder, batch, now, fused=True) for name, encoder in ours.items()},
    }
    frames, fill = now.latency() * STRIDE, -(-now.memory() // now.latency()) + 2
    generator = torch.Generator().manual_seed(1)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    differences = {name: 0.0 for name in ours if name != "fused float32"}
    for step in range(fill + steps):
        x = torch.randn(batch, frames, theirs.config.num_mel_bins, generator=generator)
        outs = {}
        for name, run in candidates.items():
            start = time.perf_counter()
            outs[name] = run(x)
            if step >= fill:
                times[name].append(1e3 * (time.perf_counter() - start))
        apart = {name: float((out - outs["transformers"]).abs().max()) for name, out in outs.items()}
        assert max(apart["plain PyTorch"], apart["fused float32"]) < 1e-4, f"the candidates must agree, but: {apart}"
        differences = {name: max(worst, apart[name]) for name, worst in differences.items()}
    return {name: statistics.quantiles(found, n=4) for name, found in times.items()}, differences


def report_subsampling(arguments: argparse.Namespace) -> None:
    print("milliseconds, median (quartiles), without and with subsample_step; d: largest difference")
    for width in arguments.subsampling:
        for batch in arguments.batches:
            for lookahead in LOOKAHEADS:
                times, apart = measure_subsampling(width, batch, STRIDE * (lookahead + 1), arguments.steps)
                cells = "".join(f"{middle:9.3f} ({low:.3f} - {high:.3f})" for low, middle, high in times)
                ratio = times[0][1] / times[1][1]
                print(
                    f"{width}, B={batch}, chunk {FRAME_MS * (lookahead + 1):4} ms {cells} {ratio:5.1f}x  d {apart:.1e}"
                )


@torch.inference_mode()
def measure_subsampling(width: int, batch: int, frames: int, steps: int) -> tuple[list[list[float]], float]:
    """Quartiles of milliseconds without and with the operator, and how far apart the results were at most."""
    torch.manual_seed(0)
    module = Subsampling(features=FEATURES, dim=width, stages=3, separable=True, before=2).eval()
    serves = kernels.serves
    states, runs, times = [], [], [[], []]  # type: ignore[var-annotated]
    x, lengths = torch.randn(batch, frames, FEATURES), torch.full((batch,), frames)

    def call(x: Tensor, lengths: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, _, after = module(x, lengths, state)
        return (y, *after)

    for without in ("subsample_step", None):
        with mock.patch.object(kernels, "serves", lambda name, like: name != without and serves(name, like)):  # noqa: B023
            runs.append(trace(call, x, lengths, *module.init_state(batch)))
        states.append(module.init_state(batch))
    clock, worst = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter, 0.0
    for step in range(steps + 5):
        x, outs = torch.randn_like(x), []
        for i, run in enumerate(runs):
            start = clock()
            y, *states[i] = run(x, lengths, *states[i])
            outs.append(y)
            if step >= 5:
                times[i].append(1e3 * (clock() - start))
        worst = max(worst, float((outs[0] - outs[1]).abs().max()))
    assert worst < 1e-4, f"the candidates must agree, but differ by {worst}"
    return [statistics.quantiles(found, n=4) for found in times], worst


if __name__ == "__main__":
    main()
