"""The door to the compiled operators of `speechkit_kernels`, which streams go through where one serves their device."""

from __future__ import annotations

from functools import cache, lru_cache

import speechkit_kernels
import torch
from torch import Tensor


def explain() -> str:
    """Which kernel serves each operator on each kind of device, and why not a faster one; a line each."""
    return "\n".join(map(str, speechkit_kernels.explain()))


def serves(operator: str, like: Tensor) -> bool:
    """Whether a compiled kernel takes tensors like this one. The first call loads the kernels, and may build them.

    Under autocast, whose mixture of types no kernel takes, none does.
    """
    device = like.device.type
    return not torch.is_autocast_enabled(device) and _serves(operator, device)


def require(operator: str, like: Tensor) -> None:
    """Insists on a compiled kernel.

    Raises:
        RuntimeError: where there is none; the message ends with the remedy.
    """
    speechkit_kernels.require(operator, like.device)


@lru_cache(maxsize=64)
def rows(batch: int, device: torch.device) -> Tensor:
    """``[0, 1, ... batch - 1]``: each stream of a batch has the slot of its row."""
    return torch.arange(batch, device=device)


@cache
def _serves(operator: str, device: str) -> bool:
    return any(
        serving.kernel != speechkit_kernels.PLAIN
        for serving in speechkit_kernels.explain()
        if (serving.operator, serving.device) == (operator, device)
    )
