"""Methods that add nothing: they choose which of a pretrained encoder's weights are trained, how fast, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from speechkit.tuning.base import Tuning
from speechkit.tuning.sites import depths


class Choice(Tuning):
    """A method that adds nothing, so that there is nothing to merge."""

    merges = True

    def merge(self, model: Any) -> None:
        model.tuning = None


class Full(Choice):
    """All of the encoder, the deeper a weight lies below the head the slower.

    The rate falls by ``decay`` from one block to the one before it (layer-wise decay, 1801.06146, section 3.2; the form
    is that of BEiT, 2106.08254, appendix): what is near the sound is good for all sounds, and forgets them last.

    Args:
        decay: factor of the learning rate from block to block; 1 is the same rate for all.

    Raises:
        ValueError: for a ``decay`` that is not above 0 and at most 1.
    """

    def __init__(self, *, decay: float = 0.75) -> None:
        if not 0 < decay <= 1:
            raise ValueError(
                f"tuning.decay must be above 0 and at most 1, which is the same rate everywhere, but is {decay}."
            )
        self.decay = decay

    def adapt(self, encoder: nn.Module) -> None:
        encoder.requires_grad_(True)

    def rates(self, model: Any) -> Mapping[str, float]:
        found, top = depths(model.encoder)
        return {f"encoder.{name}": self.decay ** (top - depth) for name, depth in found.items()}


class Gradual(Full):
    """As `Full`, beginning with the head alone and joined by one more block every so many steps, the last block first.

    Gradual unfreezing (1801.06146, section 3.2). What is trained is a function of the step, so a run that is continued
    goes on with the same weights. On several GPUs it needs ``trainer.strategy=ddp_find_unused_parameters_true``.

    Args:
        every: optimizer steps from one block to the next.
        decay: as for `Full`.

    Raises:
        ValueError: for an ``every`` below 1.
    """

    def __init__(self, *, every: int, decay: float = 1.0) -> None:
        super().__init__(decay=decay)
        if every < 1:
            raise ValueError(f"tuning.every must be at least 1 optimizer step, but is {every}.")
        self.every = every

    def at(self, model: Any, step: int) -> None:
        found, top = depths(model.encoder)
        for name, parameter in model.encoder.named_parameters():
            parameter.requires_grad_(top - found[name] < step // self.every)
        super().at(model, step)


class LinearProbe(Choice):
    """Nothing of the encoder, which hears as it was left: without dropout and patchout. The head is all that learns."""

    def adapt(self, encoder: nn.Module) -> None:
        """All of it is frozen already."""

    def at(self, model: Any, step: int) -> None:
        model.encoder.eval()


class BitFit(Choice):
    """The biases of linear maps, convolutions and norms (2106.10199)."""

    def adapt(self, encoder: nn.Module) -> None:
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] == "bias")
