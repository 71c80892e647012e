"""Fused operators of streaming speech encoders: ``stream_attn``, ``conv_step``, ``linear_step``, ``subsample_step``.

This package stands alone: it imports torch and nothing of speechkit. What the operators mean is said in `plain`.

Importing it defines the operators, in plain PyTorch. `ready` puts the compiled kernels in their place, and is called
where a stream begins, not here: building takes seconds and loading a few milliseconds, which nobody who trains,
evaluates or asks for help should pay, and whether a kernel serves must not depend on what an earlier process built.
"""

from speechkit_kernels import ops as ops
from speechkit_kernels.serving import PLAIN as PLAIN
from speechkit_kernels.serving import Serving as Serving
from speechkit_kernels.serving import explain as explain
from speechkit_kernels.serving import instruction_set as instruction_set
from speechkit_kernels.serving import ready as ready
from speechkit_kernels.serving import require as require
