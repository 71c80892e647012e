"""Training of taggers: clips into batches, losses and mixup against their formulas, starts from other models."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipe
import torch
from test_train import home, launch, rows, run
from torch import Tensor, nn

import speechkit
from speechkit import audio, config
from speechkit.app.train import train
from speechkit.data import Source
from speechkit.data.corpora import write_manifest
from speechkit.datamodule import TagData
from speechkit.features import FrontEnd, GlobalNorm, LogMel
from speechkit.heads import Mean, Summary
from speechkit.tagger import Tagger
from speechkit.tasks import Constant, Mixup, Optim, Tag
from speechkit.tasks.tag import mix
from speechkit.types import EncoderOutput, TagBatch

RATE = 16000


def clip(folder: Path, number: int, seconds: float, **about: Any) -> dict[str, Any]:
    """A ramp, whose samples say where in the file they were."""
    ramp = np.linspace(0, 0.9, int(seconds * RATE), dtype=np.float32)
    audio.write(folder / f"{number}.wav", ramp, RATE)
    return {"audio": f"{number}.wav", **about}


def data(folder: Path, lines: list[dict[str, Any]], **changes: Any) -> TagData:
    write_manifest(folder / "all.jsonl", lines)
    source = Source(path=str(folder / "all.jsonl"))
    settings = {"labels": ("a", "b", "c"), "seconds": 1.0, "batch": 4, "workers": 0} | changes
    return TagData(train={"all": source}, dev={"all": source}, test={}, **settings)


class Levels(nn.Module):
    """An encoder of one frame a feature frame: the features."""

    dim, stride = 8, 1

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> EncoderOutput:
        lengths = torch.full((len(features),), features.shape[1]) if lengths is None else lengths
        return EncoderOutput(features, lengths, features.mean(1))


def tagger(**changes: Any) -> Tagger:
    torch.manual_seed(0)
    front = FrontEnd(mel=LogMel(bands=8), norm=GlobalNorm(dim=8, mean=3.0, std=2.0))
    settings = {"features": front, "encoder": Levels(), "labels": ["a", "b", "c"], "frames": 60, "head": Mean} | changes
    return Tagger(**settings)


def task(**changes: Any) -> Tag:
    optim = Optim(optimizer=torch.optim.AdamW, schedule=Constant())
    return Tag(**{"model": tagger(), "optim": optim, **changes})


def batch(targets: list[list[float]]) -> TagBatch:
    torch.manual_seed(1)
    lengths = torch.tensor([4000, 8000, 6000, 5000][: len(targets)])
    names = tuple(map(str, range(len(targets))))
    samples = torch.where(torch.arange(8000) < lengths[:, None], torch.randn(len(targets), 8000), 0.0)
    return TagBatch(samples, lengths, torch.tensor(targets), names, names)


# Clips


def test_clips_of_training_are_pieces_and_those_of_dev_are_whole(tmp_path: Path) -> None:
    lines = [clip(tmp_path, n, 3.0, label="a") for n in range(4)]
    module = data(tmp_path, lines)
    (one,) = module.train_batches(0)
    (other,) = module.train_batches(1)
    assert one.sample_lengths.tolist() == [RATE] * 4
    starts = {round(float(row[0] / 0.9 * 3), 1) for epoch in (one, other) for row in epoch.samples}
    assert len(starts) > 4 and min(starts) >= 0 and max(starts) <= 2
    (dev,) = module.dev_batches()
    assert dev.sample_lengths.tolist() == [3 * RATE] * 4
    (again,) = module.train_batches(1)
    assert torch.equal(again.samples, other.samples)


def test_targets_say_which_classes_are_heard(tmp_path: Path) -> None:
    lines = [
        clip(tmp_path, 0, 0.4, labels=["c", "a"]),
        clip(tmp_path, 1, 0.3, label="b"),
        clip(tmp_path, 2, 0.2, labels=[]),
        clip(tmp_path, 3, 0.1),
    ]
    (found,) = data(tmp_path, lines).dev_batches()
    assert found.targets.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert found.texts == ("c, a", "b", "", "")


def test_balanced_epochs_have_rare_classes_as_often_as_frequent_ones(tmp_path: Path) -> None:
    lines = [clip(tmp_path, n, 0.1, label="a" if n < 57 else "b") for n in range(60)]
    module = data(tmp_path, lines, balanced=True)
    heard = Counter(u.cut.custom["label"] for epoch in range(40) for u in module.draw(epoch))
    assert heard.total() == 2400 and 0.45 < heard["b"] / 2400 < 0.55
    keys = [u.key for u in module.draw(0)]
    assert len(set(keys)) == 60, "two copies of a clip are augmented differently"


def test_folds_are_held_out(tmp_path: Path) -> None:
    lines = [clip(tmp_path, n, 0.1, label="a", fold=1 + n % 5) for n in range(10)]
    write_manifest(tmp_path / "folds.jsonl", lines)
    path = str(tmp_path / "folds.jsonl")
    held, rest = Source(path=path, folds=[2]), Source(path=path, without_folds=[2])
    assert [len(source.cuts(transcribed=False)) for source in (held, rest)] == [2, 8]
    with pytest.raises(ValueError, match=r"folds=\[7\], but none of its 10 is left; it has .* folds 1 \(2\), 2 \(2\)"):
        Source(path=path, folds=[7]).cuts(transcribed=False)


@pytest.mark.parametrize(
    ("line", "changes", "words"),
    [
        ({"label": "d"}, {}, r"one of the 3 classes of model.labels, but 1 are not: d \(1\)"),
        ({"labels": ["a", "b"]}, {"exclusive": True}, "must have one label .* but 0 has a, b"),
        ({}, {"exclusive": True}, "but 0 has none"),
        ({"labels": "a"}, {}, "The labels of 0 must be a list of names, but are 'a'"),
        ({"label": 3}, {}, r"but are \[3\]"),
    ],
    ids=["unknown", "two", "none", "text", "number"],
)
def test_labels_that_cannot_be_learnt_are_refused_before_an_epoch(
    tmp_path: Path, line: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        data(tmp_path, [clip(tmp_path, 0, 0.1, **line)], **changes).setup("fit")


def test_a_class_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must name each class once, but names b again"):
        data(tmp_path, [clip(tmp_path, 0, 0.1, label="a")], labels=("a", "b", "b"))


# Losses


def test_losses_are_the_formulas_of_soft_targets() -> None:
    logits, targets = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    each = -(targets * logits.sigmoid().log() + (1 - targets) * (1 - logits.sigmoid()).log())
    assert torch.allclose(task().loss(logits, targets), each.mean())
    one = -(targets * logits.softmax(1).log()).sum(1)
    assert torch.allclose(task(model=tagger(exclusive=True)).loss(logits, targets), one.mean())


def test_label_smoothing_spreads_a_share_of_the_target() -> None:
    targets = torch.tensor([[0.0, 1.0, 0.0]])
    assert torch.allclose(
        task(model=tagger(exclusive=True), label_smoothing=0.3).smooth(targets), torch.tensor([[0.1, 0.8, 0.1]])
    )
    assert torch.allclose(task(label_smoothing=0.2).smooth(targets), torch.tensor([[0.1, 0.9, 0.1]]))


@pytest.mark.parametrize("of", ["samples", "features"])
def test_mixed_clips_are_learnt_as_the_formula_says(of: str) -> None:
    mixed = task(mixup=Mixup(of=of, alpha=2.0, probability=1.0)).eval()
    heard = batch([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    torch.manual_seed(7)
    found = mixed.losses(heard, 0)["loss"]
    torch.manual_seed(7)
    share, partner = mixed.mixup.draw(4, torch.device("cpu"))
    assert ((share > 0) & (share < 1)).all()
    lengths = torch.maximum(heard.sample_lengths, heard.sample_lengths[partner])
    if of == "samples":
        samples = share[:, None] * heard.samples + (1 - share)[:, None] * heard.samples[partner]
        frames, counts = mixed.model.hear(samples, lengths)
    else:
        frames, counts = mixed.model.hear(heard.samples, lengths)
        frames = share[:, None, None] * frames + (1 - share)[:, None, None] * frames[partner]
    targets = share[:, None] * heard.targets + (1 - share)[:, None] * heard.targets[partner]
    assert torch.allclose(found, mixed.loss(mixed.model.logits(frames, counts), targets), atol=1e-6)


def test_clips_are_mixed_as_often_and_as_much_as_wanted() -> None:
    torch.manual_seed(0)
    share, partner = Mixup(alpha=10.0, probability=0.25).draw(20000, torch.device("cpu"))
    mixed = share[share < 1]
    assert len(mixed) / 20000 == pytest.approx(0.25, abs=0.02)
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    assert float(mixed.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(mixed.var()) == pytest.approx(1 / (4 * 21), rel=0.1)
    assert sorted(partner.tolist()) == list(range(20000))
    x = torch.randn(3, 2, 2)
    assert torch.equal(mix(x, torch.ones(3), torch.tensor([2, 0, 1])), x)


def test_impossible_mixup_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha must be more than 0"):
        Mixup(alpha=0.0)


# Hearing


def test_padding_of_a_batch_changes_no_score() -> None:
    model, heard = tagger().eval(), batch([[1, 0, 0]] * 4)
    frames, counts = model.hear(heard.samples, heard.sample_lengths)
    together = model.probabilities(model.logits(frames, counts))
    for row, (samples, length) in enumerate(zip(heard.samples, heard.sample_lengths, strict=True)):
        assert torch.allclose(together[row], model.scores(samples[:length]), atol=1e-6)


def test_filled_clips_are_scored_the_same_in_training_and_in_use() -> None:
    model, heard = tagger(filled=True, frames=70).eval(), batch([[1, 0, 0]] * 4)
    frames, _ = model.hear(heard.samples, heard.sample_lengths)
    assert frames.shape[1] == 70
    floor = -3.0 / 2.0  # zeros, normalised
    assert torch.allclose(frames[0, 25:], torch.full((45, 8), floor))
    together = model.probabilities(model.logits(frames))
    for row, (samples, length) in enumerate(zip(heard.samples, heard.sample_lengths, strict=True)):
        assert torch.allclose(together[row], model.scores(samples[:length]), atol=1e-6)


def test_a_head_needs_what_it_pools() -> None:
    model = tagger(head=Summary)
    assert model.head(EncoderOutput(torch.randn(2, 3, 8), torch.tensor([3, 3]), torch.randn(2, 8))).shape == (2, 3)
    with pytest.raises(ValueError, match=r"heads.Summary must be given an encoder with a summary.*head=mean"):
        model.head(EncoderOutput(torch.randn(2, 3, 8), torch.tensor([3, 3])))


# Training


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe.write_tags(tmp_path_factory.mktemp("tags"))


@pytest.fixture(scope="module")
def finished(tags: Path) -> Path:
    return run(tags, "finished")


def test_a_trained_tagger_names_tones_it_has_not_heard(tags: Path, finished: Path) -> None:
    model = speechkit.load(finished)
    assert isinstance(model, Tagger)
    for line in map(json.loads, (tags.parents[3] / "dev.jsonl").read_text().splitlines()):
        assert model.tag(tags.parents[3] / line["audio"])[0].label == line["label"]
    assert float(rows(finished, "dev.csv")[-1]["accuracy"]) == 1.0


def test_a_training_in_two_parts_is_the_same_training(tags: Path) -> None:
    constant = ["optim=constant", "task.mixup={_target_: speechkit.tasks.Mixup}", "data.balanced=true"]
    whole = run(tags, "whole", *constant, "trainer.max_steps=12")
    run(tags, "halves", *constant, "trainer.max_steps=8")
    halves = run(tags, "halves", *constant, "trainer.max_steps=12")
    one, other = speechkit.load(whole).state_dict(), speechkit.load(halves).state_dict()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_other_classes_start_from_front_end_and_encoder(tags: Path, finished: Path) -> None:
    changes = [f"init={finished}", "model.labels=[d,c,b,a,z]", "optim.optimizer.lr=0", "trainer.max_steps=6"]
    begun, given = speechkit.load(run(tags, "begun", *changes)), speechkit.load(finished)
    assert begun.labels == ("d", "c", "b", "a", "z") and begun.head.linear.weight.shape[0] == 5
    learnt = dict(begun.named_parameters())
    assert all(torch.equal(learnt[name], weight) for name, weight in given.encoder.named_parameters("encoder"))
    assert torch.equal(begun.features.norm.mean, given.features.norm.mean)


def test_the_same_classes_start_from_the_head_too(tags: Path, finished: Path) -> None:
    again = run(tags, "again", f"init={finished}", "optim.optimizer.lr=0", "trainer.max_steps=6")
    learnt = dict(speechkit.load(again).named_parameters())
    assert all(torch.equal(learnt[name], weight) for name, weight in speechkit.load(finished).named_parameters())


def test_an_encoder_that_is_left_open_is_that_of_init(tags: Path, finished: Path, tmp_path: Path) -> None:
    bare = tags.with_name("bare.yaml")
    lines = [line for line in tags.read_text().splitlines() if "encoder" not in line and "features:" not in line]
    bare.write_text("\n".join(lines))
    folder = run(bare, "bare", f"init={finished}", "trainer.max_steps=6")
    assert speechkit.load(folder).encoder.dim == 16
    with pytest.raises(ValueError, match=r"model.encoder must be given where there is no init"):
        train(bare, ["name=nothing"])


def test_labels_can_be_a_file(tags: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
    folder = run(tags, "listed", f"model.labels={tmp_path / 'labels.txt'}", "trainer.max_steps=6")
    assert speechkit.load(folder).labels == ("a", "b", "c", "d")
    with pytest.raises(ValueError, match=r"a text file with a class a line, but gone.txt is not there"):
        train(tags, ["name=unlisted", "model.labels=gone.txt"])


def test_a_recogniser_gives_a_tagger_its_encoder(tags: Path, tmp_path: Path) -> None:
    tones = recipe.write(tmp_path)
    heard = run(tones, "heard", "model.features.mel.bands=20", "trainer.max_steps=6")
    folder = run(tags, "taught", f"init={heard}", "optim.optimizer.lr=0", "trainer.max_steps=6")
    learnt = dict(speechkit.load(folder).encoder.named_parameters())
    assert all(torch.equal(learnt[name], w) for name, w in speechkit.load(heard).encoder.named_parameters())


def test_several_labels_a_clip_are_judged_by_mean_average_precision(tags: Path) -> None:
    folder = run(tags, "many", "model.exclusive=false", "task.label_smoothing=0.1")
    assert float(rows(folder, "dev.csv")[-1]["mAP"]) > 0.9
    assert speechkit.load(folder).tag(tags.parents[3] / "dev0.wav")[0].label == "a"


@pytest.mark.slow
def test_two_processes_judge_all_of_dev(tags: Path) -> None:
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
    process = launch(
        tags, "two", *two, "trainer.max_steps=12", "trainer.val_check_interval=6", "trainer.log_every_n_steps=1"
    )
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    accuracies = [float(row["accuracy"]) for row in rows(home(tags, "two"), "dev.csv")]
    assert len(accuracies) == 2 and all((8 * accuracy).is_integer() for accuracy in accuracies)
    assert accuracies[-1] == 1.0


def test_a_model_node_says_what_it_describes() -> None:
    with pytest.raises(ValueError, match="model must have one of the keys objective, head"):
        config.build_model({"encoder": {}})
