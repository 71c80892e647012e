"""Pretraining from end to end: what a run leaves, what starts with it, and that chance on dev disturbs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipe
import torch
from test_train import refusal, rows, run

import speechkit
from speechkit import config, pictures, pretrained
from speechkit.app.prepare import prepare
from speechkit.app.train import train
from speechkit.autoencoder import MaskedAutoencoder
from speechkit.data.corpora import read_corpus

CONFIG = """\
# speechkit train {folder}/recipes/hidden/conf/hidden.yaml
defaults:
  - /pretrain
  - _self_
name: hidden
run: {folder}/runs/${{name}}
model:
  features: {{mel: {{bands: 32}}}}
  encoder: {{frames: 48, dim: 16, heads: 2, layers: 1, patch: 8, stride: 8, band_stride: 8}}
  decoder: {{dim: 16, heads: 2, layers: 1}}
  normalised: false
data:
  train: {{tones: {{_target_: speechkit.data.Source, path: {folder}/train.jsonl}}}}
  dev: {{tones: {{_target_: speechkit.data.Source, path: {folder}/dev.jsonl}}}}
  seconds: 0.4
  batch: 8
  workers: 0
optim: {{schedule: {{warmup: 5}}, optimizer: {{lr: 1e-2}}}}
trainer: {{max_steps: 24, val_check_interval: 12}}
checkpoint: {{every: 4, best: 2}}
"""


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a pretraining on single tones, whose labels nobody looks at."""
    tags = recipe.write_tags(tmp_path_factory.mktemp("hidden"))
    file = tags.parents[2] / "hidden" / "conf" / "hidden.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(CONFIG.format(folder=tags.parents[3]))
    return file


@pytest.fixture(scope="module")
def finished(hidden: Path) -> Path:
    return run(hidden, "finished")


def test_a_run_leaves_the_model_of_least_loss_on_dev_and_a_picture_of_what_it_guesses(finished: Path) -> None:
    dev = [float(row["loss"]) for row in rows(finished, "dev.csv")]
    assert len(dev) == 2 and dev[1] < dev[0]
    assert isinstance(speechkit.load(finished), MaskedAutoencoder)
    assert (finished / "reconstructed.png").stat().st_size > 5000 and (finished / "curve.png").exists()


def test_a_model_folder_gives_the_same_guesses_again(finished: Path) -> None:
    model, again = speechkit.load(finished), speechkit.load(finished)
    heard = torch.randn(2, 40, 32)
    losses = []
    for one in (model, again):
        torch.manual_seed(0)
        losses.append(one.losses(heard)["loss"])
    assert torch.equal(*losses)


