"""One NVIDIA GPU, under ten minutes: are the CUDA kernels right there, how near to the memory's speed, and a step?

    python tools/bench_cuda.py > results.md      tests, ceilings, streaming tables, whole steps, compute-sanitizer
    python tools/bench_cuda.py --dry-run         the same lines on the CPU at tiny sizes, to see that they run

Candidates are timed in turns within one run, on the same input; what is printed is the median and the quartiles in
microseconds, and the share of the memory floor: bytes that must move, at the speed of a plain copy. In a graph a peer
hears the same past again and again, which spares it the copy of its cache to where the next replay would read it.
What no time is left for is said and left out.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.nemotron_asr_streaming import NemotronAsrStreamingEncoder, NemotronAsrStreamingEncoderConfig

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]
from bench_step import LOOKAHEADS, of_theirs  # noqa: E402
from bench_stream_attn import PEERS, Layer, candidates  # noqa: E402
from speechkit_kernels import cuda  # noqa: E402

import speechkit  # noqa: E402
from speechkit.encoders import Conformer  # noqa: E402
from speechkit.graphs import Graphs, captured  # noqa: E402
from speechkit.pretrained.nemotron import context  # noqa: E402

Step = Callable[[], Tensor]
BEGIN, SECONDS = time.monotonic(), 570  # of the whole run
SANITIZED = "equals and (49 or 36 or aligned or chunks or twenty or slopes or odd or gated)"  # small cases of the tests
STREAMS = ((256, 16, 64), (1024, 16, 64), (4096, 16, 64), (256, 16, 256), (1024, 16, 256), (4096, 16, 256))
FILTERS = ((1, 1), (1, 16), (16, 16), (256, 16), (1024, 16), (4096, 2))
FLEX = ((1, 16, 64), (256, 16, 64))  # flex_attention compiles each size for seconds
FEW = ((1, 16, 64), (4, 16, 64), (16, 16, 64), (1, 16, 256), (16, 16, 256), (16, 1, 70))


@dataclass(frozen=True)
class Filter:
    """One call of a convolution module's inside: gate, K taps, layer norm, SiLU."""

    streams: int
    frames: int
    taps: int = 9
    width: int = 1024
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    def __str__(self) -> str:
        return f"B={self.streams} C={self.frames}"

    def bytes(self) -> float:
        """Values and gates read, results written, the memory read and written, filters read."""
        rows = self.streams * (3 * self.frames + 2 * (self.taps - 1)) + self.taps
        return rows * self.width * self.dtype.itemsize

    def candidates(self) -> dict[str, Step]:
        B, C, K, D = self.streams, self.frames, self.taps, self.width
        like = dict(dtype=self.dtype, device=self.device)
        x, weight = torch.randn(B, C, 2 * D, **like), torch.randn(K, D, **like).t() / 3
        bias, scale, shift = (torch.randn(D, **like) for _ in range(3))
        cache, past = torch.randn(B, K - 1, D, **like), torch.randn(B, K - 1, D, **like)
        past.copy_(cache)
        slots = torch.arange(B, device=self.device)
        qlen = torch.full((B,), C, device=self.device)

        def ours() -> Tensor:
            return torch.ops.speechkit.conv_step(
                x, weight, bias, cache, slots, qlen, gated=True, norm_weight=scale, norm_bias=shift
            )

        def eager() -> Tensor:
            seen = torch.cat([past, F.glu(x, -1)], 1)
            past.copy_(seen[:, C:])
            y = F.conv1d(seen.transpose(1, 2), weight[:, None], bias, groups=D).transpose(1, 2)
            return F.silu(F.layer_norm(y, (D,), scale, shift))

        return {"conv_step": ours, "eager": eager}


def microseconds(step: Step, repeats: int) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e6
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(repeats):
        step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e3 / repeats


