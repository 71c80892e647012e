"""Models by their names on the hub, without a network: a cache in the hub's own layout, and what goes wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ast_cases import close
from safetensors.torch import save_file
from test_tag_cli import made
from tiny import node, sound, tiny

import speechkit
from speechkit import audio, pretrained
from speechkit.app import cli
from speechkit.pretrained import hub, save

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
COMMITS = {"main": "1" * 40, "v2": "2" * 40}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a network that is not there."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def unreachable(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.OfflineModeIsEnabled("there is no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    return tmp_path / "hub"


def cached(cache: Path, revision: str = "main") -> Path:
    """The folder of a revision of ``owner/name``, as the library keeps one it has downloaded."""
    home = cache / "models--owner--name"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(COMMITS[revision])
    folder = home / "snapshots" / COMMITS[revision]
    folder.mkdir(parents=True)
    return folder


def flat(folder: Path) -> None:
    """Leave in a folder of the cache what its ``model`` holds: it is no run."""
    for file in (folder / "model").iterdir():
        file.rename(folder / file.name)
    (folder / "model").rmdir()


@pytest.mark.parametrize("local", [True, False])
@torch.no_grad()
def test_a_model_in_the_cache_is_loaded_without_a_network(cache: Path, local: bool) -> None:
    for revision, seed in (("main", 0), ("v2", 1)):
        model = tiny()
        torch.manual_seed(seed)
        model.objective.ctc.head.bias.normal_()
        folder = cached(cache, revision)
        save(model, node(), folder / "model")
        flat(folder)
        name = "hf:owner/name" if revision == "main" else "hf:owner/name@v2"
        found = speechkit.load(name, local=local)
        close(found.objective.ctc.head.bias, model.objective.ctc.head.bias, 0.0)
        assert found.transcribe(sound(1.0)).text == model.transcribe(sound(1.0)).text
        assert pretrained.describe(name)["encoder"] == node()["encoder"]


@pytest.mark.parametrize(("local", "why"), [(True, "the network was not asked"), (False, "the hub cannot be reached")])
def test_a_model_that_is_nowhere_is_one_sentence_with_what_to_do(cache: Path, local: bool, why: str) -> None:
    with pytest.raises(ValueError) as error:
        speechkit.load("hf:owner/name", local=local)
    said = str(error.value)
    assert said.startswith("hf:owner/name must be in the local cache or on a hub that can be reached, but is not in ")
    assert str(cache) in said and why in said
    assert said.endswith("load it once where there is a network, set HF_HOME to a cache that has it, or name a folder "
                         "with its files.")  # fmt: skip


@pytest.mark.parametrize("broken", [ConnectionError, TimeoutError, PermissionError, RuntimeError])
def test_whatever_a_network_comes_to_is_the_same_sentence(
    cache: Path, broken: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise broken("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", failing)
    with pytest.raises(ValueError, match=rf"the hub cannot be reached \({broken.__name__}\); load it once"):
        speechkit.load("hf:owner/name")


@pytest.mark.parametrize("name", ["hf:", "hf:ast", "hf:a/b/c", "hf:a/b@", "hf:../../etc", "hf:a b/c"])
def test_what_is_no_name_is_said(cache: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"must be named hf:owner/name or hf:owner/name@revision, but is 'hf:"):
        speechkit.load(name)


def test_nothing_but_safetensors_configs_and_tokenizers_is_asked_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cached(cache)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"hf:owner/name must have its weights as safetensors, but has none; choose"):
        speechkit.load("hf:owner/name")
    asked: dict = {}

    def download(model: str, **options: object) -> str:
        asked.update(options, model=model)
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.fetch("hf:owner/name@refs/pr/1") == folder
    assert asked["model"] == "owner/name" and asked["revision"] == "refs/pr/1" and not asked["local_files_only"]
    wanted = huggingface_hub.utils.filter_repo_objects
    files = ["model.safetensors", "pytorch_model.bin", "model.pt", "training_args.bin", "model.py", "config.json"]
    files += ["model.safetensors.index.json", "preprocessor_config.json", "tokenizer.json", "vocab.json", "x.msgpack"]
    files += ["special_tokens_map.json", "added_tokens.json"]
    assert set(wanted(files, allow_patterns=asked["allow_patterns"])) == {
        "model.safetensors", "model.safetensors.index.json", "config.json", "preprocessor_config.json",
        "tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json",
    }  # fmt: skip


def test_the_command_asks_no_network_where_it_is_told_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert cli.main(["transcribe", "hf:owner/name", "a.wav", "--local"]) == 1
    assert "hf:owner/name must be in the local cache" in capsys.readouterr().err
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("kind", ["recogniser", "tagger"])
def test_what_a_model_of_the_hub_is_evaluated_to_lies_here_and_not_in_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = cached(cache, "v2")
    if kind == "recogniser":
        save(tiny(), node(), folder / "model")
    else:
        made(folder / "model")
    flat(folder)
    audio.write(tmp_path / "a.wav", sound(1.0).numpy(), 16000)
    (tmp_path / "set.jsonl").write_text('{"audio": "a.wav", "text": "abc", "label": "dog"}\n')
    monkeypatch.chdir(tmp_path)
    before = sorted(cache.rglob("*"))
    assert cli.main(["evaluate", "hf:owner/name@v2", "set.jsonl"]) == 0
    assert list((tmp_path / "runs" / "owner-name-v2" / "evaluate").glob("*.json"))
    assert sorted(cache.rglob("*")) == before
