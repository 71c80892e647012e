"""A step replayed from a recording of its operators, which is what a CUDA graph is, against the stream itself."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from speechkit_kernels import cuda
from tiny import node, sound, tiny
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from speechkit import kernels
from speechkit.attention import RelativePosition
from speechkit.graphs import Graphs, Step
from speechkit.recogniser import Recogniser
from speechkit.stream import Context
from speechkit.types import EncoderOutput

CONTEXT = Context(left=16, chunk=8)
CHUNK = 8 * 4 * 160  # samples
SLOTS = 5
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "lift_fresh")


def tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if leaf is not None]


class Recording(TorchDispatchMode):
    """The operators of a step, to be called again on the same tensors, without the Python that called them first.

    Refuses what a capture refuses: a value that is read on the host, or a tensor made of Python's numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in READS or by_mask:
            raise RuntimeError(f"{name} reads a value on the host")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def recorded(step: Step) -> Step:
    with Recording() as recording:
        encoded = step()

    def replay() -> EncoderOutput:
        recording.replay()
        return encoded

    return replay


@pytest.fixture(scope="module", params=["conformer", "squeezeformer", "plain"])
def model(request: pytest.FixtureRequest) -> Iterator[Recogniser]:
    """With the compiled operators, with two clocks, and without the operators."""
    changes: dict[str, Any] = {}
    if request.param == "squeezeformer":
        changes["encoder"] = node()["encoder"] | {"_target_": "speechkit.encoders.Squeezeformer", "layers": 4}
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(kernels, "serves", lambda operator, like: False)
        yield tiny(**changes)


def graphs(model: Recogniser, record: Any = recorded) -> Graphs:
    stream = partial(model.stream, context=CONTEXT)
    return Graphs(stream, model.init_state(SLOTS, context=CONTEXT), torch.zeros(SLOTS, CHUNK), record=record)


@torch.inference_mode()
def test_streams_that_join_pause_and_leave_hear_what_they_hear_alone(model: Recogniser) -> None:
    dice, step = random.Random(0), graphs(model)
    states: dict[int, Any] = {}
    clips: dict[int, Iterator[Tensor]] = {}
    compared = 0
    for turn in range(40):
        if len(states) < SLOTS and dice.random() < 0.3:
            slot = min(set(range(SLOTS)) - set(states))
            states[slot], clips[slot] = model.init_state(1, context=CONTEXT), iter(sound(20.0, turn).split(CHUNK))
            step.join(slot, model.init_state(1, context=CONTEXT))
        if states and dice.random() < 0.1:
            del states[dice.choice(list(states))]
        if not states:
            continue
        rows = max(states) + 1
        chunk, lengths = torch.full((rows, CHUNK), torch.nan), torch.zeros(rows, dtype=torch.long)
        for slot in states:
            if dice.random() < 0.7:
                chunk[slot], lengths[slot] = next(clips[slot]), CHUNK
        encoded = step(chunk, lengths)
        for slot, state in states.items():
            alone, states[slot] = model.stream(chunk[slot : slot + 1], lengths[slot : slot + 1], state, context=CONTEXT)
            count = int(alone.lengths)
            assert int(encoded.lengths[slot]) == count == (8 if lengths[slot] else 0)
            torch.testing.assert_close(encoded.frames[slot, :count], alone.frames[0, :count], rtol=1e-4, atol=1e-4)
            compared += count
    assert compared > 300
    assert set(step._steps) == {1, 2, 4, 5}


@torch.inference_mode()
def test_a_replayed_step_is_the_step_bit_for_bit(model: Recogniser) -> None:
    one, other = graphs(model), graphs(model, record=lambda step: step)
    for turn in range(6):
        samples = torch.stack([sound(1.0, 10 * turn + row)[:CHUNK] for row in range(3)])
        lengths = torch.tensor([CHUNK, CHUNK * (turn % 2), CHUNK])
        a, b = one(samples, lengths), other(samples, lengths)
        for row in range(3):
            assert torch.equal(a.frames[row, : a.lengths[row]], b.frames[row, : b.lengths[row]])
    assert all(torch.equal(a, b) for a, b in zip(tensors(one.state), tensors(other.state), strict=True))


@torch.inference_mode()
def test_a_capture_moves_no_stream_on(model: Recogniser) -> None:
    step = graphs(model)
    step(sound(1.0)[None, :CHUNK], torch.tensor([CHUNK]))
    before = tree_map_only(Tensor, torch.clone, step.state)
    assert [step.capture(rows) for rows in (1, 3, 5)] == [1, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(tensors(before), tensors(step.state), strict=True))


@torch.inference_mode()
def test_a_state_stays_where_it_is(model: Recogniser) -> None:
    step = graphs(model)
    places = [leaf.data_ptr() for leaf in tensors(step.state)]
    step.join(1, model.init_state(1, context=CONTEXT))
    step(torch.zeros(2, CHUNK), torch.tensor([CHUNK, 0]))
    assert [leaf.data_ptr() for leaf in tensors(step.state)] == places


