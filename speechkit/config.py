"""Configs: composed by Hydra, checked by `speechkit.schema`, turned into objects in one place.

Hydra and OmegaConf come in through this file alone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from speechkit.schema import Node, check, meant


@dataclass(frozen=True, kw_only=True)
class Recognition:
    """The keys of ``model``: the parts of a `speechkit.recogniser.Recogniser`; without an encoder, those of ``init``.

    ``tuning`` says what of the encoder is trained, and ``attention`` is what the encoder refers to.
    """

    features: Node | None = None
    text: Node
    encoder: Node | None = None
    objective: Node
    search: Node
    tuning: Node | None = None
    attention: Node | None = None


@dataclass(frozen=True, kw_only=True)
class Tagging:
    """The keys of ``model``: the parts of a `speechkit.tagger.Tagger`; without an encoder, those of ``init``.

    ``labels`` can also be a text file with a class a line, and ``tuning`` says what of the encoder is trained.
    """

    features: Node | None = None
    encoder: Node | None = None
    head: Node
    labels: list[str] | str
    frames: int
    exclusive: bool = False
    filled: bool = False
    tuning: Node | None = None
    attention: Node | None = None


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """The keys of ``model``: the parts of a `speechkit.autoencoder.MaskedAutoencoder`."""

    features: Node
    encoder: Node
    decoder: Node
    mask: Node
    normalised: bool = True
    attention: Node | None = None


KINDS = {"objective": Recognition, "head": Tagging, "decoder": Pretraining}
"""What describes a model, by a key that no other kind has."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The keys of a training config; conf/train.yaml, conf/tag.yaml and conf/pretrain.yaml say what each is for."""

    name: str
    run: str
    seed: int
    model: Node
    data: Node
    augment: Node | None
    context: Node | None = None
    optim: Node
    trainer: Node
    task: Node
    checkpoint: Node
    init: str | None
    fresh: list[str]
    fold: int | None = None


def catalogue() -> Path:
    """The folder ``conf``: inside the package where that was installed, beside it in a checkout."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def compose(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The training config of a file with ``key=value`` overrides: complete, resolved and checked.

    Args:
        path: a YAML file, for example ``recipes/digits/conf/demo.yaml``; recipes are also found where speechkit lies.
        overrides: ``encoder=conformer_m`` chooses a file of the catalogue, ``model.encoder.dim=256`` sets a value.

    Raises:
        ValueError: naming the file or key that is not there or not of its type, and what could have been meant.
    """
    file = _find(Path(path))
    try:
        changes = [*_left_open(_written(file)), *(_change(override, file) for override in overrides)]
        with hydra.initialize_config_dir(str(file.parent.resolve()), version_base="1.3"):
            home = str(catalogue().resolve()).replace("'", r"\'")
            search = f"hydra.searchpath=['file://{home}']"
            config = hydra.compose(file.stem, overrides=[search, *changes])
        OmegaConf.resolve(config)
    except MissingConfigException as error:
        raise ValueError(_no_such_choice(error)) from None
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{path} must compose with {' '.join(overrides) or 'conf/'}, but: {_flat(error)}.") from None
    values = plain(config)
    if "run" not in values:
        raise ValueError(
            f"{path} must begin its defaults with /train, /tag or /pretrain, which say what every config has, but does "
            f"not; see recipes/*/conf/."
        )
    check(values, Training, later=True)
    check(values["model"], kind_of(values["model"]), "model", later=True)
    return config


def kind_of(node: Node) -> type:
    """What a ``model`` node describes: one of `KINDS`.

    Raises:
        ValueError: where it is none of them.
    """
    kinds = [kind for key, kind in KINDS.items() if key in node]
    if len(kinds) != 1:
        raise ValueError(
            f"model must have one of the keys {', '.join(KINDS)}, which say what it is, but has {', '.join(node)}; "
            f"choose a file of conf/objective/ for a recogniser, of conf/head/ for a tagger, or of conf/decoder/ for a "
            f"pretraining."
        )
    return kinds[0]


def build_model(node: Node, *, tokenizer: Any = None) -> Any:
    """What a ``model`` node describes, with fresh weights.

    Args:
        node: one of `KINDS`, as composed or as read from the config.json of a model folder.
        tokenizer: instead of the one that the node of a recogniser describes.

    Raises:
        ValueError: naming the key that is wrong.
    """
    parts = plain(node)
    check(parts, kind_of(parts), "model", later=True)
    if "objective" in parts:
        model = _recogniser(parts, tokenizer)
    else:
        model = _tagger(parts) if "head" in parts else _autoencoder(parts)
    tune(model, parts.get("tuning"))
    return model


def tune(model: Any, node: Node | None) -> None:
    """Change a model as the fine-tuning method of its ``tuning`` node says, if it has one."""
    if node is not None:
        build(node, "model.tuning").apply(model)


def _tagger(parts: dict[str, Any]) -> Any:
    built = {name: build(parts.get(name), f"model.{name}") for name in ("features", "encoder", "head")}
    plainly = {name: parts[name] for name in ("labels", "frames", "exclusive", "filled") if name in parts}
    return build({"_target_": "speechkit.tagger.Tagger"}, "model", **built, **plainly)


