"""The contract over the whole catalogue, and proof that the contract catches what it is for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from speechkit import kernels
from speechkit.attention import Alibi, RelativePosition, Rotary, ScoreTerm, Softmax
from speechkit.attention.ring import Ring
from speechkit.config import build, catalogue
from speechkit.encoders import ChunkedEncoder, Conformer, Squeezeformer
from speechkit.layers import BatchNorm, Convolution, Subsampling
from speechkit.stream import Context, Span, State, keep_valid
from speechkit.testing import verify_stream

CONTEXT = Context(left=8, chunk=4)


def names(group: str) -> list[str]:
    return sorted(p.stem for p in (catalogue() / group).glob("*.yaml"))


def tiny(encoder: str, attention: str) -> ChunkedEncoder:
    """An encoder of the catalogue with its own parts and few of each."""
    small = ["dim=24", "heads=4", "layers=4"]
    with hydra.initialize_config_dir(str(catalogue()), version_base="1.3"):
        config = hydra.compose(
            overrides=[f"+encoder={encoder}", f"+attention={attention}", "+model.features.mel.bands=8"]
            + [f"model.encoder.{change}" for change in small]
        )
    OmegaConf.update(config, "model.encoder.subsampling.channels", 16, force_add=True)
    return randomised(build(config.model.encoder, "model.encoder"))


def randomised(encoder: ChunkedEncoder) -> ChunkedEncoder:
    """Every parameter and statistic away from its neutral start: a zero bias or a mean of 0 would hide a fault."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in [*encoder.named_parameters(), *encoder.named_buffers()]:
            if name.endswith(("bias", "u", "v", "running_mean")):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return encoder


WHOLE = ("ast", "wav2vec2")  # what hears whole utterances only
STREAMING = [name for name in names("encoder") if not name.endswith("_whole") and not name.startswith(WHOLE)]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams go through the operators even where they are not compiled."""
    monkeypatch.setattr(kernels, "serves", lambda operator, like: True)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams go through ordinary PyTorch, as they do where nothing is compiled."""
    monkeypatch.setattr(kernels, "serves", lambda operator, like: False)


