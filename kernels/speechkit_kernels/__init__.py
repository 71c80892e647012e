"""Fused operators of streaming speech encoders: ``torch.ops.speechkit.stream_attn`` and ``conv_step``.

This package stands alone: it imports torch and nothing of speechkit. What the operators mean is said in `plain`.
"""

from speechkit_kernels import ops as ops
