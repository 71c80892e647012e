"""Which patches of a spectrogram a pretraining leaves visible, drawn anew for each clip.

A mask is a frozen value called as ``mask(columns, rows)``: how many columns of patches each clip of a batch has, and
how many patches are in a column. It answers with ``seen [B, P]``, over the patches of the longest clip, column by
column. The same share of every clip is hidden, whatever is beside it, and padding is never seen. Chance is torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speechkit.stream import valid

Mask = Callable[[Int[Tensor, "B"], int], Bool[Tensor, "B P"]]


@dataclass(frozen=True, kw_only=True)
class Anywhere:
    """Patches anywhere (Audio-MAE, 2207.06405, section 3.1).

    Args:
        share: of the patches that is hidden.
    """

    share: float = 0.8

    def __post_init__(self) -> None:
        _require_share("Anywhere.share", self.share)

    def __call__(self, columns: Int[Tensor, "B"], rows: int) -> Bool[Tensor, "B P"]:
        return _drawn(columns * rows, 1 - self.share)


@dataclass(frozen=True, kw_only=True)
class Stripes:
    """Whole columns and whole rows (Audio-MAE, section 4.4); with ``rows=0`` SSAST's masking of frames (2110.09784).

    Args:
        columns, rows: shares of them that are hidden, each by itself. The paper's 0.6 and 0.5 leave a fifth visible.
    """

    columns: float = 0.6
    rows: float = 0.5

    def __post_init__(self) -> None:
        _require_share("Stripes.columns", self.columns, least=0.0)
        _require_share("Stripes.rows", self.rows, least=0.0)
        if not self.columns + self.rows:
            raise ValueError("Stripes must hide columns or rows, but both shares are 0; raise one.")

    def __call__(self, columns: Int[Tensor, "B"], rows: int) -> Bool[Tensor, "B P"]:
        column = _drawn(columns, 1 - self.columns)
        row = _drawn(torch.full_like(columns, rows), 1 - self.rows)
        return (column[:, :, None] & row[:, None]).flatten(1)


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Squares of patches, one after the other until enough are hidden (SSAST, 2110.09784, section 2.3).

    Its paper draws the squares one by one. Here every patch draws when a square is to begin there, and a patch is
    hidden as early as the first square that covers it: the same squares in an order of equal chance, without a loop.

    Args:
        share: of the patches that is hidden; the paper hides 400 of 512.
        sides: of a square in patches, the shortest and the longest; each clip has one of its own.
    """

    share: float = 0.78
    sides: Sequence[int] = (3, 5)

    def __post_init__(self) -> None:
        _require_share("Clusters.share", self.share)
        shortest, longest = self.sides
        if not 1 <= shortest <= longest:
            raise ValueError(f"Clusters.sides must be at least 1 and in order, but are {tuple(self.sides)}.")

    def __call__(self, columns: Int[Tensor, "B"], rows: int) -> Bool[Tensor, "B P"]:
        patches, (shortest, longest) = columns * rows, self.sides
        begins = _noise(patches).unflatten(1, (-1, rows))
        sides = torch.randint(shortest, longest + 1, columns.shape, device=columns.device)
        covered = torch.empty_like(begins)
        for side in range(shortest, longest + 1):
            padded = F.pad(begins, (side - 1, 0, side - 1, 0), value=torch.inf)
            earliest = -F.max_pool2d(-padded[:, None], side, stride=1)[:, 0]
            covered = torch.where((sides == side)[:, None, None], earliest, covered)
        # the patches of one square in an order of chance, since the last square is hidden in part
        order = covered.flatten(1) + 1e-9 * torch.rand_like(covered.flatten(1))
        real = valid(patches, order.shape[1])
        hidden = _first(order.masked_fill(~real, torch.inf), patches - _count(patches, 1 - self.share))
        return real & ~hidden


def visible(seen: Bool[Tensor, "B P"]) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B"]]:
    """The numbers of each clip's visible patches, in order, and how many they are; N is the largest count."""
    counts = seen.sum(1)
    order = (~seen).to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, : int(counts.max())], counts


def _drawn(of: Int[Tensor, "B"], share: float) -> Bool[Tensor, "B P"]:
    """A share of the first ``of[b]`` places of each row b."""
    return _first(_noise(of), _count(of, share))


def _noise(of: Int[Tensor, "B"]) -> Float[Tensor, "B P"]:
    noise = torch.rand(len(of), int(of.max()), dtype=torch.float64, device=of.device)
    return noise.masked_fill(~valid(of, noise.shape[1]), torch.inf)


def _first(order: Float[Tensor, "B P"], counts: Int[Tensor, "B"]) -> Bool[Tensor, "B P"]:
    """Where the lowest ``counts[b]`` values of each row are."""
    return order.argsort(dim=1).argsort(dim=1) < counts[:, None]


def _count(of: Int[Tensor, "B"], share: float) -> Int[Tensor, "B"]:
    """A share of so many, rounded down, but one where there is one; the millionth is for shares like 1 - 0.8."""
    return (of * share + 1e-6).long().clamp(min=1).minimum(of)


def _require_share(name: str, share: float, least: float = 1e-9) -> None:
    if not least <= share < 1:
        raise ValueError(f"{name} must be {'more than' if least else 'at least'} 0 and less than 1, but is {share}.")
