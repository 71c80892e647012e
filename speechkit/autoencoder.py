"""Masked autoencoders of spectrograms: an encoder learns from recordings alone, by what is hidden from it.

A `speechkit.masking.Mask` hides patches of each clip, and a decoder of `speechkit.decoders` guesses them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from speechkit.decoders import Patches
from speechkit.encoders import AST
from speechkit.features import FrontEnd
from speechkit.masking import Mask
from speechkit.stream import Context, Everything, keep_valid


class MaskedAutoencoder(nn.Module):
    """An encoder in pretraining: what is hidden from it, and how that is guessed. Afterwards a tagger starts with it.

    Args:
        features: the front end; ``None`` for one that is given features.
        encoder: its patches must not overlap, or a hidden one would be seen in part.
        decoder: called as ``decoder(inputs=, rows=, outputs=)``: `Decoder` or `Matcher`.
        mask: what is hidden, for example `speechkit.masking.Anywhere`.
        normalised: guess each patch with its own mean taken away and divided by its own deviation, as Audio-MAE does.

    Raises:
        ValueError: where patches overlap.
    """

    def __init__(
        self,
        *,
        features: FrontEnd | None,
        encoder: AST,
        decoder: Callable[..., nn.Module],
        mask: Mask,
        normalised: bool = True,
    ) -> None:
        super().__init__()
        if min(encoder.stride, encoder.band_stride) < encoder.patch:
            raise ValueError(
                f"MaskedAutoencoder.encoder must have patches that do not overlap, but one of {encoder.patch} x "
                f"{encoder.patch} begins every {encoder.stride} frames and {encoder.band_stride} bands; set both "
                f"strides to the patch."
            )
        self.features, self.encoder, self.mask, self.normalised = features, encoder, mask, normalised
        self.decoder: Any = decoder(inputs=encoder.dim, rows=encoder.rows, outputs=encoder.patch**2)

    @property
    def sample_rate(self) -> int:
        """In Hz, of the front end."""
        assert self.features is not None, "a training has a front end"
        return self.features.sample_rate

    def losses(
        self, features: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"] | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """``loss`` and its parts, of what a mask drawn with torch's generator hides.

        Args:
            features: frames past a length may hold anything.
            lengths: real feature frames of each; all of them unless given.
        """
        return self.decoder.losses(self.encoder, self.patches(features, lengths))

    def patches(self, features: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"] | None = None) -> Patches:
        """What a newly drawn mask makes of spectrograms."""
        context = Everything() if lengths is None else Context()
        if lengths is None:
            lengths = torch.full((len(features),), features.shape[1], device=features.device)
        columns = self.encoder.columns(lengths)
        x, pixels = self.encoder.embed(features, lengths), self.pixels(keep_valid(features, lengths))
        return Patches(x, self._wanted(pixels), columns, self._seen(columns, x.shape[1]), context)

    def pixels(self, features: Float[Tensor, "B T F"]) -> Float[Tensor, "B P X"]:
        """The numbers of each patch; zeros behind what is shorter than one."""
        encoder, short = self.encoder, max(0, self.encoder.patch - features.shape[1])
        x = F.pad(features, (0, 0, 0, short)).unfold(1, encoder.patch, encoder.stride)
        return x.unfold(2, encoder.patch, encoder.band_stride).flatten(3).flatten(1, 2)

    def _wanted(self, pixels: Float[Tensor, "B P X"]) -> Float[Tensor, "B P X"]:
        if not self.normalised:
            return pixels
        var, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        return (pixels - mean) / (var + 1e-6).sqrt()

    def _seen(self, columns: Int[Tensor, "B"], places: int) -> Bool[Tensor, "B P"]:
        seen = self.mask(columns, self.encoder.rows)
        return F.pad(seen, (0, places * self.encoder.rows - seen.shape[1]))

    @torch.no_grad()
    def rebuilt(
        self, features: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"]
    ) -> tuple[Float[Tensor, "B T2 F2"], Bool[Tensor, "B T2 F2"]]:
        """Spectrograms in which hidden patches are guessed, and where those are; whole patches only, to look at.

        Normalised guesses get the mean and the deviation of the patch that was hidden: the loss leaves these out.
        """
        patches = self.patches(features, lengths)
        pixels, guess = self.pixels(features), self.decoder(self.encoder, patches)
        if self.normalised:
            var, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
            guess = guess * (var + 1e-6).sqrt() + mean
        hidden = patches.hidden[..., None].expand_as(guess)
        return self._laid(torch.where(hidden, guess, pixels)), self._laid(hidden)

    def _laid(self, pixels: Tensor) -> Tensor:
        """The inverse of `pixels`."""
        side = self.encoder.patch
        grid = pixels.unflatten(1, (-1, self.encoder.rows)).unflatten(-1, (side, side))  # [B, U, Q, patch, patch]
        return grid.transpose(2, 3).flatten(3).flatten(1, 2)
