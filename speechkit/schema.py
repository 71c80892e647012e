"""The signature is the schema: hold a config node against the signature of the class it names.

A node is a mapping. With a ``_target_`` it describes an object and may hold the keyword arguments of that class and
nothing else, each of the annotated type; with ``_partial_: true`` it describes a factory of such objects.
"""

from __future__ import annotations

import collections.abc
import difflib
import importlib
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

Node = Mapping[str, Any]

# A config can come from a downloaded model, and a `_target_` is code to run: only what lives in these modules is built.
# Your own mechanisms join with SPEECHKIT_ALLOW=mypackage in the environment.
HOMES = (
    "speechkit",
    "torch.nn",
    "torch.optim",
    "lightning.pytorch.trainer",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.strategies",
)


def check(
    node: Any, target: Callable | None = None, where: str = "", *, given: Iterable[str] = (), later: bool = False
) -> None:
    """Hold a node, and every node inside it, against the signature of what it names.

    Args:
        node: keyword arguments, with a ``_target_`` unless ``target`` is given.
        where: the full key of the node, for the message.
        given: arguments that come from elsewhere.
        later: whether the nodes inside may lack arguments, because they are built later, with more given.

    Raises:
        ValueError: for a key that is not an argument, a value of the wrong type, a required argument left out, or a
            ``_target_`` outside of `HOMES`.
    """
    if not isinstance(node, Mapping) or (target is None and "_target_" not in node):
        raise ValueError(
            f"{where} must be a node of keys with a _target_, but is {node!r}; choose a file of conf/ for it."
        )
    partial = target is None and bool(node.get("_partial_"))
    takes = _arguments(target or locate(node["_target_"], where, partial=partial))
    keys = {key: value for key, value in node.items() if target or key not in ("_target_", "_partial_")}
    name = node.get("_target_", where or "a training config")
    for key in keys.keys() - takes.keys():
        raise ValueError(
            f"{_full(where, key)} is not a key of {name}, which takes {', '.join(sorted(takes))}{meant(key, takes)}"
        )
    for key, value in keys.items():
        _check_value(value, takes[key], _full(where, key), later)
    missing = [k for k, p in takes.items() if p.default is p.empty and k not in keys and k not in given]
    if missing and not partial and not (later and target is None):
        raise ValueError(
            f"{_full(where, missing[0])} must be given for {name}, but is not; "
            f"add it to the config, or {_full(where, missing[0])}=VALUE to the command."
        )


def locate(target: Any, where: str, *, partial: bool = False) -> Callable:
    """The class a ``_target_`` names, or with ``partial`` a function; its home must be one of `HOMES`.

    The home of what was found counts, not only the path to it, because a module also holds the names it imports.

    Raises:
        ValueError: where there is no such class, or it lives elsewhere.
    """
    homes = (*HOMES, *filter(None, os.environ.get("SPEECHKIT_ALLOW", "").split(",")))
    found = _named(target, where) if isinstance(target, str) and _within(target, homes) else None
    if not (inspect.isclass(found) or (partial and inspect.isfunction(found))) or not _within(found.__module__, homes):
        raise ValueError(
            f"{where}._target_ must name a class of {', '.join(homes)}, but is {target}; "
            f"if you trust its package, add that to SPEECHKIT_ALLOW in the environment."
        )
    return found


def meant(key: str, names: Iterable[str]) -> str:
    """The end of a sentence about a name that is not there: which ones are like it."""
    near = difflib.get_close_matches(key, list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else "."


def _named(target: str, where: str) -> Any:
    module, _, name = target.rpartition(".")
    try:
        home = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{where}._target_ must name a class, but {target} cannot be imported: {error}.") from error
    if not hasattr(home, name):
        near = meant(name, (n for n in dir(home) if not n.startswith("_")))
        raise ValueError(f"{where}._target_ must name a class, but {module} has no {name}{near}")
    return getattr(home, name)


def _within(path: str, homes: Iterable[str]) -> bool:
    return any(path == home or path.startswith(f"{home}.") for home in homes)


def _full(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _check_value(value: Any, argument: inspect.Parameter, full: str, later: bool) -> None:
    if value == "???":
        raise ValueError(f"{full} must be given, but is not; add {full}=VALUE to the command.")
    if not _fits(value, argument.annotation, argument.default):
        raise ValueError(
            f"{full} must be {_kind(argument.annotation)}, but is {value!r}; "
            f"change it in the config, or add {full}=VALUE to the command."
        )
    _check_inside(value, full, later)


def _check_inside(value: Any, where: str, later: bool) -> None:
    """Check the nodes inside a value, however deep they lie in lists and mappings."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return check(value, where=where, later=later)
        for key, item in value.items():
            _check_inside(item, _full(where, key), later)
    elif _is_list(value):
        for number, item in enumerate(value):
            _check_inside(item, f"{where}[{number}]", later)


def _arguments(target: Callable) -> dict[str, inspect.Parameter]:
    """The named arguments of a class or function, with their annotations evaluated where that is possible."""
    function = target.__init__ if inspect.isclass(target) else target  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # annotations can name things that only a type checker imports
        hints = {}
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind not in variable
    }


_SCALARS: dict[Any, Any] = {
    bool: bool,
    int: int,
    float: (int, float),
    str: str,
    Path: str,
    types.NoneType: types.NoneType,
}
_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)


def _fits(value: Any, hint: Any, default: Any = ...) -> bool:
    """Whether a value read from YAML can be an argument annotated with ``hint``; a node with a target always can."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, str | typing.TypeVar) or (value is None and default is None):
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is Literal:
        return value in arguments
    if hint in _SCALARS:
        return isinstance(value, _SCALARS[hint]) and (hint is bool or not isinstance(value, bool))
    kind = origin or hint
    if isinstance(value, Mapping):
        return "_target_" in value or (inspect.isclass(kind) and issubclass(dict, kind))
    return kind in _LISTS and _is_list(value) and _items_fit(value, kind, arguments)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _items_fit(value: Sequence[Any], kind: Any, arguments: tuple[Any, ...]) -> bool:
    if kind is tuple and arguments and ... not in arguments:
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    return all(_fits(item, arguments[0] if arguments else Any) for item in value)


def _kind(hint: Any) -> str:
    """A hint in words."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in words:
        return words[hint]
    if hint is types.NoneType:
        return "null"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(part) for part in arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if (origin or hint) in _LISTS:
        return "a list"
    return "a node of keys with a _target_"
