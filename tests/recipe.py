"""A recipe of tones that trains in seconds: four letters, each a pitch, in forty short recordings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from speechkit import audio

CONFIG = """\
# speechkit train {folder}/recipes/tones/conf/tones.yaml
defaults:
  - /train
  - /text: characters
  - /attention: relative
  - /encoder: conformer_xs
  - /objective: ctc
  - override /augment: none
  - _self_
name: tones
run: {folder}/runs/${{name}}
model:
  features: {{mel: {{bands: 20}}}}
  text: {{symbols: "abcd "}}
  encoder: {{dim: 16, heads: 2, layers: 1, subsampling: {{channels: 8}}}}
data:
  _target_: speechkit.datamodule.SpeechData
  train: {{tones: {{_target_: speechkit.data.Source, path: {folder}/train.jsonl}}}}
  dev: {{tones: {{_target_: speechkit.data.Source, path: {folder}/dev.jsonl}}}}
  test: {{}}
  max_seconds: 4
  workers: 0
optim: {{schedule: {{warmup: 5}}}}
trainer: {{max_steps: 12, val_check_interval: 6}}
checkpoint: {{every: 4, best: 2}}
"""


TAGS = """\
# speechkit train {folder}/recipes/tags/conf/tags.yaml
defaults:
  - /tag
  - /attention: relative
  - /encoder: conformer_xs
  - override /head: mean
  - _self_
name: tags
run: {folder}/runs/${{name}}
model:
  labels: [a, b, c, d]
  frames: 100
  features: {{mel: {{bands: 20}}}}
  encoder: {{dim: 16, heads: 2, layers: 1, subsampling: {{channels: 8}}}}
task: {{spec_augment: null}}
data:
  train: {{tones: {{_target_: speechkit.data.Source, path: {folder}/train.jsonl}}}}
  dev: {{tones: {{_target_: speechkit.data.Source, path: {folder}/dev.jsonl}}}}
  seconds: 0.4
  batch: 8
  workers: 0
optim: {{schedule: {{warmup: 5}}, optimizer: {{lr: 1e-2}}}}
trainer: {{max_steps: 30, val_check_interval: 6}}
checkpoint: {{every: 4, best: 2}}
"""


def write_tags(folder: Path, *, train: int = 24, dev: int = 8) -> Path:
    """Record single tones, each labelled with its letter, into ``folder``; the config of a tagging recipe."""
    dice = np.random.default_rng(0)
    for split, count in (("train", train), ("dev", dev)):
        lines = [_tone(folder / f"{split}{number}.wav", number % 4, dice) for number in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = folder / "recipes" / "tags" / "conf" / "tags.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(TAGS.format(folder=folder))
    return file


def _tone(path: Path, letter: int, dice: np.random.Generator) -> dict[str, object]:
    seconds = np.arange(int(dice.integers(5000, 9000))) / 16000
    samples = 0.3 * np.sin(2 * np.pi * (300 + 500 * letter) * seconds) + 0.003 * dice.standard_normal(len(seconds))
    audio.write(path, samples.astype(np.float32), 16000)
    return {"audio": path.name, "label": "abcd"[letter], "fold": 1 + letter % 2}


def write(folder: Path, *, train: int = 24, dev: int = 4) -> Path:
    """Record the tones into ``folder``; the config of the recipe."""
    dice = np.random.default_rng(0)
    for split, count in (("train", train), ("dev", dev)):
        lines = [_record(folder / f"{split}{number}.wav", dice) for number in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = folder / "recipes" / "tones" / "conf" / "tones.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(CONFIG.format(folder=folder))
    return file


def _record(path: Path, dice: np.random.Generator) -> dict[str, str]:
    letters = dice.integers(0, 4, dice.integers(2, 5))
    seconds = np.arange(2400) / 16000
    tones = [np.sin(2 * np.pi * (300 + 500 * letter) * seconds) * np.hanning(2400) for letter in letters]
    samples = 0.3 * np.concatenate([np.append(tone, np.zeros(800)) for tone in tones])
    audio.write(path, (samples + 0.003 * dice.standard_normal(len(samples))).astype(np.float32), 16000)
    return {"audio": path.name, "text": " ".join("abcd"[letter] for letter in letters)}
