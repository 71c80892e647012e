"""Audio Spectrogram Transformer (AST, 2104.01778): a vision transformer over overlapping patches of a spectrogram.

A patch spans ``patch`` feature frames and as many bands. Patches are taken column by column, so that those of a shorter
utterance are the first ones and one length says which are real: attention takes no other mask. What a clip gives is
therefore the same alone and beside longer ones. (The original goes band by band. Attention does not see the order, and
its position table is turned when it is loaded.)

Whole utterances only: every patch sees all of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.attention import Softmax, sinusoid
from speechkit.layers import FeedForward
from speechkit.stream import Context, Everything, Span, fresh_span, keep_valid
from speechkit.types import EncoderOutput

TOKENS = 2  # class and distillation token (2012.12877), before the patches


def stretch(wanted: Int[Tensor, "B"], places: int, size: int) -> Float[Tensor, "B U P"]:
    """How much of each of a table's P = ``size`` rows makes the position of each of the first U = ``places``.

    The rule of the original (section 2.2): up to ``size`` positions are the middle of the table, more are linear
    interpolation between the centres of its rows. Each utterance by its own number of them.
    """
    place = torch.arange(places, device=wanted.device, dtype=torch.float64)
    wanted = wanted[:, None]
    spread = ((place + 0.5) * size / wanted - 0.5).clamp(0, size - 1)
    at = torch.where(wanted <= size, place + (size // 2 - wanted // 2), spread)[..., None]
    return (1 - (at - torch.arange(size, device=wanted.device)).abs()).clamp(min=0)


class PatchPositions(nn.Module):
    """A learned vector for each patch and for each of the tokens; a subclass says how those of patches are kept.

    Args:
        columns, rows: patches in time and in frequency that there are vectors for. Utterances may have other columns.
        tokens: how many there are before the patches.
    """

    def __init__(self, *, columns: int, rows: int, dim: int, tokens: int = TOKENS) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(tokens, dim))

    @abstractmethod
    def grid(self) -> Float[Tensor, "P Q D"]:
        """The vectors of all patches, by column and row."""

    def reset(self) -> None:
        """Start anew."""
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    @abstractmethod
    def adopt(self, other: PatchPositions) -> None:
        """Take over the vectors of other positions, cut or interpolated to the size of these."""

    def forward(self, columns: Int[Tensor, "B"], places: int) -> Float[Tensor, "B U Q D"]:
        """The vectors of the first U = ``places`` columns of utterances that have so many ``columns``."""
        grid = self.grid()
        return torch.einsum("bup,pqd->buqd", stretch(columns, places, len(grid)).to(grid.dtype), grid)


class Positions(PatchPositions):
    """One table of all patches (AST)."""

    def __init__(self, *, columns: int, rows: int, dim: int, tokens: int = TOKENS) -> None:
        super().__init__(columns=columns, rows=rows, dim=dim, tokens=tokens)
        self.table = nn.Parameter(torch.zeros(columns, rows, dim))

    def grid(self) -> Float[Tensor, "P Q D"]:
        return self.table

    @torch.no_grad()
    def adopt(self, other: PatchPositions) -> None:
        self.tokens.copy_(other.tokens)
        self.table.copy_(_stretched(other.grid(), *self.table.shape[:2]))


class Sinusoidal(Positions):
    """One table that starts as sines and cosines of the column, and of the row (Audio-MAE, 2207.06405, section 3.1).

    It is trained like any other: with little data, what lies beside what need not be found out first.
    """

    @torch.no_grad()
    def reset(self) -> None:
        super().reset()
        columns, rows, dim = self.table.shape
        self.table.copy_(sinusoids(columns, rows, dim))


def sinusoids(columns: int, rows: int, dim: int, device: torch.device | None = None) -> Float[Tensor, "P Q D"]:
    """Sines and cosines for each patch: those of its row in the first half, of its column in the second."""
    half = dim // 2
    column = sinusoid(torch.arange(columns, device=device), dim - half, torch.float32)
    row = sinusoid(torch.arange(rows, device=device), half, torch.float32)
    return torch.cat([row.expand(columns, -1, -1), column[:, None].expand(-1, rows, -1)], dim=-1)


class SeparatePositions(PatchPositions):
    """A vector for each column plus one for each row (PaSST, 2110.05069)."""

    def __init__(self, *, columns: int, rows: int, dim: int, tokens: int = TOKENS) -> None:
        super().__init__(columns=columns, rows=rows, dim=dim, tokens=tokens)
        self.time = nn.Parameter(torch.zeros(columns, dim))
        self.frequency = nn.Parameter(torch.zeros(rows, dim))

    def grid(self) -> Float[Tensor, "P Q D"]:
        return self.time[:, None] + self.frequency

    @torch.no_grad()
    def adopt(self, other: PatchPositions) -> None:
        """The nearest sum there is, in the sense of least squares."""
        grid = _stretched(other.grid(), len(self.time), len(self.frequency))
        self.tokens.copy_(other.tokens)
        self.time.copy_(grid.mean(1))
        self.frequency.copy_(grid.mean(0) - grid.mean((0, 1)))


def _stretched(grid: Float[Tensor, "P Q D"], columns: int, rows: int) -> Float[Tensor, "P2 Q2 D"]:
    for axis, size in enumerate((columns, rows)):
        weights = stretch(torch.tensor([size], device=grid.device), size, grid.shape[axis])[0].to(grid.dtype)
        grid = torch.tensordot(weights, grid, ([1], [axis])).movedim(0, axis)
    return grid


@dataclass(frozen=True, kw_only=True)
class Patchout:
    """Training on a part of the patches, drawn anew for each batch (PaSST, 2110.05069).

    Args:
        columns: columns of patches left out, anywhere in time (``s_patchout_t``).
        rows: rows left out, anywhere in frequency (``s_patchout_f``).
        patches: patches left out anywhere, of those that then remain (``u_patchout``).
    """

    columns: int = 0
    rows: int = 0
    patches: int = 0

    def draw(self, columns: int, rows: int, device: torch.device) -> Int[Tensor, "N"]:
        """The patches that stay, of ``columns * rows`` counted column by column, in order.

        Raises:
            ValueError: where none would stay.
        """
        kept = self._kept("columns", self.columns, columns, device)[:, None] * rows
        kept = (kept + self._kept("rows", self.rows, rows, device)).flatten()
        return kept[self._kept("patches", self.patches, len(kept), device)]

    @staticmethod
    def _kept(name: str, out: int, of: int, device: torch.device) -> Int[Tensor, "N"]:
        if not 0 <= out < of:
            raise ValueError(
                f"Patchout.{name} must be at least 0 and less than the {of} there are, but is {out}; "
                f"lower it, or train on longer clips."
            )
        return torch.randperm(of, device=device)[out:].sort().values if out else torch.arange(of, device=device)


class VisionBlock(nn.Module):
    """Attention and feed-forward, a norm before each (2010.11929, figure 1)."""

    def __init__(
        self, *, dim: int, heads: int, expansion: int, attention: Callable, dropout: float, eps: float
    ) -> None:
        super().__init__()
        self.norm_attention, self.norm_feed = (nn.LayerNorm(dim, eps=eps) for _ in range(2))
        self.attention = attention(dim=dim, heads=heads)
        self.feed = FeedForward(dim=dim, hidden=expansion * dim, dropout=dropout, activation=nn.GELU)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B S D"], span: Span) -> Float[Tensor, "B S D"]:
        y, _ = self.attention(self.norm_attention(x), span)
        x = x + self.dropout(y)
        return x + self.feed(self.norm_feed(x))


class AST(nn.Module):
    """Audio Spectrogram Transformer.

    An utterance has as many columns of patches as fit into its features whole, and at least one, filled up with zeros.
    ``frames`` of what it gives are the means of these columns over frequency, one for every ``stride`` features: each
    has its place in time, as the frames of every encoder have, and a row of single patches would not. ``summary`` is
    the mean of the tokens, which is what the original classifies.

    Args:
        features: mel bands of a feature frame.
        frames: feature frames the position table is for, 1024 for AudioSet; clips may have more or fewer.
        dim, heads, layers: DeiT's tiny / small / base are 192, 3, 12 / 384, 6, 12 / 768, 12, 12.
        patch: feature frames, and bands, that a patch spans.
        stride, band_stride: feature frames, and bands, from one patch to the next.
        expansion: width of a feed-forward in units of ``dim``.
        tokens: 2 are DeiT's class and distillation token, 1 is ViT's class token.
        normed: whether the last block is followed by a layer norm; where it is not, the head's own is the only one.
        attention: one mechanism a layer, called as ``attention(dim=, heads=)``.
        positions: called as ``positions(columns=, rows=, dim=, tokens=)``: `Positions`, `Sinusoidal` or
            `SeparatePositions`.
        patchout: which patches training leaves out; none unless given.
        dropout: share dropped after the position table, attention and feed-forward.
        eps: of all layer norms.

    Raises:
        ValueError: where not one patch fits into ``frames`` and ``features``.
    """

    def __init__(
        self,
        *,
        features: int = 128,
        frames: int = 1024,
        dim: int,
        heads: int,
        layers: int,
        patch: int = 16,
        stride: int = 10,
        band_stride: int = 10,
        expansion: int = 4,
        tokens: Literal[1, 2] = 2,
        normed: bool = True,
        attention: Callable = Softmax,
        positions: Callable = Positions,
        patchout: Patchout | None = None,
        dropout: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        for name, size in (("features", features), ("frames", frames)):
            if size < patch:
                raise ValueError(f"AST.{name} must be at least a patch, {patch}, but is {size}; lower patch.")
        self.features, self.dim, self.patch, self.stride, self.band_stride = features, dim, patch, stride, band_stride
        self.patchout = patchout
        self.class_token = nn.Parameter(torch.zeros(dim))
        self.distillation_token = nn.Parameter(torch.zeros(dim)) if tokens == TOKENS else None
        self.patches = nn.Conv2d(1, dim, patch, stride=(stride, band_stride))
        self.positions = positions(columns=(frames - patch) // stride + 1, rows=self.rows, dim=dim, tokens=tokens)
        self.dropout = nn.Dropout(dropout)
        block = partial(VisionBlock, dim=dim, heads=heads, expansion=expansion, attention=attention)
        self.blocks: Any = nn.ModuleList(block(dropout=dropout, eps=eps) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=eps) if normed else nn.Identity()
        for part in self.modules():
            initialise_part(part)

    @property
    def tokens(self) -> Float[Tensor, "_ D"]:
        """What is before the patches."""
        tokens = [token for token in (self.class_token, self.distillation_token) if token is not None]
        return torch.stack(tuple(tokens)) + self.positions.tokens

    @property
    def rows(self) -> int:
        """Patches one above the other."""
        return (self.features - self.patch) // self.band_stride + 1

    def columns(self, lengths: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """Patches side by side in so many feature frames."""
        return torch.where(lengths > 0, (lengths - self.patch).clamp(min=0) // self.stride + 1, 0)

    def resize(self, *, features: int, frames: int) -> None:
        """Cut or interpolate the position table for another number of mel bands or usual length, for good.

        Raises:
            ValueError: where not one patch fits.
        """
        if min(features, frames) < self.patch:
            raise ValueError(
                f"AST.resize must leave a patch of {self.patch} bands and frames, but features is {features} and "
                f"frames is {frames}; give it at least {self.patch} of each."
            )
        self.features = features
        positions = type(self.positions)(
            columns=(frames - self.patch) // self.stride + 1, rows=self.rows, dim=self.dim, tokens=len(self.tokens)
        ).to(self.positions.tokens)
        positions.adopt(self.positions)
        self.positions = positions

    def init_state(self, batch: int, *, context: Context | None = None) -> NoReturn:
        """Refused: there is no stream.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "AST must hear whole utterances, because every patch sees all the others, but a stream was asked for; "
            "encode whole utterances with forward(), or stream a Conformer."
        )

    def forward(self, features: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"] | None = None) -> EncoderOutput:
        """Encode whole utterances.

        Args:
            features: ``[B, T, F]``; frames past a length may hold anything, NaN included.
            lengths: real feature frames of each. All of them unless given, which is also faster: for clips of one
                length, and for padding that the model was trained to hear, as the published checkpoints were.

        Raises:
            ValueError: for another number of mel bands, or where `Patchout` leaves nothing.
        """
        if features.shape[2] != self.features:
            raise ValueError(
                f"AST must be given features of {self.features} mel bands, but they have {features.shape[2]}; compute "
                f"as many, or adapt the encoder with resize()."
            )
        context = Everything() if lengths is None else Context()
        if lengths is None:
            lengths = torch.full((len(features),), features.shape[1], device=features.device)
        columns = self.columns(lengths)
        x = self.embed(features, lengths)
        x = x + self.positions(columns, x.shape[1])
        places, kept = x.shape[1], self._kept(x)
        x = x.flatten(1, 2).index_select(1, kept)
        tokens, x = self.relate(x, (kept < columns[:, None] * self.rows).sum(1), context)
        return EncoderOutput(self._means(x, kept, places), columns, tokens.mean(1))

    def embed(self, features: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"]) -> Float[Tensor, "B U Q D"]:
        """A vector for each patch by itself, without its position."""
        x = F.pad(keep_valid(features, lengths), (0, 0, 0, max(0, self.patch - features.shape[1])))
        return self.patches(x[:, None]).permute(0, 2, 3, 1)  # [B, D, U, Q] -> [B, U, Q, D]

    def relate(
        self,
        x: Float[Tensor, "B N D"],
        counts: Int[Tensor, "B"],
        context: Context = Context(),  # noqa: B008 - frozen
    ) -> tuple[Float[Tensor, "B _ D"], Float[Tensor, "B N D"]]:
        """The tokens and the patches after all of them have seen each other.

        Args:
            x: vectors of any patches, with their positions.
            counts: how many of each utterance's are real, the first ones; `Everything` says that all are.
        """
        first = self.tokens
        x = self.dropout(torch.cat([first.expand(len(x), -1, -1), x], dim=1))
        span = fresh_span(len(first) + counts, context)
        for block in self.blocks:
            x = block(x, span)
        x = self.norm(x)
        return x[:, : len(first)], x[:, len(first) :]

    def _kept(self, x: Float[Tensor, "B U Q D"]) -> Int[Tensor, "N"]:
        drawn = self.patchout if self.patchout is not None and self.training else Patchout()
        return drawn.draw(x.shape[1], x.shape[2], x.device)

    def _means(self, x: Float[Tensor, "B N D"], kept: Int[Tensor, "N"], places: int) -> Float[Tensor, "B U D"]:
        """The mean of each column's patches; 0 for a column of which none was kept."""
        member = (kept // self.rows == torch.arange(places, device=x.device)[:, None]).to(x.dtype)
        return (member / member.sum(1, keepdim=True).clamp(min=1)) @ x


def initialise_part(part: nn.Module) -> None:
    """Vision transformers' initialisation (2012.12877, section 6): truncated normal of 0.02, biases 0."""
    if isinstance(part, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(part.weight, std=0.02)
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    elif isinstance(part, PatchPositions):
        part.reset()
    elif isinstance(part, AST):
        for parameter in part.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)
