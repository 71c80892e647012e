"""The data module: what an epoch has, how a run continues, and how it sits in a Lightning trainer."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from speechkit import audio
from speechkit.data import Augment, Gain, Source
from speechkit.data.corpora import write_manifest
from speechkit.datamodule import SpeechData
from speechkit.text import Characters

LETTERS = Characters(symbols="abcdefghijklmnopqrstuvwxyz '")


def corpus(folder: Path, name: str, count: int, text: str = "one") -> Source:
    """Tones of 0.1 s and longer, named by their number."""
    records = []
    for number in range(count):
        samples = 0.1 * np.sin(np.arange(1600 + 160 * number) / (3 + number))
        audio.write(folder / name / f"{number}.wav", samples.astype(np.float32), 16000)
        records.append({"audio": f"{name}/{number}.wav", "text": text})
    write_manifest(folder / f"{name}.jsonl", records)
    return Source(path=str(folder / f"{name}.jsonl"))


@pytest.fixture
def data(tmp_path: Path) -> SpeechData:
    return SpeechData(
        train={"some": corpus(tmp_path, "train", 20)},
        dev={"dev": corpus(tmp_path, "dev", 5)},
        test={"near": corpus(tmp_path, "near", 3), "far": corpus(tmp_path, "far", 2)},
        tokenizer=LETTERS,
        augment=Augment(speeds=[0.9, 1.1], effects={"gain": Gain()}),
        max_seconds=0.7,
        workers=0,
        seed=5,
    )


def ids(batches) -> list[tuple[str, ...]]:
    return [batch.ids for batch in batches]


def test_epoch_is_exact_after_a_restart(data: SpeechData) -> None:
    whole = list(data.train_batches(2))
    rest = list(data.train_batches(2, skip=2))
    assert all(torch.equal(a.samples, b.samples) for a, b in zip(whole[2:], rest, strict=True))
    assert ids(whole) != ids(data.train_batches(3))


def test_first_epochs_go_from_short_to_long_if_asked(data: SpeechData) -> None:
    data.short_first = 1
    first, second = ([max(batch.sample_lengths.tolist()) for batch in data.train_batches(epoch)] for epoch in (0, 1))
    assert all(a <= 1.5 * b for a, b in itertools.pairwise(first)) and first[0] < first[-1]
    assert any(a > 1.5 * b for a, b in itertools.pairwise(second))
    assert ids(data.train_batches(0, skip=2)) == ids(data.train_batches(0))[2:]


def test_augmentation_differs_from_epoch_to_epoch_and_spares_dev(data: SpeechData) -> None:
    def sound(batches, name: str) -> torch.Tensor:
        return next(
            b.samples[b.ids.index(name), : b.sample_lengths[b.ids.index(name)]] for b in batches if name in b.ids
        )

    heard = [sound(data.train_batches(epoch), "train/3") for epoch in range(4)]
    assert len({tuple(samples.tolist()) for samples in heard}) == 4
    as_it_is = torch.from_numpy(audio.read(Path(data.dev["dev"].path).parent / "dev" / "3.wav")[0])
    assert torch.equal(sound(data.dev_batches(), "dev/3"), as_it_is)


@pytest.mark.parametrize(("repeat", "least", "most"), [(1.0, 20, 20), (3.0, 60, 60), (2.5, 42, 58), (0.2, 1, 11)])
def test_sources_are_repeated_as_asked(data: SpeechData, repeat: float, least: int, most: int) -> None:
    data.train = {"some": Source(path=data.train["some"].path, repeat=repeat)}
    names = [name for batch in data.train_batches(0) for name in batch.ids]
    assert least <= len(names) <= most
    assert all(int(repeat) <= names.count(f"train/{n}") <= int(np.ceil(repeat)) for n in range(20))


def test_repeats_sound_different(data: SpeechData) -> None:
    data.train = {"some": Source(path=data.train["some"].path, repeat=2.0)}
    data.augment = Augment(effects={"gain": Gain()})
    peaks = [
        float(row.abs().max())
        for b in data.train_batches(0)
        for row, i in zip(b.samples, b.ids, strict=True)
        if i == "train/3"
    ]
    assert len(peaks) == 2 and peaks[0] != peaks[1]


def test_sources_add_up(data: SpeechData, tmp_path: Path) -> None:
    data.train["more"] = corpus(tmp_path, "more", 4)
    names = sorted(name for batch in data.train_batches(0) for name in batch.ids)
    assert names == sorted([f"train/{n}" for n in range(20)] + [f"more/{n}" for n in range(4)])


def test_ranks_share_train_and_dev(data: SpeechData) -> None:
    for batches in (
        lambda rank: data.train_batches(0, rank=rank, world_size=2),
        lambda rank: data.dev_batches(rank=rank, world_size=2),
    ):
        mine, others = ids(batches(0)), ids(batches(1))
        assert len(mine) == len(others)
        assert not {n for b in mine for n in b} & {n for b in others for n in b}


def test_dataloader_follows_the_trainer_and_resumes_once(data: SpeechData) -> None:
    data.trainer = SimpleNamespace(current_epoch=4, global_rank=0, world_size=1)
    data.resume(epoch=4, batch=3)
    assert ids(data.train_dataloader()) == ids(data.train_batches(4))[3:]
    data.trainer.current_epoch = 5
    assert ids(data.train_dataloader()) == ids(data.train_batches(5))


def test_test_sets_are_found_by_name(data: SpeechData) -> None:
    assert [len(list(batches)) for batches in data.test_dataloader()] == [1, 1]
    assert sorted(ids(data.test_batches("far"))[0]) == ["far/0", "far/1"]
    with pytest.raises(ValueError, match=r"must be one of near, far, but is wide; add it to data.test"):
        data.test_batches("wide")


def test_text_outside_the_vocabulary_stops_before_the_first_epoch(data: SpeechData, tmp_path: Path) -> None:
    data.train["odd"] = corpus(tmp_path, "odd", 1, text="1")
    with pytest.raises(ValueError, match=r"'1' in 1, for example odd/0"):
        data.setup("fit")


def test_utterance_longer_than_a_batch_is_named(data: SpeechData) -> None:
    data.max_seconds = 0.25
    with pytest.raises(ValueError, match=r"max_seconds=0.25, but train/19 lasts 0.3 s; leave such out"):
        data.setup("fit")


def test_nothing_to_train_on_is_refused(data: SpeechData) -> None:
    data.train = {}
    with pytest.raises(ValueError, match=r"data.train \(empty\) gives none; name a manifest"):
        data.train_batches(0)


class Listener(LightningModule):
    """Trains one weight and writes down what it heard."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.heard: list[tuple[str, ...]] = []
        self.validated: list[str] = []

    def training_step(self, batch, index: int) -> torch.Tensor:
        self.heard.append(batch.ids)
        return (self.weight * batch.samples).square().mean()

    def validation_step(self, batch, index: int) -> None:
        self.validated += batch.ids

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_lightning_hears_the_planned_epochs(data: SpeechData, tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    listener = Listener()
    data.resume(epoch=0, batch=2)
    trainer.fit(listener, datamodule=data)
    assert listener.heard == ids(data.train_batches(0, skip=2)) + ids(data.train_batches(1)) + ids(
        data.train_batches(2)
    )
    assert sorted(listener.validated) == sorted([f"dev/{n}" for n in range(5)] * 3)
