"""A GPU for tests: NVIDIA's driver, emulated on the CPU, under the operators as they are launched on a real one.

Everything of a call is what ships: the checks, the choice of a variant, the packing of its arguments, the launch, and
the kernel's text, which g++ compiles where NVRTC would.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from speechkit_kernels import build, cuda, ops
from torch import Tensor

COMPILER = shutil.which("g++")
SOURCES = build.SOURCES
HOPPER = 227 * 1024  # bytes of shared memory that a block may ask for
SMALL = 99 * 1024  # on consumer GPUs
Bug = tuple[str, str]


class Range(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("bytes", ctypes.c_longlong), ("writable", ctypes.c_int))


class Machine(ctypes.Structure):
    """As in csrc/emu/driver_emu.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int)
            for name in ("arch", "processors", "blocks", "shared_bytes", "capturing", "broken", "idle", "unchecked")
        ),
        ("seed", ctypes.c_uint),
        ("tensors", ctypes.POINTER(Range)),
        ("count", ctypes.c_int),
        ("launches", ctypes.c_int),
        ("loads", ctypes.c_int),
        ("grid", ctypes.c_int * 3),
        ("threads", ctypes.c_int),
        ("asked_bytes", ctypes.c_int),
        ("stream", ctypes.c_void_p),
    )


class Emulator:
    """One emulated GPU, whose operators are ``torch.ops.speechkit_emulated``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.driver = folder / "driver.so"
        _compile("-fvisibility=default", str(SOURCES / "emu" / "driver_emu.cpp"), "-ldl", "-o", str(self.driver))
        self.machine = Machine.in_dll(ctypes.CDLL(str(self.driver)), "machine")
        self.library = torch.library.Library("speechkit_emulated", "DEF")
        for name in cuda.OPERATORS:
            self.library.define(name + ops.SCHEMAS[name])
        self.lock = threading.Lock()
        self.made: dict[Any, Path] = {}
        self.asked: list[str] = []
        self.start()

    def start(self, bug: Bug | None = None, constants: Bug = ("", ""), **machine: int) -> None:
        """A machine that has loaded nothing yet: of its kind, with a bug in a kernel, or constants put for others."""
        self.bug, self.constants, self.asked = bug, constants, []
        ctypes.memset(ctypes.byref(self.machine), 0, ctypes.sizeof(Machine))
        kind = {"arch": 90, "processors": 1, "blocks": 2, "shared_bytes": HOPPER} | machine
        for name, value in kind.items():
            setattr(self.machine, name, value)
        cuda.serve(self.driver, self.driver, "speechkit_emulated", "CPU", self.compile)

    def compile(self, kernel: str, constants: str, arch: int) -> bytes:
        """The path of a library, with the kernel's text changed in one place where asked."""
        with self.lock:
            return self._compiled(kernel, constants)

    def _compiled(self, kernel: str, constants: str) -> bytes:
        self.asked.append(f"{kernel} {constants}")
        constants = constants.replace(*self.constants) if self.constants[0] else constants
        key = (kernel, constants, self.bug)
        if key not in self.made:
            text = (SOURCES / "cuda" / f"{kernel}.cu").read_text()
            if self.bug is not None:
                if text.count(self.bug[0]) != 1:
                    raise LookupError(f"what a planted bug changes must stand once in the kernel: {self.bug[0]}")
                text = text.replace(*self.bug)
            source = self.folder / f"{len(self.made)}.cu"
            source.write_text(text)
            options = [f"-D{each}" for each in constants.split()]
            options += [f"-DKERNEL_NAME={kernel}", f'-DKERNEL_SOURCE="{source}"']
            options += [f"-I{SOURCES / 'emu'}", f"-I{SOURCES / 'cuda'}"]
            self.made[key] = source.with_suffix(".so")
            _compile(*options, str(SOURCES / "emu" / "kernel_emu.cpp"), "-o", str(self.made[key]))
        return str(self.made[key]).encode() + b"\0"

    def call(self, operator: str, arguments: dict[str, Any], changed: tuple[str, ...], seed: int = 0) -> Tensor:
        """Calls an operator; its kernel may touch what it is given, and write to ``changed``."""
        kept = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        ranges = (Range * len(kept))(*(Range(*_memory(x), name in changed) for name, x in kept.items()))
        self.machine.seed, self.machine.tensors, self.machine.count = seed, ranges, len(kept)
        out: Tensor = getattr(torch.ops.speechkit_emulated, operator)(**arguments)
        return out


def _memory(x: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), reach * x.element_size() if x.numel() else 0


def _compile(*arguments: str) -> None:
    assert COMPILER is not None
    subprocess.run([COMPILER, "-O1", "-std=c++17", "-shared", "-fPIC", "-w", *arguments], check=True)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    if COMPILER is None:
        pytest.skip("the emulator is compiled with g++, which is not on the PATH")
    try:
        build.find()
    except build.BuildError as error:
        pytest.skip(f"there is no launcher: {error}")
    yield Emulator(tmp_path_factory.mktemp("emulated"))
