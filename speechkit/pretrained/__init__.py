"""Model folders: ``model.safetensors``, ``config.json`` (the config's ``model`` node) and a tokenizer's files.

Nothing in them is code and nothing is unpickled, so a downloaded one is safe to load: `speechkit.config` builds only
what its allow-list names. Models of other toolkits are read by one file each: `nemotron`, `ast`, `passt`, `audiomae`,
`wav2vec2` with the `vocabulary` of its recognisers, and all others of transformers by `hf`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from speechkit.autoencoder import MaskedAutoencoder
from speechkit.config import build_model, plain
from speechkit.encoders import AST, Conformer, Wav2Vec2
from speechkit.files import to_disk
from speechkit.layers import shrink
from speechkit.pretrained import ast, audiomae, foreign, hf, hub, nemotron, passt, wav2vec2
from speechkit.pretrained.weights import CONFIG, PICKLES, WEIGHTS, fill, holds_weights, read, some, tensors_of
from speechkit.recogniser import Recogniser
from speechkit.tagger import Tagger
from speechkit.text import load_tokenizer

Trained = Recogniser | Tagger | MaskedAutoencoder


def save(model: Trained, config: Mapping[str, Any], folder: str | Path) -> None:
    """Write a model folder, all of it or nothing.

    It is written beside its place and renamed, so that a full disk or a killed process leaves the earlier one.

    Args:
        config: the ``model`` node it was built from.
        folder: is replaced, if it holds a model and nothing else.

    Raises:
        ValueError: where the folder holds other files, the disk refuses, or the weights were shrunk to int8; the
            earlier model is untouched.
    """
    folder = Path(folder)
    if any(weight.dtype == torch.int8 for weight in model.parameters()):
        raise ValueError(
            f"{folder} must hold weights as they were trained, but these are rounded to int8; save the model before it "
            f"is shrunk, it is shrunk again when it is loaded."
        )
    draft = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write(model, config, draft)
        _replace(folder, draft)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder} must be written in full, but the disk refused ({error}); the model that was there before is "
            f"untouched: make room, or choose another folder."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


Model = Trained | Conformer | AST | Wav2Vec2 | hf.Transformers


def load(name: str | Path, *, weights: torch.dtype = torch.float32, local: bool = False) -> Model:
    """The model of a folder, of a file or of the hub, on the CPU, ready to use.

    Args:
        name: what `save` wrote, or a run (whose model is in ``RUN/model``); what transformers wrote, here or on the hub
            (``hf:owner/name``, see `speechkit.pretrained.hub`), for a tagger, a recogniser or an encoder; or a
            checkpoint of an original repository. docs/pretrained.md lists them.
        local: take a model of the hub from the local cache.
        weights: ``torch.bfloat16`` or ``torch.int8`` streams faster on a CPU, see `speechkit.layers.shrink`.

    Raises:
        ValueError: where there is none, where a file is damaged or a pickle, or where the weights are of another model.
    """
    model = _original(Path(name)).load_original(name) if _is_file(name) else _of_folder(model_folder(name, local=local))
    if weights != torch.float32:
        if (tuning := getattr(model, "tuning", None)) is not None and tuning.merges:
            tuning.merge(model)  # what reads a weight to change it would read the rounded one
        shrink(model, weights)
    return model.eval()


def _of_folder(home: Path) -> Model:
    config = _config(home)
    if source := _source(config):
        return foreign.load(source, home, config)
    if hf.describes(config):
        return hf.load(home, config)
    model = _described(home, config)
    fill(model, read(home), home)
    return model


def _source(config: Mapping[str, Any]) -> foreign.Source | None:
    """Who else saved a model with such a config."""
    sources: tuple[Any, ...] = (nemotron, ast, wav2vec2)
    return next((source for source in sources if source.describes(config)), None)


def _is_file(name: str | Path) -> bool:
    """Whether a name is of a checkpoint of an original repository: not of a folder, of its weights, or of the hub."""
    if str(name).startswith(hub.PREFIX) or Path(name).is_dir():
        return False
    alone = not Path(name).with_name(CONFIG).is_file()
    return Path(name).suffix in PICKLES or (alone and Path(name).suffix == ".safetensors")


def _original(path: Path) -> Any:
    """Whose original repository a file is from."""
    weights = tensors_of(path)
    return next((source for source in (passt, audiomae) if source.recognises(weights)), ast)


def describe(name: str | Path) -> dict[str, Any]:
    """The nodes ``features`` and ``encoder`` of whatever `load` loads: what is to be built for its weights to fit.

    Raises:
        ValueError: where there is none, or it says nothing of them.
    """
    if _is_file(name):
        return _original(Path(name)).describe_original(Path(name), tensors_of(Path(name)))
    config = model_node(name)
    return {key: config.get(key) for key in ("features", "encoder")}


def model_node(name: str | Path) -> dict[str, Any]:
    """The ``model`` node of a folder, of ours, of transformers or of the hub: with it `save` writes what `load` gave.

    Of an encoder alone it is the nodes ``features`` and ``encoder``.

    Raises:
        ValueError: where there is none, or it does not say which encoder it has.
    """
    home = model_folder(name)
    config = _config(home)
    if source := _source(config):
        config = foreign.describe(source, home, config)
    elif hf.describes(config):
        config = hf.describe(home, config)
    if "encoder" not in config:
        raise ValueError(
            f"{name} must say which encoder it has as speechkit's models do, but does not; choose the encoder "
            f"yourself with encoder=NAME."
        )
    return config


def of_images(path: str | Path) -> bool:
    """Whether a file holds a vision transformer that was trained on images, to start an AST from."""
    path = Path(path)
    return path.is_file() and ast.IMAGE_PATCHES in tensors_of(path) and _original(path) is ast


def load_recogniser(folder: str | Path) -> Recogniser:
    """As `load`, for what has to write text.

    Raises:
        ValueError: also where the folder holds an encoder alone, or a tagger.
    """
    model = load(folder)
    if not isinstance(model, Recogniser):
        kind = "a tagger" if isinstance(model, Tagger) else "an encoder"
        use = "use it with speechkit tag" if isinstance(model, Tagger) else "use it from Python with speechkit.load"
        raise ValueError(
            f"{folder} must hold a recogniser, but holds {kind}, which writes no text; {use}, or name a model that "
            f"speechkit trained, or one of the wav2vec family (ForCTC) and its vocab.json."
        )
    return model


def model_folder(name: str | Path, *, local: bool = False) -> Path:
    """The folder that `load` reads: the one given, the model of the run given, or what the hub has by that name.

    Raises:
        ValueError: where none of them holds a model.
    """
    if str(name).startswith(hub.PREFIX):
        return hub.fetch(str(name), local=local)
    folder = Path(name)
    for home in (folder, folder / "model"):
        for found in (home, _aside(home)):
            if holds_weights(found):
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


def _write(model: Trained, config: Mapping[str, Any], folder: Path) -> None:
    # A copy each, since safetensors refuses tied weights.
    weights = {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(plain(config), indent=2) + "\n", encoding="utf-8")
    if isinstance(model, Recogniser):
        model.tokenizer.save(folder)
    for file in folder.iterdir():
        to_disk(file)


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
            f"{folder} must hold a model and nothing else to be replaced, but holds {some(others)}; "
            f"choose another folder, or move that elsewhere."
        )


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds {config!r:.40}")
        return config
    except (OSError, ValueError) as error:
        raise _undescribed(folder, error) from error


def _described(folder: Path, config: Mapping[str, Any]) -> Trained:
    """The model that config and tokenizer describe, with weights that mean nothing yet."""
    try:
        return build_model(config, tokenizer=load_tokenizer(folder) if "objective" in config else None)
    except (OSError, ValueError) as error:
        raise _undescribed(folder, error) from error


def _undescribed(folder: Path, error: Exception) -> ValueError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rstrip(".")
    return ValueError(
        f"{folder / CONFIG} must be what save() wrote, but no model can be built from it ({reason}); "
        f"copy the model folder again."
    )
