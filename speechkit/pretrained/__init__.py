"""Model folders: ``model.safetensors``, ``config.json`` (the config's ``model`` node) and the tokenizer's files.

Nothing in them is code and nothing is unpickled, so a downloaded one is safe to load: `speechkit.config` builds only
what its allow-list names.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from speechkit.config import build_model, plain
from speechkit.recogniser import Recogniser
from speechkit.text import load_tokenizer

WEIGHTS, CONFIG = "model.safetensors", "config.json"
SHOWN = 8  # keys named in one sentence


def save(recogniser: Recogniser, config: Mapping[str, Any], folder: str | Path) -> None:
    """Write a model folder, all of it or nothing.

    It is written beside its place and renamed, so that a full disk or a killed process leaves the earlier one.

    Args:
        config: the ``model`` node the recogniser was built from.
        folder: is replaced, if it holds a model and nothing else.

    Raises:
        ValueError: where the folder holds other files, or the disk refuses; the earlier model is untouched.
    """
    folder = Path(folder)
    draft = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write(recogniser, config, draft)
        _replace(folder, draft)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder} must be written in full, but the disk refused ({error}); the model that was there before is "
            f"untouched: make room, or choose another folder."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(folder: str | Path) -> Recogniser:
    """The recogniser of a model folder, or of a run (whose model is in ``RUN/model``), on the CPU, ready to use.

    Raises:
        ValueError: where there is none, where a file is damaged or a pickle, or where the weights are of another model.
    """
    home = model_folder(folder)
    recogniser = _described(home)
    weights = _weights(home / WEIGHTS)
    _refuse_misfit(recogniser.state_dict(), weights, home / WEIGHTS)
    recogniser.load_state_dict(weights)
    return recogniser.eval()


def model_folder(folder: str | Path) -> Path:
    """The folder that `load` reads: the one given, or the model of the run given.

    Raises:
        ValueError: where neither holds a model.
    """
    folder = Path(folder)
    for home in (folder, folder / "model"):
        for found in (home, _aside(home)):
            if (found / WEIGHTS).is_file():
                return found
    if not folder.exists():
        what = "does not exist; check the path, or train one with: speechkit train CONFIG"
    elif folder.is_dir():
        what = f"holds no {WEIGHTS}; a run has one after its first evaluation on dev"
    else:
        what = f"is a file; name the folder around it, which must hold {WEIGHTS} and {CONFIG}"
    raise ValueError(f"{folder} must be a model folder or a run, but {what}.")


def _aside(folder: Path) -> Path:
    """Where the earlier model waits while the new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def _write(recogniser: Recogniser, config: Mapping[str, Any], folder: Path) -> None:
    # A copy each, since safetensors refuses tied weights.
    weights = {
        name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in recogniser.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(plain(config), indent=2) + "\n", encoding="utf-8")
    recogniser.tokenizer.save(folder)
    for file in folder.iterdir():
        with open(file, "rb") as written:
            os.fsync(written)


def _replace(folder: Path, draft: Path) -> None:
    old = _aside(folder)
    if old.exists() and not folder.exists():  # a process was killed between the two renames below
        old.rename(folder)
    _refuse_others(folder, draft)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_others(folder: Path, draft: Path) -> None:
    others = sorted({f.name for f in folder.iterdir()} - {f.name for f in draft.iterdir()}) if folder.exists() else []
    if others:
        raise ValueError(
            f"{folder} must hold a model and nothing else to be replaced, but holds {_some(others)}; "
            f"choose another folder, or move that elsewhere."
        )


def _described(folder: Path) -> Recogniser:
    """The recogniser that config and tokenizer describe, with weights that mean nothing yet."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds {config!r:.40}")
        return build_model(config, tokenizer=load_tokenizer(folder))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} must be what save() wrote, but no model can be built from it ({str(error).rstrip('.')}); "
            f"copy the model folder again."
        ) from error


def _weights(path: Path) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        start = file.read(4)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        raise ValueError(
            f"{path} must be a safetensors file, but is a Python pickle, which can run any code when it is opened; "
            f"get the safetensors file from its author, or convert it where you trust it."
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, but is damaged or cut short at {path.stat().st_size} bytes "
            f"({error}); copy it again."
        ) from error


def _refuse_misfit(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path) -> None:
    missing = [name for name in wanted if name not in weights]
    surplus = [name for name in weights if name not in wanted]
    resized = [
        f"{name} {list(weights[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    found = [("lacks", missing), ("has the unknown", surplus), ("has the wrong sizes", resized)]
    faults = ", and ".join(f"{what} {_some(names)}" for what, names in found if names)
    if faults:
        raise ValueError(
            f"{path} must hold the weights of the model that {CONFIG} beside it describes, but {faults}; "
            f"it is of another model: put the {CONFIG} beside it that it was saved with."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
