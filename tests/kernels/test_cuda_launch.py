"""The Python around the CUDA kernel, as far as it runs without a GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_cases import CASES, build, case
from speechkit_kernels import cuda, plain
from torch import Tensor

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
H200 = 132 * 3  # blocks that run at a time


def copy(made: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in made.items()}


@without_gpu
def test_without_a_gpu_plain_pytorch_answers_and_one_reason_is_given() -> None:
    made = build(CASES[1])
    assert cuda.reason() == "torch finds no CUDA GPU"
    cuda.prepare(**made)
    assert torch.equal(cuda.stream_attn(**copy(made)), plain.stream_attn(**made))


def test_a_cold_variant_is_refused_during_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    made = build(CASES[0])
    call = cuda.describe(**made, out=torch.empty_like(made["q"]), limit=227 * 1024)
    assert isinstance(call, cuda.Call)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="must be loaded before a CUDA graph captures it"):
        cuda._loaded(call.variant, call.shared_bytes, 0)


@pytest.mark.parametrize(("streams", "blocks"), [(1, 1), (49, 49), (50, 25), (256, 43), (4096, 49)])
def test_blocks_all_run_at_once_and_share_the_streams_evenly(
    streams: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build(case("many", heads=8, key_heads=8, frames=1, left=3, width=16, rows=((5, 1, 1),) * streams))
    call = cuda.describe(**made, out=torch.empty_like(made["q"]), limit=227 * 1024)
    assert isinstance(call, cuda.Call)
    launched: list[tuple[Any, ...]] = []
    driver = SimpleNamespace(
        cuCtxSetCurrent=lambda context: (SimpleNamespace(value=0),),
        cuLaunchKernel=lambda *args: launched.append(args) or (SimpleNamespace(value=0),),
    )
    monkeypatch.setattr(cuda, "_bindings", lambda name: driver)
    cuda._launch(call, cuda.Loaded("function", "context", H200), 7)
    assert launched[0][:8] == ("function", blocks, 8, 1, call.variant.threads, 1, 1, call.shared_bytes)


def test_a_driver_that_fails_is_named() -> None:
    failed = SimpleNamespace(value=1, name="CUDA_ERROR_INVALID_VALUE")
    with pytest.raises(RuntimeError, match="driver must succeed, but answers CUDA_ERROR_INVALID_VALUE"):
        cuda._checked(SimpleNamespace(__name__="driver"), (failed,))


def test_strides_reach_the_kernel_in_bytes() -> None:
    made = build(case("strides", heads=2, key_heads=2, width=16, frames=3, left=4, rows=((5, 3, 3),) * 2))
    wide = torch.zeros(2, 3, 3, 2, 16, dtype=torch.bfloat16)
    made |= {"q": wide[:, :, 0], "k": wide[:, :, 1], "v": wide[:, :, 2]}
    call = cuda.describe(**made, out=torch.empty(2, 3, 2, 16, dtype=torch.bfloat16), limit=227 * 1024)
    assert isinstance(call, cuda.Call)
    k = call.args.k
    assert (k.at - wide.data_ptr(), k.batch, k.frame, k.head) == (64, 3 * 192, 192, 32)
    assert ctypes.sizeof(call.args) % 8 == 0
