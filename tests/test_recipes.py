"""Every recipe composes, builds and starts with the losses that its expected.json pins."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pin_losses
import pytest

from speechkit import config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("recipes/*/conf/*.yaml"))
named = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parents[1].name}/{path.stem}")


@named
def test_config_builds_a_model(path: Path) -> None:
    node = config.compose(path).model
    pin_losses.need_no_files(node)
    model = config.build_model(node)
    assert sum(weight.numel() for weight in model.parameters()) > 1000


@named
def test_config_opens_with_the_command_that_runs_it(path: Path) -> None:
    opening = re.match(r"(#.*\n)+", path.read_text())
    assert opening and f"speechkit train {path.relative_to(ROOT)}" in opening[0]


@named
def test_first_losses_are_as_pinned(path: Path, tmp_path: Path) -> None:
    command = f"python tools/pin_losses.py {path.parents[1].relative_to(ROOT)}"
    file = path.parents[1] / "expected.json"
    if not file.exists():
        pytest.skip(f"{file.relative_to(ROOT)} is not written yet: {command}")
    pinned = json.loads(file.read_text())["smoke"].get(path.stem)
    assert pinned is not None, f"{path.stem} is not pinned yet: {command}"
    assert pin_losses.smoke(path, tmp_path) == pytest.approx(pinned, rel=1e-3)


@pytest.mark.parametrize("recipe", sorted({path.parents[1] for path in CONFIGS}), ids=lambda recipe: recipe.name)
def test_recipe_holds_the_same_four_things_and_annotations_its_corpus_lacks(recipe: Path) -> None:
    found = {path.name for path in recipe.iterdir()} - {"__pycache__"}
    found -= {path.name for path in recipe.glob("*.jsonl")}
    assert {"README.md", "conf", "prepare.py"} <= found <= {"README.md", "conf", "prepare.py", "expected.json"}
