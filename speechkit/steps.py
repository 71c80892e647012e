"""The rows of a batched state, one a stream, and the step that moves some of them on: plain, traced, or CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from speechkit.graphs import Graphs
from speechkit.stream import Context, State, clone_state, first, put_, take
from speechkit.traced import Traced
from speechkit.types import EncoderOutput

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)  # streams a step is traced for; fewer than the next size go with it


class Streams(Protocol):
    """What is stepped, for example a `speechkit.recogniser.Recogniser`."""

    def init_state(self, batch: int, *, context: Context | None = None) -> State: ...

    def stream(
        self, samples: Tensor, lengths: Tensor, state: State, *, context: Context | None = None
    ) -> tuple[EncoderOutput, State]: ...


class Rows:
    """A row for each of ``slots`` streams.

    Args:
        model: what is stepped.
        context: that it is stepped in.
        slots: rows.
    """

    def __init__(self, model: Streams, context: Context, slots: int) -> None:
        self.model, self.context, self.slots = model, context, slots
        self.state = clone_state(self.fresh(slots))

    def fresh(self, rows: int) -> State:
        """So many that have heard nothing."""
        return self.model.init_state(rows, context=self.context)

    def begin(self, rows: Sequence[int]) -> None:
        """These have heard nothing."""
        self.state = put_(self.state, rows, self.fresh(len(rows)))

    def __call__(self, rows: list[int], samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"]) -> EncoderOutput:
        """Their next frames."""
        encoded, state = self.model.stream(samples, lengths, take(self.state, rows), context=self.context)
        self.state = put_(self.state, rows, state)
        return encoded


class TracedRows(Rows):
    """Steps of few streams are traced: where many go together, the way through the modules hardly counts.

    Args:
        most: streams of a step that is traced, a second or so for each size.
        chunk: samples a step takes of each.
    """

    def __init__(self, model: Streams, context: Context, slots: int, *, most: int, chunk: Float[Tensor, "N"]) -> None:
        super().__init__(model, context, slots)
        self.step = Traced(model.stream)
        self.sizes = [size for size in SIZES if size <= min(most, slots)]
        for size in self.sizes:
            lengths = torch.full((size,), len(chunk), device=chunk.device)
            self.step.know(chunk.expand(size, -1).contiguous(), lengths, self.fresh(size), context=context)

    def __call__(self, rows: list[int], samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"]) -> EncoderOutput:
        size = next((size for size in self.sizes if size >= len(rows)), None)
        if size is None:
            return super().__call__(rows, samples, lengths)
        more = size - len(rows)  # they repeat the first, and say nothing
        samples, lengths = F.pad(samples, (0, 0, 0, more)), F.pad(lengths, (0, more))
        state = take(self.state, rows + rows[:1] * more)
        encoded, state = self.step(samples, lengths, state, context=self.context)
        self.state = put_(self.state, rows, first(state, len(rows)))
        return EncoderOutput(encoded.frames[: len(rows)], encoded.lengths[: len(rows)])


class GraphRows(Rows):
    """Every step is a CUDA graph of the first 1, 2, 4, ... rows, all captured now; those that have nothing new wait.

    Args:
        chunk: samples a step takes of each.
        record: as `Graphs` takes it.
    """

    def __init__(
        self,
        model: Streams,
        context: Context,
        slots: int,
        *,
        chunk: Float[Tensor, "N"],
        record: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, context, slots)
        self.empty = chunk.expand(slots, -1).contiguous()
        self.graphs = Graphs(partial(model.stream, context=context), self.state, self.empty, record=record)
        rows = 1
        while self.graphs.capture(rows) < slots:
            rows *= 2

    def begin(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.graphs.join(row, self.fresh(1))

    def __call__(self, rows: list[int], samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"]) -> EncoderOutput:
        count = max(rows) + 1
        chunk, new = self.empty[:count].clone(), torch.zeros(count, dtype=torch.long, device=lengths.device)
        chunk[rows, : samples.shape[1]], new[rows] = samples, lengths
        encoded = self.graphs(chunk, new)
        return EncoderOutput(encoded.frames[rows], encoded.lengths[rows])
