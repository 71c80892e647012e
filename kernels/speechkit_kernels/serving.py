"""Which kernel serves an operator, and why not a faster one."""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from speechkit_kernels import build, cuda
from speechkit_kernels.ops import SCHEMAS

DEVICES = ("cpu", "cuda")
PLAIN = "plain PyTorch"


class Serving(NamedTuple):
    """What runs when an operator is called with tensors of a device.

    Args:
        kernel: the name of an instruction set, or "plain PyTorch".
        reason: why it is not a faster one, and what would change that; empty where there is none.
    """

    operator: str
    device: str
    kernel: str
    reason: str

    def __str__(self) -> str:
        because = f": {self.reason}" if self.reason else ""
        return f"{self.operator} on {self.device}: {self.kernel}{because}"


def ready() -> None:
    """Loads the compiled kernels, once a process; builds them first where they are not built yet.

    Where that is impossible one warning says why, and everything goes on in plain PyTorch with the same results.

    Raises:
        ValueError: ``SPEECHKIT_KERNELS`` is set to something else than "off".
    """
    _load()


def explain() -> tuple[Serving, ...]:
    """Which kernel serves each operator on each kind of device; ``print(*explain(), sep="\\n")`` for people to read."""
    ready()
    return tuple(_serving(operator, device) for operator in SCHEMAS for device in DEVICES)


def require(operator: str, device: torch.device | str) -> None:
    """Insists on a compiled kernel.

    Raises:
        ValueError: there is no operator of that name.
        RuntimeError: plain PyTorch would serve it; the message ends with the remedy.
    """
    if operator not in SCHEMAS:
        raise ValueError(f"operator must be one of {', '.join(SCHEMAS)}, but is {operator!r}.")
    ready()
    serving = _serving(operator, torch.device(device).type)
    if serving.kernel == PLAIN:
        raise RuntimeError(f"{operator} has no compiled kernel on {serving.device}: {serving.reason}")


def instruction_set(wanted: str | None = None) -> str | None:
    """The instruction set the CPU kernels use, None where there are none; ``wanted``, if given, is used from now on.

    Raises:
        ValueError: this machine, or this build, does not have the one that is wanted.
    """
    library = _load().library
    if library is None:
        return None
    name = library.speechkit_isa(wanted.encode() if wanted else None).decode()
    if wanted not in (None, name):
        raise ValueError(f"the instruction set must be one that this machine and the library have, but is {wanted!r}.")
    return name


class _Loaded(NamedTuple):
    library: ctypes.CDLL | None
    reason: str  # why there is no library


@cache
def _load() -> _Loaded:
    switch = os.environ.get("SPEECHKIT_KERNELS", "")
    if switch not in ("", "off"):
        raise ValueError(f"SPEECHKIT_KERNELS must be 'off' or unset, but is {switch!r}.")
    if switch == "off":
        return _Loaded(None, "SPEECHKIT_KERNELS=off forbids compiled kernels; unset it.")
    try:
        return _Loaded(_open(build.find()), "")
    except build.BuildError as error:
        warnings.warn(f"speechkit streams in plain PyTorch, slower with the same results: {error}", stacklevel=3)
        return _Loaded(None, str(error))


def _open(path: Path) -> ctypes.CDLL:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise build.BuildError(f"the CPU kernels do not load: {error}; delete {path} to have it built anew.") from error
    library = ctypes.CDLL(str(path))
    library.speechkit_isa.restype = ctypes.c_char_p
    return library


def _serving(operator: str, device: str) -> Serving:
    compiled = device in DEVICES and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"speechkit::{operator}", device.upper()
    )
    if not compiled:
        missing = f"no kernel is written for {device} yet; use a device that explain() names one for."
        if device == "cuda" and operator in cuda.OPERATORS:
            hindrance = cuda.reason()
            missing = (
                f"{hindrance}."
                if hindrance
                else (
                    "the kernel is proved by emulation alone and has not run on a GPU yet, so it waits to be asked "
                    "for; call speechkit_kernels.cuda.register() before the first stream."
                )
            )
        return Serving(operator, device, PLAIN, (device == "cpu" and _load().reason) or missing)
    name = instruction_set() if device == "cpu" else None
    if name is None:
        return Serving(operator, device, "compiled", "")
    sets = build.isas(operator)
    used = sets.index(name) if name in sets else 0
    better = " and ".join(sets[:used])
    because = f"{better} would come first, but this machine lacks it or instruction_set({name!r}) ruled it out."
    return Serving(operator, device, sets[used], because if used else "")
