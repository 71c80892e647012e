"""Scale and shift: two numbers a channel behind every map and norm of a frozen encoder, which merge into these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from speechkit.tuning.base import Around, Tuning
from speechkit.tuning.sites import blocks, maps


class ScaleShift(Tuning):
    """SSF (2210.08823, section 3.2): ``y * gain + shift`` behind the linear maps and layer norms of the blocks.

    Where a map adds no bias there is no shift, so that `merge` gives the very structure that the encoder had.
    """

    merges = True

    def adapt(self, encoder: nn.Module) -> None:
        for block in blocks(encoder):
            known = {id(part) for _, part in maps(block)}
            for parent in list(block.modules()):
                for name, part in list(parent.named_children()):
                    if isinstance(part, nn.LayerNorm) or (isinstance(part, nn.Linear) and id(part) in known):
                        setattr(parent, name, Scaled(part))

    def merge(self, model: Any) -> None:
        for parent in list(model.encoder.modules()):
            for name, part in list(parent.named_children()):
                if isinstance(part, Scaled):
                    setattr(parent, name, part.merged())
        model.tuning = None


class Scaled(Around):
    """A linear map or a layer norm, scaled and shifted."""

    def __init__(self, part: nn.Linear | nn.LayerNorm) -> None:
        super().__init__(part)
        self.gain = nn.Parameter(torch.ones_like(part.weight[..., 0] if part.weight.dim() > 1 else part.weight))
        self.shift = None if part.bias is None else nn.Parameter(torch.zeros_like(part.bias))

    def forward(self, *args: Any) -> Tensor:
        y = self.part(*args) * self.gain
        return y if self.shift is None else y + self.shift

    @torch.no_grad()
    def merged(self) -> nn.Module:
        part, gain = self.part, self.gain
        part.weight.mul_(gain[:, None] if part.weight.dim() > 1 else gain)
        if self.shift is not None:
            part.bias.mul_(gain).add_(self.shift)
        return part
