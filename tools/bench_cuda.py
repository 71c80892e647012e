"""One NVIDIA GPU, under ten minutes: is stream_attn right there, and how near to the memory's speed is it?

    python tools/bench_cuda.py > results.md      tests, ceilings, streaming tables, compute-sanitizer where installed
    python tools/bench_cuda.py --dry-run         the same lines on the CPU at tiny sizes, to see that they run

Candidates are timed in turns within one run, each on its own copy of the same input; what is printed is the median and
the quartiles in microseconds, and the share of the memory floor: bytes that must move, at the speed of a plain copy.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "kernels"))
from speechkit_kernels import cuda, plain  # noqa: E402

Step = Callable[[], Tensor]
SANITIZED = "equals and (49 or 36 or aligned or chunks or twenty or slopes)"  # small cases of the tests
STREAMS = ((256, 16, 64), (1024, 16, 64), (4096, 16, 64), (256, 16, 256), (1024, 16, 256), (4096, 16, 256))
FEW = ((1, 16, 64), (4, 16, 64), (16, 16, 64), (1, 16, 256), (16, 16, 256), (16, 1, 70))


@dataclass(frozen=True)
class Layer:
    """One call of a layer with H heads of width D, long after the streams began: every ring is full."""

    streams: int
    frames: int
    left: int
    heads: int = 8
    width: int = 64
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def bytes(self) -> int:
        """Remembered keys and values read, new ones read and written, queries read, results written."""
        frames = 2 * self.left + (2 + 2 + 1 + 1) * self.frames
        return self.streams * frames * self.heads * self.width * self.dtype.itemsize

    def candidates(self) -> dict[str, Step]:
        B, C, L, H, D = self.streams, self.frames, self.left, self.heads, self.width
        q, k, v = (self.noise(B, C, H, D) for _ in range(3))
        rel, u, w = self.noise(H, L + 2 * C - 1, D), self.noise(H, D), self.noise(H, D)
        cache = self.noise(B, 2, H, L + C, D)
        count = dict(dtype=torch.int32, device=self.device)
        slots = torch.randperm(B, device=self.device).int()
        pos, qlen = torch.full((B,), 10 * (L + C), **count), torch.full((B,), C, **count)
        past = cache[slots.long()][:, :, :, C:]  # pos is a multiple of W, so the frame of time pos - L lies at C
        scale = D**-0.5
        options = {"rel": rel, "rel_zero": L + C - 1, "bias_u": u, "bias_v": w, "left": L, "scale": scale}

        def ours() -> Tensor:
            operator = cuda.stream_attn if self.device == "cuda" else plain.stream_attn
            return operator(q, k, v, cache, slots, pos, qlen, **options)

        def peer(attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Step:
            keys, values = past[:, 0].clone(), past[:, 1].clone()

            def step() -> Tensor:
                all_keys = torch.cat([keys, k.transpose(1, 2)], 2)
                all_values = torch.cat([values, v.transpose(1, 2)], 2)
                band = (q + w).transpose(1, 2) @ rel.transpose(1, 2)  # [B, H, C, P]
                rows = band.stride()
                bias = band.as_strided((B, H, C, L + C), (rows[0], rows[1], rows[2] - 1, 1), C - 1)
                out = attend((q + u).transpose(1, 2), all_keys, all_values, bias * scale)
                keys.copy_(all_keys[:, :, C:]), values.copy_(all_values[:, :, C:])
                return out.transpose(1, 2)

            return step

        def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return torch.softmax(q @ k.transpose(2, 3) * scale + bias, -1) @ v

        def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

        return {"stream_attn": ours, "eager, cat cache": peer(eager), "SDPA + bias, cat cache": peer(sdpa)}


def captured(step: Step) -> Step:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


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


def table(sizes: tuple[tuple[int, int, int], ...], speed: float, device: str, rounds: int) -> None:
    print("| streams | C | left | candidate | median us | quartiles | share of floor | error to eager |")
    print("|---|---|---|---|---|---|---|---|")
    for streams, frames, left in sizes:
        layer = Layer(streams, frames, left, device=device)
        torch.manual_seed(0)
        steps = layer.candidates()
        outs = {name: step().float() for name, step in steps.items()}
        errors = {
            n: ((x - outs["eager, cat cache"]).norm() / outs["eager, cat cache"].norm()).item() for n, x in outs.items()
        }
        if device == "cuda":
            steps |= {f"{name}, graph": captured(step) for name, step in steps.items()}
        floor = layer.bytes() / speed
        for name, (low, middle, high) in quartiles(steps, rounds, 5).items():
            error = errors[name.removesuffix(", graph")]
            cells = (streams, frames, left, name, f"{middle:.1f}", f"{low:.1f} to {high:.1f}", f"{floor / middle:.0%}")
            print("|", " | ".join(map(str, cells)), f"| {error:.1e} |")


def launches(device: str) -> None:
    """What a launch costs when there is nothing to do."""
    one = torch.zeros(1, device=device)
    tiny = Layer(1, 1, 1, heads=1, width=16, device=device).candidates()["stream_attn"]
    steps: dict[str, Step] = {"empty operator": one.zero_, "smallest stream_attn": tiny}
    if device == "cuda":
        steps |= {f"{name}, graph": captured(step) for name, step in steps.items()}
    print("\n| launch | median us |\n|---|---|")
    for name, times in quartiles(steps, 50, 100).items():
        print(f"| {name} | {times[1]:.2f} |")


def tests(*arguments: str, under: tuple[str, ...] = ()) -> str:
    command = [*under, sys.executable, "-m", "pytest", "-q", "tests/kernels/test_cuda_gpu.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]


def sanitize() -> None:
    if shutil.which("compute-sanitizer") is None:
        print("\ncompute-sanitizer: not installed")
        return
    for name in ("memcheck", "racecheck", "initcheck", "synccheck"):
        under = ("compute-sanitizer", "--tool", name, "--error-exitcode", "9", "--kernel-name", "kns=stream_attn")
        print(f"\ncompute-sanitizer {name}: {tests('-k', SANITIZED, under=under)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    dry = parser.parse_args().dry_run
    if not dry and cuda.reason() is not None:
        sys.exit(f"bench_cuda needs a GPU that the kernel runs on, but {cuda.reason()}; --dry-run needs none.")
    device = "cpu" if dry else "cuda"
    print(f"# stream_attn on {'the CPU, a dry run' if dry else torch.cuda.get_device_name()}\n")
    print(f"{datetime.date.today()}, torch {torch.__version__}, `python {' '.join(sys.argv)}`\n")
    if not dry:
        print(f"correctness: {tests()}\n")
    speed = copy_speed(8 if dry else 2048, device)
    print(f"copy: {speed / 1e6:.2f} TB/s read and written\n")
    table(((2, 3, 5), (1, 16, 64)) if dry else FEW, speed, device, 3 if dry else 100)
    if not dry:
        table(STREAMS, speed, device, 20)
    launches(device)
    if not dry:
        sanitize()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
