"""Linear maps of streams: rounded weights, and a frame's result whoever else is in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import node, sound, tiny
from torch import Tensor, nn

import speechkit
from speechkit import kernels
from speechkit.layers import Linear, shrink
from speechkit.pretrained import save
from speechkit.testing import Utterances, run_stream


def made(inputs: int = 20, outputs: int = 30, seed: int = 0) -> Linear:
    torch.manual_seed(seed)
    return Linear(inputs, outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_rounded_weights_stream_what_they_encode(dtype: torch.dtype, path: bool) -> None:
    encoder = tiny().encoder
    shrink(encoder, dtype)
    x, context = torch.randn(2, 128, 16), encoder.context
    lengths = torch.tensor([128, 100])
    with torch.no_grad():
        whole = encoder(x, lengths)
        frames, counts, _ = run_stream(encoder, Utterances(x, lengths), context, pause=0.3)
    assert counts.tolist() == whole.lengths.tolist()
    for b, n in enumerate(counts.tolist()):
        torch.testing.assert_close(frames[b, :n], whole.frames[b, :n], atol=1e-4, rtol=1e-4)


@pytest.fixture(params=[True, False], ids=["operator", "pytorch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(kernels, "serves", lambda operator, like: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@torch.no_grad()
def test_a_map_is_the_product_with_its_rounded_weight(dtype: torch.dtype, path: bool) -> None:
    linear, x = made(), torch.randn(3, 5, 20)
    weight = linear.weight.clone()
    if dtype != torch.float32:
        shrink(linear, dtype)
    step = weight.abs().amax(1, keepdim=True) / 127
    rounded = weight.to(dtype).float() if dtype != torch.int8 else (weight / step).round() * step
    torch.testing.assert_close(linear(x), x @ rounded.T + linear.bias, atol=1e-5, rtol=1e-5)
    assert linear.weight.dtype == dtype
    assert (rounded - weight).abs().le({torch.int8: step / 2, torch.bfloat16: weight.abs() / 256}.get(dtype, 0)).all()


@torch.no_grad()
def test_a_row_of_zeros_stays_one() -> None:
    linear = made()
    linear.weight[3] = 0
    shrink(linear, torch.int8)
    assert torch.equal(linear(torch.randn(1, 2, 20))[..., 3], linear.bias[3].expand(1, 2))


@torch.no_grad()
def test_a_frame_is_the_same_bits_whoever_else_is_in_the_batch() -> None:
    linear, x = made(96, 130), torch.randn(9, 16, 96)
    if not kernels.serves("linear_step", x):
        pytest.skip(kernels.explain())
    together = linear(x)
    assert all(torch.equal(linear(x[b : b + 1]), together[b : b + 1]) for b in range(9))
    assert all(torch.equal(linear(x[:, u : u + 1]), together[:, u : u + 1]) for u in range(16))


def test_gradients_and_other_types_take_the_way_of_pytorch(path: bool) -> None:
    linear, x = made(), torch.randn(2, 3, 20, requires_grad=True)
    expected = nn.functional.linear(x, linear.weight, linear.bias)
    assert torch.equal(linear(x), expected)
    linear(x).sum().backward()
    assert linear.weight.grad is not None
    with torch.no_grad():
        double = linear.double()(x.double())
    torch.testing.assert_close(double, expected.double(), atol=1e-6, rtol=1e-5)


def test_weights_are_rounded_once_and_to_what_there_is() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"from torch.float32 to torch.float16; load the model anew"):
        shrink(model, torch.float16)
    shrink(model, torch.int8)
    with pytest.raises(ValueError, match=r"goes from torch.int8 to torch.bfloat16; load the model anew"):
        shrink(model, torch.bfloat16)


def test_a_model_is_loaded_with_rounded_weights_and_not_saved_with_them(tmp_path: Path) -> None:
    save(tiny(), node(), tmp_path / "model")
    clip = sound(3.0)
    lengths = torch.tensor([len(clip)])

    @torch.no_grad()
    def frames(dtype: torch.dtype) -> Tensor:
        return speechkit.load(tmp_path / "model", weights=dtype).encode(clip[None], lengths).frames

    exact = frames(torch.float32)
    errors = [float((frames(dtype) - exact).norm() / exact.norm()) for dtype in (torch.bfloat16, torch.int8)]
    assert 0 < errors[0] < 0.02 and 0 < errors[1] < 0.05
    shrunk = speechkit.load(tmp_path / "model", weights=torch.int8)
    with pytest.raises(ValueError, match="save the model before it is shrunk"):
        save(shrunk, node(), tmp_path / "model")
    assert torch.equal(frames(torch.float32), exact)