def quartiles(steps: dict[str, Step], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Candidates in turns, so that a clock that drifts is shared by all."""
    for step in steps.values():
        microseconds(step, repeats)
    times = {name: [] for name in steps}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(microseconds(step, repeats))
    return {name: statistics.quantiles(each, n=4) for name, each in times.items()}


def copy_speed(mebibytes: int, device: str) -> float:
    """Bytes a microsecond, read and written, of a plain copy."""
    source = torch.empty(mebibytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    time_of = quartiles({"copy": lambda: target.copy_(source)}, 20, 3)["copy"][1]
    return 2 * source.numel() / time_of


def steps_of(call: Layer | Filter) -> tuple[dict[str, Step], dict[str, float]]:
    """The candidates, and how far the first result of each is from the eager one's; on a GPU from a graph, too."""
    if isinstance(call, Filter):
        steps = call.candidates()
        outs = {name: step().float() for name, step in steps.items()}
        apart = {name: float((out - outs["eager"]).norm() / outs["eager"].norm()) for name, out in outs.items()}
        again = call.candidates()
    else:
        flex = call.device == "cuda" and (call.B, call.C, call.L) in FLEX
        names = [name for name in PEERS if name != "operator in PyTorch" and (flex or name != "flex+bias")]
        skipped: dict[str, str] = {}
        steps, apart = candidates(call, names, skipped)
        for name, reason in skipped.items():
            print(f"| {call} | {name} | does not run: {reason} | | | |")
        again = {name: PEERS[name](call) for name in steps}
    if call.device == "cuda":
        for name, step in again.items():
            try:
                steps[f"{name}, graph"] = captured(step)
            except RuntimeError as error:
                print(f"| {call} | {name}, graph | cannot be captured: {str(error).splitlines()[0]} | | | |")
    return steps, apart


def table(calls: Iterable[Layer] | Iterable[Filter], speed: float, rounds: int) -> None:
    print("| call | candidate | median us | quartiles | share of floor | difference to eager |")
    print("|---|---|---|---|---|---|")
    torch.manual_seed(0)
    for call in calls:  # made one at a time: the largest takes gigabytes
        if late():
            return
        steps, apart = steps_of(call)
        floor = call.bytes() / speed
        for name, (low, middle, high) in quartiles(steps, rounds, 5).items():
            error = apart[name.removesuffix(", graph")]
            cells = (
                str(call),
                name,
                f"{middle:.1f}",
                f"{low:.1f} to {high:.1f}",
                f"{floor / middle:.0%}",
                f"{error:.1e}",
            )
            print("|", " | ".join(cells), "|", flush=True)


def late() -> bool:
    if time.monotonic() - BEGIN < SECONDS - 90:
        return False
    print("\nno time is left for what would follow here")
    return True


@torch.inference_mode(False)
def pair(dim: int, layers: int, device: str) -> tuple[nn.Module, Conformer]:
    """transformers' cache-aware FastConformer with random weights, and ours with the same ones, in bfloat16."""
    sizes = {"hidden_size": dim, "num_hidden_layers": layers, "intermediate_size": 4 * dim, "num_attention_heads": 8}
    with tempfile.TemporaryDirectory() as folder:
        theirs = NemotronAsrStreamingEncoder(NemotronAsrStreamingEncoderConfig(**sizes)).eval()
        theirs.save_pretrained(folder)
        ours = cast(Conformer, speechkit.load(folder))
    return theirs.to(device, torch.bfloat16), ours.to(device, torch.bfloat16)


def whole_steps(device: str, dim: int, layers: int, sizes: tuple[int, ...], rounds: int) -> None:
    """A step of transformers' and of ours, plain and from a graph, with full caches and the same weights.

    ``faster`` is against transformers' plain step.
    """
    print(f"\nA whole step, {layers} layers of {dim}, 8 times subsampled, 70 frames remembered:\n")
    print(
        "| chunk | streams | candidate | median ms | quartiles | real-time streams | over transformers' | difference |"
    )
    print("|---|---|---|---|---|---|---|---|")
    torch.manual_seed(0)
    theirs, ours = pair(dim, layers, device)
    for lookahead in LOOKAHEADS:
        for streams in sizes:
            if late():
                return
            chunk_ms = 80 * (lookahead + 1)
            steps, apart = step_candidates(theirs, ours, lookahead, streams, device)
            times = quartiles(steps, rounds, 3)
            for name, (low, middle, high) in times.items():
                cells = (
                    f"{chunk_ms} ms",
                    str(streams),
                    name,
                    f"{middle / 1e3:.2f}",
                    f"{low / 1e3:.2f} to {high / 1e3:.2f}",
                    str(int(streams * chunk_ms / (middle / 1e3))),
                    f"{times['transformers'][1] / middle:.1f}x",
                    f"{apart[name]:.1e}" if name in apart else "",
                )
                print("|", " | ".join(cells), "|", flush=True)


def step_candidates(
    theirs: nn.Module, ours: Conformer, lookahead: int, streams: int, device: str
) -> tuple[dict[str, Step], dict[str, float]]:
    """Steps with full caches, and how far the results of ours are from transformers' over the first chunks."""
    now = context(left=theirs.config.sliding_window - 1, lookahead=lookahead)  # type: ignore[union-attr, arg-type]
    bands: int = theirs.config.num_mel_bins  # type: ignore[union-attr, assignment]
    chunk = torch.randn(streams, 8 * now.latency(), bands, dtype=torch.bfloat16, device=device)
    lengths = torch.full((streams,), chunk.shape[1], device=device)
    stream, record = partial(ours.stream, context=now), captured if device == "cuda" else lambda step: step
    graphs = Graphs(stream, ours.init_state(streams, context=now), chunk, record=record)
    state, transformers = ours.init_state(streams, context=now), of_theirs(theirs, lookahead)

    def plain() -> Tensor:
        nonlocal state
        encoded, state = stream(chunk, lengths, state)
        return encoded.frames

    steps: dict[str, Step] = {
        "transformers": lambda: transformers(chunk),
        "ours": plain,
        "ours, graph": lambda: graphs(chunk, lengths).frames,
    }
    apart = dict.fromkeys(("ours", "ours, graph"), 0.0)
    for _ in range(-(-now.memory() // now.latency()) + 2):
        outs = {name: step().float() for name, step in steps.items()}
        for name in apart:
            reference = outs["transformers"]
            apart[name] = max(apart[name], ((outs[name] - reference).norm() / reference.norm()).item())
    try:  # replayed, it hears the same past again and again, which costs the same
        steps["transformers, graph"] = record(steps["transformers"])
    except RuntimeError as error:
        print(f"transformers' step cannot be captured: {str(error).splitlines()[0]}")
    return steps, apart


def launches(device: str) -> None:
    """What a launch costs when there is nothing to do."""
    one = torch.zeros(1, device=device)
    tiny = PEERS["ours"](Layer(1, 1, 1, torch.bfloat16, device))
    small = Filter(1, 1, 2, 16, device=device).candidates()["conv_step"]
    steps: dict[str, Step] = {"empty operator": one.zero_, "smallest stream_attn": tiny, "smallest conv_step": small}
    if device == "cuda":
        steps |= {f"{name}, graph": captured(step) for name, step in steps.items()}
    print("\n| launch | median us |\n|---|---|")
    for name, times in quartiles(steps, 50, 100).items():
        print(f"| {name} | {times[1]:.2f} |")


def tests(*arguments: str, under: tuple[str, ...] = (), seconds: float = 240) -> str:
    files = ["tests/kernels/test_cuda_gpu.py", *([] if under else ["tests/test_graphs.py", "tests/test_session.py"])]
    command = [*under, sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files, *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not over after {seconds:.0f} s"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "========="))]
    return "\n".join([*failed[-20:], *(done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]])[-1:]])


def sanitize() -> None:
    if shutil.which("compute-sanitizer") is None:
        print("\ncompute-sanitizer: not installed")
        return
    for name in ("memcheck", "racecheck", "initcheck", "synccheck"):
        left = SECONDS - (time.monotonic() - BEGIN)
        if left < 20:
            print(f"\ncompute-sanitizer {name}: no time is left")
            continue
        under = (
            "compute-sanitizer",
            "--tool",
            name,
            "--error-exitcode",
            "9",
            "--kernel-name",
            "regex=stream_attn|conv_step",
        )
        print(f"\ncompute-sanitizer {name}: {tests('-k', SANITIZED, under=under, seconds=min(60, left))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    dry = parser.parse_args().dry_run
    if not dry:
        if cuda.reason() is not None:
            sys.exit(f"bench_cuda needs a GPU that the kernels run on, but {cuda.reason()}; --dry-run needs none.")
        cuda.register()
    device = "cpu" if dry else "cuda"
    print(f"# The CUDA kernels on {'the CPU, a dry run' if dry else torch.cuda.get_device_name()}\n")
    print(f"{datetime.date.today()}, torch {torch.__version__}, `python {' '.join(sys.argv)}`\n")
    if not dry:
        print(f"correctness: {tests()}\n", flush=True)
    speed = copy_speed(8 if dry else 2048, device)
    print(f"copy: {speed / 1e6:.2f} TB/s read and written\n")
    few = (Layer(*size, torch.bfloat16, device) for size in (((2, 3, 5), (1, 16, 64)) if dry else FEW))
    table(few, speed, 3 if dry else 100)
    launches(device)
    print()
    filters = [Filter(*size, device=device) for size in (((2, 3),) if dry else FILTERS)]
    table(filters, speed, 3 if dry else 30)
    whole_steps(device, *((64, 1, (2,)) if dry else (1024, 24, (1, 16, 256, 1024))), rounds=2 if dry else 10)
    if not dry:
        print()
        table((Layer(*size, torch.bfloat16, device) for size in STREAMS), speed, 20)
        print("\nvariants of these calls, for building ahead of time:\n")
        print(*cuda.used(), sep="\n")
        sanitize()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
