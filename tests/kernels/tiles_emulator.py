"""A processor with AMX for tests: stream_attn's own text over tile instructions that any processor with AVX-512 runs.

Everything of a call is what ships, but for which instruction set is chosen: the checks, the sharing out to threads, and
the kernel's text, compiled over csrc/emu/tiles_emu.h where it would be over csrc/tiles.h.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from instruction_sets import instruction_set
from speechkit_kernels import build, ops
from torch import Tensor

COMPILER = shutil.which("g++")
FORBIDDEN = 0x7FDB  # as in tiles_emu.h
Bug = tuple[str, str]
AROUND = "avx512bf16"  # what the code around the tiles is compiled for


class TilesEmulator:
    """One emulated processor; its operator is ``torch.ops.speechkit_tiles.stream_attn``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[Bug | None, Path] = {}
        self.library = torch.library.Library("speechkit_tiles", "DEF")
        self.library.define("stream_attn" + ops.SCHEMAS["stream_attn"])
        torch_folder = Path(torch.__file__).parent
        host = folder / "host.so"
        _compile(
            *build.FLAGS, "-Dspeechkit=speechkit_tiles", "-DSPEECHKIT_ISAS(X)=X(amx)", f"-I{build.SOURCES}",
            "-isystem", f"{torch_folder}/include", str(build.SOURCES / "stream_attn_op.cpp"),
            str(build.SOURCES / "emu" / "tiles_host_emu.cpp"), f"-L{torch_folder}/lib", *build.LINK, "-o", str(host),
        )  # fmt: skip
        torch.ops.load_library(host)
        self.host = ctypes.CDLL(str(host))
        self.host.emulated_trouble.restype = ctypes.c_char_p
        self.start()

    def start(self, bug: Bug | None = None) -> None:
        """From now on the kernel as it is, or with a bug in its text."""
        if bug not in self.made:
            self.made[bug] = self._compiled(bug)
        assert self.host.emulate(str(self.made[bug]).encode()) == 0

    def product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """TDPBF16PS: ``total`` [16, 16] float32 += ``a`` [16, 32] by ``b`` [16, 16, 2] (pair, column, of the pair)."""
        ctypes.CDLL(str(self.made[None])).emulated_product(*(ctypes.c_void_p(x.data_ptr()) for x in (total, a, b)))

    def stream_attn(self, *args: Tensor, **arguments: Any) -> Tensor:
        """The operator as a processor with AMX serves it: tiles for bfloat16 alone.

        Raises:
            RuntimeError: the processor would refuse an instruction, or nobody may see what is loaded.
        """
        q: Tensor = args[0] if args else arguments["q"]
        if q.dtype != torch.bfloat16:
            return torch.ops.speechkit.stream_attn(*args, **arguments)  # type: ignore[no-any-return]
        try:
            return torch.ops.speechkit_tiles.stream_attn(*args, **arguments)  # type: ignore[no-any-return]
        except RuntimeError as error:
            raise RuntimeError(self.host.emulated_trouble().decode()) from error

    def _compiled(self, bug: Bug | None) -> Path:
        folder = self.folder / str(len(self.made))
        shutil.copytree(build.SOURCES, folder, ignore=shutil.ignore_patterns("cuda"))
        if bug is not None:
            texts = {path: path.read_text() for path in folder.glob("*.h")}
            places = [path for path, text in texts.items() if text.count(bug[0]) == 1]
            if len(places) != 1 or sum(text.count(bug[0]) for text in texts.values()) != 1:
                raise LookupError(f"what a planted bug changes must stand once in the sources: {bug[0]}")
            places[0].write_text(texts[places[0]].replace(*bug))
        library = folder / "kernel.so"
        _compile(
            *build.ISAS["amx"], "-Dspeechkit=speechkit_tiles", "-DSPEECHKIT_ISAS(X)=X(amx)", "-DSPEECHKIT_ISA=amx",
            f'-DKERNEL_SOURCE="{folder / "stream_attn.cpp"}"', "-shared", str(folder / "emu" / "tiles_kernel_emu.cpp"),
            "-o", str(library),
        )  # fmt: skip
        return library


def _compile(*arguments: str) -> None:
    assert COMPILER is not None
    subprocess.run([COMPILER, "-std=c++17", "-fPIC", "-w", *arguments, "-O1"], check=True)


@pytest.fixture(scope="session")
def tiles_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> TilesEmulator:
    if COMPILER is None:
        pytest.skip("the emulator is compiled with g++, which is not on the PATH")
    return TilesEmulator(tmp_path_factory.mktemp("tiles"))


@pytest.fixture
def tiles(request: pytest.FixtureRequest) -> Iterator[TilesEmulator]:
    """The emulator without a bug; skips where the machine has not what the code around the tiles needs."""
    with instruction_set(AROUND):
        emulator: TilesEmulator = request.getfixturevalue("tiles_of_this_machine")
        emulator.start()
        yield emulator