def _autoencoder(parts: dict[str, Any]) -> Any:
    built = {name: build(parts[name], f"model.{name}") for name in ("features", "encoder", "decoder", "mask")}
    plainly = {"normalised": parts["normalised"]} if "normalised" in parts else {}
    return build({"_target_": "speechkit.autoencoder.MaskedAutoencoder"}, "model", **built, **plainly)


def _recogniser(parts: dict[str, Any], tokenizer: Any) -> Any:
    tokenizer = build(parts["text"], "model.text") if tokenizer is None else tokenizer
    encoder = build(parts["encoder"], "model.encoder")
    return build(
        {"_target_": "speechkit.recogniser.Recogniser"},
        "model",
        features=build(parts["features"], "model.features"),
        encoder=encoder,
        objective=build(parts["objective"], "model.objective")(dim=encoder.dim, vocab=tokenizer.size),
        search=build(parts["search"], "model.search"),
        tokenizer=tokenizer,
    )


def build(node: Node | None, where: str = "config", **extra: Any) -> Any:
    """The object a node describes, called with its keys and ``extra``: the only place where a config becomes code.

    A node with ``_partial_: true`` gives a factory, to be called once for each object wanted: a plain node inside
    another is built once, and twelve layers would share it.

    Raises:
        ValueError: where `speechkit.schema.check` refuses the node, or the constructor refuses an argument.
    """
    if node is None:
        return None
    node = plain(node)
    check(node, where=where, given=extra)
    try:
        # Extra arguments go around Hydra, which would turn a tuple or a dataclass among them into a config.
        make = instantiate({**node, "_partial_": True}, _convert_="all")
        return functools.partial(make, **extra) if node.get("_partial_") else make(**extra)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise ValueError(f"{where} cannot be built: {_flat(error)}.") from error


def plain(node: Node | DictConfig) -> dict[str, Any]:
    """A node as dicts, lists and plain values, every reference filled in."""
    return cast(dict, OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node))


def load(path: str | Path) -> DictConfig:
    """A config that `save` wrote."""
    return cast(DictConfig, OmegaConf.load(path))


def save(config: DictConfig, path: str | Path) -> None:
    """Write a composed config as YAML."""
    OmegaConf.save(config, path)


def differences(old: Node, new: Node, where: str = "") -> list[str]:
    """What changed from one config to another, as ``key: old -> new``."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        name, before, after = f"{where}{key}", old.get(key, "absent"), new.get(key, "absent")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{name}.")
        elif before != after:
            found.append(f"{name}: {before} -> {after}")
    return found


def _find(path: Path) -> Path:
    found = next((p for p in (path, catalogue().parent / path) if p.is_file()), None)
    if found is None or found.suffix != ".yaml":
        home = catalogue().parent
        known = sorted(str(p.relative_to(home)) for p in home.glob("recipes/*/conf/*.yaml"))
        raise ValueError(
            f"A config must be a YAML file, for example one of {', '.join(known) or 'recipes/*/conf/'}, "
            f"but {path} is not there{meant(str(path), known)}"
        )
    return found


def _change(override: str, file: Path) -> str:
    """An override that may also set a key no YAML mentions: `check` knows better than Hydra which keys there are.

    A group that the recipe does not list is added behind the recipe's own values, and replaces them.
    """
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        raise ValueError(f"An override must be key=value, but is {override!r}; quote it if it holds spaces.") from None
    groups = {p.name for base in (file.parent, catalogue()) for p in base.iterdir() if p.is_dir()}
    key, keys = parsed.key_or_group, {*groups, *(f.name for f in fields(Training))}
    if key.split(".")[0] not in keys:
        raise ValueError(
            f"{key} is not a key or group of a training config: {', '.join(sorted(keys))}{meant(key, keys)}"
        )
    if override[0] in "+~" or (key in groups and key != "tuning"):
        return override
    return f"{'++' if key not in groups else '' if _lists(file, key) else '+'}{override}"


def _written(file: Path) -> dict[str, Any]:
    """What a file says by itself, without references filled in."""
    return cast(dict, OmegaConf.to_container(load(file)))


def _left_open(node: Node, where: str = "") -> Iterator[str]:
    """A config's own ``???`` as overrides: merged as it stands, OmegaConf would keep what the catalogue says there."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _left_open(value, f"{where}{key}.")
        elif value == "???":
            yield f"++{where}{key}=???"


def _lists(file: Path, group: str) -> bool:
    """Whether the defaults of a config name a file of a group."""
    listed = _written(file).get("defaults", [])
    keys = (str(key) for item in listed if isinstance(item, Mapping) for key in item)
    return any(group in key.replace("/", " ").split() for key in keys)


def _no_such_choice(error: MissingConfigException) -> str:
    wanted, options = str(error.missing_cfg_file or ""), list(error.options or ())
    there = f"which is not one of {', '.join(options)}" if options else "but there is no such group"
    return f"conf/{wanted}.yaml is chosen, {there}{meant(wanted.rpartition('/')[2], options)}"


def _flat(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip().rstrip(".")
