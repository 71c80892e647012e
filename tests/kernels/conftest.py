"""The operator that a module of tests is about: the one it names as ``OPERATOR``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import speechkit_kernels
import torch
from cuda_emulator import emulator as emulator  # one for all modules: its operators can be defined once
from instruction_sets import instruction_set
from speechkit_kernels import build, plain
from tiles_emulator import tiles as tiles
from tiles_emulator import tiles_of_this_machine as tiles_of_this_machine


@pytest.fixture(params=build.isas("conv_step"))
def kernel(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The operator, with each instruction set this machine has."""
    with instruction_set(request.param):
        yield getattr(torch.ops.speechkit, request.module.OPERATOR)


@pytest.fixture(params=["kernel", "plain"])
def step(request: pytest.FixtureRequest) -> Any:
    """The operator as it serves, and the plain one, which it must not differ from."""
    if request.param == "plain":
        return getattr(plain, request.module.OPERATOR)
    speechkit_kernels.ready()
    return getattr(torch.ops.speechkit, request.module.OPERATOR)
