"""The kernels for NVIDIA GPUs: their cubins, and how they come to serve the operators. `CUDA.md` says how they work.

Everything that happens in a call is in csrc/gpu.cpp and the two files beside it: which variant, its arguments, the
launch. A variant of a kernel is a set of constants; when one is needed first, C++ asks here for its cubin, which comes
from this package (built ahead of time), from the cache, or from NVRTC, which every CUDA build of torch brings.

    python -m speechkit_kernels.cuda --arch 90 [--out FOLDER] < VARIANTS     builds ahead of time, with nvcc

where VARIANTS has a line for each, as `used` gives them.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from speechkit_kernels import build, plain

SOURCES = build.SOURCES / "cuda"
SHIPPED = build.PACKAGE / "lib"
OPERATORS = ("stream_attn", "conv_step")
OLDEST = 80

Compile = Callable[[str, str, int], bytes]
GIVE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int)
COMPILE = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, GIVE)

_used: set[str] = set()


@functools.cache
def reason(device: int = 0) -> str | None:
    """Why the kernels cannot serve a GPU, or None where they can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    if torch.version.hip:
        return "the kernel is written for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < OLDEST:
        return f"the kernel needs a GPU of compute capability 8.0 or newer, but this one has {major}.{minor}"
    try:
        _nvrtc_version()
        build.find()
    except (RuntimeError, build.BuildError) as error:  # cuda.pathfinder's errors of libraries not found are the first
        return str(error).rstrip(".")
    return None


def register() -> None:
    """Serve ``stream_attn`` and ``conv_step`` on CUDA tensors from here on, in this process.

    Raises:
        RuntimeError: they cannot, with the reason.
    """
    hindrance = reason()
    if hindrance:
        raise RuntimeError(f"the CUDA kernels must have a GPU and NVRTC to serve, but {hindrance}.")
    serve("libcuda.so.1", Path(torch.__file__).parent / "lib" / "libtorch_cuda.so", "speechkit", "CUDA")


def serve(
    driver: str | Path, torch_library: str | Path, library: str, key: str, compile: Compile | None = None
) -> None:
    """`register` with everything named: NVIDIA's driver, the library that knows torch's current stream, the operators'
    library, the dispatch key, and what makes the cubin of a kernel, its constants and an architecture (`cubin`).

    Raises:
        RuntimeError: the driver does not answer.
    """
    _define_plain()
    made = compile or cubin

    @COMPILE
    def answer(kernel: bytes, constants: bytes, arch: int, to: int, give: Any) -> None:
        try:
            content = made(kernel.decode(), constants.decode(), arch)
            give(to, content, len(content), 1)
        except Exception as error:  # nothing may be thrown through C++
            text = str(error).encode()
            give(to, text, len(text), 0)

    _kept.append(answer)
    paths = str(driver).encode(), str(torch_library).encode()
    trouble = _launcher().speechkit_cuda(*paths, answer, library.encode(), key.encode())
    if trouble:
        raise RuntimeError(f"the CUDA kernels must reach NVIDIA's driver, but: {trouble.decode()}")


_kept: list[Any] = []  # C++ calls them as long as it lives


@functools.cache
def _launcher() -> ctypes.CDLL:
    """The host library; one a process, whatever becomes of the cache."""
    library = ctypes.CDLL(str(build.find()))
    library.speechkit_cuda.restype = ctypes.c_char_p
    library.speechkit_cuda.argtypes = [ctypes.c_char_p, ctypes.c_char_p, COMPILE, ctypes.c_char_p, ctypes.c_char_p]
    return library


@functools.cache
def _define_plain() -> None:
    """Names for plain PyTorch where a kernel has taken the operator's own."""
    from speechkit_kernels.ops import LIBRARY, SCHEMAS

    for name in OPERATORS:
        LIBRARY.define(f"plain_{name}{SCHEMAS[name]}")
        LIBRARY.impl(f"plain_{name}", getattr(plain, name), "CompositeExplicitAutograd")