@pytest.mark.parametrize("path", ["fused", "plain"])
@pytest.mark.parametrize("attention", names("attention"))
@pytest.mark.parametrize("encoder", STREAMING)
def test_every_encoder_streams_with_every_attention(
    encoder: str, attention: str, path: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(path)
    verify_stream(tiny(encoder, attention), features=8, context=CONTEXT, long=False)


@pytest.mark.parametrize("attention", names("attention"))
@pytest.mark.parametrize("encoder", ["conformer_s", "squeezeformer_xs", "fastconformer_l"])
def test_every_family_streams_past_five_thousand_frames(encoder: str, attention: str) -> None:
    verify_stream(tiny(encoder, attention), features=8, context=CONTEXT, long=True)


@pytest.mark.parametrize(
    "context", [Context(left=0, chunk=2), Context(left=6, chunk=8), Context(left=64, chunk=16)], ids=str
)
@pytest.mark.parametrize("encoder", ["conformer_s", "squeezeformer_xs"])
def test_the_same_weights_stream_under_any_context(encoder: str, context: Context) -> None:
    verify_stream(tiny(encoder, "relative"), features=8, context=context, long=False)


def test_a_causal_encoder_streams_frame_by_frame() -> None:
    verify_stream(tiny("conformer_s", "rotary"), features=8, context=Context(left=12, chunk=1), long=False)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_causal_downsampling_streams(stages: int) -> None:
    encoder = Conformer(
        features=8,
        dim=24,
        heads=4,
        layers=2,
        attention=partial(Softmax, position=RelativePosition),
        subsampling=partial(Subsampling, channels=16, stages=stages, separable=True, before=2),
    )
    verify_stream(randomised(encoder), features=8, context=CONTEXT, long=False)


@pytest.mark.parametrize("encoder", [name for name in names("encoder") if name.endswith("_whole")])
def test_an_encoder_of_whole_utterances_refuses_to_stream(encoder: str) -> None:
    with pytest.raises(ValueError, match="cannot stream"):
        tiny(encoder, "relative").init_state(1, context=CONTEXT)


class LinearAttention(nn.Module):
    """A mechanism of another kind, as a plug-in would bring it: chunk-causal linear attention (2006.16236).

    What a stream remembers is the sum of ``phi(k) v`` over all it has heard, of one size however long that was.
    """

    clean: Callable = staticmethod(keep_valid)

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.project, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def init_state(self, batch: int, context: Context) -> State:
        width = self.out.in_features // self.heads
        return self.out.weight.new_zeros(batch, self.heads, width, width + 1)

    def forward(self, x: Tensor, span: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        memory = self.init_state(len(x), span.context) if state is None else state
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.project(x).chunk(3, dim=-1))
        q, k = q.sigmoid(), self.clean(k.sigmoid(), span.lengths)
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        outs = []
        for first in range(0, x.shape[1], span.context.chunk):
            now = slice(first, first + span.context.chunk)
            memory = memory + torch.einsum("buhk,buhv->bhkv", k[:, now], v[:, now])
            y = torch.einsum("buhk,bhkv->buhv", q[:, now], memory)
            outs.append(y[..., :-1] / (y[..., -1:] + 1e-3))
        return self.out(torch.cat(outs, dim=1).flatten(2)), None if state is None else memory


def made(position: type[ScoreTerm] | None, encoder: type = Squeezeformer) -> ChunkedEncoder:
    torch.manual_seed(0)
    attention = LinearAttention if position is None else partial(Softmax, position=position)
    return randomised(encoder(features=8, dim=24, heads=4, layers=4, attention=attention))


def test_a_mechanism_that_is_no_softmax_meets_the_contract() -> None:
    verify_stream(made(None), features=8, context=CONTEXT, long=False, tolerance=5e-5)


def a_ring_that_is_short_by(slots: int, patch: pytest.MonkeyPatch) -> None:
    whole = Softmax.init_state

    def short(self: Softmax, batch: int, context: Context) -> Ring:
        ring = whole(self, batch, context)
        return Ring(ring.cache[:, :, :, slots:].contiguous(), ring.scores)

    patch.setattr(Softmax, "init_state", short)


def keys_one_slot_short(patch: pytest.MonkeyPatch) -> None:
    a_ring_that_is_short_by(CONTEXT.latency() + 1, patch)


def memory_ignores_lengths(patch: pytest.MonkeyPatch) -> None:
    remember = Ring.remember
    patch.setattr(Ring, "remember", lambda s, k, v, x, t, n: remember(s, k, v, x, t, torch.full_like(n, k.shape[1])))


def keys_off_by_one(patch: pytest.MonkeyPatch) -> None:
    positions = Span.positions
    patch.setattr(Span, "positions", lambda self, frames, before=0: positions(self, frames, before) + (before > 0))


def positions_restart_at_each_chunk(patch: pytest.MonkeyPatch) -> None:
    place = Rotary.place
    patch.setattr(Rotary, "place", lambda self, q, k, position: place(self, q, k, position - position[:, :1]))


def clock_advances_by_the_frames_it_was_given(patch: pytest.MonkeyPatch) -> None:
    step = ChunkedEncoder.stream

    def wrong(self: Any, chunk: Tensor, lengths: Tensor, state: State, *, context: Any = None) -> Any:
        out, after = step(self, chunk, lengths, state, context=context)
        return out, None if after is None else (state[0] + out.frames.shape[1], *after[1:])

    patch.setattr(ChunkedEncoder, "stream", wrong)


def padding_is_not_cleaned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("speechkit.layers.keep_valid", lambda x, lengths: x)


def the_next_chunk_is_seen(patch: pytest.MonkeyPatch) -> None:
    bounds = Context.bounds

    def wrong(self: Context, query: Tensor) -> tuple[Tensor, Tensor]:
        lo, hi = bounds(self, query)
        return lo, hi + (self.chunk or 0)

    patch.setattr(Context, "bounds", wrong)


def the_slow_clock_is_not_halved(patch: pytest.MonkeyPatch) -> None:
    slower = Span.slower
    patch.setattr(Span, "slower", lambda self, stride: slower(self, stride)._replace(start=self.start))


def linear_memory_hears_padding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LinearAttention, "clean", staticmethod(lambda x, lengths: x))


