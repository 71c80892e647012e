"""csrc/cuda/stream_attn.cu compiles with nvcc and with NVRTC for every architecture, within its registers."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from speechkit_kernels import cuda

NVCC = shutil.which("nvcc")
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes that a block may ask for
# dtype, width, frames, left, own position query, registers: 168 let three blocks of 128 threads share a processor
VARIANTS = {
    "bf16, 64 wide": (torch.bfloat16, 64, 16, 64, False, 168),
    "fp16, 49 wide": (torch.float16, 49, 4, 70, False, 168),
    "bf16, 128 wide, 64 frames": (torch.bfloat16, 128, 64, 256, True, 255),
    "float32, 64 wide": (torch.float32, 64, 20, 128, False, 255),
    "float32, 128 wide": (torch.float32, 128, 16, 64, False, 255),
}


PAIRS = [
    (name, arch) for name in ("bf16, 64 wide", "bf16, 128 wide, 64 frames", "float32, 128 wide") for arch in SHARED
]
REST = [(name, 90) for name in VARIANTS if all(name != n for n, _ in PAIRS)]


def variant_of(name: str, arch: int) -> tuple[cuda.Variant, int]:
    dtype, width, frames, left, q_pos, registers = VARIANTS[name]
    vec = 16 if width % 8 == 0 else dtype.itemsize
    variant = cuda.choose(dtype, width, frames, left, True, q_pos, vec, SHARED[arch])
    assert variant is not None
    return variant, registers


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, which Triton brings too."""
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton and triton.origin else None
    return shutil.which(name) or (str(beside) if beside and beside.exists() else None)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize(("name", "arch"), PAIRS)
def test_nvcc_spills_nothing_and_stays_within_the_registers(name: str, arch: int, tmp_path: Path) -> None:
    variant, registers = variant_of(name, arch)
    command = [NVCC, "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", *variant.defines()]
    made = subprocess.run(
        [*command, cuda.SOURCES / "stream_attn.cu", "-o", tmp_path / "a.cubin"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in made.stderr
    assert int(re.findall(r"Used (\d+) registers", made.stderr)[0]) <= registers


@pytest.mark.parametrize(("name", "arch"), [*PAIRS, *REST])
def test_nvrtc_compiles_to_tensor_core_instructions_and_no_local_memory(
    name: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    disassembler = tool("nvdisasm")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        cubin = cuda.compile_variant(variant_of(name, arch)[0], arch)
    except RuntimeError as error:
        if "DynamicLibNotFoundError" in type(error).__name__:
            pytest.skip("libnvrtc is not installed")
        raise
    assert cubin.startswith(b"\x7fELF")
    if disassembler is not None:
        (tmp_path / "a.cubin").write_bytes(cubin)
        text = subprocess.run([disassembler, tmp_path / "a.cubin"], capture_output=True, text=True, check=True).stdout
        assert "HMMA" in text
        assert not re.search(r"\b(STL|LDL)\b", text)


def test_a_cubin_comes_from_disk_until_the_variant_or_the_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    variant, _ = variant_of("bf16, 64 wide", 90)
    cuda.compile_variant(variant, 90)
    (made,) = cuda.cache_folder().iterdir()
    made.write_bytes(b"kept")
    assert cuda.compile_variant(variant, 90) == b"kept"
    sources = tmp_path / "sources"
    shutil.copytree(cuda.SOURCES, sources)
    (sources / "stream_attn.cu").write_text((sources / "stream_attn.cu").read_text() + "// changed\n")
    monkeypatch.setattr(cuda, "SOURCES", sources)
    assert cuda.compile_variant(variant, 90) != b"kept"


def test_a_kernel_that_does_not_compile_is_refused_in_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shutil.copy(cuda.SOURCES / "prim.h", tmp_path)
    (tmp_path / "stream_attn.cu").write_text("nonsense\n")
    monkeypatch.setattr(cuda, "SOURCES", tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)NVRTC must compile the kernel for sm_90.*nonsense"):
        cuda.compile_variant(variant_of("bf16, 64 wide", 90)[0], 90)
