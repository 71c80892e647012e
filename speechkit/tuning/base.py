"""What every fine-tuning method is, and a part of a model with something put around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class Tuning:
    """A fine-tuning method: what of a pretrained model is trained, and what is added to it.

    A subclass writes `adapt`. The front end is never trained, and what comes behind the encoder always is. A model
    knows its method as ``tuning``.
    """

    merges = False
    """Whether `merge` can fold what was added into the weights."""

    def apply(self, model: Any) -> None:
        """Change the structure of ``model``, in place, and mark what is trained by ``requires_grad``.

        Pretrained weights must be in place, because some methods begin from them.

        Args:
            model: with ``features`` (or None) and ``encoder``; all other weights are of its head.

        Raises:
            ValueError: where the method cannot work with the encoder, or the model is tuned already.
        """
        if getattr(model, "tuning", None) is not None:
            raise ValueError(
                f"A model must be plain to be tuned by {type(self).__name__}, but this one is tuned by "
                f"{type(model.tuning).__name__}; merge that first, or continue with the same method."
            )
        for part in (model.features, model.encoder):
            if part is not None:
                part.requires_grad_(False)
        self.adapt(model.encoder)
        model.tuning = self

    def adapt(self, encoder: nn.Module) -> None:
        """Mark what is trained, all being frozen, and add what is new."""
        raise NotImplementedError

    def rates(self, model: Any) -> Mapping[str, float]:
        """Factors of the learning rate by the name of a weight in ``model``; 1 for those that are not named."""
        return {}

    def at(self, model: Any, step: int) -> None:
        """Called before each training step, with the number of optimizer steps made: a function of nothing else.

        A batch norm that is not trained as a whole goes on with the statistics it came with.
        """
        for part in model.encoder.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.train(model.encoder.training and all(p.requires_grad for p in part.parameters()))

    def merge(self, model: Any) -> None:
        """Fold what was added into the weights, in place: a plain model that gives the same.

        Raises:
            ValueError: where that cannot be exact.
        """
        raise ValueError(
            f"{type(self).__name__} must stay beside the weights it was trained with, because no plain model gives the "
            f"same; use the model as it is, or start from the one it was tuned from."
        )


class Around(nn.Module):
    """A part of a model with something put around it; what is asked of it and not known here, the part is asked."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part: Any = part

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("part"), name)
