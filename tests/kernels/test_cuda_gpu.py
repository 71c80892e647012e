"""stream_attn on a real NVIDIA GPU: the same cases as emulated, CUDA graphs, torch's own checks of an operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_cases import CASES, Case, alone, answer, build, case, check
from speechkit_kernels import cuda
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.reason() is not None, reason=f"the CUDA kernel cannot run: {cuda.reason()}"),
]
stream_attn = cuda.stream_attn


def on_gpu(made: dict[str, Any]) -> dict[str, Any]:
    """On the GPU, each tensor as far from alignment as it was."""
    return {name: _moved(x) if isinstance(x, Tensor) else x for name, x in made.items()}


def _moved(x: Tensor) -> Tensor:
    storage = x.new_empty(0, device="cuda").set_(x.untyped_storage().cuda())  # type: ignore[call-overload]
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


LARGE = [
    case("many streams", left=64, heads=8, key_heads=8, rows=tuple((7 * b, b % 17, b % 17) for b in range(500))),
    case("many streams, long memory, float32", dtype=torch.float32, left=256, heads=4, key_heads=2,
         rows=tuple((31 * b, 16, b % 17) for b in range(100))),
    case("wide heads, 64 frames", "rel q_pos bias_u", width=128, frames=64, left=200,
         rows=((64, 64, 64), (900, 60, 3))),
]  # fmt: skip


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda c: c.name)
def test_the_kernel_equals_plain_pytorch(case: Case) -> None:
    for seed in range(2):
        made = build(case, seed)
        expected, exact = answer(made)
        used = on_gpu(made)
        check(case, stream_attn(**used), used, expected, exact)


def test_a_stream_gives_the_same_bits_alone() -> None:
    made = build(LARGE[0])
    singles = {b: on_gpu(alone(made, b)) for b in (16, 33, 499)}
    together = stream_attn(**on_gpu(made))
    for b, single in singles.items():
        assert torch.equal(stream_attn(**single)[0], together[b])


def test_a_graph_replayed_for_a_hundred_steps_equals_eager() -> None:
    """One graph; slots, positions and lengths change between its replays."""
    shape = case("graph", left=40, rows=((0, 16, 16),) * 4, slack=3)
    held = on_gpu(build(shape))
    eager = {n: x.clone() if isinstance(x, Tensor) else x for n, x in held.items()}
    cuda.prepare(**held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stream_attn(**held)
    position = torch.zeros(held["cache"].shape[0], dtype=held["pos"].dtype, device="cuda")
    for step in range(100):
        torch.manual_seed(step)
        slots = torch.randperm(held["cache"].shape[0], device="cuda")[:4].to(held["slots"].dtype)
        qlen = torch.randint(0, 17, (4,), device="cuda").to(held["qlen"].dtype)
        fresh = {n: torch.randn_like(held[n]) for n in ("q", "k", "v")} | {
            "slots": slots,
            "pos": position[slots.long()],
            "qlen": qlen,
        }
        for name, value in fresh.items():
            held[name].copy_(value)
            eager[name].copy_(value)
        graph.replay()
        assert torch.equal(out, stream_attn(**eager))
        position[slots.long()] += qlen
    torch.testing.assert_close(held["cache"], eager["cache"], rtol=0, atol=0, equal_nan=True)


def test_a_capture_with_a_cold_variant_is_refused() -> None:
    cold = on_gpu(build(case("cold", width=24, left=11, frames=3, rows=((0, 3, 3),))))
    with (
        pytest.raises(RuntimeError, match="must be loaded before a CUDA graph captures it"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        stream_attn(**cold)


@pytest.fixture
def registered() -> Iterator[None]:
    cuda.register()
    yield


def test_the_operator_passes_torchs_checks(registered: None) -> None:
    made = on_gpu(build(case("checked", rows=((0, 16, 16), (20, 16, 16)))))
    made["cache"].nan_to_num_()
    tensors = [made.pop(n) for n in ("q", "k", "v", "cache", "slots", "pos", "qlen")]
    torch.library.opcheck(torch.ops.speechkit.stream_attn.default, tensors, made)
