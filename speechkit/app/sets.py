"""What ``speechkit evaluate`` is given: runs, and the sets they are evaluated on."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from speechkit import config as configs
from speechkit.data.corpora import Cut, Source
from speechkit.pretrained import hub, model_folder

Sets = dict[str, list[Cut]]


def is_run(name: str) -> bool:
    """Whether a word names a model and no manifest.

    Raises:
        ValueError: where it is neither.
    """
    if name.endswith((".jsonl", ".jsonl.gz")):
        return False
    model_folder(name)  # says what is wrong with it
    return True


def manifests(paths: Sequence[str], split: str | None, *, transcribed: bool = True) -> Sets:
    """Cuts by the name of the set: the last two parts of its path.

    Args:
        transcribed: whether each must have a text.
    """
    sets: Sets = {}
    for path in paths:
        short = "/".join(Path(path).with_suffix("").parts[-2:])
        name = (path if short in sets else short) + (f":{split}" if split else "")
        sets[name] = list(Source(path=path, split=split).cuts(transcribed=transcribed))
    return sets


def own(run: str, *, transcribed: bool = True) -> Sets:
    """The test sets of the run's own config; one whose manifest is absent is left out, unless none is left then."""
    path = home(run) / "config.yaml"
    nodes = configs.plain(configs.load(path))["data"].get("test") if path.is_file() else None
    if not nodes:
        raise ValueError(f"{run} must name test sets in {path}, but has none; name a manifest behind the run.")
    sources = {name: configs.build(node, f"data.test.{name}") for name, node in nodes.items()}
    there = {name: source for name, source in sources.items() if Path(source.path).is_file()}
    for name in sources.keys() - there.keys() if there else ():
        print(f"speechkit: {sources[name].path} is not there, so {run} is not evaluated on {name}.", file=sys.stderr)
    return {name: list(source.cuts(transcribed=transcribed)) for name, source in (there or sources).items()}


def results(run: str, name: str) -> tuple[Path, str]:
    """The folder for what a run is evaluated to, which is made here, and what ``name`` is as the name of a file."""
    folder = home(run) / "evaluate"
    folder.mkdir(parents=True, exist_ok=True)
    return folder, _plain(name)


def home(run: str) -> Path:
    """The run around a model folder, the model folder where it is alone, and ``runs/NAME`` for a model of the hub."""
    if run.startswith(hub.PREFIX):
        return Path("runs", _plain(run.removeprefix(hub.PREFIX)))
    model = model_folder(run)
    return model.parent if model.name.strip(".").startswith("model") else model


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
