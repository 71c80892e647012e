"""The CUDA kernels on a real NVIDIA GPU: the same cases as emulated, CUDA graphs, torch's own checks of an operator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cuda_conv_cases as conv
import pytest
import torch
from cuda_cases import CASES, Case, alone, answer, build, case, check
from speechkit_kernels import cuda
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.reason() is not None, reason=f"the CUDA kernels cannot run: {cuda.reason()}"),
]


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    cuda.register()


def stream_attn(**made: Any) -> Tensor:
    out: Tensor = torch.ops.speechkit.stream_attn(**made)
    return out


def conv_step(**made: Any) -> Tensor:
    out: Tensor = torch.ops.speechkit.conv_step(**made)
    return out


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
WIDE = [
    conv.Case("bf16, many rows of 1024", width=1024, qlen=tuple(b % 17 for b in range(300))),
    conv.Case("float32, 1024 wide", dtype=torch.float32, width=1024, qlen=(16, 3)),
    conv.Case("fp16, 2048 wide, 15 taps", dtype=torch.float16, width=2048, taps=15, qlen=(16, 7)),
    conv.Case("bf16, 512 wide, 31 taps, 64 frames", width=512, taps=31, frames=64, qlen=(64, 33)),
]


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda c: c.name)
def test_attention_equals_plain_pytorch(case: Case) -> None:
    for seed in range(2):
        made = build(case, seed)
        expected, exact = answer(made)
        used = on_gpu(made)
        check(case, stream_attn(**used), used, expected, exact)


@pytest.mark.parametrize("case", [*conv.CASES, *WIDE], ids=lambda c: c.name)
def test_the_convolution_equals_plain_pytorch(case: conv.Case) -> None:
    for seed in range(2):
        made = conv.build(case, seed)
        expected, memory = conv.answer(made)
        used = on_gpu(made)
        conv.check(case, conv_step(**used), used["cache"], expected, memory)


def test_a_stream_gives_the_same_bits_alone() -> None:
    made = build(LARGE[0])
    singles = {b: on_gpu(alone(made, b)) for b in (16, 33, 499)}
    together = stream_attn(**on_gpu(made))
    for b, single in singles.items():
        assert torch.equal(stream_attn(**single)[0], together[b])
    rows = conv.build(WIDE[0])
    each = {b: on_gpu(conv.alone(rows, b)) for b in (16, 33, 299)}
    convolved = conv_step(**on_gpu(rows))
    for b, single in each.items():
        assert torch.equal(conv_step(**single)[0], convolved[b])


def test_a_convolution_gives_the_same_bits_in_calls_of_any_size() -> None:
    made = on_gpu(conv.build(replace(conv.CASES[0], width=512, frames=40, qlen=(40,))))
    whole, first = conv_step(**conv.copied(made)), conv.copied(made)
    for size in (1, 3, 16, 39):
        own, outs = conv.copied(first), []
        for part in own["x"].split(size, dim=1):
            length = torch.tensor([part.shape[1]], device="cuda")
            outs.append(conv_step(**own | {"x": part.contiguous(), "qlen": length}))
        assert torch.equal(torch.cat(outs, 1), whole)


def test_a_graph_replayed_for_a_hundred_steps_equals_eager() -> None:
    """One graph; slots, positions and lengths change between its replays."""
    shape = case("graph", left=40, rows=((0, 16, 16),) * 4, slack=3)
    held = on_gpu(build(shape))
    memory = torch.zeros(len(held["cache"]), 8, 2 * 64, dtype=torch.bfloat16, device="cuda")
    filters = torch.randn(2 * 64, 9, dtype=torch.bfloat16, device="cuda")

    def step(call: dict[str, Any], memory: Tensor) -> Tensor:
        out = stream_attn(**call).flatten(2)
        return conv_step(
            x=out, weight=filters, bias=None, cache=memory, slots=call["slots"], qlen=call["qlen"], gated=False
        )

    eager, other = {n: x.clone() if isinstance(x, Tensor) else x for n, x in held.items()}, memory.clone()
    held["qlen"].zero_()
    step(held, memory)  # loads the variants, and moves no stream on
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(held, memory)
    position = torch.zeros(held["cache"].shape[0], dtype=held["pos"].dtype, device="cuda")
    for turn in range(100):
        torch.manual_seed(turn)
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
        assert torch.equal(out, step(eager, other))
        position[slots.long()] += qlen
    assert torch.equal(memory, other)
    torch.testing.assert_close(held["cache"], eager["cache"], rtol=0, atol=0, equal_nan=True)


def test_a_capture_with_a_cold_variant_is_refused() -> None:
    cold = on_gpu(build(case("cold", width=24, left=11, frames=3, rows=((0, 3, 3),))))
    with (
        pytest.raises(RuntimeError, match="must be loaded before a CUDA graph captures it"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        stream_attn(**cold)


def test_a_call_waits_for_nothing() -> None:
    """With the device's own check of it."""
    made, other = on_gpu(build(CASES[0])), on_gpu(conv.build(conv.CASES[0]))
    stream_attn(**made), conv_step(**other)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream_attn(**made), conv_step(**other)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_the_kernels_do_not_serve_goes_to_plain_pytorch() -> None:
    made = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in build(CASES[0]).items()}
    expected, _ = answer(made)
    torch.testing.assert_close(stream_attn(**on_gpu(made)).cpu(), expected)


def test_the_operators_pass_torchs_checks() -> None:
    made = on_gpu(build(case("checked", rows=((0, 16, 16), (20, 16, 16)))))
    made["cache"].nan_to_num_()
    tensors = [made.pop(n) for n in ("q", "k", "v", "cache", "slots", "pos", "qlen")]
    torch.library.opcheck(torch.ops.speechkit.stream_attn.default, tensors, made)
    rows = {n: x.nan_to_num() if isinstance(x, Tensor) else x for n, x in on_gpu(conv.build(conv.CASES[0])).items()}
    tensors = [rows.pop(n) for n in ("x", "weight", "bias", "cache", "slots", "qlen")]
    torch.library.opcheck(torch.ops.speechkit.conv_step.default, tensors, rows)
