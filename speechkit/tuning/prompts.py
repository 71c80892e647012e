"""Learned frames, and learned keys and values, that a frozen encoder attends to beside what it hears."""

from __future__ import annotations

import inspect

import torch
from jaxtyping import Float
from torch import Tensor, nn

from speechkit.attention import Softmax
from speechkit.stream import Span, State
from speechkit.tuning.base import Around, Tuning
from speechkit.tuning.sites import Site, blocks, sites

Frames = Float[Tensor, "B U D"]


class Prompts(Tuning):
    """Learned frames before what a block hears (visual prompt tuning, 2203.12119, section 3.2).

    For encoders of whole utterances: in one that streams, frames have their place in time.

    Args:
        count: frames.
        deep: every block has frames of its own, which are dropped behind it; else the first block's go through all.
    """

    def __init__(self, *, count: int = 20, deep: bool = True) -> None:
        self.count, self.deep = count, deep

    def adapt(self, encoder: nn.Module) -> None:
        all_blocks = blocks(encoder)
        if set(inspect.signature(all_blocks[0].forward).parameters) != {"x", "span"}:
            raise ValueError(
                f"Prompts must be given to blocks that hear a whole utterance as frames and a span, as those of AST, "
                f"but {type(encoder).__name__} has {type(all_blocks[0]).__name__}; take tuning=gated_prefix."
            )
        dim = sites(encoder, ["attention"])[0].dim
        for number, block in enumerate(list(all_blocks)):
            own = self.deep or number == 0
            last = self.deep or number == len(all_blocks) - 1
            all_blocks[number] = Prompted(block, count=self.count, dim=dim if own else None, keep=not last)


class Prompted(Around):
    """A block that hears prompts: its own, with ``dim``, or those that are there already.

    Args:
        keep: whether they are left for the next block.
    """

    def __init__(self, block: nn.Module, *, count: int, dim: int | None, keep: bool) -> None:
        super().__init__(block)
        self.count, self.keep = count, keep
        self.prompts = None if dim is None else nn.Parameter(torch.randn(count, dim) * 0.02)

    def forward(self, x: Frames, span: Span) -> Frames:
        if self.prompts is not None:
            x = torch.cat([self.prompts.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        y = self.part(x, span._replace(lengths=span.lengths + self.count))
        return y if self.keep else y[:, self.count :]


class Prefix(Tuning):
    """Learned keys and values before those of every attention, under one softmax with them (2101.00190, section 4).

    For encoders of whole utterances: in one that streams they would fall out of sight with the first frames.

    Args:
        count: keys of each attention.
    """

    def __init__(self, *, count: int = 20) -> None:
        self.count = count

    def adapt(self, encoder: nn.Module) -> None:
        for site in _softmax(encoder, "Prefix"):
            if type(site.part) is not Softmax:
                raise ValueError(
                    f"Prefix must know all that an attention does, but {type(encoder).__name__} has "
                    f"{type(site.part).__name__}; take tuning=gated_prefix."
                )
            if hasattr(encoder, "context"):
                raise ValueError(
                    f"Prefix must be in an encoder of whole utterances, but {type(encoder).__name__} can be told to "
                    f"see less; take tuning=gated_prefix."
                )
            site.replace(Prefixed(site.part, self.count))


class Prefixed(Around):
    """Softmax attention to its own frames and to learned keys, which stand before the first of them."""

    def __init__(self, part: Softmax, count: int) -> None:
        super().__init__(part)
        self.keys = nn.Parameter(torch.randn(count, part.kv_heads, part.width) * 0.02)
        self.values = nn.Parameter(torch.randn(count, part.kv_heads, part.width) * 0.02)

    def forward(self, x: Frames, span: Span, state: State | None = None) -> tuple[Frames, None]:
        part: Softmax = self.part
        q, k, v = part._project(x)
        q, k = part.position.place(q, k, span.positions(x.shape[1]))
        k, v = (
            torch.cat([first.to(x.dtype).expand(len(x), -1, -1, -1), then], dim=1)
            for first, then in ((self.keys, k), (self.values, v))
        )
        y, _ = part._attend(q, k, v, span.positions(x.shape[1]), span._replace(start=span.start + len(self.keys)), None)
        return part.out(y.flatten(2)), None


class GatedPrefix(Tuning):
    """Learned frames that every attention looks at by a softmax of their own, behind a gate that begins shut.

    The zero-initialised attention of LLaMA-Adapter (2303.16199, section 3.2), one gate a head. Each frame looks by
    itself, so a stream gives what the whole utterance does, with any context.

    Args:
        count: frames of each attention.
    """

    def __init__(self, *, count: int = 20) -> None:
        self.count = count

    def adapt(self, encoder: nn.Module) -> None:
        for site in _softmax(encoder, "GatedPrefix"):
            site.replace(Gated(site.part, self.count, site.dim))


class Gated(Around):
    """Softmax attention, plus what its queries find in learned frames, passed on through its own maps."""

    def __init__(self, part: Softmax, count: int, dim: int) -> None:
        super().__init__(part)
        self.prompts = nn.Parameter(torch.randn(1, count, dim))
        self.gate = nn.Parameter(torch.zeros(part.heads, 1))

    def forward(self, x: Frames, span: Span, state: State | None = None) -> tuple[Frames, State | None]:
        y, state = self.part(x, span, state)
        return y + self._found(x), state

    def _found(self, x: Frames) -> Frames:
        part: Softmax = self.part
        group = part.heads // part.kv_heads
        q = part.query(x).unflatten(-1, (part.heads, part.width))  # [B, U, H, K]
        k, v = (
            said(self.prompts)[0].unflatten(-1, (part.kv_heads, part.width)).repeat_interleave(group, 1)
            for said in (part.key, part.value)
        )  # [P, H, K]
        weights = (torch.einsum("buhk,phk->buhp", q, k) * part.width**-0.5).softmax(-1)
        found = torch.einsum("buhp,phk->buhk", weights, v) * self.gate.tanh()
        nothing = x.new_zeros(1, 1, part.heads * part.width)
        return part.out(found.flatten(2)) - part.out(nothing)  # without the bias, which was added once already


def _softmax(encoder: nn.Module, method: str) -> list[Site]:
    found = sites(encoder, ["attention"])
    for site in found:
        if not isinstance(site.part, Softmax):
            raise ValueError(
                f"{method} must find speechkit.attention.Softmax in the blocks of an encoder, but "
                f"{type(encoder).__name__} has {type(site.part).__name__}; take tuning=lora or tuning=bottleneck."
            )
    return found
