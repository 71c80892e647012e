"""Pin the first losses of every recipe, or see that they are as pinned.

    python tools/pin_losses.py [recipes/digits ...]      # rewrites the "smoke" part of expected.json

A smoke run is the recipe's own config on ten short clips of noise and tones with texts of its vocabulary, or labels of
three classes: everything from features and augmentation to the optimizer takes part, and nothing has to be prepared.
Encoders of taggers are made small for it, and hear as much as there is: AST would take minutes.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, open_dict

from speechkit import audio, config
from speechkit.app.train import fit
from speechkit.text import Tokenizer

STEPS, CLIPS, CLASSES = 3, 10, ("whistle", "hum", "hiss")
ROOT = Path(__file__).parents[1]


def smoke(path: Path, folder: Path) -> list[float]:
    """The losses of the first steps of a recipe's config, on clips recorded into ``folder``."""
    settings = config.compose(path)
    manifest = _record(folder, config.build(settings.model.text) if "text" in settings.model else None)
    fit(_on_ten_clips(settings, manifest, folder / "run"))
    with open(folder / "run" / "train.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def _on_ten_clips(settings: DictConfig, manifest: Path, run: Path) -> DictConfig:
    source = {"_target_": "speechkit.data.Source", "path": str(manifest)}
    with open_dict(settings):
        settings.update(run=str(run), init=None)
        need_no_files(settings.model)
        settings.data.update(train={"clips": source}, dev={}, test={}, workers=0)
        if "text" in settings.model:
            settings.data.update(max_seconds=60)
        else:
            settings.data.update(batch=CLIPS, seconds=1.2)
            settings.model.encoder.update(dim=96, heads=2, layers=2)
        settings.trainer.update(accelerator="cpu", devices=1, strategy="auto", precision="32-true", max_time=None)
        settings.trainer.update(max_steps=STEPS, max_epochs=-1, accumulate_grad_batches=1, log_every_n_steps=1)
        settings.trainer.update(limit_val_batches=0)
    return settings


def need_no_files(model: DictConfig) -> None:
    """Three classes and at most five seconds at once, for a tagger; the demo's encoder for that of init."""
    if "labels" in model:
        model.update(labels=list(CLASSES), frames=min(model.frames, 512))
    if model.get("encoder") is None:
        demo = config.compose(ROOT / "recipes" / "digits" / "conf" / "demo.yaml").model
        model.update(features=demo.features, encoder=demo.encoder)


def _record(folder: Path, tokenizer: Tokenizer | None) -> Path:
    dice = np.random.default_rng(0)
    lines = []
    for number in range(CLIPS):
        samples = dice.standard_normal(dice.integers(12_000, 20_000)) * 0.05
        samples += 0.3 * np.sin(2 * np.pi * dice.uniform(200, 2000) * np.arange(len(samples)) / 16000)
        audio.write(folder / f"{number}.wav", samples.astype(np.float32), 16000)
        text = tokenizer.decode(dice.integers(1, tokenizer.size, 4).tolist()).strip() if tokenizer else ""
        lines.append({"audio": f"{number}.wav", "text": text, "label": CLASSES[number % len(CLASSES)]})
    (folder / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "clips.jsonl"


def pin(recipe: Path) -> None:
    """Write the losses of all configs of a recipe into its ``expected.json``; what else is there stays."""
    file = recipe / "expected.json"
    expected = json.loads(file.read_text()) if file.exists() else {}
    expected["smoke"] = {}
    for path in sorted((recipe / "conf").glob("*.yaml")):
        with tempfile.TemporaryDirectory() as folder:
            expected["smoke"][path.stem] = [round(loss, 6) for loss in smoke(path, Path(folder))]
    file.write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    recipes = [Path(given) for given in sys.argv[1:]] or [conf.parent for conf in sorted(ROOT.glob("recipes/*/conf"))]
    for recipe in recipes:
        if not (recipe / "conf").is_dir():
            sys.exit(
                f"A recipe must be a folder with conf in it, but {recipe} is not; name recipes/digits, for example."
            )
        pin(recipe)
