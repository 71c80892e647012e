"""Explanations against transformers' attentions, and pictures of them and of what was mistaken."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from ast_cases import close, randomised, spectrogram, tiny
from tiny import sound
from torch import nn

import speechkit
from speechkit import pictures
from speechkit.explain import explain, rollout, sensitivity, spread
from speechkit.features import FrontEnd, LogMel
from speechkit.heads import Mean
from speechkit.tagger import Tagger

CONFIG = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


def test_rollout_is_that_of_the_attentions_transformers_gives(tmp_path: Path) -> None:
    theirs = pytest.importorskip("transformers.models.audio_spectrogram_transformer")
    config = theirs.ASTConfig(**CONFIG, num_mel_bins=48, max_length=96, num_labels=3, attn_implementation="eager")
    model = randomised(theirs.ASTForAudioClassification(config))
    model.save_pretrained(tmp_path)
    x = spectrogram(2, 96, 48)
    with torch.no_grad():
        attentions = model(x, output_attentions=True).attentions
    rolled = torch.eye(attentions[0].shape[-1], dtype=torch.float64)
    for weights in attentions:
        rolled = (0.5 * weights.double().mean(1) + 0.5 * torch.eye(len(rolled[0]), dtype=torch.float64)) @ rolled
    encoder = speechkit.load(tmp_path).encoder
    columns, rows = 9, encoder.rows
    wanted = rolled[:, :2, 2:].mean(1).unflatten(1, (rows, columns)).mT
    close(rollout(encoder, x), wanted.float(), 1e-6)
    assert 0.05 < float(wanted.sum((1, 2)).min()) < 1


def test_rollout_of_a_short_clip_is_the_same_beside_a_longer_one_and_leaves_no_trace() -> None:
    encoder, x = tiny(), spectrogram(2, 96, 40)
    lengths = torch.tensor([50, 96])
    together, alone = rollout(encoder, x, lengths), rollout(encoder, x[:1, :50], lengths[:1])
    close(together[0, :4], alone[0], 1e-6)
    assert (together[0, 4:] == 0).all() and together[1].min() > 0
    assert not any(part._forward_hooks for part in encoder.modules())


def test_patches_are_spread_over_the_features_they_cover() -> None:
    encoder, grid = tiny(), torch.rand(3, 3)
    heat = spread(encoder, grid, 50)
    wanted = np.zeros((50, 40))
    for t in range(50):
        for f in range(40):
            over = [
                grid[c, r].item() for c in range(3) for r in range(3) if 0 <= t - 10 * c < 16 and 0 <= f - 10 * r < 16
            ]
            wanted[t, f] = np.mean(over) if over else 0
    assert heat.numpy() == pytest.approx(wanted, abs=1e-6)
    assert (heat[36:] == 0).all()


class Bands(nn.Module):
    """Gives its features: then gradient times input is known."""

    dim, stride = 16, 1

    def forward(self, features: torch.Tensor, lengths: torch.Tensor | None):  # type: ignore[no-untyped-def]
        full = torch.full((len(features),), features.shape[1]) if lengths is None else lengths
        return speechkit.types.EncoderOutput(features, full)


def linear_tagger(**options: object) -> Tagger:
    features = FrontEnd(mel=LogMel(bands=16))
    tagger = Tagger(features=features, encoder=Bands(), labels=("a", "b", "c"), frames=200, head=Mean, **options).eval()
    tagger.head.norm = nn.Identity()
    return tagger


def test_gradient_times_input_is_exact_for_a_linear_model() -> None:
    tagger, x = linear_tagger(), spectrogram(1, 30, 16)
    best = int(tagger.logits(x)[0].argmax())
    close(sensitivity(tagger, x)[0], (x[0] * tagger.head.linear.weight[best] / 30).abs().detach(), 1e-6)


@pytest.mark.parametrize("filled", [False, True])
def test_every_tagger_can_be_explained_and_only_real_features_are(filled: bool) -> None:
    for encoder, how in ((tiny(features=16), "attention rollout"), (Bands(), "gradient times input")):
        tagger = linear_tagger(filled=filled)
        if how == "attention rollout":
            tagger = Tagger(
                features=tagger.features, encoder=encoder, labels=("a", "b"), frames=96, filled=filled
            ).eval()
        (piece,) = tagger.pieces(sound(0.7))
        said, heat = explain(tagger, piece)
        assert said == how and heat.shape == (piece.length, 16) and heat.min() >= 0 and heat.max() > 0


def test_pictures_are_drawn_for_few_and_for_many_classes(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    for count in (2, 10, 50):
        counts = dice.integers(0, 3, size=(count, count)) + 20 * np.eye(count, dtype=int)
        counts[0] = 0
        pictures.confusion(counts, [f"class {n}" for n in range(count)], "x").savefig(tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").stat().st_size > 5000
    figure = pictures.explained(
        dice.random((70, 16)), np.zeros((70, 16)), [("dog", 0.9)], (3.0, 3.7), "a.wav", "rollout"
    )
    figure.savefig(tmp_path / "e.png")
    assert figure.axes[0].get_xlim() == (3.0, 3.7)


@pytest.mark.parametrize(
    ("column", "label"), [("wer", "word error rate in %"), ("accuracy", "accuracy in %"), ("mAP", "mean average")]
)
def test_the_curve_of_a_run_shows_what_dev_was_judged_by(tmp_path: Path, column: str, label: str) -> None:
    for name, columns in (("train", ["step", "loss"]), ("dev", ["step", "loss", column])):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([columns, *([n, *[0.5] * (len(columns) - 1)] for n in range(1, 4))])
    below = pictures.curve(tmp_path).axes[1]
    assert below.get_ylabel().startswith(label) and below.lines[0].get_ydata().tolist() == [50.0] * 3


def test_the_curve_of_a_run_judged_by_its_loss_has_the_losses_alone(tmp_path: Path) -> None:
    (tmp_path / "dev.csv").write_text("step,loss\n1,0.5\n2,0.25\n")
    (axes,) = pictures.curve(tmp_path).axes
    assert axes.get_xlabel() == "optimizer step"
