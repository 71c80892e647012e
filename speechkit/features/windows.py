"""Windows that slide over samples: what the resampler and the filter bank look through."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from speechkit.stream import State, carry, keep_valid


def full_precision(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def still(like: Tensor, batch: int, window: int, pending: int) -> State:
    """The state of `slide` at the start: silence, of which ``pending`` samples belong to the first window."""
    return like.new_zeros(batch, window - 1), torch.full((batch,), pending, device=like.device)


def slide(
    samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"], state: State, hop: int
) -> tuple[Float[Tensor, "B T W"], Int[Tensor, "B"], State]:
    """Windows that slide over each stream by ``hop``, in any division of the stream.

    The state holds the last W - 1 samples, the most that an unfinished window can have, and how many it has
    (``pending``): those at the end of the tail. So the next window starts ``pending`` before the new samples.

    Returns:
        Windows, T = ceil(N / hop) whatever the data; how many of them are complete; the next state.
    """
    tail, pending = state
    window = tail.shape[1] + 1
    seen, tail = carry(tail, F.pad(keep_valid(samples, lengths), (0, window)), lengths)
    heard = pending + lengths
    counts = ((heard - window) // hop + 1).clamp(min=0)
    most = max(1, -(-samples.shape[1] // hop))
    index = torch.arange((most - 1) * hop + window, device=samples.device)
    aligned = seen.gather(1, window - 1 - pending[:, None] + index)
    return aligned.unfold(1, window, hop), counts, (tail, heard - counts * hop)
