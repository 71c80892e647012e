"""The contract that makes the model you train the model you stream, public so that your own parts can run it.

`verify_stream` checks one encoder under one context. Each of its clauses fails with a sentence that says what went
wrong and by how much. Comparisons assert finiteness first: ``max(0, nan)`` is 0 in Python, and a contract that took a
running maximum would let NaN through.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speechkit.stream import Context, State, keep_valid, put, state_bytes, valid


@dataclass(frozen=True)
class Utterances:
    """Random features of ragged lengths, NaN in every padded place."""

    features: Tensor  # [B, T, F]
    lengths: Tensor  # [B]

    @classmethod
    def draw(cls, lengths: list[int], features: int, seed: int = 0) -> Utterances:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(len(lengths), max(lengths), features, generator=generator)
        real = torch.tensor(lengths)
        return cls(torch.where(valid(real, x.shape[1])[..., None], x, torch.nan), real)


def compare(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Assert that two tensors are finite and equal within ``tolerance`` of the larger one's root mean square."""
    assert ours.shape == theirs.shape, (
        f"{name}: shapes must agree, but are {list(ours.shape)} and {list(theirs.shape)}."
    )
    for x in (ours, theirs):
        assert bool(torch.isfinite(x).all()), f"{name}: all values must be finite, but some are NaN or infinite."
    if ours.numel() == 0:
        return
    scale = max(1.0, float(theirs.double().square().mean().sqrt()))
    worst = float((ours - theirs).abs().max()) / scale
    assert worst <= tolerance, f"{name}: must agree within {tolerance:g}, but differ by {worst:.3g}."


def run_stream(
    encoder: Any,
    said: Utterances,
    context: Context,
    *,
    chunks: int = 1,
    pause: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, State]:
    """Feed utterances ``chunks`` context chunks at a time, pausing streams at random; frames, lengths and last state.

    The streams of a batch drift apart with every pause, so each call sees a mixture of starts, of lengths, and of
    streams that are over; every place past a length holds NaN.
    """
    dice = random.Random(seed)
    step = chunks * context.latency() * encoder.stride
    total, position = said.lengths.tolist(), [0] * len(said.lengths)
    state = encoder.init_state(len(total), context=context)
    pieces: list[list[Tensor]] = [[] for _ in total]
    while any(p < t for p, t in zip(position, total, strict=True)):
        now = [0 if dice.random() < pause else min(step, t - p) for p, t in zip(position, total, strict=True)]
        chunk = said.features.new_full((len(total), step, said.features.shape[2]), torch.nan)
        for b, (p, n) in enumerate(zip(position, now, strict=True)):
            chunk[b, :n] = said.features[b, p : p + n]
        out, state = encoder.stream(chunk, torch.tensor(now), state, context=context)
        for b, n in enumerate(out.lengths.tolist()):
            pieces[b].append(out.frames[b, :n])
        position = [p + n for p, n in zip(position, now, strict=True)]
    rows = [torch.cat(piece) for piece in pieces]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(r) for r in rows]), state


