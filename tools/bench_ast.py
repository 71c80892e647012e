"""Training AST: ours, ours with PaSST's patchout, and transformers', side by side in one run.

    python tools/bench_ast.py [--size tiny] [--batch 2] [--frames 1024] [--repeats 5] [--device cuda] [--compile]

A step is forward and backward of a tagger of 527 classes on random features, with the same weights for all; the
logits are checked to be equal first. Patchout is that of PaSST-S at 10 s, 40 columns and 4 rows. The
candidates take turns, so whatever else the machine does falls on all of them alike. Times are medians with their
quartiles, on a CPU of the time that its threads were at work; ratios are to transformers, the median over the turns.
Memory is what a forward pass keeps for its backward pass; on a GPU the most that a step holds beside the weights of the
models. There the steps are in bfloat16. With --compile each candidate goes through torch.compile.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ASTConfig, ASTForAudioClassification

import speechkit
from speechkit.encoders.ast import Patchout

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
CLASSES = 527


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    steps = candidates(arguments.size, arguments.frames, device)
    if arguments.compile:
        steps = {name: torch.compile(logits) for name, logits in steps.items()}
    x = torch.randn(arguments.batch, arguments.frames, 128, device=device)
    what = f"forward and backward{', compiled' if arguments.compile else ''}"
    print(f"AST {arguments.size}, {arguments.batch} clips of {arguments.frames} frames, {what}")
    print(f"{device}, {arguments.threads} thread(s), torch {torch.__version__}\n")
    times = measure(steps, x, arguments.repeats)
    report(times, {name: held(logits, x) for name, logits in steps.items()})


def candidates(size: str, frames: int, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """What gives the logits of features, by its name."""
    dim, heads = SIZES[size]
    theirs = ASTForAudioClassification(
        ASTConfig(
            hidden_size=dim,
            num_attention_heads=heads,
            intermediate_size=4 * dim,
            max_length=frames,
            num_labels=CLASSES,
        )
    )
    nn.init.normal_(theirs.audio_spectrogram_transformer.embeddings.position_embeddings, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, less = (speechkit.load(Path(folder)).train().to(device) for _ in range(2))
    less.encoder.patchout = Patchout(columns=40, rows=4)
    theirs.train().to(device)
    return {"transformers": lambda x: theirs(x).logits, "ours": ours.logits, "ours, patchout": less.logits}


def measure(candidates: dict[str, Callable[[Tensor], Tensor]], x: Tensor, repeats: int) -> dict[str, Tensor]:
    """Seconds of each candidate in each turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.no_grad():
        same = [candidates[name](x) for name in ("transformers", "ours")]
        assert torch.allclose(*same, atol=1e-3), "the candidates must agree"
    for turn in range(repeats + 1):
        for name, logits in candidates.items():
            seconds = step(logits, x)
            if turn:  # the first is for warming up
                times[name].append(seconds)
    return {name: torch.tensor(seconds, dtype=torch.float64) for name, seconds in times.items()}


def step(logits: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = now(x.device)
    forward(logits, x).backward()
    return now(x.device) - start


def now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def forward(logits: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        return logits(x).float().square().mean()


def held(logits: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that a step takes beside what is there already."""
    if x.device.type == "cpu":
        return kept(partial(forward, logits, x))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward(logits, x).backward()
    return torch.cuda.max_memory_allocated() - before


def kept(loss: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights aside."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = loss()
        del found
    return sum(sizes.values())


def report(times: dict[str, Tensor], memory: dict[str, int]) -> None:
    for name, seconds in times.items():
        low, middle, high = torch.quantile(1e3 * seconds, torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
        ratio, saving = float((times["transformers"] / seconds).median()), memory["transformers"] / memory[name]
        print(
            f"{name:>15} {middle:9.1f} ms ({low:.1f}-{high:.1f})   {ratio:.2f}x as fast"
            f" {memory[name] / 2**20:9.1f} MiB   {saving:.2f}x less"
        )


if __name__ == "__main__":
    main()
