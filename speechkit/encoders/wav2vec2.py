"""wav2vec 2.0 (2006.11477), HuBERT (2106.07447) and WavLM (2110.13900): convolutions over samples, then a transformer.

Three architectures in one, because they differ in little: where the norms are, and how WavLM scores positions.

A clip gives the same alone and in a batch, whatever is in its padding. For that the norm of each channel over time,
which `Convolutions` of "group" have, is computed from the real frames of each clip; elsewhere it also sees the padding,
and a clip depends on how much of it there is.

Whole utterances only: the transformer sees all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.attention import ScoreTerm, Softmax, attend
from speechkit.attention.ring import Ring
from speechkit.encoders.ast import VisionBlock
from speechkit.layers import Linear
from speechkit.stream import Context, Everything, Span, fresh_span, keep_valid
from speechkit.types import EncoderOutput


class ChannelNorm(nn.GroupNorm):
    """Each channel minus its mean over time, divided by its deviation, both of the real frames of a clip."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def forward(self, x: Float[Tensor, "B D U"], counts: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B D U"]:
        if counts is None:
            return super().forward(x)
        count, x = counts.clamp(min=1)[:, None, None], keep_valid(x.transpose(1, 2), counts)  # [B, U, D]
        away = keep_valid(x - x.sum(1, keepdim=True) / count, counts)
        variance = away.square().sum(1, keepdim=True) / count
        return (away * (variance + self.eps).rsqrt() * self.weight + self.bias).transpose(1, 2)