def verify_stream(
    encoder: Any,
    *,
    features: int,
    context: Context | None = None,
    tolerance: float = 1e-5,
    long: bool = True,
) -> None:
    """Assert that an encoder streams what it encodes, in every way a server could ask of it.

    Whole against streamed at 1, 2 and 3 chunks a step, with ragged lengths and random pauses; NaN in every padded
    place; each utterance alone against all in a batch; streams that join and leave rows of NaN; a state that does not
    grow; gradients; and (``long``) more than 5,000 encoder frames. float32 within ``tolerance``.

    Args:
        encoder: a `speechkit.encoders.StreamingEncoder`; it is put into eval mode.
        features: F of its input.
        context: a finite context; the encoder's own unless given.

    Raises:
        AssertionError: with the first clause that does not hold.
    """
    encoder.eval()
    context = (context or encoder.context).streamable()
    step = context.latency() * encoder.stride
    lengths = [5 * step + 3, 9 * step, 1, 7 * step + step // 2, 2 * step + encoder.stride, 6 * step - 1]
    said = Utterances.draw(lengths, features)
    with torch.no_grad():
        whole = encoder.forward(said.features, said.lengths, context=context)
        expected = keep_valid(whole.frames, whole.lengths)
        _verify_divisions(encoder, said, context, expected, whole.lengths, tolerance)
        _verify_alone(encoder, said, context, expected, whole.lengths, tolerance)
        _verify_rows(encoder, said, context, expected, whole.lengths, tolerance)
        if long:
            _verify_long(encoder, features, context, tolerance)
    _verify_gradients(encoder, said, context, 10 * tolerance)


def _verify_divisions(
    encoder: Any, said: Utterances, context: Context, expected: Tensor, lengths: Tensor, tolerance: float
) -> None:
    sizes = set()
    for chunks, pause in ((1, 0.0), (2, 0.0), (3, 0.0), (1, 0.4), (2, 0.3)):
        name = f"streamed {chunks} chunk(s) a step, pausing {pause:.0%}, against whole"
        frames, streamed, state = run_stream(encoder, said, context, chunks=chunks, pause=pause, seed=chunks)
        assert streamed.tolist() == lengths.tolist(), (
            f"{name}: lengths must be {lengths.tolist()}, but are {streamed.tolist()}."
        )
        compare(name, frames, expected[:, : frames.shape[1]], tolerance)
        sizes.add(state_bytes(state))
    sizes.add(state_bytes(encoder.init_state(len(lengths), context=context)))
    assert len(sizes) == 1, f"the state must keep its size, but took {sorted(sizes)} bytes."


def _verify_alone(
    encoder: Any, said: Utterances, context: Context, expected: Tensor, lengths: Tensor, tolerance: float
) -> None:
    for b, (t, u) in enumerate(zip(said.lengths.tolist(), lengths.tolist(), strict=True)):
        alone = encoder.forward(said.features[b : b + 1, :t], said.lengths[b : b + 1], context=context)
        compare(f"utterance {b} alone against in a batch", alone.frames[0, :u], expected[b, :u], tolerance)


def _verify_rows(
    encoder: Any, said: Utterances, context: Context, expected: Tensor, lengths: Tensor, tolerance: float
) -> None:
    """Two rows serve all utterances: a row that is free holds NaN, in its input and in its state."""
    step = context.latency() * encoder.stride
    waiting = list(range(len(lengths)))
    rows: list[list[int] | None] = [None, None]  # utterance and position
    heard: dict[int, list[Tensor]] = {b: [] for b in waiting}
    state = put(encoder.init_state(2, context=context), [0, 1], _poisoned(encoder, 2, context))
    tick = 0
    while waiting or any(rows):
        for row in range(2):
            if rows[row] is None and waiting and (row == 0 or tick > 1):
                state = put(state, [row], encoder.init_state(1, context=context))
                rows[row] = [waiting.pop(0), 0]
        chunk, now = said.features.new_full((2, step, said.features.shape[2]), torch.nan), [0, 0]
        for row, live in enumerate(rows):
            if live is not None:
                b, p = live
                now[row] = min(step, int(said.lengths[b]) - p)
                chunk[row, : now[row]] = said.features[b, p : p + now[row]]
        out, state = encoder.stream(chunk, torch.tensor(now), state, context=context)
        for row, live in enumerate(rows):
            if live is None:
                continue
            heard[live[0]].append(out.frames[row, : int(out.lengths[row])])
            live[1] += now[row]
            if live[1] == int(said.lengths[live[0]]):
                rows[row] = None
                state = put(state, [row], _poisoned(encoder, 1, context))
        tick += 1
    for b, pieces in heard.items():
        frames = torch.cat(pieces)
        compare(f"utterance {b} in a row that others left", frames, expected[b, : len(frames)], tolerance)


def _poisoned(encoder: Any, batch: int, context: Context) -> State:
    """A state of which every floating-point number is NaN."""

    def poison(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(poison, x))
        if isinstance(x, dict):
            return {key: poison(value) for key, value in x.items()}
        return torch.full_like(x, torch.nan) if isinstance(x, Tensor) and x.is_floating_point() else x

    return poison(encoder.init_state(batch, context=context))


def _verify_long(encoder: Any, features: int, context: Context, tolerance: float) -> None:
    """Past 5,000 encoder frames, where tables of positions end in other toolkits, and past a neighbour's end."""
    step = context.latency() * encoder.stride
    chunks = 5000 // context.latency() + 2
    said = Utterances.draw([chunks * step + 1, 3 * step], features, seed=1)
    whole = encoder.forward(said.features, said.lengths, context=context)
    frames, lengths, _ = run_stream(encoder, said, context, chunks=max(1, 256 // context.latency()))
    assert lengths.tolist() == whole.lengths.tolist(), (
        f"long streams: lengths must be {whole.lengths}, but are {lengths}."
    )
    expected = keep_valid(whole.frames, whole.lengths)
    compare(f"a stream of {int(lengths[0])} encoder frames against whole", frames, expected, tolerance)


def _verify_gradients(encoder: Any, said: Utterances, context: Context, tolerance: float) -> None:
    """The same weights receive the same gradients, so what a stream hears is what training teaches."""
    parameters = dict(encoder.named_parameters())

    def gradients(frames: Tensor) -> dict[str, Tensor]:
        weights = torch.linspace(-1, 1, frames.shape[-1])
        found = torch.autograd.grad((frames * weights).square().sum(), list(parameters.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}

    whole = encoder.forward(said.features, said.lengths, context=context)
    expected = gradients(keep_valid(whole.frames, whole.lengths))
    streamed = gradients(run_stream(encoder, said, context, chunks=2, pause=0.3)[0])
    size = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in streamed.items():
        compare(f"gradient of {name}, streamed against whole", gradient / size, expected[name] / size, tolerance)
