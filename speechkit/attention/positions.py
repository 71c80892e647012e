"""What positions do to a softmax score.

Positions arrive as absolute integers, so no scheme can restart at a chunk border, and angles are formed in float64,
so none wears out: after ten hours of 40 ms frames (a million of them) a float32 angle would be off by 0.06 rad.

A `ScoreTerm` acts twice. ``place`` sees each new frame once; what it returns as keys is what a stream caches. ``bias``
sees pairs. Queries and keys are contiguous and their last frame is the same, or that of the keys is ``ahead`` frames
later, so ``query[b, i] - key[b, j]`` is the same for every stream b: a relative scheme needs the first row only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.stream import Context

Heads = Float[Tensor, "B U H K"]
Positions = Int[Tensor, "B U"]


class ScoreTerm(nn.Module):
    """No positions at all, and the base of the schemes that have them."""

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        self.dim, self.heads, self.width = dim, heads, dim // heads

    def place(
        self, q: Heads, k: Float[Tensor, "B U G K"], position: Positions
    ) -> tuple[Heads, Float[Tensor, "B U G K"]]:
        """Queries and keys (of G key heads) of new frames, moved to where they stand."""
        return q, k

    def bias(
        self, q: Heads, query: Positions, key: Int[Tensor, "B S"], ahead: int = 0
    ) -> Float[Tensor, "#B H #U S"] | None:
        """What to add to the scaled score of each pair; ``q`` as ``place`` gave it."""
        return None

    @property
    def fusable(self) -> bool:
        """Whether `fused` says all that ``bias`` does. A scheme that changes ``bias`` alone is not."""
        where = [next(c for c in type(self).__mro__ if name in vars(c)) for name in ("bias", "fused")]
        return issubclass(where[1], where[0])

    def fused(self, context: Context, q: Heads) -> dict[str, Any]:
        """What the operator ``stream_attn`` needs in order to add ``bias`` itself, by the names of its arguments."""
        return {}

    def init_scores(self, batch: int, size: int, like: Tensor) -> Float[Tensor, "B H W"] | None:
        """Room for what ``key_scores`` gives, for a scheme that scores keys by themselves."""
        return None

    def key_scores(self, position: Positions) -> Float[Tensor, "B U H"] | None:
        """What to add to every score of each new key, for a scheme that scores keys by themselves."""
        return None


def sinusoid(position: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sines (even columns) and cosines (odd) of positions (1706.03762, section 3.5): ``[...] -> [..., dim]``."""
    angle = position[..., None] * _frequencies(dim, position.device)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :dim].to(dtype)


def _frequencies(dim: int, device: torch.device) -> Float[Tensor, "K"]:
    steps = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
    return 10000.0 ** (-steps / dim)


class RelativePosition(ScoreTerm):
    """Transformer-XL (1901.02860, section 3.3): ``(q + u) . k + (q + v) . r[query - key]``.

    The table ``r = linear(sinusoid(distance))`` depends on neither batch nor input, so its rows for one shape of call
    are kept until the weights change. ``u`` is added to the query in ``place``; the position product therefore needs
    the query plus ``v - u``.
    """

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__(dim=dim, heads=heads)
        self.linear = nn.Linear(dim, dim, bias=False)
        self.u = nn.Parameter(torch.zeros(heads, self.width))
        self.v = nn.Parameter(torch.zeros(heads, self.width))
        self._kept: tuple[tuple, Tensor] | None = None

    def place(
        self, q: Heads, k: Float[Tensor, "B U G K"], position: Positions
    ) -> tuple[Heads, Float[Tensor, "B U G K"]]:
        return q + self.u.to(q.dtype), k

    def bias(self, q: Heads, query: Positions, key: Int[Tensor, "B S"], ahead: int = 0) -> Float[Tensor, "B H U S"]:
        U, S = query.shape[1], key.shape[1]
        table = self._table(first=S - 1 - ahead, rows=S + U, like=q)
        q = (q + (self.v - self.u).to(q.dtype)).transpose(1, 2) * self.width**-0.5  # [B, H, U, K]
        return _skew(q @ table.transpose(-1, -2), S)

    def fused(self, context: Context, q: Heads) -> dict[str, Any]:
        back = context.memory() + context.latency() - 1
        table = self._table(first=back, rows=back + 1 + context.latency(), like=q)
        return dict(rel=table, rel_zero=back, bias_v=self.v - self.u)

    def _table(self, first: int, rows: int, like: Tensor) -> Float[Tensor, "H R K"]:
        """Rows for the distances ``first, first - 1, ...``: descending, so that a row ascends with the key."""
        weight = self.linear.weight
        signature = (first, rows, like.device, like.dtype, weight._version, weight.data_ptr())
        if self._kept is not None and self._kept[0] == signature and not torch.is_grad_enabled():
            return self._kept[1]
        distance = torch.arange(first, first - rows, -1, device=like.device)
        table = F.linear(sinusoid(distance, self.dim, weight.dtype), weight).to(like.dtype)
        table = table.view(rows, self.heads, self.width).transpose(0, 1)
        if not torch.is_grad_enabled():
            self._kept = (signature, table)
        return table