def test_other_pretrainings_are_options_of_the_same_encoder(hidden: Path, finished: Path) -> None:
    brief = ["trainer.max_steps=6", "trainer.val_check_interval=6"]
    without = [f"~model.decoder.{key}" for key in ("dim", "heads", "layers")]
    ssast = run(hidden, "ssast", "decoder=ssast", "mask=clusters", "model.mask.sides=[1,2]", *without, *brief)
    assert rows(ssast, "dev.csv")[0].keys() >= {"loss", "matched", "rebuilt"}
    windows = ["decoder=multiwindow", "model.decoder.windows.patches=[2,null]", "mask=stripes"]
    multiwindow = run(hidden, "multiwindow", *windows, *brief)
    shapes = [
        {name: weight.shape for name, weight in speechkit.load(folder).encoder.state_dict().items()}
        for folder in (finished, ssast, multiwindow)
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_a_tagger_starts_with_front_end_and_encoder_and_drops_the_rest(hidden: Path, finished: Path) -> None:
    tags = hidden.parents[2] / "tags" / "conf" / "tags.yaml"
    bare = tags.with_name("bare.yaml")
    lines = [line for line in tags.read_text().splitlines() if "encoder" not in line and "features:" not in line]
    bare.write_text("\n".join(lines))
    tagger = speechkit.load(run(bare, "begun", f"init={finished}", "optim.optimizer.lr=0", "trainer.max_steps=6"))
    given = speechkit.load(finished)
    weights = tagger.state_dict()
    for part in ("features", "encoder"):
        for name, weight in getattr(given, part).state_dict().items():
            assert torch.equal(weights[f"{part}.{name}"], weight), name
    assert not [name for name in weights if name.startswith("decoder")]
    x, lengths = torch.randn(2, 40, 32), torch.tensor([40, 30])
    assert torch.equal(tagger.encoder(x, lengths).frames, given.encoder(x, lengths).frames)


def test_a_training_in_two_parts_is_the_same_training(hidden: Path) -> None:
    whole = run(hidden, "whole", "optim=constant", "trainer.max_steps=12")
    run(hidden, "halves", "optim=constant", "trainer.max_steps=8")
    halves = run(hidden, "halves", "optim=constant", "trainer.max_steps=12")
    one, other = speechkit.load(whole).state_dict(), speechkit.load(halves).state_dict()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_how_often_dev_is_heard_changes_no_step(hidden: Path) -> None:
    often = run(hidden, "often", "trainer.max_steps=6", "trainer.val_check_interval=3")
    once = run(hidden, "once", "trainer.max_steps=6", "trainer.val_check_interval=6")
    assert rows(often) == rows(once)
    assert rows(often, "dev.csv")[-1] == rows(once, "dev.csv")[-1]


def test_a_config_without_a_mask_is_refused_by_name(hidden: Path) -> None:
    assert "model.mask must be given" in refusal(config.compose, hidden, ["~model.mask"])
    node = config.plain(config.compose(hidden).model)
    for key in ("mask", "decoder"):
        with pytest.raises(ValueError, match=key):
            config.build_model({name: value for name, value in node.items() if name != key})


def test_a_model_in_pretraining_writes_no_text(hidden: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold a recogniser, but holds"):
        pretrained.load_recogniser(finished)
    tones = recipe.write(tmp_path)
    with pytest.raises(ValueError, match=r"init must have the encoder of the config, Conformer, but .* has AST"):
        train(tones, ["name=text", f"init={finished}"])


def test_the_picture_shows_what_was_hidden() -> None:
    heard, guess = np.random.default_rng(0).normal(size=(2, 32, 16))
    unseen = np.arange(32)[:, None] + np.zeros(16) > 15
    figure = pictures.reconstructed(heard, unseen, np.where(unseen, guess, heard), 0.32, "a clip")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["a clip", "seen", "rebuilt"]
    seen = np.ma.filled(figure.axes[1].images[0].get_array(), np.nan)
    assert np.array_equal(np.isnan(seen), unseen.T)


# The recipe's manifests


def record(home: Path, name: str, seconds: float, **about: Any) -> None:
    folder = home / name
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.jsonl"
    number = len(manifest.read_text().splitlines()) if manifest.exists() else 0
    speechkit.audio.write(folder / f"{number}.wav", np.zeros(int(16000 * seconds), np.float32), 16000)
    with open(manifest, "a") as lines:
        lines.write(json.dumps({"audio": f"{number}.wav", **about}) + "\n")


def test_everything_is_heard_but_the_test_sets_of_what_is_tagged(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        record(tmp_path, "esc10", 5.0, split=split, label="rain")
        record(tmp_path, "reading", 3.0, split=split, text="hello")
    record(tmp_path, "reading", 25.0, text="a long one")
    record(tmp_path, "reading", 0.5, text="a short one")
    for _ in range(2):
        prepare(name="sounds_mae", rest=["--corpus", str(tmp_path), "--out", str(tmp_path / "out")])
    found = {
        kind: [round(cut.duration, 2) for cut in read_corpus(tmp_path / "out" / f"{kind}.jsonl", transcribed=False)]
        for kind in ("speech", "sounds", "dev")
    }
    assert found == {"speech": [3.0, 3.0, 3.0, 8.33, 8.33, 8.33], "sounds": [5.0], "dev": [5.0]}
    with pytest.raises(ValueError, match=r"must hold folders with a manifest.jsonl each, but holds none; name"):
        prepare(name="sounds_mae", rest=["--corpus", str(tmp_path / "out"), "--out", str(tmp_path / "again")])
