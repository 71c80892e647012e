"""How a call reaches the driver: emulated, so that it is told without a GPU what would reach a real one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cuda_conv_cases as conv
import pytest
import test_conv_step
import test_stream_attn
import torch
from cuda_cases import CASES, answer, build, case, check
from cuda_emulator import SMALL, Emulator
from speechkit_kernels import build as library
from speechkit_kernels import cuda
from torch import Tensor

STREAM = 0x5000  # what the emulated driver says is torch's current one
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@pytest.fixture
def gpu(emulator: Emulator) -> Emulator:
    emulator.start(idle=1)
    return emulator


def attend(made: dict[str, Any]) -> Tensor:
    out: Tensor = torch.ops.speechkit_emulated.stream_attn(**made)
    return out


@without_gpu
def test_without_a_gpu_one_reason_is_given_and_asking_for_the_kernels_is_an_error() -> None:
    assert cuda.reason() == "torch finds no CUDA GPU"
    with pytest.raises(RuntimeError, match="must have a GPU and NVRTC to serve, but torch finds no CUDA GPU"):
        cuda.register()


def test_a_launch_goes_to_torchs_stream_with_what_its_variant_needs(gpu: Emulator) -> None:
    attend(build(CASES[0]))
    machine = gpu.machine
    constants = dict(each.split("=") for each in gpu.asked[0].split()[1:])
    warps = int(constants["ROW_WARPS"]) * int(constants["KEY_WARPS"])
    assert (machine.stream, machine.threads) == (STREAM, 32 * warps)
    assert 48 * 1024 < machine.asked_bytes <= machine.shared_bytes


def test_a_variant_is_loaded_once_and_another_one_anew(gpu: Emulator) -> None:
    for made in (build(CASES[0]), build(CASES[0], 1), build(CASES[5]), build(CASES[0])):
        attend(made)
    assert (gpu.machine.launches, gpu.machine.loads) == (4, 2)


def test_a_smaller_gpu_gets_a_smaller_variant(gpu: Emulator) -> None:
    made = build(case("long", width=128, left=290, heads=1, key_heads=1, rows=((1000, 16, 16),)))
    attend(made)
    gpu.start(idle=1, shared_bytes=SMALL)
    attend(made)
    assert gpu.machine.asked_bytes <= SMALL


@pytest.mark.parametrize(("streams", "blocks"), [(1, 1), (49, 49), (50, 25), (256, 43), (4096, 49)])
def test_blocks_all_run_at_once_and_share_the_streams_evenly(streams: int, blocks: int, gpu: Emulator) -> None:
    gpu.start(idle=1, processors=132, blocks=3)
    attend(build(case("many", heads=8, key_heads=8, frames=1, left=3, width=16, rows=((5, 1, 1),) * streams)))
    assert list(gpu.machine.grid) == [blocks, 8, 1]


def test_a_row_of_conv_step_is_a_block_and_without_a_norm_several(gpu: Emulator) -> None:
    for norm, grid in ((True, [2, 1, 1]), (False, [2, 3, 1])):
        made = conv.build(conv.Case("grid", width=600, frames=1, qlen=(1, 1), norm=norm))
        torch.ops.speechkit_emulated.conv_step(**made)
        assert list(gpu.machine.grid) == grid


def test_rows_may_be_parts_of_wider_tensors(emulator: Emulator) -> None:
    emulator.start(unchecked=1)
    made = build(case("strides", width=16, frames=3, left=4, rows=((5, 3, 3), (9, 2, 2))))
    expected, exact = answer(made)
    together = torch.stack([made["q"], made["k"], made["v"]], 2)
    memory = torch.stack([made["cache"], made["cache"]], 3)
    moved = made | {name: together[:, :, i] for i, name in enumerate("qkv")} | {"cache": memory[:, :, :, 1]}
    check(case("strides"), attend(moved), moved, expected, exact)
    torch.testing.assert_close(memory[:, :, :, 0], made["cache"], rtol=0, atol=0, equal_nan=True)

    wide = conv.build(conv.CASES[0])
    result, remembered = conv.answer(wide)
    x, cache = torch.stack([wide["x"]] * 3, 2), torch.stack([wide["cache"]] * 2, 1)
    out = torch.ops.speechkit_emulated.conv_step(**wide | {"x": x[:, :, 1], "cache": cache[:, 1]})
    conv.check(conv.CASES[0], out, cache[:, 1], result, remembered)


def test_nothing_is_launched_for_an_empty_call(gpu: Emulator) -> None:
    made = build(CASES[0])
    empty = {n: x[:0] if n in ("q", "k", "v", "slots", "pos", "qlen") else x for n, x in made.items()}
    assert attend(empty).shape == (0, 16, 2, 64)
    none = conv.build(conv.Case("none", frames=0, qlen=(0, 0)))
    assert torch.ops.speechkit_emulated.conv_step(**none).shape == (2, 0, 64)
    assert gpu.machine.launches == 0


def test_a_capture_is_refused_a_variant_that_is_not_loaded_and_given_one_that_is(gpu: Emulator) -> None:
    made = build(CASES[0])
    gpu.machine.capturing = 1
    with pytest.raises(RuntimeError, match=r"must be loaded before a CUDA graph captures it.*run the step once before"):
        attend(made)
    gpu.machine.capturing = 0
    attend(made)
    gpu.machine.capturing = 1
    attend(made)
    assert gpu.machine.launches == 2


def test_threads_may_come_at_the_same_time(gpu: Emulator) -> None:
    """The compiler takes Python's lock, which must not be waited for by who holds the launcher's."""
    cases = [build(each) for each in CASES[:6]] * 2
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(attend, cases))) == 12
    assert (
        len(set(gpu.asked)) == 3
    )  # variants; a machine of fewer cores has each loaded once, others some of them again


def test_what_the_compiler_says_is_the_error(gpu: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kernel: str, constants: str, arch: int) -> bytes:
        raise RuntimeError(f"{kernel} cannot be had for sm_{arch}.")

    monkeypatch.setattr(gpu, "compile", refuse)
    gpu.start(idle=1, arch=86)
    with pytest.raises(RuntimeError, match=r"^stream_attn cannot be had for sm_86\.$"):
        attend(build(CASES[0]))


def test_a_driver_that_fails_is_quoted(emulator: Emulator) -> None:
    emulator.start(blocks=1)
    made = build(CASES[0])
    with pytest.raises(
        RuntimeError, match="cuLaunchKernel must succeed, but answers a global store outside the tensors"
    ):
        emulator.call("stream_attn", made | {"q": made["q"].clone()}, ())  # the ring may not be written


def test_a_driver_that_is_not_there_is_named(emulator: Emulator, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"must reach NVIDIA's driver, but: .*nowhere\.so"):
        cuda.serve(tmp_path / "nowhere.so", emulator.driver, "speechkit_emulated", "CPU")
    emulator.start()


@pytest.mark.parametrize("name", test_stream_attn.BAD)
def test_a_wrong_argument_of_stream_attn_is_named(name: str, gpu: Emulator) -> None:
    with pytest.raises(ValueError, match=rf"^stream_attn: .*{name}"):
        attend(test_stream_attn.BAD[name](test_stream_attn.make()))
    assert gpu.machine.launches == 0


@pytest.mark.parametrize("change, sentence", test_conv_step.BAD.values(), ids=test_conv_step.BAD)
def test_a_wrong_argument_of_conv_step_is_named(change: dict[str, Any], sentence: str, gpu: Emulator) -> None:
    with pytest.raises(ValueError, match=f"^conv_step: {sentence}"):
        torch.ops.speechkit_emulated.conv_step(**test_conv_step._call(**change))
    assert gpu.machine.launches == 0


def test_the_drivers_numbers_are_nvidias() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    text = (library.SOURCES / "gpu.cpp").read_text()
    attribute = driver.CUdevice_attribute
    numbers = {
        "PROCESSORS": attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        "MAJOR": attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        "MINOR": attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        "SHARED_BYTES": attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        "DYNAMIC_SHARED_BYTES": driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
    }
    for name, number in numbers.items():
        assert f"{name} = {number.value}" in text
