"""Everything that is hard about streaming, once.

Two values carry all of it. `Context` says which keys a query may see: mask, cache size and latency follow from it.
`Span` says which frames of this call are new. `carry` remembers: convolutions their left taps, subsampling its
overlap, the filter bank its samples. Attention keeps its keys in a ring (`speechkit.attention.ring`), where a kernel
can read and append in place.

State is a pytree in which **tuples and dicts are structure, tensors have the stream on axis 0, and a list has one
item a stream**. So a server resets, pauses, joins or drops a stream by its row (`take`, `put`), and knows nothing
of what is inside.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

State = Any


@dataclass(frozen=True)
class Context:
    """Which keys a query may see, in frames of the layer's own clock: one interval of them, by absolute position.

    Args:
        left: frames before the first frame of the query's chunk; ``None`` is all of them.
        chunk: frames seen together; 1 is causal, ``None`` the whole utterance.
        right: frames after the last frame of the query's chunk; ``None`` is all of them.

    The rule looks at whole chunks only, so look-ahead does not grow with depth: every layer waits for the same chunk.
    ``right`` breaks that on purpose and is for whole utterances: ``Context(left=64, chunk=1, right=64)`` is a window
    that slides with each frame, as long recordings want it, ``Context(left=64, chunk=16, right=32)`` two chunks ahead.
    """

    left: int | None = None
    chunk: int | None = None
    right: int | None = 0

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(
                f"Context.chunk must be at least 1 frame, or None for the whole utterance, but is {self.chunk}."
            )
        for name in ("left", "right"):
            frames = getattr(self, name)
            if frames is not None and frames < 0:
                raise ValueError(f"Context.{name} must be at least 0 frames, or None for all of them, but is {frames}.")

    def bounds(self, query: Int[Tensor, "B U"]) -> tuple[Int[Tensor, "B U"], Int[Tensor, "B U"]]:
        """The first key each query may see, and the first after those: ``lo <= key < hi``, ``lo`` at least 0."""
        lo, hi = torch.zeros_like(query), torch.full_like(query, torch.iinfo(query.dtype).max)
        if self.chunk is not None:
            first = query - query % self.chunk
            lo = lo if self.left is None else (first - self.left).clamp(min=0)
            hi = hi if self.right is None else first + self.chunk + self.right
        return lo, hi

    def visible(self, query: Int[Tensor, "B U"], key: Int[Tensor, "B S"]) -> Bool[Tensor, "B U S"]:
        """Whether each query sees each key, from absolute positions; positions below 0 are never seen."""
        lo, hi = (bound[:, :, None] for bound in self.bounds(query))
        return (key[:, None, :] >= lo) & (key[:, None, :] < hi)

    def slower(self, stride: int) -> Context:
        """The same seconds on a clock ``stride`` times slower.

        Raises:
            ValueError: where a border of the context would fall inside a slow frame.
        """
        slow = {"left": self.left, "chunk": self.chunk, "right": self.right}
        for name, frames in slow.items():
            if frames is not None and frames % stride:
                raise ValueError(
                    f"Context.{name} must be a multiple of {stride}, because a part of this encoder runs on a clock "
                    f"{stride} times slower, but is {frames}; the next one up is {frames + -frames % stride}."
                )
        return Context(**{name: None if frames is None else frames // stride for name, frames in slow.items()})

    @property
    def streams(self) -> bool:
        """Whether a stream can live in it, see `streamable`."""
        try:
            return bool(self.streamable())
        except ValueError:
            return False

    def latency(self) -> int:
        """Frames a stream waits at most before a frame can be encoded: one chunk.

        Raises:
            ValueError: for a context that cannot stream, see `streamable`.
        """
        chunk = self.streamable().chunk
        assert chunk is not None
        return chunk

    def memory(self) -> int:
        """Frames a stream remembers from before its chunk.

        Raises:
            ValueError: for a context that cannot stream, see `streamable`.
        """
        left = self.streamable().left
        assert left is not None
        return left

    def streamable(self) -> Context:
        """This context, if a stream can live in it with bounded memory and delay.

        Raises:
            ValueError: naming the part that is unbounded, or that looks behind the chunk.
        """
        for name in ("chunk", "left"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"Context.{name} must be finite to stream, but is None; "
                    f"pass for example Context(left=64, chunk=16), or encode the whole utterance with forward()."
                )
        if self.right != 0:
            raise ValueError(
                f"Context.right must be 0 to stream, because every layer would wait for it anew, but is {self.right}; "
                f"pass a larger chunk for look-ahead, for example Context(left=64, chunk=16), or encode the whole "
                f"utterance with forward()."
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Interval(Context):
    """A context that two tensors narrow, query by query: chunks of its own length for each utterance, for example.

    Query i of stream b sees the keys ``lo[b, i] <= key < hi[b, i]`` of those that ``left``, ``chunk`` and ``right``
    show, none where that is empty. With a finite ``left`` and ``right`` around all of them, attention does no more work
    than that; nothing is read from the tensors to find out. For whole utterances.

    Args:
        lo, hi: absolute positions for each frame of the call.
    """

    lo: Int[Tensor, "B U"]
    hi: Int[Tensor, "B U"]

    def bounds(self, query: Int[Tensor, "B U"]) -> tuple[Int[Tensor, "B U"], Int[Tensor, "B U"]]:
        """As `Context.bounds`.

        Raises:
            ValueError: unless there is one interval a query.
        """
        for name, bound in (("lo", self.lo), ("hi", self.hi)):
            if bound.shape != query.shape:
                raise ValueError(
                    f"Interval.{name} must be [streams, frames] = {list(query.shape)}, one for each frame that the "
                    f"encoder makes of its features, but is {list(bound.shape)}."
                )
        lo, hi = super().bounds(query)
        return lo.maximum(self.lo), hi.minimum(self.hi)

    def slower(self, stride: int) -> Context:
        raise ValueError(
            f"Interval must stay on its own clock, because its borders may fall inside a slow frame, but a part of "
            f"this encoder runs {stride} times slower; pass a Context, or take an encoder with one clock."
        )

    def streamable(self) -> Context:
        raise ValueError(
            "Interval must be used on whole utterances, because its frames are those of one call, but a stream was "
            "asked for; pass for example Context(left=64, chunk=16)."
        )


@dataclass(frozen=True)
class Everything(Context):
    """The whole utterance, where every frame of the call is real, so that attention may leave out its mask.

    Lengths say it too, but a GPU would have to wait for somebody to look at them.
    """


@dataclass(frozen=True)
class ContextSampler:
    """Dynamic chunk training: one `Context` a batch, drawn from the product of ``chunks`` and ``lefts``.

    A model trained so streams at every one of those latencies (U2, arXiv 2012.05481, section 3.1). ``whole`` is the
    share of batches that see the whole utterance; ``ContextSampler(whole=1.0)`` is ordinary training.
    """

    chunks: Sequence[int] = (4, 8, 16, 32)
    lefts: Sequence[int | None] = (32, 64, 128)
    whole: float = 0.5

    def draw(self, seed: int) -> Context:
        """The context of the batch numbered ``seed``; the same on every machine of a distributed run."""
        dice = random.Random(seed)
        if dice.random() < self.whole:
            return Context()
        return Context(left=dice.choice(list(self.lefts)), chunk=dice.choice(list(self.chunks)))


class Span(NamedTuple):
    """Where the frames of this call sit on each stream's clock. ``lengths`` of 0 is a paused stream."""

    start: Int[Tensor, "B"]
    lengths: Int[Tensor, "B"]
    context: Context

    def positions(self, frames: int, before: int = 0) -> Int[Tensor, "B S"]:
        """Absolute positions of ``before`` remembered frames and the ``frames`` of this call."""
        return self.start[:, None] + torch.arange(-before, frames, device=self.start.device)

    def slower(self, stride: int) -> Span:
        """The same frames on a clock ``stride`` times slower; an incomplete last frame counts."""
        return Span(self.start // stride, ceil_div(self.lengths, stride), self.context.slower(stride))


def fresh_span(lengths: Int[Tensor, "B"], context: Context) -> Span:
    """The span of utterances seen whole: every stream starts at 0."""
    return Span(torch.zeros_like(lengths), lengths, context)


def ceil_div(lengths: Tensor | int, stride: int) -> Any:
    """Frames left after a stride; an incomplete last frame counts."""
    return (lengths + stride - 1) // stride


def carry(tail: Tensor | None, new: Tensor, lengths: Int[Tensor, "B"]) -> tuple[Tensor, Tensor | None]:
    """Put the remembered frames before the new ones, and say what to remember next.

    Args:
        tail: ``[B, S, ...]`` remembered frames, or ``None`` to start from nothing and remember nothing.
        new: ``[B, T, ...]`` frames of this call, of which the first ``lengths[b]`` are real.

    Returns:
        ``(tail, new)`` joined along axis 1, and the next tail: the S frames that start at ``lengths[b]``. For a
        paused stream that slice *is* the old tail, so pausing needs no code.
    """
    if tail is None:
        return new, None
    seen = torch.cat([tail, new], dim=1)
    if tail.shape[1] == 0:
        return seen, tail
    index = lengths[:, None] + torch.arange(tail.shape[1], device=lengths.device)  # [B, S]
    index = index.reshape(index.shape + (1,) * (new.dim() - 2)).expand(-1, -1, *new.shape[2:])
    return seen, torch.gather(seen, 1, index)


def valid(lengths: Int[Tensor, "B"], frames: int) -> Bool[Tensor, "B T"]:
    """Which of ``frames`` frames are real. The one place where a mask is made from lengths."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def keep_valid(x: Tensor, lengths: Int[Tensor, "B"]) -> Tensor:
    """``x [B, T, ...]`` with every padded frame set to zero, even where it was NaN."""
    mask = valid(lengths, x.shape[1])
    return torch.where(mask.reshape(mask.shape + (1,) * (x.dim() - 2)), x, x.new_zeros(()))


def take(state: State, rows: Sequence[int]) -> State:
    """The state of some streams, in that order; repeats are allowed."""
    return _map(lambda x: x[list(rows)] if isinstance(x, Tensor) else [x[r] for r in rows], state)


def put(state: State, rows: Sequence[int], fresh: State) -> State:
    """``state`` with the streams ``rows`` replaced by those of ``fresh``: a reset, a join, or a move."""
    return put_(clone_state(state), rows, fresh)


def put_(state: State, rows: Sequence[int], fresh: State) -> State:
    """As `put`, but written into the tensors of ``state``, which is consumed: it costs what ``fresh`` is large.

    For who owns a state alone, with no tensor in it that is a view of another.
    """

    def write(old: Any, new: Any) -> Any:
        if isinstance(old, Tensor):
            old[list(rows)] = new.to(old.dtype)
        else:
            for row, item in zip(rows, new, strict=True):
                old[row] = item
        return old

    return _map(write, state, fresh)


def first(state: State, count: int) -> State:
    """The first streams of a state, in the same memory."""
    return _map(lambda x: x[:count], state)


def clone_state(state: State) -> State:
    """A copy that a step can consume while the original lives on."""
    return _map(lambda x: x.clone() if isinstance(x, Tensor) else list(x), state)


def state_bytes(state: State) -> int:
    """Bytes the tensors of a state hold."""
    total = 0

    def add(x: Any) -> Any:
        nonlocal total
        total += x.numel() * x.element_size() if isinstance(x, Tensor) else 0
        return x

    _map(add, state)
    return total


def leaves(state: State) -> list[Any]:
    """What a state consists of beside its structure, in order."""
    found: list[Any] = []
    _map(found.append, state)
    return found


def with_leaves(state: State, new: Iterable[Any]) -> State:
    """The structure of ``state`` with other leaves."""
    following = iter(new)
    return _map(lambda _: next(following), state)


def _map(function: Any, state: State, *others: State) -> State:
    if state is None:
        return None
    if isinstance(state, dict):
        return {key: _map(function, value, *(o[key] for o in others)) for key, value in state.items()}
    if isinstance(state, tuple):
        items = [_map(function, *parts) for parts in zip(state, *others, strict=True)]
        return type(state)(*items) if hasattr(state, "_fields") else tuple(items)
    return function(state, *others)


def split(state: State, parts: int) -> tuple[State, ...]:
    """The parts of a composite state; a fresh start gives every part a fresh start."""
    return (None,) * parts if state is None else state


def stack(states: Sequence[State]) -> State:
    """The states of some streams as that of a batch, in that order."""

    def joined(*rows: Any) -> Any:
        return torch.cat(rows) if isinstance(rows[0], Tensor) else [item for row in rows for item in row]

    return _map(joined, *states)
