"""Keys in a ring: the fused operator and ordinary PyTorch remember the same, and may take turns on one stream."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from speechkit import kernels
from speechkit.attention import AbsoluteKey, Alibi, RelativePosition, Rotary, ScoreTerm, Softmax
from speechkit.attention.patterns import Dilated
from speechkit.attention.ring import Ring
from speechkit.stream import Context, Span

CONTEXT = Context(left=6, chunk=4)
TERMS = [ScoreTerm, RelativePosition, AbsoluteKey, Alibi, Rotary]


def attention(term: type[ScoreTerm] = RelativePosition, **options) -> Softmax:
    torch.manual_seed(0)
    softmax = Softmax(dim=24, heads=4, position=term, **options)
    with torch.no_grad():
        for parameter in softmax.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return softmax.eval()


def hear(softmax: Softmax, paths: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Ring]:
    """Two streams, one of which pauses, each call by the path of its letter; the outputs and the last ring."""
    x = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(1))
    state, start, outs = softmax.init_state(2, CONTEXT), torch.tensor([0, 0]), []
    for call, path in enumerate(paths):
        monkeypatch.setattr(kernels, "serves", lambda *_, path=path: path == "f")
        lengths = torch.tensor([4, 0 if call % 3 == 1 else 4])
        rows = torch.stack([row[int(t) : int(t) + 4] for row, t in zip(x, start, strict=True)])
        y, state = softmax(rows, Span(start, lengths, CONTEXT), state)
        outs.append(torch.where(lengths[:, None, None] > 0, y, 0))
        start = start + lengths
    return torch.stack(outs), state


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_operator_and_pytorch_may_take_turns_on_one_stream(
    term: type[ScoreTerm], kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if term is AbsoluteKey and kv_heads == 2:
        pytest.skip("absolute keys have a head each")
    softmax = attention(term, kv_heads=kv_heads)
    expected, ring = hear(softmax, "pppppppp", monkeypatch)
    for paths in ("ffffffff", "fpfpppff", "pfpfffpp"):
        found, other = hear(softmax, paths, monkeypatch)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(other, ring, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_ring_keeps_what_is_written_however_long_the_call() -> None:
    """Against a list of all frames a stream has had."""
    generator = torch.Generator().manual_seed(2)
    ring, start = Ring(torch.full((2, 2, 1, 5, 3), torch.nan)), torch.tensor([0, 0])
    had: list[list[Tensor]] = [[], []]
    for lengths in ([2, 0], [1, 3], [12, 1], [0, 0], [4, 7]):
        k, v = (torch.randn(2, 12, 1, 3, generator=generator) for _ in range(2))
        ring = ring.remember(k, v, None, start, torch.tensor(lengths))
        for b, n in enumerate(lengths):
            had[b] += list(torch.stack([k[b, :n], v[b, :n]], dim=1))
        start = start + torch.tensor(lengths)
        keys, values = ring.recall(start, 5)
        for b in range(2):
            expected = torch.stack([torch.zeros(2, 1, 3)] * 5 + had[b])[-5:]
            assert torch.equal(keys[b], expected[:, 0]) and torch.equal(values[b], expected[:, 1])


def test_gradients_are_recorded_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax = attention()
    outs, _ = hear(softmax, "ffff", monkeypatch)
    outs.square().sum().backward()
    assert all(parameter.grad is not None for parameter in softmax.parameters())


@torch.no_grad()
def test_an_operator_that_was_insisted_on_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = hear(attention(), "pppp", monkeypatch)
    found, _ = hear(attention(kernel="fused"), "ffff", monkeypatch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"has no kernel for Dilated; use kernel='auto'"):
        monkeypatch.setattr(kernels, "require", lambda *_: None)
        hear(attention(kernel="fused", pattern=Dilated()), "f", monkeypatch)

    def missing(operator: str, like: Tensor) -> None:
        raise RuntimeError(f"{operator} is not built")

    monkeypatch.setattr(kernels, "require", missing)
    with pytest.raises(RuntimeError, match="stream_attn is not built"):
        hear(attention(kernel="fused"), "p", monkeypatch)


@torch.no_grad()
def test_a_scheme_that_changes_bias_alone_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nearer(Alibi):
        def bias(self, q: Tensor, query: Tensor, key: Tensor, ahead: int = 0) -> Tensor:
            return 2 * super().bias(q, query, key, ahead)

    assert Alibi(dim=24, heads=4).fusable and not Nearer(dim=24, heads=4).fusable
    expected, _ = hear(attention(partial(Nearer)), "pppp", monkeypatch)
    found, _ = hear(attention(partial(Nearer)), "ffff", monkeypatch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
