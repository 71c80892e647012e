"""The parts that every encoder is made of: norms, feed-forward, convolutions with memory, subsampling.

A convolution that remembers takes ``(x, lengths, state)`` and gives ``(y, state)``. ``state=None`` starts from zeros
and remembers nothing, so the offline pass and the stream are the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit import kernels
from speechkit.stream import State, carry, ceil_div, keep_valid, valid

Frames = Float[Tensor, "B U D"]
Lengths = Int[Tensor, "B"]


FEW = 64
"""Frames of a call up to which `Linear` is bound by reading its weight, and PyTorch's product is not the faster one."""


class Linear(nn.Linear):
    """A linear map that reads its weight at the speed of memory where few frames come at a time, as in a stream.

    Where a compiled kernel serves, a frame's result is then the same bit for bit whoever else is in the batch.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self.scale: Tensor | None
        self.register_buffer("scale", None)  # of each row of an int8 weight
        self.rounded_from: torch.dtype | None = None

    def new_zeros(self, *shape: int) -> Tensor:
        """Zeros of the type that frames have, whatever the weight was rounded to."""
        return self.weight.new_zeros(shape, dtype=self.rounded_from or self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        few = x.dim() == 3 and x.shape[1] <= FEW and x.dtype == torch.float32 and not torch.is_grad_enabled()
        if few and kernels.serves("linear_step", x):
            return torch.ops.speechkit.linear_step(x, self.weight, self.bias, scale=self.scale)
        if self.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        weight = self.weight.to(x.dtype)
        return F.linear(x, weight if self.scale is None else weight * self.scale[:, None], self.bias)

    def shrink(self, dtype: torch.dtype) -> None:
        """Round the weight to bfloat16, or to int8 with a scale for each row. There is no way back."""
        weight, self.rounded_from = self.weight.detach(), self.weight.dtype
        if dtype == torch.int8:
            self.scale = weight.abs().amax(1).clamp(min=1e-30) / 127
            weight = (weight / self.scale[:, None]).round()
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)


def shrink(module: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of all `Linear` maps inside ``module``: a stream of small batches waits for little else.

    Sums stay in float32, so what changes is what rounding the weights changes. The module can no longer be trained.

    Args:
        dtype: ``torch.bfloat16`` (half the bytes) or ``torch.int8`` (a quarter).

    Raises:
        ValueError: for another type, or weights that are rounded already.
    """
    maps = [part for part in module.modules() if isinstance(part, Linear)]
    if dtype not in (torch.bfloat16, torch.int8) or any(part.weight.dtype != torch.float32 for part in maps):
        found = sorted({str(part.weight.dtype) for part in maps})
        raise ValueError(
            f"shrink must go from torch.float32 to torch.bfloat16 or torch.int8, but goes from {', '.join(found)} to "
            f"{dtype}; load the model anew, and shrink it once."
        )
    for part in maps:
        part.shrink(dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation inside a convolution module: each frame by itself, so lengths do not matter."""

    def forward(self, x: Frames, lengths: Lengths | None = None) -> Frames:
        return super().forward(x)


class BatchNorm(nn.Module):
    """Batch normalisation over real frames only: padding enters neither the batch's statistics nor the running ones."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Frames, lengths: Lengths) -> Frames:
        if not self.training:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)
        mask = valid(lengths, x.shape[1])
        y = torch.zeros_like(x)
        y[mask] = self.norm(x[mask]).to(y.dtype)
        return y

    def fold(self, weight: Float[Tensor, "D K"], bias: Float[Tensor, "D"] | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of a depthwise convolution that does what it did and this normalisation behind it."""
        norm = self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        return weight * scale[:, None], shift if bias is None else shift + bias * scale


class Scale(nn.Module):
    """A learned scale and shift in the place of a pre-norm (Squeezeformer, section 3.2, "adaptive scale")."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Frames) -> Frames:
        return x * self.weight + self.bias


class FeedForward(nn.Sequential):
    """Linear, activation, linear; dropout after each. ``bias``: whether the linear maps add one."""

    def __init__(
        self,
        *,
        dim: int,
        hidden: int,
        dropout: float,
        bias: bool = True,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(
            Linear(dim, hidden, bias=bias),
            activation(),
            nn.Dropout(dropout),
            Linear(hidden, dim, bias=bias),
            nn.Dropout(dropout),
        )


class DepthwiseConv(nn.Module):
    """A convolution over time, one filter a channel, that can be streamed.

    Args:
        kernel: frames a filter spans.
        stride: input frames an output frame; an incomplete last frame counts.
        causal: True lets output ``u`` see inputs up to the last of its own stride; False centres the filter, which
            serves whole utterances only.
        bias: whether a bias is added.
    """

    def __init__(self, *, dim: int, kernel: int, stride: int = 1, causal: bool = True, bias: bool = True) -> None:
        super().__init__()
        if kernel < stride:
            raise ValueError(f"DepthwiseConv.kernel must be at least the stride, {stride}, but is {kernel}.")
        self.conv = nn.Conv1d(dim, dim, kernel, stride=stride, groups=dim, bias=bias)
        self.stride, self.causal = stride, causal
        self.before = kernel - stride if causal else (kernel - stride) // 2
        self.after = kernel - stride - self.before

    def init_state(self, batch: int) -> Float[Tensor, "B S D"]:
        """Remembered input frames: the ``kernel - stride`` before the next output frame's own."""
        if not self.causal:
            raise ValueError(
                "a centred convolution must see frames of the future, so this encoder cannot stream; build it with "
                "convolution.causal=true, or encode whole utterances with forward()."
            )
        weight = self.conv.weight
        return weight.new_zeros(batch, self.before, weight.shape[0])

    def forward(
        self, x: Frames, lengths: Lengths, state: Tensor | None = None
    ) -> tuple[Float[Tensor, "B T D"], Tensor | None]:
        seen, state = carry(state, keep_valid(x, lengths), lengths)
        before = self.before + x.shape[1] - seen.shape[1]  # what no memory provides is zero
        after = self.after + -x.shape[1] % self.stride
        y = self.conv(F.pad(seen.transpose(1, 2), (before, after)))
        return y.transpose(1, 2), state


class Convolution(nn.Module):
    """The convolution module of Conformer (2005.08100, figure 2) and Squeezeformer (2206.00888, section 3.2).

    Pointwise to twice the width, an activation, depthwise over time, norm, SiLU, pointwise back.

    Args:
        kernel: frames of the depthwise filter.
        gated: the first activation is a gate that halves the width (Conformer), or SiLU that keeps it (Squeezeformer).
        causal: see `DepthwiseConv`.
        norm: called with a width: `LayerNorm` or `BatchNorm`.
        bias: whether the three convolutions add one.
    """

    def __init__(
        self,
        *,
        dim: int,
        kernel: int = 31,
        gated: bool = True,
        causal: bool = True,
        norm: Callable[[int], nn.Module] = LayerNorm,
        dropout: float = 0.1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        inner = dim if gated else 2 * dim
        self.widen = Linear(dim, 2 * dim, bias=bias)
        self.gate = nn.GLU() if gated else nn.SiLU()
        self.depthwise = DepthwiseConv(dim=inner, kernel=kernel, causal=causal, bias=bias)
        self.norm = norm(inner)
        self.project = Linear(inner, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def init_state(self, batch: int) -> Tensor:
        return self.depthwise.init_state(batch)

    def forward(self, x: Frames, lengths: Lengths, state: Tensor | None = None) -> tuple[Frames, Tensor | None]:
        if state is not None and self._fuses(x):
            return self.project(self._fused(self.widen(x), lengths, state)), state
        y, state = self.depthwise(self.gate(self.widen(x)), lengths, state)
        return self.dropout(self.project(F.silu(self.norm(y, lengths)))), state

    def _fuses(self, x: Tensor) -> bool:
        known = isinstance(self.norm, LayerNorm | BatchNorm)
        return known and not (self.training or torch.is_grad_enabled()) and kernels.serves("conv_step", x)

    def _fused(self, x: Tensor, lengths: Lengths, state: Tensor) -> Tensor:
        """Gate, filter, norm and SiLU in one operator, which also moves ``state`` on, in place."""
        weight, bias, options = self.depthwise.conv.weight[:, 0], self.depthwise.conv.bias, {}
        if isinstance(self.norm, BatchNorm):
            weight, bias = self.norm.fold(weight, bias)
        else:
            options = dict(norm_weight=self.norm.weight, norm_bias=self.norm.bias, eps=self.norm.eps)
        gated, slots = isinstance(self.gate, nn.GLU), kernels.rows(len(x), x.device)
        return torch.ops.speechkit.conv_step(x, weight, bias, state, slots, lengths, gated=gated, **options)


def _keep_variance(module: nn.Module) -> None:
    """He's initialisation (1502.01852): what comes out of ReLU layers varies as much as what went in.

    torch's default loses two thirds of the variance at each layer, and a stack of them starts training with frames
    that are nearly all alike, which CTC answers with blanks for a thousand steps.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if isinstance(module, nn.Conv2d) else "linear")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Subsampling(nn.Module):
    """Features to encoder frames: ``stages`` convolutions of 3x3 with stride 2 and ReLU, then a linear map.

    Two full stages are Conformer's 4x; three separable ones are FastConformer's 8x depthwise striding (2305.05084).
    Output frame u sees features up to the last of its own ``2 ** stages``: one frame of the past is remembered at each
    stage and none of the future is needed, so whole chunks of features give whole chunks of frames. With ``before=2``,
    the causal downsampling of cache-aware FastConformers (2312.17279), it sees them up to the first of its own: two
    frames are remembered, and up to ``2 ** stages - 1`` features at the very end of a stream are not heard.

    Args:
        features: mel bands of a feature frame.
        dim: width of an encoder frame.
        channels: width of the convolutions; ``dim`` unless given.
        separable: all stages but the first are a depthwise followed by a pointwise convolution.
        before: zeros that each stage puts before its first frame and before its first band, 1 or 2: output i of a stage
            is made of its inputs ``2 i - before`` to ``2 i - before + 2``.

    Raises:
        ValueError: for another ``before``.
    """

    def __init__(
        self,
        *,
        features: int,
        dim: int,
        channels: int | None = None,
        stages: int = 2,
        separable: bool = False,
        before: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if before not in (1, 2):
            raise ValueError(
                f"Subsampling.before must be 1 or 2, because a stage has 3 taps and a stride of 2, but is {before}."
            )
        channels = channels or dim
        self.bands = [features]
        self.stages = nn.ModuleList()
        for stage in range(stages):
            source = channels if stage else 1
            depthwise = separable and stage > 0
            conv = nn.Conv2d(source, channels, 3, groups=source if depthwise else 1)
            self.stages.append(nn.Sequential(conv, nn.Conv2d(channels, channels, 1)) if depthwise else conv)
            self.bands.append((self.bands[-1] + before) // 2)
        self.linear = Linear(channels * self.bands[-1], dim)
        self.dropout = nn.Dropout(dropout)
        self.channels, self.before, self.stride = channels, before, 2**stages
        self.apply(_keep_variance)

    def init_state(self, batch: int) -> tuple[Tensor, ...]:
        """The remembered frames of each stage, ``[B, before, bands, channels]``."""
        widths = [1, *[self.channels] * (len(self.stages) - 1)]
        new = self.linear.new_zeros
        return tuple(new(batch, self.before, bands, width) for bands, width in zip(self.bands, widths, strict=False))

    def forward(
        self, x: Float[Tensor, "B T F"], lengths: Lengths, state: State | None = None
    ) -> tuple[Frames, Lengths, State | None]:
        """Encoder frames, their lengths, and the next state."""
        x, tails, done = x[..., None], list(state or [None] * len(self.stages)), 0  # [B, T, F, C]
        if self._fuses(x, tails[0]) and len(self.stages) > 1 and isinstance(self.stages[1], nn.Sequential):
            x, done = self._halve_twice(x, lengths, tails), 2
        for i in range(done, len(self.stages)):
            x, tails[i] = self._halve(self.stages[i], x, ceil_div(lengths, 2**i), tails[i])
        x = self.linear(x.transpose(2, 3).flatten(2))  # [B, U, C F] -> [B, U, D]
        return self.dropout(x), ceil_div(lengths, self.stride), None if state is None else tuple(tails)

    def _fuses(self, x: Tensor, tail: Tensor | None) -> bool:
        plain = tail is None or x.dtype != torch.float32 or torch.is_grad_enabled()
        return not plain and kernels.serves("subsample_step", x)

    def _halve(
        self, stage: nn.Module, x: Tensor, lengths: Lengths, tail: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        conv, *pointwise = cast(Sequence[nn.Conv2d], stage if isinstance(stage, nn.Sequential) else [stage])
        if conv.weight.shape[1] == 1 and self._fuses(x, tail):
            step, filters = torch.ops.speechkit.subsample_step, conv.weight[:, 0]
            y = step(x, filters, conv.bias, tail, lengths, relu=not pointwise)  # moves the tail on, in place
            return _pointwise(y, pointwise[0]) if pointwise else y, tail
        y, tail = self._convolve(conv, x, lengths, tail)
        for point in pointwise:
            y = F.linear(y, point.weight.flatten(1), point.bias)
        return F.relu(y), tail

    def _halve_twice(self, x: Tensor, lengths: Lengths, tails: list[Tensor]) -> Tensor:
        """The first two stages: the frames between them are the largest tensor of a step, and are never all there."""
        first, (depthwise, pointwise) = cast(Sequence[Any], self.stages)[:2]
        second = {"depthwise": depthwise.weight[:, 0], "depthwise_bias": depthwise.bias, "depthwise_tail": tails[1]}
        step, filters = torch.ops.speechkit.subsample_step, first.weight[:, 0]
        return _pointwise(step(x, filters, first.bias, tails[0], lengths, relu=True, **second), pointwise)

    def _convolve(
        self, conv: nn.Conv2d, x: Tensor, lengths: Lengths, tail: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        seen, tail = carry(tail, keep_valid(x, lengths), lengths)
        before, after = self.before + x.shape[1] - seen.shape[1], x.shape[1] % 2
        if before or after:
            seen = F.pad(seen, (0, 0, 0, 0, before, after))
        bands = (x.shape[2] + self.before) // 2
        # as many zeros behind the last band as before the first; the output that only they are for is dropped
        padding = (0, self.before)
        y = F.conv2d(seen.permute(0, 3, 1, 2), conv.weight, conv.bias, 2, padding, groups=conv.groups)
        return y[..., :bands].permute(0, 2, 3, 1), tail  # [B, T, F, C]


def _pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """ReLU of a convolution of one tap, as a linear map whose result does not depend on who else is in the batch."""
    return torch.ops.speechkit.linear_step(x, conv.weight.flatten(1), conv.bias).relu_()
