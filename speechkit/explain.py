"""Where in a spectrogram a tagger finds its first label: attention rollout, or gradient times input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.attention import Softmax, attend
from speechkit.encoders import AST
from speechkit.heads import Summary
from speechkit.recogniser import evaluating
from speechkit.tagger import Piece, Tagger
from speechkit.tuning import Prefix, Prompts


def explain(tagger: Tagger, piece: Piece) -> tuple[str, Float[Tensor, "T F"]]:
    """How it was found out, and how much each real feature of a piece has to do with the label of highest score.

    An AST whose summary is classified has its attention rolled out, the same for every label; everything else has
    gradient times input, also an AST that was tuned to attend to more than patches.
    """
    lengths = None if tagger.filled else torch.tensor([piece.length], device=piece.features.device)
    patches_alone = not isinstance(tagger.tuning, Prefix | Prompts)
    if isinstance(tagger.encoder, AST) and isinstance(tagger.head, Summary) and patches_alone:
        grid = rollout(tagger.encoder, piece.features, lengths)[0]
        return "attention rollout", spread(tagger.encoder, grid, piece.features.shape[1])[: piece.length].cpu()
    return "gradient times input", sensitivity(tagger, piece.features, lengths)[0, : piece.length].cpu()


@torch.no_grad()
def rollout(
    encoder: AST, features: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"] | None = None
) -> Float[Tensor, "B U Q"]:
    """Attention rollout (2005.00928, equation 1) of the tokens, on columns and rows of patches.

    Each layer passes on half of what a token is (the residual) and half of what its heads, on average, attend to; the
    product over layers is how much of each patch ends up in the tokens. They keep the rest of 1 for themselves.
    """
    with evaluating(encoder), _attentions(encoder) as layers:
        columns = int(encoder(features, lengths).lengths.max())
    rolled = torch.eye(layers[0].shape[-1], device=features.device)
    for weights in layers:
        rolled = (weights @ rolled + rolled) / 2
    tokens = len(encoder.tokens)
    patches = rolled[:, :tokens, tokens:].mean(1)
    return patches[:, : columns * encoder.rows].unflatten(1, (columns, encoder.rows))


def spread(encoder: AST, grid: Float[Tensor, "U Q"], frames: int) -> Float[Tensor, "T F"]:
    """A value of each patch as a value of each feature: the mean of the patches that cover it, 0 where there are none.

    Args:
        frames: T, how many feature frames there are.
    """
    patch, steps = encoder.patch, (encoder.stride, encoder.band_stride)
    square = grid.new_ones(1, 1, patch, patch)
    sums, counts = (
        F.conv_transpose2d(x[None, None], square, stride=steps)[0, 0] for x in (grid, torch.ones_like(grid))
    )
    heat = (sums / counts.clamp(min=1))[:frames, : encoder.features]
    return F.pad(heat, (0, encoder.features - heat.shape[1], 0, frames - heat.shape[0]))


def sensitivity(
    tagger: Tagger, features: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"] | None = None
) -> Float[Tensor, "B T F"]:
    """The size of gradient times input, of the highest logit (Shrikumar et al. 2016, 1605.01713)."""
    x = features.detach().clone().requires_grad_()
    with evaluating(tagger), torch.enable_grad():
        logits = tagger.logits(x, lengths)
        (gradient,) = torch.autograd.grad(logits.max(1).values.sum(), x)
    return (gradient * x.detach()).abs()


@contextmanager
def _attentions(encoder: nn.Module) -> Iterator[list[Float[Tensor, "B S S"]]]:
    """The attention weights of each layer, mean over heads, of what the encoder hears meanwhile.

    Attention to the identity matrix is its weights: they are computed by the definition, beside what is used.
    """
    found: list[Tensor] = []

    def remember(layer: Softmax, inputs: tuple[Any, ...], _: Any) -> None:
        x, span = inputs[:2]
        q, k, _ = layer._project(x)
        q, k = layer.position.place(q, k, span.positions(x.shape[1]))
        each = torch.eye(x.shape[1], device=x.device, dtype=x.dtype).expand(len(x), -1, -1)[:, :, None]
        each = each.expand(-1, -1, k.shape[2], -1)
        weights = attend(q, k, each, span, term=layer.position, pattern=layer.pattern, kernel="reference")
        found.append(weights.mean(2))

    hooks = [layer.register_forward_hook(remember) for layer in encoder.modules() if isinstance(layer, Softmax)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
