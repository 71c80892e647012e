"""Which kernel serves an operator, and why not a faster one."""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from typing import NamedTuple

import torch

from speechkit_kernels.ops import SCHEMAS

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
    return tuple(_serving(operator, device) for operator in SCHEMAS for device in ("cpu", "cuda"))


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
    """The instruction set the CPU kernels use, None without kernels; with ``wanted``, that one from now on.

    Raises:
        ValueError: this machine, or this build, does not have the one that is wanted.
    """
    ready()
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
    switch = os.environ.get("SPEECHKIT_KERNELS", "").lower()
    if switch == "off":
        return _Loaded(None, "SPEECHKIT_KERNELS=off forbids compiled kernels; unset it.")
    if switch:
        raise ValueError(f"SPEECHKIT_KERNELS must be 'off' or unset, but is {switch!r}.")
    try:
        from speechkit_kernels import build  # Linux only

        path = str(build.find())
        torch.ops.load_library(path)
        library = ctypes.CDLL(path)
        library.speechkit_isa.restype = ctypes.c_char_p
        return _Loaded(library, "")
    except ImportError:
        return _Loaded(None, "compiled CPU kernels exist for Linux alone; run there to use them.")
    except (build.NotBuilt, OSError) as error:
        reason = str(error)
    warnings.warn(f"speechkit streams in plain PyTorch, slower with the same results: {reason}", stacklevel=3)
    return _Loaded(None, reason)


def _serving(operator: str, device: str) -> Serving:
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"speechkit::{operator}", device.upper()):
        return Serving(operator, device, instruction_set() or "compiled" if device == "cpu" else "compiled", "")
    reason = _load().reason if device == "cpu" else ""
    return Serving(operator, device, PLAIN, reason or f"no kernel is written for {device} yet; use the CPU.")