def _skew(scores: Float[Tensor, "B H U R"], keys: int) -> Float[Tensor, "B H U S"]:
    """Read the diagonal band: ``out[i, j] = scores[i, U - 1 - i + j]``, as a view.

    Flat, element (i, j) lies at ``i R + U - 1 - i + j = (U - 1) + i (R - 1) + j``: rows of length R - 1 after U - 1.
    R must be S + U, one more than there are distances, so that a row of R - 1 has room for S keys even when U is 1.
    """
    U, R = scores.shape[-2:]
    flat = scores.flatten(-2)[..., U - 1 : U - 1 + U * (R - 1)]
    return flat.unflatten(-1, (U, R - 1))[..., :keys]


class AbsoluteKey(ScoreTerm):
    """WeNet's variant: ``(q + u) . k + (q + v) . p[key]`` with the key's absolute position, no relative shift.

    It equals ``(q + u) . (k + p) + (v - u) . p``: ordinary attention on keys with ``p`` folded in when they are
    written, and one scalar a key. Here to carry WeNet checkpoints; `RelativePosition` is the better model.
    """

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__(dim=dim, heads=heads)
        self.linear = nn.Linear(dim, dim, bias=False)
        self.u = nn.Parameter(torch.zeros(heads, self.width))
        self.v = nn.Parameter(torch.zeros(heads, self.width))

    def place(
        self, q: Heads, k: Float[Tensor, "B U G K"], position: Positions
    ) -> tuple[Heads, Float[Tensor, "B U G K"]]:
        if k.shape[2] != self.heads:
            raise ValueError(
                f"AbsoluteKey needs as many key heads as heads, {self.heads}, because each head folds its own position "
                f"vector into its keys, but there are {k.shape[2]}; leave kv_heads unset or use RelativePosition."
            )
        p = self.linear(sinusoid(position, self.dim, self.linear.weight.dtype)).unflatten(-1, (self.heads, -1))
        return q + self.u.to(q.dtype), k + p.to(k.dtype)

    def bias(self, q: Heads, query: Positions, key: Int[Tensor, "B S"], ahead: int = 0) -> Float[Tensor, "B H 1 S"]:
        return self.key_scores(key).transpose(1, 2)[:, :, None].to(q.dtype)

    def init_scores(self, batch: int, size: int, like: Tensor) -> Float[Tensor, "B H W"]:
        return like.new_zeros(batch, self.heads, size, dtype=torch.promote_types(like.dtype, torch.float32))

    def key_scores(self, position: Positions) -> Float[Tensor, "B U H"]:
        # (v - u) . (W e) = e . (W^T (v - u)): one vector a head, instead of one product a key
        weight = self.linear.weight.view(self.heads, self.width, self.dim)
        direction = torch.einsum("hkd,hk->dh", weight, self.v - self.u) * self.width**-0.5
        return sinusoid(position, self.dim, weight.dtype) @ direction

    def fused(self, context: Context, q: Heads) -> dict[str, Any]:
        return {}  # `key_scores` are remembered beside the keys


class Rotary(ScoreTerm):
    """RoPE (2104.09864): pairs of coordinates turned by an angle in proportion to the position.

    An odd last coordinate (head widths 49, 81) is left alone. Cached keys are turned already.
    """

    def place(
        self, q: Heads, k: Float[Tensor, "B U G K"], position: Positions
    ) -> tuple[Heads, Float[Tensor, "B U G K"]]:
        angle = position[:, :, None, None] * _frequencies(self.width - self.width % 2, position.device)
        turn = angle.cos(), angle.sin()
        return _rotate(q, *turn), _rotate(k, *turn)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class Alibi(ScoreTerm):
    """ALiBi (2108.12409) for both directions: minus a slope a head times the distance in frames."""

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__(dim=dim, heads=heads)
        self.slopes: Tensor
        self.register_buffer("slopes", _slopes(heads), persistent=False)

    def bias(self, q: Heads, query: Positions, key: Int[Tensor, "B S"], ahead: int = 0) -> Float[Tensor, "1 H U S"]:
        distance = (query[:1, :, None] - key[:1, None, :]).abs()
        return (-self.slopes[:, None, None] * distance[:, None]).to(q.dtype)

    def fused(self, context: Context, q: Heads) -> dict[str, Any]:
        return dict(slopes=self.slopes)


def _slopes(heads: int) -> Float[Tensor, "H"]:
    """A geometric series from 2^(-8/n); heads beyond a power of two take every other slope of the next power."""
    power = 1 << (heads.bit_length() - 1)

    def series(n: int) -> Tensor:
        return 2.0 ** (-8.0 / n * torch.arange(1, n + 1))

    return torch.cat([series(power), series(2 * power)[0::2][: heads - power]])
