"""Learning from events: what frames are to say, against the sound itself and by brute force; and what that gains."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hearing
import numpy as np
import pytest
import torch
from hearing import HERTZ, RATE
from test_tag_events import listed, manifest, row
from test_tagging import batch, tagger, task
from test_train import run
from torch import Tensor

from speechkit.data import Augment, Gain, Shift, Source
from speechkit.datamodule import TagData
from speechkit.encoders.ast import AST, Patchout
from speechkit.tasks import Mixup
from speechkit.tasks.tag import frame_targets, mix
from speechkit.types import EncoderOutput, Event, TagBatch, Timing

LABELS = tuple(HERTZ)


def timing(clips: Sequence[list[tuple[int, float, float]] | None]) -> Timing:
    rows = [(row, *event) for row, events in enumerate(clips) for event in events or ()]
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    known = torch.tensor([events is not None for events in clips])
    return Timing(known, table[:, 0].long(), table[:, 1].long(), table[:, 2:])


def data(folder: Path, lines: list[dict[str, Any]], **changes: Any) -> TagData:
    source = Source(path=str(manifest(folder / "all.jsonl", lines)))
    settings = {"labels": LABELS, "seconds": 2.0, "batch": 8, "workers": 0} | changes
    module = TagData(train={"all": source}, dev={"all": source}, test={}, **settings)
    module.setup("fit")
    return module


# Targets


def test_a_frame_is_to_say_how_much_of_it_a_class_is_heard_in() -> None:
    dice = np.random.default_rng(0)
    clips: list[list[tuple[int, float, float]]] = []
    for _ in range(5):
        borders = dice.uniform(0, 3, (6, 2))
        clips.append([(int(dice.integers(3)), min(pair), max(pair)) for pair in borders.tolist()])
    clips[2] = []
    found = frame_targets(timing(clips), (5, 40, 3), 0.07)
    fine = 700  # parts of a frame
    for number, events in enumerate(clips):
        heard = np.zeros((3, 40 * fine), dtype=bool)
        for label, start, end in events:
            heard[label, round(start / 0.07 * fine) : round(end / 0.07 * fine)] = True
        wanted = heard.reshape(3, 40, fine).mean(2).T
        # Where events of a class overlap within a frame they begin or end in, shares are added, up to all of it.
        assert (found[number].numpy() >= wanted - 2e-3).all() and (found[number].numpy() <= 1).all()
        alone = [sum(e[0] == label for e in events) < 2 for label in range(3)]
        assert np.abs(found[number].numpy() - wanted)[:, alone].max(initial=0) < 2e-3
        assert np.array_equal(found[number].numpy() > 1e-3, wanted > 1e-3)


@pytest.mark.parametrize("speed", [1.0, 0.8, 1.25])
def test_events_stay_with_their_sounds_through_pieces_and_changes_of_speed(tmp_path: Path, speed: float) -> None:
    lines = []
    for number in range(6):
        start = 0.7 + 0.6 * number
        events = [Event("low", start, start + 0.9), Event("low", start + 2.0, start + 2.5)]
        hearing.sounds(tmp_path / f"{number}.wav", events, 7.0)
        lines.append({"audio": f"{number}.wav", "events": listed(events)})
    hearing.sounds(tmp_path / "u.wav", [Event("low", 1.0, 2.0)], 2.0)
    lines.append({"audio": "u.wav", "label": "low"})
    module = data(tmp_path, lines, augment=Augment(speeds=[speed], effects={"gain": Gain(db=(-3, 0))}))
    seen = 0
    for epoch in range(4):
        (one,) = module.train_batches(epoch)
        for clip, name in enumerate(one.ids):
            if name.endswith("u"):
                assert not one.events.known[clip] and one.targets[clip, 0] == 1
                continue
            times = one.events.times[one.events.clips == clip].tolist()
            said = np.zeros(one.samples.shape[1], dtype=bool)
            for start, end in times:
                said[round(start * RATE) : round(end * RATE)] = True
            loud = np.convolve(np.abs(one.samples[clip].numpy()), np.ones(160) / 160, "same") > 0.03
            assert np.mean(said != loud) < 0.02, (name, times)
            assert bool(one.targets[clip, 0]) == bool(times) == (one.texts[clip] == "low")
            seen += len(times)
    assert seen > 12 and one.sample_lengths.max() <= 2 * RATE


def test_batches_have_events_where_the_training_has_any_and_only_there(tmp_path: Path) -> None:
    hearing.sounds(tmp_path / "a.wav", [], 0.5)
    plain = {"audio": "a.wav", "label": "low"}
    assert next(iter(data(tmp_path, [plain]).train_batches(0))).events is None
    quiet = {"audio": "a.wav", "id": "b", "events": []}
    (both,) = data(tmp_path, [plain, quiet]).train_batches(0)
    known = dict(zip(both.ids, both.events.known.tolist(), strict=True))
    assert known == {"a": False, "b": True} and both.events.times.shape == (0, 2)
    (unnamed,) = data(tmp_path, [plain, quiet], labels=()).train_batches(0)
    assert unnamed.events is None


def test_augmentation_that_moves_sounds_is_refused_where_it_matters_when_they_are(tmp_path: Path) -> None:
    hearing.sounds(tmp_path / "a.wav", [], 0.5)
    moving = Augment(effects={"gain": Gain(), "later": Shift()})
    data(tmp_path, [{"audio": "a.wav", "label": "low"}], augment=moving)
    with pytest.raises(ValueError, match=r"but later shifts them in time; leave it out with '~augment.effects.later'"):
        data(tmp_path, [{"audio": "a.wav", "events": []}], augment=moving)


# The loss


def strong(known: Sequence[list[tuple[int, float, float]] | None]) -> TagBatch:
    targets = [[float(any(e[0] == label for e in events or ())) for label in range(3)] for events in known]
    return batch(targets)._replace(events=timing(known))


def by_hand(one: Any, heard: TagBatch, rows: Sequence[int]) -> Tensor:
    """The mean over the real frames of some clips, frame by frame: they last 10 ms, and clips 0.25 s, 0.5 s ..."""
    frames, counts = one.model.hear(heard.samples, heard.sample_lengths)
    logits = one.model.head.frames(one.model.encoder(frames, counts))
    losses = []
    for clip in rows:
        for frame in range(int(counts[clip])):
            target = torch.zeros(1, 3)
            for number, label, (start, end) in zip(*heard.events[1:], strict=True):
                if number == clip:
                    part = min(float(end), 0.01 * frame + 0.01) - max(float(start), 0.01 * frame)
                    target[0, label] += max(0.0, part) / 0.01
            if not one.exclusive or target.sum() > 0:
                losses.append(one.loss(logits[clip, frame][None], one.smooth(target)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("exclusive", [False, True])
def test_the_loss_is_that_of_clips_and_of_the_frames_of_those_with_events(exclusive: bool) -> None:
    heard = strong([[(0, 0.043, 0.2)], None, [], [(1, 0.0, 0.118), (1, 0.25, 0.3)]])
    one = task(model=tagger(exclusive=exclusive), events=0.3, label_smoothing=0.1)
    parts, alone = one.losses(heard, 0), one.losses(heard._replace(events=None), 0)
    assert set(alone) == {"loss"} and torch.equal(parts["clip"], alone["loss"])
    torch.testing.assert_close(parts["events"], by_hand(one, heard, [0, 2, 3]))
    torch.testing.assert_close(parts["loss"], parts["clip"] + 0.3 * parts["events"])
    assert set(task(model=one.model, events=0.0).losses(heard, 0)) == {"loss"}


def test_clips_without_events_give_the_loss_of_the_clip_alone_under_the_same_names() -> None:
    one, heard = task(), strong([None, None, None, None])
    parts = one.losses(heard, 0)
    assert parts["events"] == 0 and torch.equal(parts["loss"], parts["clip"])
    assert set(parts) == set(one.losses(strong([[], None, None, None]), 0))


def test_a_filled_up_clip_is_learnt_from_as_far_as_it_goes() -> None:
    heard = strong([[(0, 0.043, 0.2)], [(2, 0.1, 0.5)], [], [(1, 0.0, 0.118)]])
    short, filled = (task(model=tagger(filled=filled, frames=60)) for filled in (False, True))
    one, other = (t.losses(heard, 0)["events"] for t in (short, filled))
    torch.testing.assert_close(one, other)  # the head looks at each frame by itself


@pytest.mark.parametrize("of", ["samples", "features"])
def test_mixed_clips_have_mixed_frames_and_none_where_one_of_them_has_no_events(of: str) -> None:
    heard = strong([[(0, 0.04, 0.2)], None, [(2, 0.1, 0.3)], [(1, 0.0, 0.1)]])
    mixed = task(mixup=Mixup(of=of, alpha=2.0, probability=0.7))
    for seed in range(20):
        torch.manual_seed(seed)
        share, partner = mixed.mixup.draw(4, torch.device("cpu"))
        torch.manual_seed(seed)
        found = mixed.losses(heard, 0)["events"]
        lengths = torch.where(
            share < 1, torch.maximum(heard.sample_lengths, heard.sample_lengths[partner]), heard.sample_lengths
        )
        x = mix(heard.samples, share, partner) if of == "samples" else heard.samples
        frames, counts = mixed.model.hear(x, lengths)
        frames = mix(frames, share, partner) if of == "features" else frames
        logits = mixed.model.head.frames(mixed.model.encoder(frames, counts))
        targets = mix(frame_targets(heard.events, logits.shape, 0.01), share, partner)
        rows = [n for n in range(4) if n != 1 and (share[n] == 1 or partner[n] != 1)]
        pairs = [(logits[n, : counts[n]], targets[n, : counts[n]]) for n in rows]
        wanted = mixed.loss(*(torch.cat(side) for side in zip(*pairs, strict=True)))
        torch.testing.assert_close(found, wanted)


def test_columns_that_patchout_leaves_out_are_not_learnt_from() -> None:
    encoder = AST(features=8, frames=60, dim=8, heads=2, layers=1, patch=8, stride=4, patchout=Patchout(columns=5))
    one, heard = task(model=tagger(encoder=encoder)).train(), strong([[(0, 0.0, 0.1)], [], [], []])
    given = []

    def frames(encoded: EncoderOutput) -> Tensor:
        encoded.frames.retain_grad()
        given.append(encoded.frames)
        return encoded.frames[..., :3]

    one.model.head.frames = frames
    torch.manual_seed(3)
    one.losses(heard, 0)["events"].backward()
    left_out = (given[0] == 0).all(-1)
    learnt = given[0].grad.abs().sum(-1) > 0
    assert left_out[1].sum() == 5 and not learnt[left_out].any() and learnt[1].any()


def test_a_weight_that_is_none_is_refused() -> None:
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"task\.events must be a weight of 0 or more"):
            task(events=wrong)


# What it is good for

CONFIG = """\
# speechkit train {folder}/recipes/scenes/conf/scenes.yaml
defaults:
  - /tag
  - /attention: relative
  - /encoder: conformer_xs
  - override /head: events
  - _self_
