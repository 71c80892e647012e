"""Audio-MAE (2207.06405): checkpoints of the original repository, for `speechkit.encoders.AST`.

An AST of patches that do not overlap, with a class token alone. A pretrained file is an encoder, its decoder being left
out; a fine-tuned one is a tagger whose head takes the mean of all patches before any norm. Columns and rows of patches
are already as ours. The original also subtracts the mean of each recording, see `speechkit.pretrained.ast`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from speechkit.heads import Mean
from speechkit.pretrained import ast, foreign
from speechkit.pretrained.foreign import Node, Weights, factory
from speechkit.pretrained.weights import tensors_of

LAYOUT = replace(ast.TIMM, head={"norm": "fc_norm", "linear": "head"}, by_column=True)
DECODER = ("decoder_", "mask_token")
BANDS = 128


def recognises(weights: Weights) -> bool:
    """Whether a file is of this repository: a vision transformer without distillation that hears one channel."""
    patches = weights.get(ast.IMAGE_PATCHES)
    return patches is not None and patches.dim() == 4 and patches.shape[1] == 1 and "dist_token" not in weights


def load_original(path: str | Path, *, labels: Sequence[str] | None = None) -> Any:
    """The encoder of a pretrained checkpoint, or the tagger of a fine-tuned one.

    Args:
        path: a ``.pth`` file.
        labels: names of the classes of a tagger; their numbers unless given.

    Raises:
        ValueError: where the file is not only tensors, they are of another model, or ``labels`` are too few or many.
    """
    path = Path(path)
    weights = {name: weight for name, weight in tensors_of(path).items() if not name.startswith(DECODER)}
    found = describe_original(path, weights)
    if "head.bias" in weights:
        found |= {
            "head": factory(Mean, eps=1e-6),
            "labels": ast.named(path, len(weights["head.bias"]), labels),
            "frames": found["encoder"]["frames"],
            "filled": True,
        }
    model = foreign.built(found)
    if faults := ast.put_timm(model, weights, LAYOUT):
        raise ValueError(f"{path} must hold an Audio-MAE of {BANDS} mel bands, but {faults}; load another file.")
    return model.eval()


def describe_original(path: Path, weights: Weights) -> Node:
    """Features and encoder of a checkpoint."""
    patches, table = weights[ast.IMAGE_PATCHES], weights.get("pos_embed")
    patch = patches.shape[-1]
    frames = patch if table is None else (table.shape[1] - 1) // (BANDS // patch) * patch
    encoder = ast.shaped(
        path, weights, "", frames=frames, stride=patch, features=BANDS, tokens=1, normed="norm.weight" in weights
    )
    return {"features": ast.front_node(mean=ast.AUDIOSET["mean"], std=ast.AUDIOSET["std"]), "encoder": encoder}
