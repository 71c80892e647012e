"""How hidden patches of a spectrogram are guessed in a pretraining.

* `Decoder`: the encoder sees the visible patches alone, and a small transformer guesses the hidden ones from what it
  made of them. With `Shifted` windows it is Audio-MAE's (2207.06405), with `PerHead` windows MW-MAE's (2306.00561),
  and without windows the one of images (2111.06377).
* `Matcher`: the encoder sees all places, with a token where a patch is hidden; guesses are made from its own output,
  and each must also be found among the hidden patches of its clip (SSAST, 2110.09784).

In configs a decoder is a factory, called as ``decoder(inputs=encoder.dim, rows=encoder.rows, outputs=patch**2)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from speechkit.attention import ScoreTerm, Softmax
from speechkit.encoders import AST
from speechkit.encoders.ast import VisionBlock, initialise_part, sinusoids
from speechkit.masking import visible
from speechkit.stream import Context, Everything, fresh_span, valid

Windows = Callable[[Int[Tensor, "N"], int, int], Int[Tensor, "#H N"]]
"""``windows(patches, rows, layer)``: the number of the window that each patch is in, for all heads or for each."""


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """Rectangles of patches, half a rectangle later in time in every second layer (Audio-MAE, section 3.2).

    Args:
        columns, rows: of a window.
    """

    columns: int = 4
    rows: int = 4

    def __post_init__(self) -> None:
        for name in ("columns", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"Shifted.{name} must be at least 1 patch, but is {getattr(self, name)}.")

    def __call__(self, patches: Int[Tensor, "N"], rows: int, layer: int) -> Int[Tensor, "1 N"]:
        column, row = patches // rows, patches % rows
        later = (column + layer % 2 * (self.columns // 2)) // self.columns
        return (later * rows + row // self.rows)[None]


@dataclass(frozen=True, kw_only=True)
class PerHead:
    """Runs of patches, counted column by column, of another length for each head (MW-MAE, section 3.2).

    Args:
        patches: of a window of each head; ``None`` sees all. The paper's are 2, 5, 10, 25, 50, 125 and twice all, of
            50 columns of 5 patches.
    """

    patches: Sequence[int | None]

    def __post_init__(self) -> None:
        if any(size is not None and size < 1 for size in self.patches):
            raise ValueError(f"PerHead.patches must be at least 1, or null for all, but are {list(self.patches)}.")

    def __call__(self, patches: Int[Tensor, "N"], rows: int, layer: int) -> Int[Tensor, "H N"]:
        return torch.stack([patches // size if size else torch.zeros_like(patches) for size in self.patches])


class Within(ScoreTerm):
    """Each patch sees those of its own window."""

    def __init__(self, *, dim: int, heads: int, windows: Windows, rows: int, layer: int) -> None:
        super().__init__(dim=dim, heads=heads)
        self.windows, self.rows, self.layer = windows, rows, layer

    def bias(self, q: Tensor, query: Tensor, key: Tensor, ahead: int = 0) -> Float[Tensor, "1 H U S"]:
        ours, theirs = (self.windows(at[0], self.rows, self.layer) for at in (query, key))
        bias = q.new_zeros(len(ours), ours.shape[1], theirs.shape[1])
        return bias.masked_fill(ours[:, :, None] != theirs[:, None], -torch.inf).expand(self.heads, -1, -1)[None]


class Patches(NamedTuple):
    """Spectrograms as patches, column by column, with what is hidden of them.

    ``embedded`` are the encoder's vectors without positions, ``target`` is what is to be guessed of each patch, and
    ``columns`` how many columns of patches each clip has.
    """

    embedded: Float[Tensor, "B U Q D"]
    target: Float[Tensor, "B P X"]
    columns: Int[Tensor, "B"]
    seen: Bool[Tensor, "B P"]
    context: Context

    @property
    def hidden(self) -> Bool[Tensor, "B P"]:
        return ~self.seen & valid(self.columns * self.embedded.shape[2], self.seen.shape[1])


class Decoder(nn.Module):
    """Guesses hidden patches from what the encoder made of the visible ones.

    Args:
        inputs: width of the encoder.
        rows: patches in a column.
        outputs: numbers in a patch.
        dim, heads, layers: Audio-MAE has 512, 16, 16 with windows and 512, 16, 8 without; MW-MAE 384, 8, 4.
        windows: which patches see each other, `Shifted` or `PerHead`; all of them unless given.

    Raises:
        ValueError: where there is not one window for each head.
    """

    def __init__(
        self, *, inputs: int, rows: int, outputs: int, dim: int, heads: int, layers: int, windows: Windows | None = None
    ) -> None:
        super().__init__()
        if isinstance(windows, PerHead) and len(windows.patches) != heads:
            raise ValueError(
                f"PerHead.patches must name one window for each of the {heads} heads of the decoder, but names "
                f"{len(windows.patches)}; set heads, or as many windows."
            )
        self.dim = dim
        self.embed = nn.Linear(inputs, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        block = partial(VisionBlock, dim=dim, heads=heads, expansion=4, dropout=0.0, eps=1e-6)
        self.blocks: Any = nn.ModuleList(block(attention=_attention(windows, rows, layer)) for layer in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, outputs)
        for part in self.modules():
            initialise_part(part)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, encoder: AST, patches: Patches) -> Float[Tensor, "B P X"]:
        """A guess for every patch; those of visible ones are not trained."""
        x, columns = patches.embedded, patches.columns
        U, Q = x.shape[1:3]
        index, counts = visible(patches.seen)
        x = (x + encoder.positions(columns, U)).flatten(1, 2)
        x = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        # what fills up the rows of clips with fewer visible patches is hidden, and must not be looked at
        context = Everything() if bool((counts == index.shape[1]).all()) else Context()
        _, x = encoder.relate(x, counts, context)
        x = torch.where(valid(counts, x.shape[1])[..., None], self.embed(x), self.mask_token)
        x = self.mask_token.expand(len(x), U * Q, -1).scatter(1, index[..., None].expand(-1, -1, self.dim), x)
        x = x + sinusoids(U, Q, self.dim, x.device).to(x.dtype).flatten(0, 1)
        span = fresh_span(columns * Q, patches.context)
        for block in self.blocks:
            x = block(x, span)
        return self.predict(self.norm(x))

    def losses(self, encoder: AST, patches: Patches) -> dict[str, Tensor]:
        """``loss``: the mean squared error of the hidden patches."""
        return {"loss": squared_error(self(encoder, patches), patches)}


class Matcher(nn.Module):
    """Guesses hidden patches from the encoder's output at their places, and finds them among the others (SSAST).

    Args:
        inputs: width of the encoder.
        rows: patches in a column.
        outputs: numbers in a patch.
        weight: of the squared error in the loss, which the paper has as 10.
    """

    def __init__(self, *, inputs: int, rows: int, outputs: int, weight: float = 10.0) -> None:
        super().__init__()
        self.weight = weight
        self.mask_token = nn.Parameter(torch.zeros(inputs))
        self.predict, self.match = (
            nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, outputs)) for _ in range(2)
        )
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, encoder: AST, patches: Patches) -> Float[Tensor, "B P X"]:
        """A guess for every patch; those of visible ones are not trained."""
        return self.predict(self._encoded(encoder, patches))

    def losses(self, encoder: AST, patches: Patches) -> dict[str, Tensor]:
        """``loss``: ``matched`` (section 2.4, equation 1) and ``weight`` times ``rebuilt``, the mean squared error."""
        x = self._encoded(encoder, patches)
        matched, rebuilt = contrast(self.match(x), patches), squared_error(self.predict(x), patches)
        return {"loss": matched + self.weight * rebuilt, "matched": matched, "rebuilt": rebuilt}

    def _encoded(self, encoder: AST, patches: Patches) -> Float[Tensor, "B P D"]:
        x, columns = patches.embedded, patches.columns
        x = torch.where(patches.seen.unflatten(1, x.shape[1:3])[..., None], x, self.mask_token)
        x = x + encoder.positions(columns, x.shape[1])
        return encoder.relate(x.flatten(1, 2), columns * x.shape[2], patches.context)[1]


def squared_error(guess: Float[Tensor, "B P X"], patches: Patches) -> Tensor:
    """The mean over the numbers of all hidden patches of a batch, each patch with equal weight."""
    hidden = patches.hidden
    errors = torch.where(hidden, (guess - patches.target).square().mean(-1), 0)
    return errors.sum() / hidden.sum().clamp(min=1)


def contrast(guess: Float[Tensor, "B P X"], patches: Patches) -> Tensor:
    """How surely each guess points at its own patch among the hidden ones of the clip: InfoNCE, in nats."""
    hidden = patches.hidden
    scores = torch.where(hidden[..., None], guess, 0) @ patches.target.mT  # [B, guesses, patches]
    right = scores.masked_fill(~hidden[:, None], torch.finfo(scores.dtype).min).log_softmax(-1).diagonal(dim1=1, dim2=2)
    return -torch.where(hidden, right, 0).sum() / hidden.sum().clamp(min=1)


def _attention(windows: Windows | None, rows: int, layer: int) -> Callable:
    position = ScoreTerm if windows is None else partial(Within, windows=windows, rows=rows, layer=layer)
    return partial(Softmax, position=position)
