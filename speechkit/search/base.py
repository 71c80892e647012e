"""What all searches share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import nn

from speechkit.types import EncoderOutput, Hypothesis

Beam = list[Hypothesis]  # best first


class Search(Protocol):
    """How a transcript is found; built as ``search(objective)``.

    A state is a list with one item a stream, so `speechkit.stream.take` and `put` move streams in and out; the items
    are values, never changed in place. A stream of length 0 is paused, and the same frames give the same hypotheses in
    whatever steps they come.

    What `step` returns is alive: the final result begins like one of its hypotheses. Their number may be 0, for a
    search that says nothing before the end. `finish` returns at least one hypothesis a stream.
    """

    def init_state(self, batch: int) -> list[Any]: ...

    def step(self, encoded: EncoderOutput, state: list[Any]) -> tuple[list[Beam], list[Any]]: ...

    def finish(self, state: list[Any]) -> list[Beam]: ...

    def __call__(self, encoded: EncoderOutput) -> list[Beam]: ...


class Whole:
    """Searching whole utterances, for a search that streams."""

    def __call__(self: Search, encoded: EncoderOutput) -> list[Beam]:
        """The hypotheses of whole utterances: one step from a fresh state, then the end."""
        return self.finish(self.step(encoded, self.init_state(len(encoded.lengths)))[1])


def stable_prefix(hypotheses: Sequence[Hypothesis]) -> int:
    """How many leading tokens can no longer change: those that all living hypotheses share.

    Sound because every search only ever extends what is alive; for `Greedy`, which holds one hypothesis, it is all
    of its tokens, for a search that says nothing before the end it is 0.
    """
    if not hypotheses:
        return 0
    # What the first and the last in lexical order share, all between them share too.
    first, last = min(h.tokens for h in hypotheses), max(h.tokens for h in hypotheses)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def best_first(hypotheses: Iterable[Hypothesis]) -> Beam:
    return sorted(hypotheses, key=lambda hypothesis: hypothesis.score, reverse=True)


def head(objective: Any, name: str, search: Any) -> Any:
    """The head ``name`` of an objective, for a search that cannot do without.

    Raises:
        ValueError: where the objective lacks it.
    """
    found = getattr(objective, name, None)
    if isinstance(found, nn.Module):
        return found
    other = {"ctc": "AttentionBeam", "attention": "Greedy or PrefixBeam"}[name]
    raise ValueError(
        f"{type(search).__name__} needs an objective with a head '{name}', but {type(objective).__name__} has none; "
        f"search with {other}, or train with objective=hybrid."
    )


def check(search: Any, *, beam: int, ctc_weight: float = 0.0) -> None:
    """Refuse a beam without hypotheses and a weight that is no share.

    Raises:
        ValueError: naming the argument.
    """
    name = type(search).__name__
    if beam < 1:
        raise ValueError(f"{name}.beam must be at least 1 hypothesis, but is {beam}; 8 is a good start.")
    if not 0 <= ctc_weight <= 1:
        raise ValueError(f"{name}.ctc_weight must be from 0 to 1, but is {ctc_weight}; 0.3 is a good start.")
