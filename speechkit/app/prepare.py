"""``speechkit prepare``: run the ``prepare.py`` of a recipe."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from speechkit.config import catalogue
from speechkit.schema import meant


def prepare(*, name: str, rest: Sequence[str]) -> None:
    """Call ``prepare(corpus, out, ...)`` of ``recipes/NAME/prepare.py`` with the options it declares in ``arguments``.

    Raises:
        ValueError: where there is no such recipe, and what the recipe raises.
    """
    recipe = _recipe(name)
    parser = argparse.ArgumentParser(
        prog=f"speechkit prepare {name}", description=recipe.__doc__, formatter_class=_Help
    )
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="where the corpus lies")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("data") / name, help="where to write")
    if hasattr(recipe, "arguments"):
        recipe.arguments(parser)
    try:
        recipe.prepare(**vars(parser.parse_args(rest)))
    except RuntimeError as error:  # of a library the recipe calls
        raise ValueError(str(error)) from error


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _recipe(name: str) -> ModuleType:
    recipes = {file.parent.name: file for file in (catalogue().parent / "recipes").glob("*/prepare.py")}
    if name not in recipes:
        raise ValueError(f"A recipe must be one of {', '.join(sorted(recipes))}, but is {name}{meant(name, recipes)}")
    spec = importlib.util.spec_from_file_location(f"recipes.{name}.prepare", recipes[name])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses and worker processes look for it
    spec.loader.exec_module(module)
    return module
