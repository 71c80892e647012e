"""LoRA and its relatives, by the library peft: the only place it comes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from speechkit.schema import meant
from speechkit.tuning.base import Tuning
from speechkit.tuning.sites import Kind, targets

OWN = {"target_modules", "peft_type", "modules_to_save"}  # settled by `Peft` itself


class Peft(Tuning):
    """Low-rank and other changes of the linear maps, as the library peft makes them.

    Args:
        method: as peft calls it, for example ``lora``, ``loha``, ``lokr``, ``oft``, ``ia3``.
        arguments: of that method's config, for example ``{r: 8, lora_alpha: 16, use_dora: true}``.
        where: the kinds of modules whose linear maps are changed. Those of positions are not.

    Raises:
        ValueError: for a method or argument that peft does not have, or where peft is absent.
    """

    merges = True

    def __init__(
        self,
        *,
        method: str = "lora",
        arguments: Mapping[str, Any] | None = None,
        where: Sequence[Kind] = ("attention", "feed_forward"),
    ) -> None:
        self.method, self.arguments, self.where = method, dict(arguments or {}), tuple(where)
        self._config([])

    def adapt(self, encoder: nn.Module) -> None:
        from peft import inject_adapter_in_model

        try:
            inject_adapter_in_model(self._config(targets(encoder, self.where)), encoder)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"tuning.method must be one that peft can put into a module, but {self.method} cannot be put into "
                f"{type(encoder).__name__}: {' '.join(str(error).split()).rstrip('.')}; take method=lora."
            ) from error
        for part in _tuned(encoder).values():
            base = part.get_base_layer()
            if hasattr(base, "new_zeros"):  # a stream's memory is made by it
                part.new_zeros = base.new_zeros

    def merge(self, model: Any) -> None:
        """Add the changes to the weights they were made for."""
        for name, part in _tuned(model.encoder).items():
            try:
                part.merge(safe_merge=True)
            except NotImplementedError:
                super().merge(model)
            parent, _, key = name.rpartition(".")
            setattr(model.encoder.get_submodule(parent), key, part.get_base_layer())
        del model.encoder.peft_config  # that of the changes there were
        model.tuning = None

    def _config(self, names: Sequence[str]) -> Any:
        try:
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        except ImportError as error:
            raise ValueError(
                f"tuning.method={self.method} must have the library peft, but it is not installed; "
                f"run: pip install 'speechkit[peft]'."
            ) from error
        every = {str(kind.value).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        arguments = {name: {field.name for field in fields(config) if field.init} for name, config in every.items()}
        known: dict[str, Any] = {k: config for k, config in every.items() if "target_modules" in arguments[k]}
        if self.method == "adalora":
            raise ValueError(
                "tuning.method must be one that learns by gradients alone, but adalora also needs its ranks allotted "
                "after each step, which no training here does; take method=lora, or hira."
            )
        if self.method not in known:
            raise ValueError(
                f"tuning.method must be one of peft's that change linear maps, in small letters, but is "
                f"{self.method}{meant(self.method, known)}"
            )
        takes = arguments[self.method] - OWN
        for key in self.arguments.keys() - takes:
            raise ValueError(
                f"tuning.arguments.{key} is not an argument of peft's {self.method}, which takes "
                f"{', '.join(sorted(takes))}{meant(key, takes)}"
            )
        return known[self.method](target_modules=list(names), **self.arguments)


def _tuned(encoder: nn.Module) -> dict[str, Any]:
    """The layers of peft, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: part for name, part in encoder.named_modules() if isinstance(part, BaseTunerLayer)}
