"""Builds the one host library of this package from ``csrc/``, with whatever C++ compiler is at hand.

    python -m speechkit_kernels.build [--out FOLDER]

The sources use torch's stable ABI alone, a C interface that later releases keep: what is built once, against the
headers of any torch from 2.10 on, loads in all of them. No CUDA compiler is needed, and no part of CPython is used.

Environment: ``SPEECHKIT_CACHE`` is the folder for what is built (``~/.cache/speechkit`` unless given), ``CXX`` the
compiler, ``SPEECHKIT_NO_JIT=1`` forbids building at run time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGE = Path(__file__).parent
SOURCES = PACKAGE / "csrc"
STABLE_ABI = "0x020a000000000000"  # torch 2.10: the first with parallel loops and typed data pointers

# -fno-math-errno and -fno-trapping-math change no value, NaN and infinity included; they let sqrt and comparisons be
# vectorised. Hidden symbols keep our names out of the way of every other library in the process.
FLAGS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math"),
    *("-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"),
)
LINK = ("-shared", "-ltorch_cpu", "-ldl")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c")
X86_64 = {
    "amx": (*AVX512, "-mavx512bf16", "-DSPEECHKIT_TILES"),  # whose instructions are written out: no option is needed
    "avx512bf16": (*AVX512, "-mavx512bf16"),
    "avx512": AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
ISAS: dict[str, tuple[str, ...]] = X86_64 if platform.machine() in ("x86_64", "AMD64") else {"portable": ()}


def isas(operator: str) -> list[str]:
    """The instruction sets an operator is compiled for, best first: tiles (AMX) multiply attention's bfloat16 alone."""
    return [isa for isa in ISAS if isa != "amx" or operator == "stream_attn"]


class Unit(NamedTuple):
    """One run of the compiler: a source, and the instruction set it is compiled for ('' for the baseline's, once)."""

    source: str
    isa: str = ""

    def arguments(self) -> list[str]:
        """Everything but what to read and write."""
        own = [f"-DSPEECHKIT_ISA={self.isa}", *ISAS[self.isa]] if self.isa else []
        known = ISAS if self.source == "library.cpp" else isas(self.source.split(".")[0].removesuffix("_op"))
        return [*FLAGS, "-DSPEECHKIT_ISAS(X)=" + " ".join(f"X({isa})" for isa in known), *own]


# A source compiled once per ISA puts all it defines into the namespace SPEECHKIT_ISA and includes no header with inline
# code of torch's or of the C++ library's: a linker keeps one copy of such code, and if that were the AVX-512 copy, a
# machine without AVX-512 would die in it.
UNITS = (
    Unit("library.cpp"),
    Unit("conv_step_op.cpp"),
    *(Unit("conv_step.cpp", isa) for isa in isas("conv_step")),
    Unit("stream_attn_op.cpp"),
    *(Unit("stream_attn.cpp", isa) for isa in isas("stream_attn")),
    Unit("linear_step_op.cpp"),
    *(Unit(f"linear_step{form}.cpp", isa) for form in ("", "_packed") for isa in isas("linear_step")),
    Unit("subsample_step_op.cpp"),
    *(Unit("subsample_step.cpp", isa) for isa in isas("subsample_step")),
    Unit("gpu.cpp"),
    Unit("conv_step_gpu.cpp"),
    Unit("stream_attn_gpu.cpp"),
)


class BuildError(Exception):
    """There is no library; the message is one sentence that ends with the remedy."""


