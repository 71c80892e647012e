"""Reading weights: safetensors in one file or in several, and held against the module that is to take them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX = f"{WEIGHTS}.index.json"  # says in which of several files a tensor is, where a model is too large for one
SHOWN = 8  # keys named in one sentence


def holds_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder that `holds_weights`.

    Raises:
        ValueError: where a file is missing, damaged or a pickle.
    """
    files = [WEIGHTS] if (folder / WEIGHTS).is_file() else _listed(folder / INDEX)
    return {name: tensor for file in files for name, tensor in _read(folder / file).items()}


def fill(
    module: nn.Module, weights: Mapping[str, Tensor], folder: Path, names: Mapping[str, str] | None = None
) -> None:
    """Put every tensor of ``weights`` into ``module``.

    Args:
        folder: where they are from, for the message.
        names: what ``weights`` calls each tensor of the module; the same unless given.

    Raises:
        ValueError: with the tensors that are missing, unknown or of another size, as ``weights`` calls them.
    """
    wanted = module.state_dict()
    names = names or {name: name for name in wanted}
    _refuse_misfit({names[name]: tensor for name, tensor in wanted.items()}, weights, folder / WEIGHTS)
    module.load_state_dict({name: weights[names[name]] for name in wanted})


def some(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _listed(index: Path) -> list[str]:
    try:
        files = sorted({Path(file).name for file in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} must name the file of every tensor in its weight_map, but does not ({error!r}); copy it again."
        ) from error
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise ValueError(
            f"{index.parent} must hold every file that {index.name} lists, but lacks {some(missing)}; copy it again."
        )
    return files


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        if _is_pickle(path):
            raise ValueError(
                f"{path} must be a safetensors file, but is a Python pickle, which can run any code when it is opened; "
                f"get the safetensors file from its author, or convert it where you trust it."
            ) from error
        raise ValueError(
            f"{path} must be a whole safetensors file, but is damaged or cut short at {path.stat().st_size} bytes "
            f"({error}); copy it again."
        ) from error


def _is_pickle(path: Path) -> bool:
    """A safetensors file can begin with the byte of a pickle, because it begins with a length; then comes a brace."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start.startswith(b"PK\x03\x04") or (start.startswith(b"\x80") and start[8:] != b"{")


def _refuse_misfit(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path) -> None:
    missing = [name for name in wanted if name not in weights]
    surplus = [name for name in weights if name not in wanted]
    resized = [
        f"{name} {list(weights[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    found = [("lacks", missing), ("has the unknown", surplus), ("has the wrong sizes", resized)]
    faults = ", and ".join(f"{what} {some(names)}" for what, names in found if names)
    if faults:
        raise ValueError(
            f"{path} must hold the weights of the model that {CONFIG} beside it describes, but {faults}; "
            f"it is of another model: put the {CONFIG} beside it that it was saved with."
        )
