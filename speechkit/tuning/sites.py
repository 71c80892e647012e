"""Where in an encoder a method can act: its blocks, and in them attention, feed-forward, convolution and linear maps.

Found by what an encoder is made of and how its parts are named, ours and those of transformers alike, so that a method
is written once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn

from speechkit.attention import ScoreTerm

Kind = Literal["attention", "feed_forward", "convolution"]
NAMES: dict[str, tuple[str, ...]] = {
    "attention": ("attention", "attn"),
    "feed_forward": ("feed", "ffn", "mlp", "fc"),
    "convolution": ("conv",),
}


class Site(NamedTuple):
    """A part of a block: ``getattr(block, name) is part``."""

    block: nn.Module
    name: str
    part: Any

    def replace(self, part: nn.Module) -> None:
        setattr(self.block, self.name, part)

    @property
    def dim(self) -> int:
        """Width of the frames that go in."""
        return next(maps(self.part))[1].in_features


def blocks(encoder: nn.Module) -> nn.ModuleList:
    """The blocks of an encoder, from the one that is heard first: its longest list of modules that have attention.

    Raises:
        ValueError: where there is none.
    """
    lists = [part for part in encoder.modules() if isinstance(part, nn.ModuleList) and all(map(_attends, part))]
    longest = max(lists, key=len, default=nn.ModuleList())
    if not longest:
        raise ValueError(
            f"A fine-tuning method must find blocks with attention in an encoder, but {type(encoder).__name__} has no "
            f"list of such; train all of it with tuning=none, or none of it with tuning=linear_probe."
        )
    return longest


def sites(encoder: nn.Module, kinds: Sequence[Kind]) -> list[Site]:
    """All attention, feed-forward or convolution modules of the blocks, in order.

    Raises:
        ValueError: where one kind is not there.
    """
    found = []
    for kind in kinds:
        of_kind = [site for block in blocks(encoder) for site in _sites(block, kind)]
        if not of_kind:
            raise ValueError(
                f"tuning.where must name parts that the blocks of {type(encoder).__name__} have as modules of their "
                f"own, but these have no {kind}; leave it out of tuning.where."
            )
        found += of_kind
    return found


def maps(part: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Linear]]:
    """The linear maps inside a part, by name; without those of positions, whose weights are read and not called."""
    if isinstance(part, nn.Linear):
        yield name, part
    elif not isinstance(part, ScoreTerm):
        for key, child in part.named_children():
            yield from maps(child, f"{name}.{key}" if name else key)


def targets(encoder: nn.Module, kinds: Sequence[Kind]) -> list[str]:
    """The full names of all linear maps of these kinds.

    Raises:
        ValueError: where there is none.
    """
    names = {id(part): name for name, part in encoder.named_modules()}
    parts = [child for block in blocks(encoder) for kind in kinds for child in _named(block, kind)]
    found = [names[id(linear)] for part in parts for _, linear in maps(part)]
    if not found:
        raise ValueError(
            f"tuning.where must name parts of {type(encoder).__name__} with linear maps, but {', '.join(kinds)} have "
            f"none; choose from {', '.join(NAMES)}."
        )
    return found


def depths(encoder: nn.Module) -> tuple[dict[str, int], int]:
    """How deep each weight lies, by name, and the greatest depth there is.

    What comes before the blocks has depth 0, block i has i + 1, what comes after them one more than the last.
    """
    known = {id(p): number for number, block in enumerate(blocks(encoder), 1) for p in block.parameters()}
    top, seen, found = len(blocks(encoder)) + 1, False, {}
    for name, parameter in encoder.named_parameters():
        seen = seen or id(parameter) in known
        found[name] = known.get(id(parameter), top if seen else 0)
    return found, top


def _sites(block: nn.Module, kind: Kind) -> list[Site]:
    """A feed-forward is both of its maps: where they lie loose in the block, there is no module to put around."""
    least = 2 if kind == "feed_forward" else 1
    named = [(name, part) for name, part in block.named_children() if _is(name, kind)]
    return [Site(block, name, part) for name, part in named if len(list(maps(part))) >= least]


def _named(block: nn.Module, kind: Kind) -> list[nn.Module]:
    return [part for name, part in block.named_children() if _is(name, kind)]


def _attends(block: nn.Module) -> bool:
    return bool(_sites(block, "attention"))


def _is(name: str, kind: Kind) -> bool:
    return any(part in name.lower() for part in NAMES[kind])
