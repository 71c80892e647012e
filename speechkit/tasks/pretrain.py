"""Sound alone: an encoder learns by what is hidden from it."""

from __future__ import annotations

from typing import Any

import torch

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
        self._losses: list[tuple[dict[str, float], int]] = []

    def validation_step(self, batch: TagBatch, index: int) -> Any:
        """The loss of a batch, a number; every step of training seeds anew, so nothing else notices the seed."""
        torch.manual_seed(chance(self.seed, index, self.global_rank))
        losses = {name: float(value) for name, value in self.model.losses(*self.features(batch)).items()}
        self._losses.append((losses, len(batch.ids)))
        return losses["loss"]

    def on_validation_epoch_end(self) -> None:
        every = self.from_all(self._losses)
        count = sum(size for _, size in every)
        values = {name: sum(losses[name] * size for losses, size in every) / count for name in every[0][0]}
        self.log_dict({f"dev/{name}": value for name, value in values.items()}, logger=False)  # for early stopping
        self.report("dev", values)

    def error_rate(self) -> float | None:
        """The loss on dev, as ``loss / (1 + loss)``: between 0 and 1, whatever the loss is a sum of."""
        loss = self.latest.get("dev/loss")
        return None if loss is None else loss / (1 + loss)
