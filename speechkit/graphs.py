"""A streaming step on a GPU as one launch: CUDA graphs over memory that stays where it is.

A step is hundreds of small kernels, and a CPU needs longer to launch them than a GPU to run them. A graph holds them
all, with the addresses they work at. So everything a step reads and writes has one place for as long as the model
streams: samples, lengths, and the state, whose rows are slots. A stream that joins, pauses or leaves changes values in
that memory and no address: a pause is a length of 0, a join writes fresh values into a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speechkit.stream import State, first, leaves
from speechkit.types import EncoderOutput

Out = TypeVar("Out")
Step = Callable[[], EncoderOutput]
Stream = Callable[[Tensor, Tensor, State], tuple[EncoderOutput, State]]


class Graphs:
    """``stream`` over the first rows of one state, a graph for each of 1, 2, 4, 8, ... rows.

    ::

        step = Graphs(partial(recogniser.stream, context=context), recogniser.init_state(64, context=context), chunk)
        step.join(slot, recogniser.init_state(1, context=context))
        encoded = step(samples, lengths)  # of the slots 0 to len(lengths) - 1

    So streams should take the lowest slots that are free. A graph is captured by the first call that needs it, which
    takes a second or so, or by `capture`. For inference, with the weights as they are then.

    Args:
        stream: called as ``stream(chunk, lengths, state)``, as `speechkit.recogniser.Recogniser.stream` is. It must
            read nothing from the device and make no tensor of Python's numbers there but by filling.
        state: of all slots, tensors alone; this object's from here on, and changed in place.
        chunk: ``[slots, ...]``, of the shape, type and device of what a step takes.
        record: makes of a step one that replays it, in the same memory; `captured` unless given.

    Raises:
        ValueError: for a state of lists, which no graph can change, or that has not a row for each slot.
    """

    def __init__(
        self, stream: Stream, state: State, chunk: Tensor, *, record: Callable[[Step], Step] | None = None
    ) -> None:
        self.slots = len(chunk)
        for leaf in _tensors(state):
            if len(leaf) != self.slots:
                raise ValueError(
                    f"Graphs.state must have a row for each of the {self.slots} slots of chunk, but has {len(leaf)}; "
                    f"make both for as many streams."
                )
        self.stream, self.state, self.record = stream, state, record or captured
        self.chunk = torch.zeros_like(chunk)
        self.lengths = torch.zeros(self.slots, dtype=torch.long, device=chunk.device)
        self._steps: dict[int, Step] = {}
        self._read: list[Tensor] = []

    @torch.inference_mode()
    def __call__(self, chunk: Tensor, lengths: Tensor) -> EncoderOutput:
        """The next frames of the slots 0 to B - 1: ``chunk [B, ...]``, from anywhere, and ``lengths [B]``.

        Returns:
            Frames and lengths of these slots, in memory that the next call writes to.

        Raises:
            ValueError: for more rows than there are slots, or another shape.
        """
        rows = len(lengths)
        if not 0 < rows <= self.slots or chunk.shape != (rows, *self.chunk.shape[1:]):
            raise ValueError(
                f"Graphs: a step must take [B, {', '.join(map(str, self.chunk.shape[1:]))}] for B of 1 to {self.slots} "
                f"slots and as many lengths, but takes {list(chunk.shape)} and {rows} lengths."
            )
        size = self.capture(rows)
        self.chunk[:rows].copy_(chunk, non_blocking=True)
        self.lengths[:rows].copy_(lengths, non_blocking=True)
        self.lengths[rows:].zero_()
        encoded = self._steps[size]()
        return EncoderOutput(encoded.frames[:rows], encoded.lengths[:rows])

    @torch.inference_mode()
    def capture(self, rows: int) -> int:
        """Makes sure that there is a graph for so many rows, and says how many it has. No stream is moved on."""
        size = min(self.slots, 1 << (rows - 1).bit_length())
        if size not in self._steps:
            self.lengths.zero_()
            with _Reads() as reads:
                self._step(size)
            self._read += reads.found.values()
            self._steps[size] = self.record(lambda: self._step(size))
        return size

    @torch.inference_mode()
    def join(self, slot: int, fresh: State) -> None:
        """A new stream in a slot: ``fresh`` is the state of one that has heard nothing."""
        for old, new in zip(_tensors(self.state), _tensors(fresh), strict=True):
            old[slot].copy_(new[0])

    def _step(self, size: int) -> EncoderOutput:
        before = first(self.state, size)
        encoded, after = self.stream(self.chunk[:size], self.lengths[:size], before)
        for old, new in zip(_tensors(before), _tensors(after), strict=True):
            if old is not new:  # kernels hand back what they changed in place
                old.copy_(new)
        return encoded


class _Reads(TorchDispatchMode):
    """Finds what a step reads that was there before it: weights, and tables that modules make once and may make anew.

    A graph knows their addresses alone. They must live as long as it does, whatever becomes of the modules' own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}  # by storage
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in _only_tensors((args, kwargs)):
            if _storage(x) not in self.made:
                self.found.setdefault(_storage(x), x)
        self.made |= {_storage(x) for x in _only_tensors(out)} - self.found.keys()
        return out


def captured(step: Callable[[], Out]) -> Callable[[], Out]:
    """The step as a CUDA graph. It runs twice before, on a stream of its own, to choose algorithms and take memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Out:
        graph.replay()
        return out

    return replay


def _only_tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _tensors(state: State) -> list[Tensor]:
    found = leaves(state)
    for leaf in found:
        if not isinstance(leaf, Tensor):
            raise ValueError(
                f"Graphs.state must consist of tensors, because a graph changes nothing else, but holds a "
                f"{type(leaf).__name__}; stream this model without graphs."
            )
    return found
