"""Reading weights: safetensors in one file or in several, and held against the module that is to take them."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX = f"{WEIGHTS}.index.json"  # says in which of several files a tensor is, where a model is too large for one
PICKLES = (".pth", ".pt", ".bin")
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


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file: safetensors, or a pickle that torch opens without running anything in it.

    Raises:
        ValueError: where it is missing, damaged, or holds anything but tensors by name.
    """
    if not path.is_file():
        raise ValueError(f"{path} must be a checkpoint, but does not exist; check the path.")
    if path.suffix not in PICKLES:
        return _read(path)
    try:
        with torch.serialization.safe_globals([Namespace]):  # options of a command line, which some keep beside it
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle end in whatever their opcodes come to
        raise ValueError(
            f"{path} must hold tensors and nothing else, but cannot be opened so ({type(error).__name__}); copy it "
            f"again, or convert it to safetensors where you trust it."
        ) from error
    found = found.get("model", found) if isinstance(found, Mapping) else found  # an envelope, as DeiT's are in
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{path} must hold tensors by name, but holds {type(found).__name__}; load another file.")
    return dict(found)


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
    if faults := put(module, weights, names):
        raise ValueError(
            f"{folder / WEIGHTS} must hold the weights of the model that {CONFIG} beside it describes, but {faults}; "
            f"it is of another model: put the {CONFIG} beside it that it was saved with."
        )


def put(module: nn.Module, weights: Mapping[str, Tensor], names: Mapping[str, str] | None = None) -> str:
    """As `fill`, but say what does not fit, in place of putting anything; nothing to say is the empty string."""
    wanted = module.state_dict()
    names = names or {name: name for name in wanted}
    faults = _misfit({names[name]: tensor for name, tensor in wanted.items()}, weights)
    if not faults:
        module.load_state_dict({name: weights[names[name]] for name in wanted})
    return faults


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


def _misfit(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    missing = [name for name in wanted if name not in weights]
    surplus = [name for name in weights if name not in wanted]
    resized = [
        f"{name} {list(weights[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    found = [("lacks", missing), ("has the unknown", surplus), ("has the wrong sizes", resized)]
    return ", and ".join(f"{what} {some(names)}" for what, names in found if names)