FAULTS = [
    (keys_one_slot_short, RelativePosition),
    (memory_ignores_lengths, RelativePosition),
    (keys_off_by_one, Alibi),
    (positions_restart_at_each_chunk, Rotary),
    (clock_advances_by_the_frames_it_was_given, Rotary),
    (padding_is_not_cleaned, ScoreTerm),
    (the_next_chunk_is_seen, RelativePosition),
    (the_slow_clock_is_not_halved, Rotary),
    (linear_memory_hears_padding, None),
]


@pytest.mark.parametrize(("fault", "position"), FAULTS, ids=lambda x: getattr(x, "__name__", "linear"))
def test_the_contract_catches(fault: Callable, position: type[ScoreTerm] | None, plain: None, monkeypatch) -> None:
    """The nine faults of other toolkits and of our own first drafts; without the fault the same encoder passes."""
    tolerance = 5e-5 if position is None else 1e-5
    verify_stream(made(position), features=8, context=CONTEXT, long=False, tolerance=tolerance)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        verify_stream(made(position), features=8, context=CONTEXT, long=False, tolerance=tolerance)


def operator(name: str, patch: pytest.MonkeyPatch, change: Callable[[list, dict], Any]) -> None:
    """The fused operator, called with arguments that ``change`` spoils."""
    right = getattr(torch.ops.speechkit, name)

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        spoilt = list(arguments)
        change(spoilt, options)
        return right(*spoilt, **options)

    patch.setattr(torch.ops.speechkit, name, wrong)


def ring_without_room_for_the_chunk(patch: pytest.MonkeyPatch) -> None:
    a_ring_that_is_short_by(1, patch)


def attention_ignores_lengths(patch: pytest.MonkeyPatch) -> None:
    operator("stream_attn", patch, lambda a, _: a.__setitem__(6, torch.full_like(a[6], a[0].shape[1])))


def attention_reads_the_slot_of_another(patch: pytest.MonkeyPatch) -> None:
    operator("stream_attn", patch, lambda a, _: a.__setitem__(4, a[4].roll(1)))


def table_off_by_one_row(patch: pytest.MonkeyPatch) -> None:
    def change(arguments: list, options: dict) -> None:
        options["rel"] = options["rel"].roll(1, dims=1)

    operator("stream_attn", patch, change)


def convolution_ignores_lengths(patch: pytest.MonkeyPatch) -> None:
    operator("conv_step", patch, lambda a, _: a.__setitem__(5, torch.full_like(a[5], a[0].shape[1])))


FUSED_FAULTS = [
    ring_without_room_for_the_chunk,
    attention_ignores_lengths,
    attention_reads_the_slot_of_another,
    table_off_by_one_row,
    convolution_ignores_lengths,
]


@pytest.mark.parametrize("fault", FUSED_FAULTS, ids=lambda fault: fault.__name__)
def test_the_contract_catches_operators_that_are_called_wrongly(fault: Callable, fused: None, monkeypatch) -> None:
    verify_stream(made(RelativePosition), features=8, context=CONTEXT, long=False)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        verify_stream(made(RelativePosition), features=8, context=CONTEXT, long=False)


def test_the_contract_catches_a_state_that_grows() -> None:
    class Hoarder(Conformer):
        def stream(self, chunk: Tensor, lengths: Tensor, state: State, *, context: Any = None) -> Any:
            out, after = super().stream(chunk, lengths, state and state[:3], context=context)
            kept = state[3] if state is not None and len(state) > 3 else chunk.new_zeros(len(chunk), 0)
            return out, None if after is None else (*after, torch.cat([kept, chunk.new_zeros(len(chunk), 1)], dim=1))

    encoder = Hoarder(features=8, dim=24, heads=4, layers=1, attention=Softmax)
    with pytest.raises(AssertionError, match="the state must keep its size"):
        verify_stream(encoder, features=8, context=CONTEXT, long=False)


def test_batch_norm_and_gates_stream_too() -> None:
    convolution = partial(Convolution, kernel=7, gated=False, norm=BatchNorm)
    encoder = Conformer(features=8, dim=24, heads=4, layers=2, attention=Softmax, convolution=convolution)
    verify_stream(randomised(encoder), features=8, context=CONTEXT, long=False)
