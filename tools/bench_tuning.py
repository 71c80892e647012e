"""Every fine-tuning method on one recipe: what it learns, what it trains, and what that takes.

    python tools/bench_tuning.py CONFIG --init MODEL [--epochs 20] [--methods lora full ...] [--out FOLDER] [key=value]

Each method of conf/tuning trains in a folder of its own, from the same model, with the rate of its own file; a method
that cannot work in this encoder says so. The same command continues what was interrupted and trains nothing twice.
Accuracy (or mAP, or the word error rate of a recogniser) is that of the model a run leaves, on dev, which chose it,
and on test, which did not. Memory is that of one step, in bytes counted: what autograd keeps of the forward pass,
gradients, and the optimizer's state, weights aside. Time is of the training steps of an epoch, the thread's own on a
CPU, the median of a few.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from bench_ast import kept
from omegaconf import DictConfig

import speechkit
from speechkit import config as configs
from speechkit import metrics
from speechkit.app import train
from speechkit.types import Batch, TagBatch

STEPS = 5  # that are timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--init", required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=known())
    parser.add_argument("--out", type=Path, default=Path("runs/tuning"))
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    found = {}
    for method in arguments.methods:
        result = arguments.out / method / "result.json"
        if not result.exists():
            changes = [f"name={method}", f"run={arguments.out / method}", f"init={arguments.init}", *overrides]
            result.parent.mkdir(parents=True, exist_ok=True)
            result.write_text(json.dumps(bench(arguments.config, method, arguments.epochs, changes)))
        found[method] = json.loads(result.read_text())
    print("\n".join(table(found)))


def known() -> list[str]:
    return sorted(path.stem for path in (configs.catalogue() / "tuning").glob("*.yaml"))


def bench(config: str, method: str, epochs: int, changes: list[str]) -> dict[str, Any]:
    """The row of a method; with nothing but ``refused`` where it cannot work."""
    _, data = built(configs.compose(config, changes))
    batches = len(data.train_batches(0))
    steps = epochs * batches
    schedule = [f"trainer.max_steps={steps}", f"optim.schedule.warmup={steps // 10}"]
    gradual = [f"model.tuning.every={max(1, steps // 20)}"] if method == "gradual" else []
    settings = configs.compose(config, [*changes, f"tuning={method}", *schedule, *gradual])
    try:
        row = measured(settings, batches)
    except ValueError as error:
        return {"refused": str(error)}
    train.fit(settings)
    return row | judged(settings)


def built(settings: DictConfig) -> tuple[Any, Any]:
    """Model and data, the config that a run keeps left as it is."""
    settings = copy.deepcopy(settings)
    train.complete(settings)
    return train.build(settings)


def measured(settings: DictConfig, batches: int) -> dict[str, Any]:
    """What a step takes, of a model that is thrown away."""
    model, data = built(settings)
    train.start(model, data, settings)
    configs.tune(model, settings.model.get("tuning"))
    task = train.task_of(model, settings)
    optimizer = task.configure_optimizers()["optimizer"]
    trained = [p for p in model.parameters() if p.requires_grad]
    task.train()
    heard = [batch for _, batch in zip(range(1 + STEPS), data.train_batches(0), strict=False)]
    times = [step(task, optimizer, batch, number) for number, batch in enumerate(heard)]
    state = [value for known in optimizer.state.values() for value in known.values() if isinstance(value, torch.Tensor)]
    gradients = [p.grad for p in trained if p.grad is not None]
    forward = kept(lambda: task.losses(heard[0], 0)["loss"])  # beside the gradients of the last step
    return {
        "trained": sum(p.numel() for p in trained),
        "weights": sum(p.numel() for p in model.parameters()),
        "memory": forward + sum(tensor.nbytes for tensor in (*state, *gradients)),
        "seconds": batches * float(torch.tensor(times[1:] or times).median()),
    }


def step(task: Any, optimizer: torch.optim.Optimizer, batch: Batch | TagBatch, number: int) -> float:
    start = time.process_time()
    if task.model.tuning is not None:
        task.model.tuning.at(task.model, number)
    task.losses(batch, number)["loss"].backward()
    optimizer.step()
    seconds = time.process_time() - start
    optimizer.zero_grad(set_to_none=number < STEPS)
    return seconds


def judged(settings: DictConfig) -> dict[str, float]:
    """Accuracy, mean average precision or word error rate of the model that a run left, on dev and on test."""
    model: Any = speechkit.load(settings.run)
    _, data = built(settings)
    sets = {"dev": data.dev_batches(), **{f"test {name}": data.test_batches(name) for name in data.test}}
    judge = misheard if isinstance(model, speechkit.Recogniser) else recognised
    return {name: judge(model, batches) for name, batches in sets.items()}


def misheard(model: speechkit.Recogniser, batches: Iterable[Batch]) -> float:
    said, heard = [], []
    for batch in batches:
        clips = zip(batch.samples, batch.sample_lengths.tolist(), strict=True)
        heard += [found.text for found in model.transcribe([samples[:length] for samples, length in clips])]
        said += batch.texts
    return metrics.word_errors(said, heard).rate


def recognised(model: Any, batches: Iterable[TagBatch]) -> float:
    scores, targets = [], []
    for batch in batches:
        clips = zip(batch.samples, batch.sample_lengths.tolist(), strict=True)
        scores += [model.scores(samples[:length]) for samples, length in clips]
        targets.append(batch.targets)
    found = metrics.tagging(torch.stack(scores).numpy(), torch.cat(targets).numpy(), model.exclusive)
    return found["accuracy" if model.exclusive else "mAP"]


def table(found: dict[str, dict[str, Any]]) -> Iterable[str]:
    """Markdown, a line a method."""
    sets = list(dict.fromkeys(key for row in found.values() for key in row if key.startswith(("dev", "test"))))
    yield "| method | trained | of all | MiB a step | s an epoch | " + " | ".join(sets) + " |"
    yield "|---|---:|---:|---:|---:|" + "---:|" * len(sets)
    for method, row in found.items():
        if "refused" in row:
            yield f"| {method} | {row['refused']} |"
            continue
        numbers = [f"{row['trained']:,}", f"{row['trained'] / row['weights']:.2%}", f"{row['memory'] / 2**20:.1f}"]
        rates = [f"{100 * row[name]:.1f}" for name in sets]
        yield "| " + " | ".join([method, *numbers, f"{row['seconds']:.1f}", *rates]) + " |"


if __name__ == "__main__":
    main()
