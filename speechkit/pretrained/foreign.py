"""What the sources of other people's models share: their configs put into our words, models built of those and filled.

A source describes a model as the nodes of ours, `speechkit.config.Tagging`, `speechkit.config.Recognition`, or the
``features`` and ``encoder`` of these alone, and says what its files call each tensor. So a fine-tuned copy is a model
folder like any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from speechkit import config as configs
from speechkit.pretrained.weights import CONFIG, read
from speechkit.recogniser import Recogniser
from speechkit.tagger import Tagger

EXTRACTOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
Node = dict[str, Any]
Weights = Mapping[str, Tensor]


class Source(Protocol):
    """A file of this package: one architecture, or a family, as somebody else saves it in a folder.

    ``WHAT`` says what a folder must describe. `describe` gives the nodes of a tagger or a recogniser where it holds
    one, else those of features and encoder, and `fill` puts the weights into what was built of them.
    """

    WHAT: str

    def describes(self, config: Mapping[str, Any]) -> bool: ...

    def describe(self, folder: Path, config: Mapping[str, Any], weights: Weights) -> Node: ...

    def fill(self, model: Any, folder: Path, config: Mapping[str, Any], weights: Weights) -> None: ...


def load(source: Source, folder: Path, config: Mapping[str, Any]) -> Any:
    """The tagger, recogniser or encoder of a folder.

    Raises:
        ValueError: where a config asks for what we have not, or the weights do not fit.
    """
    weights = read(folder)
    with _understood(folder, source.WHAT):
        model = built(source.describe(folder, config, weights))
    source.fill(model, folder, config, weights)
    return model


def describe(source: Source, folder: Path, config: Mapping[str, Any]) -> Node:
    """The nodes of a folder's model; raises what `load` raises for a config."""
    with _understood(folder, source.WHAT):
        return source.describe(folder, config, read(folder))


@contextmanager
def _understood(folder: Path, what: str) -> Iterator[None]:
    """Turn what goes wrong with a config of theirs into a sentence about it."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG} must describe {what} as transformers does, but no model can be built from it "
            f"({type(error).__name__}: {str(error).rstrip('.')}); copy it again, or use transformers."
        ) from error


def require(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a config in which a setting is not the only one we have; one left out is.

    Raises:
        ValueError: naming the setting.
    """
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} must be {value}, but is {config[key]}")


def times(config: Mapping[str, Any]) -> int:
    """The width of a feed-forward in units of the model's width.

    Raises:
        ValueError: where it is no multiple.
    """
    dim, hidden = config["hidden_size"], config["intermediate_size"]
    if hidden % dim:
        raise ValueError(f"intermediate_size must be a multiple of hidden_size, {dim}, but is {hidden}")
    return hidden // dim


def node(target: type, **keys: Any) -> Node:
    """A config node of ours."""
    return {"_target_": f"{target.__module__}.{target.__qualname__}", **keys}


def factory(target: type, **keys: Any) -> Node:
    """A config node of a factory of ours."""
    return node(target, _partial_=True, **keys)


def labels(config: Mapping[str, Any], classes: int) -> list[str]:
    """The names of the classes, in order.

    Raises:
        ValueError: where there is not one for each.
    """
    # transformers leaves out what is its default: two classes without names
    names = {int(number): label for number, label in config.get("id2label", {0: "LABEL_0", 1: "LABEL_1"}).items()}
    if sorted(names) != list(range(classes)):
        raise ValueError(f"id2label must name the classes 0 to {classes - 1} of the weights, but names {len(names)}")
    return [names[number] for number in range(classes)]


def exclusive(config: Mapping[str, Any]) -> bool:
    """Whether their config says that just one class is right."""
    return config.get("problem_type") == "single_label_classification"


def extractor(folder: Path) -> dict[str, Any] | None:
    """What a folder says of its features, if it does: alone, or as part of a processor, as transformers 5 writes it."""
    if (alone := folder / EXTRACTOR).is_file():
        return json.loads(alone.read_text(encoding="utf-8"))
    whole = folder / PROCESSOR
    return json.loads(whole.read_text(encoding="utf-8")).get("feature_extractor") if whole.is_file() else None


def built(described: Node) -> Any:
    """The tagger, recogniser or encoder that nodes describe, with weights that mean nothing yet."""
    if "head" in described or "objective" in described:
        return configs.build_model(described)
    return configs.build(described["encoder"], "model.encoder")


def parts(model: nn.Module) -> nn.ModuleDict:
    """What of a model has weights in a file of theirs: not the front end."""
    if isinstance(model, Tagger):
        return nn.ModuleDict({"encoder": model.encoder, "head": model.head})
    if isinstance(model, Recogniser):
        return nn.ModuleDict({"encoder": model.encoder, "objective": model.objective})
    return nn.ModuleDict({"encoder": model})


def names(parts: nn.ModuleDict, modules: Mapping[str, str]) -> dict[str, str]:
    """What their files call each tensor of ours, from what they call modules, or tensors, of ours."""
    split = {name: name.rpartition(".") for name in parts.state_dict()}
    return {name: modules.get(name) or f"{modules[module]}.{last}" for name, (module, _, last) in split.items()}
