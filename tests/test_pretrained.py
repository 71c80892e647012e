"""Model folders: what comes back, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import node, sound, tiny

import speechkit
from speechkit.pretrained import load, save
from speechkit.text import train_sentencepiece


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tiny(), node(), tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


def test_what_is_loaded_is_what_was_saved_bit_for_bit(folder: Path) -> None:
    saved, loaded = tiny(), load(folder)
    assert saved.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in saved.state_dict().items())
    assert not loaded.training
    clip = sound(2.0)
    assert loaded.transcribe(clip) == saved.transcribe(clip)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert not [file for file in folder.parent.iterdir() if file != folder]


def test_a_run_is_loaded_like_its_model(folder: Path) -> None:
    assert speechkit.load(folder.parent).transcribe(sound(1.0)) == load(folder).transcribe(sound(1.0))


def test_a_model_folder_can_be_moved_and_needs_no_other_file(tmp_path: Path) -> None:
    texts = ["a bad cab", "bead face", "egg faded", "decade", "a cabbage bed"] * 20
    train_sentencepiece(texts, tmp_path / "pieces.model", vocab=14)
    config = node(text={"_target_": "speechkit.text.SentencePiece", "model": str(tmp_path / "pieces.model")})
    model = tiny(**config)
    save(model, config, tmp_path / "here")
    (tmp_path / "pieces.model").unlink()
    (tmp_path / "here").rename(tmp_path / "there")
    assert load(tmp_path / "there").transcribe(sound(2.0)) == model.transcribe(sound(2.0))


def test_saving_again_replaces_the_model(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.encoder.subsampling.linear.bias += 1
    save(model, node(), folder)
    assert torch.equal(load(folder).encoder.subsampling.linear.bias, model.encoder.subsampling.linear.bias)
    assert not [file for file in folder.parent.iterdir() if file != folder]


def test_a_folder_with_other_files_is_not_replaced(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"model must hold a model and nothing else .* but holds notes.txt; choose"):
        save(load(folder), node(), folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert load(folder)


def test_a_save_killed_between_its_two_renames_loses_nothing(folder: Path) -> None:
    aside = folder.with_name(".model.old")
    folder.rename(aside)
    assert load(folder) and load(folder.parent)
    save(load(folder), node(), folder)
    assert load(folder) and not aside.exists()


# A process whose files may not grow beyond 20 kB stands for a full disk: both refuse in the middle of a write.
FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from tiny import node, tiny
from speechkit.pretrained import save
model = tiny()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save(model, node(), sys.argv[1])
except ValueError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_earlier_model_whole(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    command = [sys.executable, "-c", FULL_DISK, str(folder), str(Path(__file__).parent)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout.startswith(f"{folder} must be written in full, but the disk refused (")
    assert "File too large" in said.stdout and said.stdout.endswith("make room, or choose another folder.\n")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["model"]


def test_a_full_disk_is_reported_whatever_file_it_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    for function in ("fsync", "rename"):

        def refuse(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, function, refuse)
        with pytest.raises(ValueError, match=r"but the disk refused \(.*No space left on device"):
            save(model, node(), folder)
        monkeypatch.undo()
        assert load(folder) and [file.name for file in folder.parent.iterdir()] == ["model"]


def test_a_checkpoint_of_another_model_is_refused_with_both_lists(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["encoder.rogue"] = torch.zeros(3)
    weights["objective.ctc.head.bias"] = torch.zeros(5)
    del weights["encoder.subsampling.linear.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(folder)
    for part in (
        "model.safetensors must hold the weights of the model that config.json",
        "lacks encoder.subsampling.linear.bias",
        "has the unknown encoder.rogue",
        "has the wrong sizes objective.ctc.head.bias [5] instead of [9]",
        "put the config.json beside it that it was saved with",
    ):
        assert part in str(error.value)


def test_the_lists_of_a_very_different_model_are_short(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["encoder"] |= {"layers": 4, "dim": 8}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks .* and \d+ more, and has the wrong sizes .* and \d+ more") as error:
        load(folder)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("size", [0, 7, 100, 5000, -1])
def test_a_truncated_file_is_damaged(folder: Path, size: int) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:size])
    with pytest.raises(ValueError, match=rf"damaged or cut short at {len(whole[:size])} bytes .*; copy it again\."):
        load(folder)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def test_a_pickle_in_disguise_is_refused_unopened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for write in (lambda path: path.write_bytes(pickle.dumps(Bomb())), lambda path: torch.save(Bomb(), path)):
        write(folder / "model.safetensors")
        with pytest.raises(ValueError, match="must be a safetensors file, but is a Python pickle"):
            load(folder)
    assert not Path("exploded").exists()


def test_a_safetensors_file_that_begins_like_a_pickle_is_read(folder: Path) -> None:
    """It begins with the length of its header, whose first byte is that of a pickle in one file of 32."""
    path = folder / "model.safetensors"
    weights, padding = load_file(path), 0
    while not path.read_bytes().startswith(b"\x80"):
        padding += 8
        save_file(weights, path, metadata={"padding": "-" * padding})
    assert load(folder)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged or cut short at 5000 bytes"):
        load(folder)


def test_a_config_that_names_foreign_code_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["search"] = {"_target_": "os.system", "command": "touch exploded"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.search"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[1, 2]", '"a"', "{}", "\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_that_describes_no_model_is_named(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config.json must be what save\(\) wrote, but .*; copy"):
        load(folder)


def test_what_is_no_model_folder_is_named_with_the_remedy(folder: Path) -> None:
    with pytest.raises(ValueError, match="nowhere must be a model folder or a run, but does not exist; check the path"):
        load(folder / "nowhere")
    with pytest.raises(ValueError, match=r"model.safetensors must be .* but is a file; name the folder around it"):
        load(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json must be .* copy the model folder again"):
        load(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"run must be .* but holds no model.safetensors; a run has one after"):
        load(folder.parent)
