"""Training wired up: what a step is, how its chance is drawn, and how a run continues exactly where it was.

`Task` is what every training has in common; a subclass says what the loss of a batch is and how dev is judged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Parts = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Up in a line for ``warmup`` optimizer steps, then down along a cosine to ``floor`` at the last of ``steps``."""

    warmup: int
    steps: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.steps <= self.warmup:
            raise ValueError(
                f"WarmupCosine.steps must be more than the warm-up of {self.warmup}, but is {self.steps}; "
                f"set trainer.max_steps, lower optim.schedule.warmup, or choose optim=noam, which has no last step."
            )

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class Noam:
    """Up in a line, then down with the square root of the step (1706.03762, equation 3), scaled to a peak of 1."""

    warmup: int

    def __call__(self, step: int) -> float:
        return min((step + 1) / self.warmup, math.sqrt(self.warmup / (step + 1)))


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Up in a line, then the same rate for good."""

    warmup: int = 0

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / (self.warmup + 1))


@dataclass(frozen=True, kw_only=True)
class Stairs:
    """Up in a line, then times ``factor`` at step ``first`` and again ``every`` so many steps after it.

    A published schedule by epochs is one of steps with the clips of its data set over those of a batch.
    """

    first: int
    every: int
    factor: float = 0.5
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"Stairs.every must be at least one step, but is {self.every}; optim=constant has none.")

    def __call__(self, step: int) -> float:
        falls = 0 if step < self.first else (step - self.first) // self.every + 1
        return min(1.0, (step + 1) / (self.warmup + 1)) * self.factor**falls


class Optim:
    """An optimizer and the schedule of its rate.

    Args:
        optimizer: called with parameter groups, for example `torch.optim.AdamW`. Its weight decay leaves out vectors:
            biases, and the gains of norms.
        schedule: optimizer step to a factor of the learning rate.
    """

    def __init__(self, *, optimizer: Callable[..., Optimizer], schedule: Callable[[int], float]) -> None:
        self.optimizer, self.schedule = optimizer, schedule

    def __call__(self, module: nn.Module, rates: Mapping[str, float] | None = None) -> tuple[Optimizer, LambdaLR]:
        """The optimizer of all that is trained in ``module``; ``rates``: factors of the rate by a weight's name."""
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                groups.setdefault(((rates or {}).get(name, 1.0), weight.dim() > 1), []).append(weight)
        fastest_first = sorted(groups, reverse=True)  # what is reported as the rate is that of the first
        rows = [{"params": groups[key], **({} if key[1] else {"weight_decay": 0.0})} for key in fastest_first]
        try:
            optimizer = self.optimizer(rows)
        except ValueError as error:
            raise ValueError(f"optim.optimizer must be given what it takes, but: {error}; correct that key.") from error
        for group, (rate, _) in zip(optimizer.param_groups, fastest_first, strict=True):
            group["lr"] *= rate
        return optimizer, LambdaLR(optimizer, self.schedule)


class Position(NamedTuple):
    """How far a training is: ``batch`` batches of ``epoch``, ``number`` batches in all, ``step`` optimizer steps."""

    epoch: int = 0
    batch: int = 0
    number: int = 0
    step: int = 0