def find() -> Path:
    """The library: shipped in the package, or in the cache, or built now.

    Raises:
        BuildError: there is none, and it cannot or may not be built.
    """
    if sys.platform != "linux":
        raise BuildError(f"compiled CPU kernels exist for Linux, but this is {sys.platform}; run there to have them.")
    stem = f"speechkit-{sources_hash()}-"
    shipped = sorted((PACKAGE / "lib").glob(f"{stem}*.so"))
    if shipped:
        return shipped[0]
    cached = cache_folder() / "kernels"
    command = compiler()
    if command is None:  # perhaps built ahead of time, as in an image without a compiler
        ready = sorted(cached.glob(f"{stem}*.so"))
        if ready:
            return ready[0]
        raise BuildError(
            "no C++ compiler was found to build the CPU kernels; install g++ or clang++, or name one in CXX."
        )
    path = cached / library_name(command)
    if not path.exists() and os.environ.get("SPEECHKIT_NO_JIT", "0") not in ("", "0"):
        raise BuildError(
            "SPEECHKIT_NO_JIT forbids building the CPU kernels at run time and none are built; "
            "run `python -m speechkit_kernels.build`, or unset it."
        )
    return path if path.exists() else build(cached, command)


def build(folder: Path, command: list[str]) -> Path:
    """Compiles and links the library into ``folder``, unless another process does so first.

    Raises:
        BuildError: the compiler refused, or the folder cannot be written.
    """
    path = folder / library_name(command)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"), tempfile.TemporaryDirectory(dir=folder) as scratch:
            if not path.exists():
                print(f"speechkit: building the CPU kernels into {folder} ...", end="", file=sys.stderr, flush=True)
                start = time.perf_counter()
                try:
                    _compile(command, Path(scratch), log=path.with_suffix(".log")).replace(path)
                finally:
                    print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr)
    except OSError as error:
        raise BuildError(
            f"the CPU kernels cannot be built in {folder}: {error}; name another folder in SPEECHKIT_CACHE."
        ) from error
    return path


def cache_folder() -> Path:
    """Where compiled things are kept between processes."""
    given = os.environ.get("SPEECHKIT_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speechkit"


def library_name(command: list[str]) -> str:
    """``speechkit-<hash of what is compiled>-<hash of what compiles it>.so``."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return f"speechkit-{sources_hash()}-{_short_hash(' '.join(command) + version)}.so"


@cache
def sources_hash() -> str:
    """Of all that decides what the library does: sources, flags, processor family, stable ABI."""
    units = "\n".join(" ".join([unit.source, *unit.arguments()]) for unit in UNITS)
    texts = [f"{path.name}\n{path.read_text()}" for path in sorted([*SOURCES.glob("*.*"), SOURCES / "cuda" / "args.h"])]
    return _short_hash("\n".join([platform.machine(), *LINK, units, *texts]))


def compiler() -> list[str] | None:
    """The command of the C++ compiler: ``CXX``, or the first of c++, g++, clang++ on the PATH."""
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    return None


def _compile(command: list[str], scratch: Path, log: Path) -> Path:
    torch_folder = Path(torch.__file__).parent
    objects = [scratch / f"{i}.o" for i in range(len(UNITS))]
    library = scratch / "library.so"
    log.unlink(missing_ok=True)
    jobs = [
        [
            *command,
            *unit.arguments(),
            "-isystem",
            f"{torch_folder}/include",
            "-c",
            f"{SOURCES / unit.source}",
            "-o",
            f"{o}",
        ]
        for unit, o in zip(UNITS, objects, strict=True)
    ]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda job: _run(job, log), jobs))
    _run([*command, *map(str, objects), f"-L{torch_folder}/lib", *LINK, "-o", str(library)], log)
    return library


def _run(job: list[str], log: Path) -> None:
    done = subprocess.run(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        with log.open("a") as file:
            file.write(f"{shlex.join(job)}\n\n{done.stdout}\n")
        raise BuildError(
            f"the C++ compiler {job[0]} could not build the CPU kernels; what it said is in {log}; "
            f"name another compiler in CXX, or silence this with SPEECHKIT_KERNELS=off."
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # Linux

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, however this process ends
        yield


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=cache_folder() / "kernels", help="folder the library is put into")
    command = compiler()
    if command is None:
        sys.exit("no C++ compiler was found; install g++ or clang++, or name one in CXX.")
    try:
        print(build(parser.parse_args().out, command))
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
