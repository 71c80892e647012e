"""Adapters that look at neighbours: a small convolution between the maps of a bottleneck, beside attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from speechkit.encoders import AST, ChunkedEncoder
from speechkit.encoders.ast import TOKENS, Patchout
from speechkit.layers import DepthwiseConv, Linear
from speechkit.stream import State, keep_valid
from speechkit.tuning.adapters import Across, Frames, Lengths, narrow, silent


class Noted:
    """Patchout that knows what it drew last."""

    def __init__(self, patchout: Patchout) -> None:
        self.patchout = patchout
        self.kept: Tensor = torch.zeros(0)
        self.columns = 0

    def draw(self, columns: int, rows: int, device: torch.device) -> Tensor:
        self.kept, self.columns = self.patchout.draw(columns, rows, device), columns
        return self.kept


class Grid:
    """The columns and rows in which the patches of an `AST` lie behind its tokens.

    Where patchout leaves patches out of a batch, there are zeros, as there are beyond the edge.
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        if encoder.patchout is not None and not isinstance(encoder.patchout, Noted):
            encoder.patchout = Noted(encoder.patchout)

    @property
    def drawn(self) -> Noted | None:
        return self.encoder.patchout if self.encoder.training else None

    def open(self, x: Frames, lengths: Lengths) -> tuple[Float[Tensor, "B P D"], Float[Tensor, "B U Q D"]]:
        """The tokens, and the patches in their places; those of padding are 0."""
        tokens, patches = x[:, :TOKENS], keep_valid(x, lengths)[:, TOKENS:]
        if self.drawn is not None:
            places = patches.new_zeros(len(x), self.drawn.columns * self.encoder.rows, x.shape[2])
            patches = places.index_copy(1, self.drawn.kept, patches)
        return tokens, patches.unflatten(1, (-1, self.encoder.rows))

    def close(self, tokens: Float[Tensor, "B P D"], patches: Float[Tensor, "B U Q D"]) -> Frames:
        """The other way round."""
        patches = patches.flatten(1, 2)
        if self.drawn is not None:
            patches = patches.index_select(1, self.drawn.kept)
        return torch.cat([tokens, patches], dim=1)


class Convpass(Across):
    """Down, GELU, a convolution over neighbouring patches in time and frequency, GELU, up (2207.07039, section 3).

    For AST. A token has no neighbours. The convolution begins as the identity.

    Args:
        reduction: how many times narrower the middle is than the frames.
        kernel: patches on each side of the filter, odd.
    """

    def __init__(self, *, dim: int, reduction: float = 48, kernel: int = 3) -> None:
        super().__init__()
        width = narrow(dim, reduction)
        self.down, self.up = Linear(dim, width), silent(Linear(width, dim))
        self.conv = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        nn.init.dirac_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def fit(self, encoder: nn.Module) -> None:
        if not isinstance(encoder, AST):
            raise ValueError(
                f"Convpass must see the patches of an AST, but the encoder is a {type(encoder).__name__}; "
                f"take tuning=conformer_adapter, which looks along time."
            )
        self.grid = Grid(encoder)

    def forward(self, x: Frames, lengths: Lengths, state: State | None = None) -> tuple[Frames, None]:
        tokens, patches = self.grid.open(F.gelu(self.down(x)), lengths)
        tokens = self.conv(tokens.flatten(0, 1)[..., None, None]).view_as(tokens)
        patches = self.conv(patches.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.up(F.gelu(self.grid.close(tokens, patches))), None


class TimeConvolution(Across):
    """The Conformer's convolution module as an adapter: norm, down, gate, depthwise over time, norm, SiLU, up.

    After the "Conformer adapter" (2312.03694, section 3.2). In an AST it runs along each row of patches. In an encoder
    that streams it sees no future and remembers ``kernel - 1`` frames.

    Args:
        reduction: how many times narrower the middle is than the frames.
        kernel: frames, or columns of patches, that a filter spans.
    """

    def __init__(self, *, dim: int, reduction: float = 48, kernel: int = 7) -> None:
        super().__init__()
        width = narrow(dim, reduction)
        self.norm_in, self.norm = nn.LayerNorm(dim), nn.LayerNorm(width)
        self.down, self.up = Linear(dim, 2 * width), silent(Linear(width, dim))
        self.width, self.kernel = width, kernel
        self.depthwise: DepthwiseConv
        self.grid: Grid | None = None

    def fit(self, encoder: nn.Module) -> None:
        if isinstance(encoder, AST):
            self.grid, causal = Grid(encoder), False
        elif isinstance(encoder, ChunkedEncoder):
            causal = encoder.context.streams
        else:
            raise ValueError(
                f"TimeConvolution must know where frames are in time, as in an AST, a Conformer or a Squeezeformer, "
                f"but the encoder is a {type(encoder).__name__}; take tuning=bottleneck."
            )
        self.depthwise = DepthwiseConv(dim=self.width, kernel=self.kernel, causal=causal)

    def init_state(self, batch: int) -> Tensor:
        return self.depthwise.init_state(batch)

    def forward(self, x: Frames, lengths: Lengths, state: Tensor | None = None) -> tuple[Frames, Tensor | None]:
        y = F.glu(self.down(self.norm_in(x)), dim=-1)
        y, state = self.depthwise(y, lengths, state) if self.grid is None else (self._by_row(y, lengths), None)
        return self.up(F.silu(self.norm(y))), state

    def _by_row(self, x: Frames, lengths: Lengths) -> Frames:
        assert self.grid is not None
        tokens, patches = self.grid.open(x, lengths)
        alone = self._along(tokens.flatten(0, 1)[:, None]).view_as(tokens)
        along = self._along(patches.transpose(1, 2).flatten(0, 1))  # [B Q, U, W]
        return self.grid.close(alone, along.unflatten(0, (len(x), -1)).transpose(1, 2))

    def _along(self, x: Float[Tensor, "R U W"]) -> Float[Tensor, "R U W"]:
        return self.depthwise(x, x.new_full(x.shape[:1], x.shape[1], dtype=torch.long))[0]