class Task(LightningModule):
    """What every training has in common.

    All chance of a batch (dropout, SpecAugment, context) comes from the seed and the number of the batch, so a restart
    needs no state of a generator. `Position` is all that is kept of where the loops were: Lightning's own progress is
    made from it, and means the same whenever it was saved.

    Args:
        model: what learns; one with a ``tuning`` (see `speechkit.tuning`) learns as that says.
        optim: makes the optimizer and its schedule.
        seed: of the run.
    """

    def __init__(self, *, model: nn.Module, optim: Optim, seed: int = 0) -> None:
        super().__init__()
        self.model: Any = model
        self.optim, self.seed = optim, seed
        self.position = Position()
        self.latest: dict[str, float] = {}  # what was reported last, for whoever shows it
        self._resumed = 0  # batches of this epoch that were had before a restart
        self._step = _Step()
        self._meter = _Meter()

    def losses(self, batch: Any, dice: int) -> Parts:
        """``loss`` and its named parts; chance other than torch's comes from ``dice``."""
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        tuning = getattr(self.model, "tuning", None)
        rates = {} if tuning is None else {f"model.{name}": r for name, r in tuning.rates(self.model).items()}
        optimizer, schedule = self.optim(self, rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, index: int) -> Tensor:
        number = self.position.number
        torch.manual_seed(chance(self.seed, number, self.global_rank))
        if (tuning := getattr(self.model, "tuning", None)) is not None:
            tuning.at(self.model, self.position.step)
        losses = self.losses(batch, chance(self.seed, number))
        self._step.add(losses, batch.ids)
        return losses["loss"]

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by norm, and stop before a step that would turn the weights into NaN.

        Raises:
            ValueError: naming the utterances of the step.
        """
        weights = [p for p in self.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # float16 skips such steps itself
        self._step.norm, self._step.rate = norm, optimizer.param_groups[0]["lr"]
        self._step.require_finite(self.trainer.global_step, scaled)
        if gradient_clip_val:
            nn.utils.clip_grads_with_norm_(weights, gradient_clip_val, norm)

    def on_train_start(self) -> None:
        self._meter = _Meter()

    def on_train_epoch_start(self) -> None:
        self._resumed = 0  # Lightning leaves this hook out for the epoch that is continued

    def on_validation_end(self) -> None:
        self._meter = _Meter()

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        trainer = self.trainer
        epoch, done = trainer.current_epoch, self._resumed + index + 1
        if trainer.is_last_batch:
            epoch, done = epoch + 1, 0
        before, self.position = self.position, Position(epoch, done, self.position.number + 1, trainer.global_step)
        if self.position.step > before.step:
            if self.position.step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                self._report_step()
            self._step = _Step()

    def _report_step(self) -> None:
        step, speed = self._step, self._meter.per_second()
        self.report("train", {**step.means(), "lr": step.rate, "grad_norm": step.norm, "frames_per_second": speed})
        self._meter = _Meter()

    def report(self, kind: str, values: dict[str, Any]) -> None:
        """Log values as ``kind/name`` at the current step; outside of a training nothing is logged."""
        self.latest = {f"{kind}/{name}": float(value) for name, value in values.items()}
        for logger in self.loggers if self.trainer.state.fn == "fit" else ():
            logger.log_metrics({f"{kind}/batch": self.position.number, **self.latest}, self.position.step)

    def error_rate(self) -> float | None:
        """What the models on the way are compared by, from the latest evaluation: 0 to 1, and lower is better."""
        raise NotImplementedError

    def from_all(self, items: list[Any]) -> list[Any]:
        """The items of every rank, those of the first rank first; every rank must call it."""
        if self.trainer.world_size == 1:
            return items
        parts: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    @property
    def between_steps(self) -> bool:
        """Whether no gradient waits for more to be added to it: the moments that a run can continue from."""
        return not self._step.ids

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["position"] = list(self.position)
        del checkpoint["loops"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.position = Position(*checkpoint["position"])
        self._resumed = self.position.batch
        checkpoint["loops"] = {"fit_loop": _progress(self.trainer.fit_loop.state_dict(), self.position)}
        self.trainer.datamodule.resume(epoch=self.position.epoch, batch=self.position.batch)  # type: ignore[attr-defined]


def chance(*key: int) -> int:
    """A seed for each key, unlike that of any neighbour."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def _progress(loops: dict[str, Any], at: Position) -> dict[str, Any]:
    """Lightning's progress as it is between two batches, whichever hook the state was saved in.

    The data module hands out the rest of a resumed epoch, so its batches are counted from 0 again. A position between
    steps is a multiple of the accumulation, so the steps fall where they did.
    """
    done = dict.fromkeys(("ready", "started", "processed", "completed"), at.number)
    loops["epoch_loop.batch_progress"]["total"].update(done)
    epochs = {"ready": at.epoch + 1, "started": at.epoch + 1, "processed": at.epoch, "completed": at.epoch}
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    for count in ("total", "current"):
        loops["epoch_progress"][count].update(epochs)
        steps[count].update(ready=at.step, completed=at.step)
    return loops


class _Step:
    """What the batches of one optimizer step add up to."""

    def __init__(self) -> None:
        self.sums: Parts = {}
        self.ids: list[tuple[str, ...]] = []
        self.norm: Tensor | float = math.nan
        self.rate = math.nan

    def add(self, losses: Parts, ids: tuple[str, ...]) -> None:
        self.sums = {name: self.sums.get(name, 0.0) + value.detach() for name, value in losses.items()}
        self.ids.append(ids)

    def means(self) -> Parts:
        return {name: total / len(self.ids) for name, total in self.sums.items()}

    def require_finite(self, step: int, scaled: bool) -> None:
        loss = self.means()["loss"]
        if not torch.isfinite(loss if scaled else loss + self.norm):
            ids = [name for batch in self.ids for name in batch]
            named = ", ".join(ids[:16]) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
            raise ValueError(
                f"The loss and its gradient must be finite, but after step {step} the loss is {float(loss):g} and the "
                f"gradient's norm {float(self.norm):g} for the utterances {named}; look at these recordings and texts, "
                f"or lower optim.optimizer.lr, which is {self.rate:.2g} here."
            )


class _Meter:
    """Frames a second since it was made."""

    def __init__(self) -> None:
        self.frames: Tensor | int = 0
        self.start = time.perf_counter()

    def per_second(self) -> float:
        return float(self.frames) / (time.perf_counter() - self.start)
