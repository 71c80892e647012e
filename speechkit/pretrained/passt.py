"""PaSST (2110.05069): checkpoints of the original repository, for `speechkit.encoders.AST`.

It is an AST with a vector for each column of patches plus one for each row. What differs from the original:

* **Features.** The original mirrors a recording at both ends, see `speechkit.features.CentredMel`.
* **Short clips** have the middle of the vectors for time, the original the first ones when it tags, and any run of them
  in training. Longer ones have interpolated vectors, where the original leaves out what is too long.
* The second classifier, of the distillation token alone, is left out: the original does not use it either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from speechkit.encoders.ast import SeparatePositions
from speechkit.features import CentredMel, FrontEnd, GlobalNorm
from speechkit.heads import Summary
from speechkit.pretrained import ast, foreign
from speechkit.pretrained.foreign import Node, Weights, factory, node
from speechkit.pretrained.weights import tensors_of
from speechkit.tagger import Tagger

TIME, FREQUENCY = "time_new_pos_embed", "freq_new_pos_embed"
POSITIONS = {"positions.tokens": "new_pos_embed", "positions.time": TIME, "positions.frequency": FREQUENCY}
LAYOUT = replace(ast.TIMM, front={**ast.TIMM.front, **POSITIONS}, head={"norm": "head.0", "linear": "head.1"})
UNUSED = "head_dist."
STRIDES = {12: 10, 10: 12, 9: 14, 8: 16}  # of a patch of 16, by the rows there are in 128 bands


def recognises(weights: Weights) -> bool:
    """Whether a file is of this repository."""
    return {TIME, FREQUENCY} <= weights.keys()


def load_original(path: str | Path, *, labels: Sequence[str] | None = None) -> Tagger:
    """The tagger of a checkpoint.

    Args:
        path: a ``.pt`` file.
        labels: names of the classes; their numbers unless given.

    Raises:
        ValueError: where the file is not only tensors, they are of another model, or ``labels`` are too few or many.
    """
    path = Path(path)
    weights = tensors_of(path)
    found = describe_original(path, weights)
    columns, encoder = weights[TIME].shape[-1], found["encoder"]
    head = {
        "head": factory(Summary),
        "labels": ast.named(path, len(weights.get("head.1.bias", ())), labels),
        "frames": encoder["patch"] + columns * encoder["stride"] - 1,  # the most that are so many columns
    }
    tagger = foreign.built(found | head)
    kept = {name: _ours(name, weight) for name, weight in weights.items() if not name.startswith(UNUSED)}
    if faults := ast.put_timm(tagger, kept, LAYOUT):
        raise ValueError(f"{path} must hold a PaSST, but {faults}; load another file.")
    return tagger.eval()


def describe_original(path: Path, weights: Weights) -> Node:
    """Features and encoder of a checkpoint.

    Raises:
        ValueError: where it has another number of rows of patches than any that was published.
    """
    columns, rows = weights[TIME].shape[-1], weights[FREQUENCY].shape[-2]
    if rows not in STRIDES:
        raise ValueError(
            f"{path} must hold a PaSST with {', '.join(map(str, STRIDES))} rows of patches, as 128 bands give, but has "
            f"{rows}; load another file."
        )
    stride = STRIDES[rows]
    front = node(FrontEnd, mel=node(CentredMel), norm=node(GlobalNorm, dim=128, mean=-4.5, std=5.0))
    sizes: dict[str, Any] = {"frames": 16 + (columns - 1) * stride, "stride": stride}
    encoder = ast.shaped(path, weights, "", **sizes, positions=factory(SeparatePositions))
    return {"features": front, "encoder": encoder}


def _ours(name: str, weight: Tensor) -> Tensor:
    """A tensor of theirs in the shape of ours: positions have the width last."""
    if name in (TIME, FREQUENCY):
        return weight.flatten(1)[0].unflatten(0, (weight.shape[1], -1)).T.contiguous()
    return weight.flatten(0, 1) if name == "new_pos_embed" else weight