@torch.inference_mode()
def test_what_a_step_reads_lives_as_long_as_its_graph(model: Recogniser) -> None:
    """A table of positions is made anew where another context comes; a graph goes on reading the one it knows."""
    step = graphs(model, record=lambda step: step)
    step.capture(2)
    tables = [weakref.ref(part._kept[1]) for part in model.modules() if isinstance(part, RelativePosition)]
    heard = sound(2.0)[None]
    model.encode(heard, torch.tensor([heard.shape[1]]))
    assert tables and all(table() is not None for table in tables)
    read = {x.data_ptr() for x in step._read}
    assert {x.data_ptr() for x in model.encoder.parameters() if x.dim() == 1} <= read
    total = sum(x.untyped_storage().nbytes() for x in {x.data_ptr(): x for x in step._read}.values())
    known = [*model.parameters(), *model.buffers(), *tensors(step.state), step.chunk, step.lengths]
    assert total <= 1.5 * sum(x.untyped_storage().nbytes() for x in known), "what a step makes itself is not kept"


def test_a_step_reads_nothing_on_the_host(model: Recogniser) -> None:
    """Fake tensors have no values to read."""
    state = model.init_state(2, context=CONTEXT)
    kernels.serves("stream_attn", torch.zeros(1))
    kernels.rows.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.inference_mode():
            fake = tree_map_only(Tensor, mode.from_tensor, state)
            lengths = mode.from_tensor(torch.tensor([CHUNK, 0]))
            encoded, _ = model.stream(mode.from_tensor(torch.zeros(2, CHUNK)), lengths, fake, context=CONTEXT)
    finally:
        kernels.rows.cache_clear()
    assert encoded.frames.shape[:2] == (2, 8)


def test_a_step_that_reads_on_the_host_is_caught() -> None:
    def reads(x: Tensor, lengths: Tensor, state: Any) -> tuple[EncoderOutput, Any]:
        return EncoderOutput(x[:, : int(lengths.max())], lengths), state

    def makes(x: Tensor, lengths: Tensor, state: Any) -> tuple[EncoderOutput, Any]:
        return EncoderOutput(x + torch.tensor([1.0]), lengths), state

    for stream in (reads, makes):
        with pytest.raises(RuntimeError, match="reads a value on the host"):
            Graphs(stream, torch.zeros(2, 3), torch.zeros(2, 4), record=recorded).capture(1)


def test_what_a_graph_cannot_hold_is_refused(model: Recogniser) -> None:
    state = model.init_state(SLOTS, context=CONTEXT)
    with pytest.raises(ValueError, match=r"must consist of tensors.*holds a list; stream this model without graphs"):
        Graphs(model.stream, (state, [1, 2]), torch.zeros(SLOTS, CHUNK))
    with pytest.raises(ValueError, match="must have a row for each of the 4 slots of chunk, but has 5; make"):
        Graphs(model.stream, state, torch.zeros(4, CHUNK))
    for rows, samples in ((SLOTS + 1, CHUNK), (0, CHUNK), (2, CHUNK - 1)):
        with pytest.raises(ValueError, match=rf"must take \[B, {CHUNK}\] for B of 1 to 5 slots.*{rows} lengths"):
            graphs(model)(torch.zeros(rows, samples), torch.zeros(rows, dtype=torch.long))


@pytest.mark.gpu
@pytest.mark.skipif(cuda.reason() is not None, reason=f"the CUDA kernels cannot run: {cuda.reason()}")
@torch.inference_mode()
def test_a_cuda_graph_is_the_step() -> None:
    cuda.register()
    kernels._serves.cache_clear()
    model = tiny().cuda()
    stream, chunk = partial(model.stream, context=CONTEXT), torch.zeros(SLOTS, CHUNK, device="cuda")
    one = Graphs(stream, model.init_state(SLOTS, context=CONTEXT), chunk)
    other = Graphs(stream, model.init_state(SLOTS, context=CONTEXT), chunk, record=lambda step: step)
    for turn in range(20):
        rows = 1 + turn % SLOTS
        samples = torch.stack([sound(1.0, 10 * turn + row)[:CHUNK] for row in range(rows)])
        lengths = torch.tensor([CHUNK * ((turn + row) % 3 > 0) for row in range(rows)])
        if turn % 4 == 0:
            one.join(0, model.init_state(1, context=CONTEXT))
            other.join(0, model.init_state(1, context=CONTEXT))
        a, b = one(samples, lengths), other(samples, lengths)
        torch.testing.assert_close(a.frames[lengths > 0], b.frames[lengths > 0], rtol=1e-4, atol=1e-4)
