"""What the documentation tells people to type exists: options, configs and their keys, tools, files and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from speechkit import config
from speechkit.app import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for folder in (".", "docs", "kernels", "recipes/*") for page in ROOT.glob(f"{folder}/*.md"))
CONFIGS = sorted(file for folder in ("conf", "conf/*", "recipes/*/conf") for file in ROOT.glob(f"{folder}/*.yaml"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands(path: Path) -> Iterator[list[str]]:
    """The commands in a page, or in the comments of a config, as words."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        blocks = ["\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))]
    else:
        blocks = [block for language, block in FENCED.findall(text) if not language]
        blocks += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCED.sub("", text))]
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        command = re.sub(r"^for .*? do |; done|\[key=value \.\.\.\]", "", line).replace("$fold", "1")
        command = re.sub(r"\[(--[^]]*)\]", r"\1", command)  # what may be left out
        if command.startswith(("speechkit ", "python ")) and command.count("'") % 2 == 0:
            yield shlex.split(command, comments=True)


ALL = sorted({tuple(words) for path in (*PAGES, *CONFIGS) for words in commands(path)})
OURS = [words[1:] for words in ALL if words[0] == "speechkit" and len(words) > 2 and re.match("[a-z]", words[1])]
TRAININGS = [words[1:] for words in OURS if words[0] == "train" and words[1].endswith(".yaml")]
OVERRIDES = [words[2:] for words in OURS if words[:2] == ("train", "CONFIG")]
TOOLS = [words[1:] for words in ALL if words[0] == "python" and words[1].startswith("tools/")]
on_a_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_the_documentation_has_commands() -> None:
    assert len(OURS) > 100 and len(TRAININGS) > 25 and len(OVERRIDES) > 25 and len(TOOLS) > 15


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_a_command_takes_its_options(words: tuple[str, ...]) -> None:
    cli._parser().parse_args(words)


@pytest.mark.parametrize("words", [words for words in TRAININGS if len(words) > 1], ids=" ".join)  # alone: test_recipes
def test_a_config_takes_its_overrides(words: tuple[str, ...]) -> None:
    config.compose(words[0], words[1:])


@pytest.mark.parametrize("overrides", OVERRIDES, ids=" ".join)
def test_a_recogniser_a_tagger_or_a_pretraining_takes_the_overrides_of_any_config(overrides: tuple[str, ...]) -> None:
    faults = []
    for name in ("digits/conf/demo", "esc10/conf/esc10", "sounds_mae/conf/sounds_mae"):
        try:
            config.compose(f"recipes/{name}.yaml", overrides)
            return
        except ValueError as fault:
            faults.append(str(fault))
    pytest.fail("\n".join(faults))


@pytest.mark.parametrize("words", TOOLS, ids=" ".join)
def test_a_tool_is_there_and_knows_its_options(words: tuple[str, ...]) -> None:
    text = (ROOT / words[0]).read_text()
    assert all(f'"{word}"' in text for word in words if word.startswith("--"))


@on_a_page
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@on_a_page
def test_files_of_the_project_that_a_page_names_are_there(page: Path) -> None:
    text = re.sub(r"<[^>]*>", "*", page.read_text(encoding="utf-8"))
    for name in re.findall(r"`((?:conf|docs|kernels|recipes|speechkit|tests|tools)/[\w*./-]*\w)/?`", text):
        assert any(list(home.glob(name)) or list(home.glob(f"{name}.yaml")) for home in (ROOT, page.parent)), name
