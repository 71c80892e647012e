"""One instruction set after the other under the compiled operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import speechkit_kernels


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The operators as this instruction set computes them; skips where it, or any compiled kernel, is absent."""
    usual = speechkit_kernels.instruction_set()
    if usual is None:
        pytest.skip("the compiled kernels are not there: " + str(speechkit_kernels.explain()[0]))
    try:
        speechkit_kernels.instruction_set(name)
    except ValueError:
        pytest.skip(f"this machine has no {name}")
    yield
    speechkit_kernels.instruction_set(usual)
