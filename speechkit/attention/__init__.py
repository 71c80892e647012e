"""Attention mechanisms: objects that are passed in, never names that are compared.

To write your own, take the cheapest of three ways:

* a `Pattern`, 3 to 10 lines: which keys of those the context shows are looked at (`speechkit.attention.patterns`);
* a `ScoreTerm`, 10 to 40 lines: how positions enter the score (`speechkit.attention.positions`);
* an `AttentionMechanism`, 40 to 120 lines: a different computation (`Softmax` is one).

Then add one YAML to ``conf/attention``; the streaming contract runs it inside every streaming encoder.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from speechkit.attention.attend import Pattern, attend
from speechkit.attention.positions import AbsoluteKey, Alibi, RelativePosition, Rotary, ScoreTerm, sinusoid
from speechkit.attention.softmax import Softmax
from speechkit.stream import Context, Span, State


@runtime_checkable
class AttentionMechanism(Protocol):
    """One per layer, built as ``mechanism(dim=, heads=)``."""

    def init_state(self, batch: int, context: Context) -> State:
        """What a stream remembers; ``context`` is finite."""
        ...

    def forward(
        self, x: Float[Tensor, "B U D"], span: Span, state: State | None = None
    ) -> tuple[Float[Tensor, "B U D"], State | None]:
        """Outputs and the next state; ``state=None`` starts fresh and remembers nothing."""
        ...


__all__ = [
    "AbsoluteKey",
    "Alibi",
    "AttentionMechanism",
    "Pattern",
    "RelativePosition",
    "Rotary",
    "ScoreTerm",
    "Softmax",
    "attend",
    "sinusoid",
]
