"""A learned mixture of all layers of a frozen encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from speechkit.tuning.base import Tuning
from speechkit.tuning.sites import blocks


class LayerSum(Tuning):
    """The head hears a weighted sum of what goes into the first block and comes out of every one.

    SUPERB's probe (2105.01051, section 3): the weights are a softmax of learned numbers, all equal at first, and the
    encoder is frozen, without dropout and patchout. The sum takes the place of the last block's output, so what an
    encoder does behind its blocks (a norm, a summary) is done to the sum, whole or streamed.
    """

    def adapt(self, encoder: nn.Module) -> None:
        all_blocks = blocks(encoder)
        encoder.mixture = mixture = Mixture(1 + len(all_blocks))
        all_blocks[0].register_forward_pre_hook(mixture.begin, with_kwargs=True)
        for block in all_blocks:
            block.register_forward_hook(mixture.hear)

    def at(self, model: Any, step: int) -> None:
        model.encoder.eval()


class Mixture(nn.Module):
    """Hears blocks through their hooks; what it has heard is dropped with the last one."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(count))
        self._heard: list[Tensor] = []

    def begin(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        self._heard = [args[0] if args else kwargs["hidden_states"]]

    def hear(self, block: nn.Module, args: tuple, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        self._heard.append(first)
        if len(self._heard) < len(self.weights):
            return output
        first, self._heard = self.mixed(self._heard), []
        return (first, *rest) if isinstance(output, tuple) else first

    def mixed(self, layers: list[Tensor]) -> Tensor:
        """The weighted sum; frames of a slower clock are heard as often as the outer clock ticks."""
        frames = layers[-1].shape[1]
        same = [torch.repeat_interleave(x, -(-frames // x.shape[1]), dim=1)[:, :frames] for x in layers]
        return torch.einsum("l,lbud->bud", self.weights.softmax(0).to(same[0].dtype), torch.stack(same))