# ---- cubins ---------------------------------------------------------------------------------------------------------


def used() -> list[str]:
    """The variants that this process has loaded: lines of a kernel's name and its constants."""
    return sorted(_used)


def cubin(kernel: str, constants: str, arch: int) -> bytes:
    """The cubin of a variant for ``sm_<arch>``. Needs NVRTC where it was not made before, but no GPU.

    Args:
        constants: ``NAME=NUMBER`` with spaces between; the kernel's source says which.

    Raises:
        RuntimeError: what NVRTC says, or that it was not found.
    """
    _used.add(f"{kernel} {constants}")
    stem = _stem(kernel, constants, arch)
    shipped = SHIPPED / f"{stem}.cubin"
    if shipped.exists():
        return shipped.read_bytes()
    cached = build.cache_folder() / "kernels" / f"{stem}-{_nvrtc_version()}.cubin"
    if cached.exists():
        return cached.read_bytes()
    content = _compile(kernel, constants, arch)
    _write(cached, content)
    return content


def ahead_of_time(variants: list[str], archs: list[int], folder: Path) -> list[Path]:
    """Cubins by nvcc, named as `cubin` looks for them in this package's ``lib``.

    Raises:
        RuntimeError: there is no nvcc, or what it says.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("building CUDA kernels ahead of time needs nvcc, but it is not on the PATH; add it.")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for kernel, constants in (line.split(maxsplit=1) for line in variants):
        for arch in archs:
            path = folder / f"{_stem(kernel, constants, arch)}.cubin"
            options = ["-cubin", f"-arch=sm_{arch}", *_options(constants)]
            command = [nvcc, *options, str(SOURCES / f"{kernel}.cu"), "-o", str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(
                    f"{kernel}: nvcc must compile the kernel for sm_{arch}, but says: {done.stderr.strip()}"
                )
            made.append(path)
    return made


def _stem(kernel: str, constants: str, arch: int) -> str:
    """Everything that decides what a cubin does, but the compiler."""
    key = repr((_sources(kernel), constants.split(), arch)).encode()
    return f"{kernel}-sm_{arch}-{hashlib.sha256(key).hexdigest()[:32]}"


def _sources(kernel: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (SOURCES / f"{kernel}.cu", *sorted(SOURCES.glob("*.h")))}


def _options(constants: str) -> list[str]:
    return ["-std=c++17", *(f"-D{each}" for each in constants.split())]


def _compile(kernel: str, constants: str, arch: int) -> bytes:
    nvrtc = _bindings()
    (_, source), *headers = _sources(kernel).items()
    names, texts = [name.encode() for name, _ in headers], [text for _, text in headers]
    options = [option.encode() for option in (f"--gpu-architecture=sm_{arch}", *_options(constants))]
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source, kernel.encode(), len(headers), texts, names))[0]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytes(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))[0])
        _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(
            f"{kernel}: NVRTC must compile the kernel for sm_{arch}, but says: {log.decode().strip(chr(0)).strip()}"
        )
    content = bytes(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program))[0])
    _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, content))
    _checked(nvrtc, nvrtc.nvrtcDestroyProgram(program))
    return content


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, whoever else writes it; a folder that cannot be written costs a second a process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        pass


@functools.cache
def _nvrtc_version() -> str:
    nvrtc = _bindings()
    return ".".join(map(str, _checked(nvrtc, nvrtc.nvrtcVersion())))


def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise RuntimeError(
            f"the CUDA kernels need the package cuda-bindings, but it cannot be imported ({error}); install the CUDA "
            f"build of torch."
        ) from error


def _checked(module: Any, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    status, *values = answer
    if status.value:
        raise RuntimeError(f"{module.__name__} must succeed, but answers {status.name}.")
    return tuple(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", required=True, help="80, 90, 100, 120, ...")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder the cubins are put into")
    options = parser.parse_args()
    try:
        print(*ahead_of_time([line for line in sys.stdin if line.strip()], options.arch, options.out), sep="\n")
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
