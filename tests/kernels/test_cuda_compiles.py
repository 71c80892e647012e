"""The CUDA kernels compile with nvcc and with NVRTC for every architecture, within their registers."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_conv_cases as conv
import pytest
import torch
from cuda_cases import build, case
from cuda_emulator import Emulator
from speechkit_kernels import cuda

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes that a block may ask for
B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def attention(dtype: torch.dtype, width: int, frames: int, left: int, options: str = "rel bias_u bias_v") -> tuple:
    one = case("one", options, dtype=dtype, width=width, frames=frames, left=left, rows=((left, frames, frames),))
    return "stream_attn", build(one)


def convolution(dtype: torch.dtype, width: int, taps: int, frames: int, norm: bool = True) -> tuple:
    one = conv.Case("one", dtype=dtype, width=width, taps=taps, frames=frames, qlen=(frames,), norm=norm)
    return "conv_step", conv.build(one)


# A call, and the most registers: 168 let three blocks of 128 threads share a processor, 128 one of 512
CALLS = {
    "bf16, 64 wide": (attention(B16, 64, 16, 64), 168),
    "bf16, 128 wide, 64 frames": (attention(B16, 128, 64, 256, "rel q_pos bias_u bias_v"), 255),
    "float32, 128 wide": (attention(F32, 128, 16, 64), 255),
    "conv, bf16, 1024 wide, 9 taps": (convolution(B16, 1024, 9, 16), 128),
    "conv, float32, 1024 wide, 9 taps": (convolution(F32, 1024, 9, 16), 64),
    "conv, bf16, 512 wide, 31 taps": (convolution(B16, 512, 31, 16), 255),
    "fp16, 49 wide": (attention(F16, 49, 4, 70), 168),
    "float32, 64 wide": (attention(F32, 64, 20, 128), 255),
    "conv, fp16, 2048 wide, 15 taps": (convolution(F16, 2048, 15, 2), 128),
    "conv, float32, 256 wide, 31 taps, no norm": (convolution(F32, 256, 31, 16, norm=False), 255),
    "conv, bf16, 144 wide, 31 taps, one frame": (convolution(B16, 144, 31, 1), 255),
}
BOTH = ("bf16, 64 wide", "conv, bf16, 1024 wide, 9 taps")  # on every architecture, the rest on one
PAIRS = [(name, arch) for name in CALLS for arch in SHARED if arch == 90 or name in BOTH]


def variant_of(name: str, arch: int, emulator: Emulator) -> tuple[str, str, int]:
    """Kernel, constants and most registers of what the launcher chooses on a GPU of this architecture."""
    (operator, arguments), registers = CALLS[name]
    emulator.start(idle=1, arch=arch, shared_bytes=SHARED[arch])
    getattr(torch.ops.speechkit_emulated, operator)(**arguments)
    kernel, constants = emulator.asked[0].split(maxsplit=1)
    return kernel, constants, registers


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, which Triton brings too."""
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton and triton.origin else None
    return shutil.which(name) or (str(beside) if beside and beside.exists() else None)


@needs_nvcc
@pytest.mark.parametrize(("name", "arch"), PAIRS)
def test_nvcc_spills_nothing_and_stays_within_the_registers(
    name: str, arch: int, emulator: Emulator, tmp_path: Path
) -> None:
    kernel, constants, registers = variant_of(name, arch, emulator)
    command = [
        NVCC,
        "-std=c++17",
        f"-arch=sm_{arch}",
        "-cubin",
        "-Xptxas",
        "-v",
        *(f"-D{c}" for c in constants.split()),
    ]
    made = subprocess.run(
        [*command, cuda.SOURCES / f"{kernel}.cu", "-o", tmp_path / "a.cubin"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in made.stderr
    assert int(re.findall(r"Used (\d+) registers", made.stderr)[0]) <= registers


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and NVRTC."""
    monkeypatch.setenv("SPEECHKIT_CACHE", str(tmp_path))
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    try:
        cuda._nvrtc_version()
    except RuntimeError as error:
        pytest.skip(f"libnvrtc is not installed: {error}")
    return tmp_path / "kernels"


@pytest.mark.parametrize(("name", "arch"), [(name, arch) for name in BOTH for arch in (80, 90)])
def test_nvrtc_compiles_to_no_local_memory_and_attention_to_tensor_core_instructions(
    name: str, arch: int, emulator: Emulator, cached: Path
) -> None:
    kernel, constants, _ = variant_of(name, arch, emulator)
    cubin = cuda.cubin(kernel, constants, arch)
    assert cubin.startswith(b"\x7fELF")
    disassembler = tool("nvdisasm")
    if disassembler is not None:
        (cached / "a.cubin").write_bytes(cubin)
        text = subprocess.run([disassembler, cached / "a.cubin"], capture_output=True, text=True, check=True).stdout
        assert kernel != "stream_attn" or "HMMA" in text
        assert not re.search(r"\b(STL|LDL)\b", text)


SMALL = "TYPE=1 TAPS=3 GATED=1 NORM=0 EACH=2 FRAMES=1 THREADS=32"


def test_a_cubin_comes_from_disk_until_the_variant_or_a_source_changes(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.cubin("conv_step", SMALL, 90)
    (made,) = cached.iterdir()
    made.write_bytes(b"kept")
    assert cuda.cubin("conv_step", SMALL, 90) == b"kept"
    assert f"conv_step {SMALL}" in cuda.used()
    assert cuda.cubin("conv_step", SMALL.replace("TAPS=3", "TAPS=4"), 90) != b"kept"
    sources = shutil.copytree(cuda.SOURCES, tmp_path / "sources")
    (sources / "common.h").write_text((sources / "common.h").read_text() + "// changed\n")
    monkeypatch.setattr(cuda, "SOURCES", sources)
    assert cuda.cubin("conv_step", SMALL, 90) != b"kept"


def test_a_kernel_that_does_not_compile_is_refused_in_the_compilers_words(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = shutil.copytree(cuda.SOURCES, tmp_path / "sources")
    (sources / "conv_step.cu").write_text("nonsense\n")
    monkeypatch.setattr(cuda, "SOURCES", sources)
    with pytest.raises(RuntimeError, match=r"(?s)NVRTC must compile the kernel for sm_90.*nonsense"):
        cuda.cubin("conv_step", SMALL, 90)


@needs_nvcc
def test_what_nvcc_made_ahead_of_time_is_taken_before_nvrtc(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "speechkit_kernels.cuda", "--arch", "80", "90", "--out", str(tmp_path / "lib")]
    done = subprocess.run(command, input=f"conv_step {SMALL}\n", capture_output=True, text=True, check=True)
    made = [Path(line) for line in done.stdout.split()]
    assert [path.read_bytes()[:4] for path in made] == [b"\x7fELF"] * 2
    monkeypatch.setattr(cuda, "SHIPPED", tmp_path / "lib")
    assert cuda.cubin("conv_step", SMALL, 90) == made[1].read_bytes()
    assert not cached.exists()


def test_without_nvcc_building_ahead_of_time_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="needs nvcc, but it is not on the PATH"):
        cuda.ahead_of_time([f"conv_step {SMALL}"], [90], tmp_path)
