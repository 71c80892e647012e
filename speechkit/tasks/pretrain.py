"""Sound alone: an encoder learns by what is hidden from it."""

from __future__ import annotations

import torch
from torch import Tensor

from speechkit.autoencoder import MaskedAutoencoder
from speechkit.tasks.base import Optim, Parts, Task, chance
from speechkit.types import FeatureOutput, TagBatch


class Pretrain(Task):
    """Sound alone: the encoder of a `MaskedAutoencoder` learns from recordings that nobody labelled.

    Models are chosen by the loss on dev, where every evaluation hides the same patches.

    Args:
        model: what learns.
    """

    def __init__(self, *, model: MaskedAutoencoder, optim: Optim, seed: int = 0) -> None:
        super().__init__(model=model, optim=optim, seed=seed)

    def losses(self, batch: TagBatch, dice: int) -> Parts:
        frames, lengths = self.features(batch)
        self._meter.frames += lengths.sum()
        return self.model.losses(frames, lengths)

    def features(self, batch: TagBatch) -> FeatureOutput:
        """Nothing in a front end is trained."""
        with torch.no_grad():
            return self.model.features(batch.samples, batch.sample_lengths)

    def on_validation_epoch_start(self) -> None:
        self._losses: list[tuple[Parts, int]] = []

    def validation_step(self, batch: TagBatch, index: int) -> Tensor:
        """The loss of a batch; training draws anew in every step, so nothing else notices the seed."""
        torch.manual_seed(chance(self.seed, index))
        losses = self.model.losses(*self.features(batch))
        self._losses.append((losses, len(batch.ids)))
        return losses["loss"]

    def on_validation_epoch_end(self) -> None:
        sums = {name: sum(float(losses[name]) * size for losses, size in self._losses) for name in self._losses[0][0]}
        count = sum(size for _, size in self._losses)
        totals = torch.tensor([*sums.values(), count], device=self.device)
        *values, count = self.trainer.strategy.reduce(totals, reduce_op="sum").tolist()
        means = {name: value / count for name, value in zip(sums, values, strict=True)}
        self.log_dict({f"dev/{name}": value for name, value in means.items()}, logger=False)  # for early stopping
        self.report("dev", means)

    def error_rate(self) -> float | None:
        """The loss on dev."""
        return self.latest.get("dev/loss")
