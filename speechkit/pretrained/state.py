"""The state of a training as one file: tensors by safetensors, everything else as JSON in its header; no pickle.

A file is written beside its place, forced to the disk and then renamed, so at any moment there is a whole state or
none: a killed process or a full disk leaves the earlier one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from speechkit.files import replacing, to_disk

SUFFIX = ".safetensors"


class StateIO(CheckpointIO):
    """Lightning's checkpoints as state files: ``Trainer(plugins=[StateIO()])``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_state(path, checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_state(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def write_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a state, atomically.

    Args:
        path: the file.
        state: mappings, lists and tuples of tensors, numbers, texts, booleans and ``None``.

    Raises:
        ValueError: where it cannot be written; what was there before is untouched.
    """
    path, tensors = Path(path), dict[str, Tensor]()
    structure = json.dumps(_pack(state, tensors, ""))
    try:
        with replacing(path) as draft:
            save_file(tensors, draft, metadata={"structure": structure})
            to_disk(draft)
        to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} must be written, but the disk refused ({error}); earlier states are untouched: "
            f"make room, and the same command continues from the last one."
        ) from error


def read_state(path: str | Path) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU.

    Raises:
        ValueError: where the file is not a whole state.
    """
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})["structure"])
            return _unpack(structure, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} must be a training state, but cannot be read ({error}); delete it to continue from an earlier one."
        ) from error


def average(paths: Sequence[str | Path]) -> dict[str, Tensor]:
    """The mean of the weights of several states; what is not floating point (a counter) is that of the first."""
    first, *others = (read_state(path)["state_dict"] for path in paths)
    for name, weight in first.items():
        if weight.is_floating_point():
            mean = torch.stack([weight.double(), *(other[name].double() for other in others)]).mean(0)
            first[name] = mean.to(weight.dtype)
    return first


# JSON knows lists, texts as keys, and no tensors: the rest is an object with one of these keys.
_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """``value`` as JSON; its tensors go into ``tensors`` under the path that leads to them."""
    if isinstance(value, Tensor):
        # A copy each, since safetensors refuses tied weights.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _pack(item, tensors, f"{name}/{key}") for key, item in value.items()}
        return {_ITEMS: [[key, _pack(item, tensors, f"{name}/{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_pack(item, tensors, f"{name}/{number}") for number, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"A training state holds tensors, numbers and texts, but {name} is a {type(value).__name__}.")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unpack(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {key: _unpack(item, tensors) for key, item in value[_ITEMS]}
    return {key: _unpack(item, tensors) for key, item in value.items()}