class FrameNorm(nn.LayerNorm):
    """Layer normalisation of each frame, of frames that lie along the last axis."""

    def forward(self, x: Float[Tensor, "B D U"], counts: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B D U"]:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Convolutions(nn.Module):
    """From samples to frames: convolutions, a norm and GELU after the first of them or after each.

    Args:
        channels, kernels, strides: of each convolution.
        norm: "group" normalises each channel over time, behind the first convolution alone; "layer" each frame, behind
            every one.
        bias: whether the convolutions add one.
    """

    def __init__(
        self,
        *,
        channels: Sequence[int] = (512,) * 7,
        kernels: Sequence[int] = (10, 3, 3, 3, 3, 2, 2),
        strides: Sequence[int] = (5, 2, 2, 2, 2, 2, 2),
        norm: Literal["group", "layer"] = "group",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if not len(channels) == len(kernels) == len(strides) > 0:
            raise ValueError(
                f"Convolutions must have as many channels as kernels and strides, but have {len(channels)}, "
                f"{len(kernels)} and {len(strides)}; list one of each for every convolution."
            )
        self.dim, self.stride = channels[-1], math.prod(strides)
        self.window = 1 + sum((k - 1) * math.prod(strides[:n]) for n, k in enumerate(kernels))
        sizes = zip((1, *channels), channels, kernels, strides, strict=False)
        self.layers: Any = nn.ModuleList(nn.Conv1d(i, o, k, stride=s, bias=bias) for i, o, k, s in sizes)
        kind = ChannelNorm if norm == "group" else FrameNorm
        self.norms: Any = nn.ModuleList(kind(dim) for dim in (channels[:1] if norm == "group" else channels))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.get_parameter("weight"))

    def forward(
        self, samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"] | None
    ) -> tuple[Float[Tensor, "B U D"], Int[Tensor, "B"] | None]:
        """Frames and how many of them are real; a clip of less than ``window`` samples is filled up with silence."""
        x = samples if lengths is None else keep_valid(samples, lengths)
        x, counts = F.pad(x, (0, max(0, self.window - x.shape[1])))[:, None], lengths
        for n, layer in enumerate(self.layers):
            x = layer(x)
            if counts is not None and lengths is not None:
                whole = (counts - layer.kernel_size[0]).div(layer.stride[0], rounding_mode="floor") + 1
                counts = torch.where(lengths > 0, whole.clamp(min=1), 0)
            x = F.gelu(self.norms[n](x, counts) if n < len(self.norms) else x)
        return x.transpose(1, 2), counts


class ConvolutionalPosition(nn.Module):
    """Where a frame is, from the frames around it: a grouped convolution whose weight is a direction times a gain.

    The gain is one number for each place of the kernel (weight normalisation, 1602.07868, as in 2006.11477).
    """

    def __init__(self, *, dim: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.groups, self.kernel = groups, kernel
        self.direction = nn.Parameter(torch.randn(dim, dim // groups, kernel) * (4 / (kernel * dim)) ** 0.5)
        self.gain = nn.Parameter(self.direction.detach().norm(dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "B U D"]) -> Float[Tensor, "B U D"]:
        weight = self.direction * (self.gain / self.direction.norm(dim=(0, 1), keepdim=True))
        y = F.conv1d(x.transpose(1, 2), weight, self.bias, padding=self.kernel // 2, groups=self.groups)
        return F.gelu(y[..., : x.shape[1]]).transpose(1, 2)


class PostNormBlock(VisionBlock):
    """Attention and feed-forward, a norm behind each (1706.03762)."""

    def forward(self, x: Float[Tensor, "B S D"], span: Span) -> Float[Tensor, "B S D"]:
        y, _ = self.attention(x, span)
        x = self.norm_attention(x + self.dropout(y))
        return self.norm_feed(x + self.feed(x))


class Distances(nn.Module):
    """A score for each distance between frames: near ones have one each, farther ones share (T5, 1910.10683).

    Args:
        heads: of the attention.
        buckets: scores of each head, half of them for what comes later.
        furthest: distance from which on all share one.
    """

    def __init__(self, *, heads: int, buckets: int = 320, furthest: int = 800) -> None:
        super().__init__()
        self.furthest = furthest
        self.table = nn.Parameter(torch.randn(buckets, heads))

    def forward(self, query: Int[Tensor, "U"], key: Int[Tensor, "S"]) -> Float[Tensor, "H U S"]:
        distance = key - query[:, None]
        half = len(self.table) // 2
        near = half // 2
        far = (distance.abs().clamp(min=1).float() / near).log() / math.log(self.furthest / near)
        shared = (near + far * (half - near)).long().clamp(max=half - 1)
        bucket = torch.where(distance.abs() < near, distance.abs(), shared) + half * (distance > 0)
        return self.table[bucket].permute(2, 0, 1)


class GatedDistance(Softmax):
    """Attention with a score for each distance, which each frame weighs by a gate of its own (WavLM, section 3.1).

    Args:
        dim, heads: as for `Softmax`.
        distances: the scores; one object for all layers.
        dropout: share of the attention weights dropped in training.
    """

    def __init__(self, *, dim: int, heads: int, distances: Distances, dropout: float = 0.0) -> None:
        super().__init__(dim=dim, heads=heads, dropout=dropout)
        self.distances = distances
        self.gate = Linear(self.width, 8)
        self.scale = nn.Parameter(torch.ones(heads))

    def init_state(self, batch: int, context: Context) -> NoReturn:
        """Refused: its scores are of whole utterances.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "GatedDistance must see whole utterances, but a stream was asked for; choose attention=relative to stream."
        )

    def forward(
        self, x: Float[Tensor, "B U D"], span: Span, state: Ring | None = None
    ) -> tuple[Float[Tensor, "B U D"], None]:
        q, k, v = self._project(x)
        term = _Gated(self._gates(x), self.distances)
        y = attend(q, k, v, span, term=term, dropout=self.dropout if self.training else 0.0)
        return self.out(y.flatten(2)), None

    def _gates(self, x: Float[Tensor, "B U D"]) -> Float[Tensor, "B H U 1"]:
        heads = x.unflatten(-1, (self.heads, self.width)).transpose(1, 2)
        update, reset = self.gate(heads).unflatten(-1, (2, 4)).sum(-1, keepdim=True).sigmoid().unbind(-2)
        return update * (reset * self.scale[:, None, None] - 1.0) + 2.0


class _Gated(ScoreTerm):
    """The bias of one call of `GatedDistance`, whose frames are whole utterances."""

    def __init__(self, gates: Float[Tensor, "B H U 1"], distances: Distances) -> None:
        super().__init__(dim=1, heads=1)
        self.gates, self.distances = gates, distances

    def bias(
        self, q: Tensor, query: Int[Tensor, "B U"], key: Int[Tensor, "B S"], ahead: int = 0
    ) -> Float[Tensor, "B H U S"]:
        return self.gates * self.distances(query[0], key[0])


class Wav2Vec2(nn.Module):
    """wav2vec 2.0, HuBERT or WavLM: frames of 20 ms from samples.

    Its features are samples, ``[B, N, 1]``, as `speechkit.features.Samples` gives them.

    Args:
        convolutions: from samples to frames.
        dim, heads, layers: of the transformer; the published base / large have 768, 12, 12 / 1024, 16, 24.
        expansion: width of a feed-forward in units of ``dim``.
        position_kernel, position_groups: of the convolution that says where a frame is.
        pre_norm: norms before attention and feed-forward and one at the end, as the published large ones have, instead
            of a norm behind each.
        normed: whether frames are normalised before they get the width ``dim``.
        attention: one mechanism a layer, called as ``attention(dim=, heads=)``; WavLM's is `GatedDistance`.
        dropout: share dropped after positions, attention and feed-forward.
        eps: of all layer norms but those of the convolutions.
    """

    def __init__(
        self,
        *,
        convolutions: Convolutions,
        dim: int,
        heads: int,
        layers: int,
        expansion: int = 4,
        position_kernel: int = 128,
        position_groups: int = 16,
        pre_norm: bool = False,
        normed: bool = True,
        attention: Callable = Softmax,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.convolutions, self.dim, self.stride, self.pre_norm = convolutions, dim, convolutions.stride, pre_norm
        self.norm_in = nn.LayerNorm(convolutions.dim, eps=eps) if normed else nn.Identity()
        self.widen = nn.Linear(convolutions.dim, dim)
        self.positions = ConvolutionalPosition(dim=dim, kernel=position_kernel, groups=position_groups)
        self.norm, self.dropout = nn.LayerNorm(dim, eps=eps), nn.Dropout(dropout)
        block = VisionBlock if pre_norm else PostNormBlock
        self.blocks: Any = nn.ModuleList(
            block(dim=dim, heads=heads, expansion=expansion, attention=attention, dropout=dropout, eps=eps)
            for _ in range(layers)
        )
        for part in (self.widen, *(m for m in self.blocks.modules() if isinstance(m, nn.Linear))):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)

    def init_state(self, batch: int, *, context: Context | None = None) -> NoReturn:
        """Refused: there is no stream.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Wav2Vec2 must hear whole utterances, because every frame sees all the others, but a stream was asked for; "
            "transcribe whole recordings, without --stream and --chunk-ms, or stream a Conformer."
        )

    def forward(
        self,
        features: Float[Tensor, "B T F"],
        lengths: Int[Tensor, "B"] | None = None,
        *,
        context: Context | None = None,
    ) -> EncoderOutput:
        """Encode whole utterances.

        Args:
            features: samples ``[B, N, 1]``; those past a length may hold anything, NaN included.
            lengths: real samples of each; all of them unless given.
            context: of whole utterances, as every recogniser gives one.

        Raises:
            ValueError: for features that are not samples, and a context that shows less than all.
        """
        if context not in (None, Context(), Everything()):
            raise ValueError(
                f"Wav2Vec2 must hear whole utterances, because every frame sees all the others, but was to see "
                f"{context}; leave the context out, in a training with context=whole."
            )
        if features.shape[2] != 1:
            raise ValueError(
                f"Wav2Vec2 must be given samples, [B, N, 1], but the features have {features.shape[2]} bands; choose "
                f"features=samples."
            )
        x, counts = self.convolutions(features[..., 0], lengths)
        x = self.widen(self.norm_in(x))
        seen: Context = Everything()
        if counts is None:
            counts = torch.full((len(x),), x.shape[1], device=x.device)
        else:
            x, seen = keep_valid(x, counts), Context()
        x = x + self.positions(x)
        x = self.dropout(x if self.pre_norm else self.norm(x))
        span = fresh_span(counts, seen)
        for block in self.blocks:
            x = block(x, span)
        return EncoderOutput(self.norm(x) if self.pre_norm else x, counts)
