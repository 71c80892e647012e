"""The building: imports go down only, and each outside library comes in through its own door."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "speechkit"

# From the ground up. Some floors of the design have a step in them: everything stands on `types`, data on features, and
# the tagger on what the recogniser does with recordings.
FLOORS = (
    ("types", "files"),
    ("stream", "audio", "text", "schema", "replay"),
    ("features", "events", "testing", "kernels", "traced", "graphs", "vad"),
    ("steps",),
    ("data", "cut"),
    ("layers",),
    ("attention",),
    ("encoders",),
    ("objectives", "heads", "search", "metrics", "masking", "tuning"),
    ("decoders",),
    ("config", "recogniser"),
    ("tagger", "autoencoder"),
    ("tasks", "datamodule", "session", "pretrained", "checkpoints", "pictures", "explain"),
    ("app",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

WIRING = {"tasks", "datamodule", "session", "pretrained", "checkpoints", "app"}
DOORS = {
    "torchaudio": {"features", "objectives", "search", "data"},
    "soundfile": {"audio"},
    "sentencepiece": {"text"},
    "lhotse": {"data"},
    "hydra": {"config", "app"},
    "omegaconf": {"config", "app"},
    "yaml": {"config"},
    "lightning": WIRING,
    "speechkit_kernels": {"kernels"},
    "safetensors": {"pretrained"},
    "huggingface_hub": {"pretrained"},
    "transformers": {"pretrained"},
    "jiwer": {"metrics"},
    "torchmetrics": {"metrics"},
    "rich": {"app"},
    "sounddevice": {"app"},
    "starlette": {"app"},
    "uvicorn": {"app"},
    "matplotlib": {"pictures"},
    "librosa": {"pictures"},
    "peft": {"tuning"},
}
EVERYWHERE = {"torch", "numpy", "jaxtyping", "speechkit", *sys.stdlib_module_names}


def part(file: Path) -> str:
    """The module or folder a file belongs to: what has a floor."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Everything a file imports, with its line, wherever in the file that is written."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{file}:{node.lineno}: imports are written from the root: from speechkit.x import y"
            )
            module = node.module or ""
            names = [alias.name for alias in node.names] if module == "speechkit" else [""]
            yield from ((node.lineno, f"{module}.{name}".rstrip(".")) for name in names)


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")
IMPORTS = [(file, line, name) for file in FILES for line, name in imports(file)]


def place(file: Path, line: int) -> str:
    return f"{file.relative_to(PACKAGE.parent)}:{line}"


def test_every_part_has_a_floor() -> None:
    assert {part(file) for file in FILES} <= FLOOR.keys()


def test_the_design_shows_every_part_on_its_floor() -> None:
    page = (PACKAGE.parent / "docs" / "design.md").read_text()
    (floors,) = re.findall(r"^```\n( roof .*?)^```", page, re.DOTALL | re.MULTILINE)
    assert [
        name for name in FLOOR if name != "app" and not re.search(rf"^ \d .*\b{name}\b", floors, re.MULTILINE)
    ] == []


def test_imports_go_down_only() -> None:
    faults = []
    for file, line, name in IMPORTS:
        if name.startswith("speechkit.") and not name.startswith("speechkit.__"):
            here, there = part(file), name.split(".")[1]
            if here != there and FLOOR[there] >= FLOOR[here]:
                faults.append(f"{place(file, line)}: {here} must not import {there}, which is on its floor or above")
    assert not faults, "\n".join(faults)


def test_each_library_comes_in_through_its_door() -> None:
    faults = []
    for file, line, name in IMPORTS:
        library = name.split(".")[0]
        if library not in EVERYWHERE and part(file) not in DOORS.get(library, set()):
            faults.append(f"{place(file, line)}: {library} belongs into {sorted(DOORS.get(library, {'no file yet'}))}")
    assert not faults, "\n".join(faults)


def test_nothing_but_training_needs_lightning() -> None:
    allowed = {"tasks/base", "datamodule", "checkpoints", "pretrained/state", "app/train", "app/show"}
    found = {
        str(file.relative_to(PACKAGE).with_suffix("")) for file, _, name in IMPORTS if name.startswith("lightning")
    }
    assert found <= allowed


def test_nothing_but_the_adapter_needs_transformers() -> None:
    assert {file for file, _, name in IMPORTS if name.startswith("transformers")} == {PACKAGE / "pretrained/hf.py"}


def test_nothing_but_the_server_needs_a_web_framework() -> None:
    libraries = ("starlette", "uvicorn", "websockets")
    assert {str(file.parent) for file, _, name in IMPORTS if name.startswith(libraries)} == {str(PACKAGE / "app/serve")}


@pytest.mark.parametrize(
    "heavy", ["torchaudio", "lhotse", "lightning", "hydra", "matplotlib", "librosa", "rich", "jiwer", "transformers"]
)
def test_import_of_the_package_is_light(heavy: str, light: set[str]) -> None:
    assert heavy not in light


@pytest.fixture(scope="module")
def light() -> set[str]:
    """The modules that ``import speechkit`` loads."""
    code = "import sys, speechkit; print(*{name.split('.')[0] for name in sys.modules})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
