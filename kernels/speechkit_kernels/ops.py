"""The operators: schemas, shapes for tracing, and a PyTorch kernel that serves every device until a compiled one does.

    speechkit::stream_attn   attention of new frames over a ring cache, which it appends to
    speechkit::conv_step     gate, causal depthwise convolution over remembered frames, norm, SiLU
    speechkit::linear_step   linear map of a few frames, its weight in float32, bfloat16 or int8, with what often
                             stands around it: layer norm before, SiLU behind, and the sum of a residual connection
    speechkit::linear_pack   the weight of linear_step as compiled kernels read it fastest
    speechkit::subsample_step
                             convolution of 3x3 with stride 2 over remembered and new frames, of one channel to many or
                             of each to itself, with ReLU if asked

Compiled kernels register for their device over the PyTorch one. Schema and meaning stay the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speechkit_kernels import plain

SCHEMAS = {
    "stream_attn": "(Tensor q, Tensor k, Tensor v, Tensor(a!) cache, Tensor slots, Tensor pos, Tensor qlen, *, "
    "Tensor? keep=None, Tensor? q_pos=None, Tensor? bias_u=None, Tensor? bias_v=None, Tensor? rel=None, "
    "int rel_zero=0, Tensor(b!)? cache_bias=None, Tensor? key_bias=None, Tensor? slopes=None, "
    "int chunk=0, int left, float scale) -> Tensor",
    "conv_step": "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) cache, Tensor slots, Tensor qlen, *, "
    "bool gated, Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=1e-5) -> Tensor",
    "linear_step": "(Tensor x, Tensor weight, Tensor? bias, *, Tensor? scale=None, bool silu=False, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=1e-5, Tensor? add=None, float factor=1.) -> Tensor",
    "subsample_step": "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) tail, Tensor lengths, *, "
    "bool relu=False, Tensor? depthwise=None, Tensor? depthwise_bias=None, Tensor(b!)? depthwise_tail=None) -> Tensor",
}

LIBRARY = torch.library.Library("speechkit", "DEF")

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(_name, getattr(plain, _name), "CompositeExplicitAutograd")

LIBRARY.define("linear_pack(Tensor weight) -> Tensor")
LIBRARY.impl("linear_pack", plain.linear_pack, "CompositeImplicitAutograd")


@torch.library.register_fake("speechkit::stream_attn", lib=LIBRARY)
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object, **options: object) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.register_fake("speechkit::conv_step", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, *rest: object, **options: object) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


@torch.library.register_fake("speechkit::linear_step", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, **options: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], plain.linear_outputs(weight, bias))


@torch.library.register_fake("speechkit::subsample_step", lib=LIBRARY)
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor,
    *rest: object,
    depthwise: Tensor | None = None,
    **options: object,
) -> Tensor:
    frames, bands = x.shape[1:3]
    for _stage in range(1 if depthwise is None else 2):
        frames, bands = (frames + 1) // 2, (bands + tail.shape[1]) // 2
    return x.new_empty(x.shape[0], frames, bands, weight.shape[0])
