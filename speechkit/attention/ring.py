"""What attention remembers of a stream: keys and values where a kernel can read and append to them in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Keys = Float[Tensor, "B U G K"]


class Ring(NamedTuple):
    """The last W frames of each stream; that of position t lies at index ``t % W``.

    Nothing outside the last W positions of a stream is ever read, so a slot may hold anything until it is written, and
    a fresh stream needs no cleaning. ``cache`` is ``[B, 2, G, W, K]``, keys and values; ``scores`` ``[B, H, W]``, what
    positions add to the score of each key, for the schemes that have such a term.
    """

    cache: Tensor
    scores: Tensor | None = None

    def recall(self, start: Int[Tensor, "B"], count: int) -> tuple[Keys, Keys]:
        """Keys and values of the ``count`` frames before ``start``, in order; zeros before position 0."""
        position = start[:, None] + torch.arange(-count, 0, device=start.device)
        row = torch.arange(len(start), device=start.device)[:, None]
        past = self.cache[row, :, :, position % self.cache.shape[3]]  # [B, count, 2, G, K]
        past = torch.where((position >= 0)[:, :, None, None, None], past, 0)
        return past[:, :, 0], past[:, :, 1]

    def remember(
        self,
        k: Keys,
        v: Keys,
        scores: Float[Tensor, "B U H"] | None,
        start: Int[Tensor, "B"],
        lengths: Int[Tensor, "B"],
    ) -> Ring:
        """A new ring that also holds the first ``lengths[b]`` of the new frames. This one is left as it is."""
        new = torch.stack([k, v], dim=1).transpose(2, 3)  # [B, 2, G, U, K]
        cache = _written(self.cache, new, start, lengths)
        if self.scores is None or scores is None:
            return Ring(cache)
        return Ring(cache, _written(self.scores[..., None], scores.transpose(1, 2)[..., None], start, lengths)[..., 0])


def _written(ring: Tensor, new: Tensor, start: Tensor, lengths: Tensor) -> Tensor:
    """``ring [B, ..., W, K]`` with the last of the new frames ``[B, ..., U, K]`` in their places."""
    size = ring.shape[-2]
    slot = torch.arange(size, device=start.device)
    last = (start + lengths - 1)[:, None]
    position = last - (last - slot) % size  # [B, W]: the latest position that a slot is for
    index = torch.where(position >= start[:, None], size + position - start[:, None], slot)
    index = index.reshape(len(start), *(1,) * (ring.dim() - 3), size, 1).expand_as(ring)
    return torch.cat([ring, new.to(ring.dtype)], dim=-2).gather(-2, index)
