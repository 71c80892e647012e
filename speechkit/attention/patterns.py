"""Patterns: which of the keys that the context shows are looked at, as functions of absolute positions.

Each is a frozen value called with ``query [B, U, 1]`` and ``key [B, 1, S]``. Attention keeps a pair only if the context
shows it *and* the pattern keeps it, so no pattern can look ahead, and none can break streaming.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Dilated:
    """Every ``step``-th key before the query, and all neighbours within ``near`` frames (1904.10509, section 4.2)."""

    step: int = 4
    near: int = 8

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        distance = (query - key).abs()
        return (distance <= self.near) | (distance % self.step == 0)