name: scenes
run: {folder}/runs/${{name}}
model:
  labels: [low, high]
  exclusive: false
  frames: 200
  features: {{mel: {{bands: 20}}}}
  encoder: {{dim: 16, heads: 2, layers: 1, subsampling: {{channels: 8}}}}
task: {{spec_augment: null, mixup: {{_target_: speechkit.tasks.Mixup, of: features, alpha: 0.3}}}}
data:
  train: {{scenes: {{_target_: speechkit.data.Source, path: {folder}/strong.jsonl}}}}
  dev: {{scenes: {{_target_: speechkit.data.Source, path: {folder}/dev.jsonl}}}}
  seconds: 2.0
  batch: 8
  workers: 0
augment: {{_target_: speechkit.data.Augment, speeds: [0.95, 1.0, 1.05]}}
optim: {{schedule: {{warmup: 5}}, optimizer: {{lr: 1e-2}}}}
trainer: {{max_steps: 60, val_check_interval: 30}}
checkpoint: {{every: 60, best: 1}}
"""


def scene(dice: np.random.Generator) -> list[Event]:
    """Up to three tones of each kind within 4 s, none on top of one of its own kind."""
    return [
        Event(label, round(start, 3), round(start + dice.uniform(0.4, 0.9), 3))
        for label in HERTZ
        for start in np.arange(0, 3.9, 1.4)[: dice.integers(4)] + dice.uniform(0.0, 0.25)
    ]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, dice = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in (("strong", 24), ("dev", 6), ("test", 12)):
        lines = []
        for number in range(count):
            events = scene(dice)
            hearing.sounds(folder / f"{split}{number}.wav", events, 4.0, int(dice.integers(1000)))
            lines.append({"audio": f"{split}{number}.wav", "events": listed(events)})
        manifest(folder / f"{split}.jsonl", lines)
    lines = [json.loads(line) for line in (folder / "strong.jsonl").read_text().splitlines()]
    weak = [{"audio": line["audio"], "labels": sorted({e["label"] for e in line["events"]})} for line in lines]
    manifest(folder / "weak.jsonl", weak)
    file = folder / "recipes" / "scenes" / "conf" / "scenes.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(CONFIG.format(folder=folder))
    return file


@pytest.fixture(scope="module")
def strongly(scenes: Path) -> Path:
    return run(scenes, "strongly")


def test_dev_says_how_well_events_are_found_as_the_evaluation_of_its_best_model_does(
    scenes: Path, strongly: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(strongly / "dev.csv", newline="") as file:
        best = max(csv.DictReader(file), key=lambda line: float(line["mAP"]))
    capsys.readouterr()
    found = row(capsys, strongly, scenes.parents[3] / "dev.jsonl")
    assert float(best["mAP"]) == pytest.approx(found["mean_average_precision"])
    assert 0 < float(best["segment_f1"]) == pytest.approx(found["events"]["segment_micro"])


def test_events_teach_when_sounds_are_heard_better_than_labels_of_clips_do(
    scenes: Path, strongly: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = scenes.parents[3]
    weakly = run(scenes, "weakly", f"data.train.scenes.path={home / 'weak.jsonl'}")
    capsys.readouterr()
    one, other = (row(capsys, folder, home / "test.jsonl")["events"] for folder in (strongly, weakly))
    assert one["event_micro"] > max(0.6, other["event_micro"] + 0.2), (one, other)
    assert one["segment_micro"] > other["segment_micro"]
    with open(strongly / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(r["loss"]) == pytest.approx(float(r["clip"]) + float(r["events"]), rel=1e-4) for r in rows)
    assert float(rows[-1]["events"]) < float(rows[0]["events"])
