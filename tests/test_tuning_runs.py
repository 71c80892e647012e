"""Fine-tuning from end to end: runs start from another model, continue, and leave a model that loads."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import recipe
import torch
from test_train import rows, run
from torch import nn
from tuning_cases import METHODS, Model, encoder, tuned

import speechkit
from speechkit import config, pretrained
from speechkit.app.train import train
from speechkit.features import read
from speechkit.recogniser import Recogniser
from speechkit.session import transcribe
from speechkit.tagger import Tagger
from speechkit.tasks import Constant, Optim

SHORT = ["optim=constant", "trainer.val_check_interval=4"]


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe.write_tags(tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def start(tags: Path) -> Path:
    """What all others are tuned from."""
    return run(tags, "start", "trainer.max_steps=6")


def weights(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def frozen(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("method", ["lora", "conformer_adapter", "layer_sum", "linear_probe"])
def test_a_tuned_run_leaves_a_model_that_loads_with_its_method(tags: Path, start: Path, method: str) -> None:
    folder = run(tags, method, f"init={start}", f"tuning={method}", "trainer.max_steps=6", *SHORT)
    model, given = speechkit.load(folder), weights(speechkit.load(start))
    assert isinstance(model, Tagger) and model.tuning is not None
    described = json.loads((folder / "model" / "config.json").read_text())["tuning"]
    assert type(model.tuning).__name__ == described["_target_"].rpartition(".")[2]
    for name, weight in frozen(model).items():
        plain = name.replace(".base_layer", "").replace("attention.part", "attention")
        assert torch.equal(weight, given[plain]), f"{plain} is frozen"
    assert not torch.equal(model.head.linear.weight, given["head.linear.weight"])
    sound = tags.parents[3] / "dev0.wav"
    assert speechkit.load(folder).tag(sound) == model.tag(sound)


def test_gradual_unfreezing_in_two_parts_is_the_same_training(tags: Path, start: Path) -> None:
    changes = [f"init={start}", "tuning=gradual", "model.tuning.every=3", *SHORT]
    whole = run(tags, "whole", *changes, "trainer.max_steps=12")
    run(tags, "halves", *changes, "trainer.max_steps=4")
    halves = run(tags, "halves", *changes, "trainer.max_steps=12")
    assert rows(whole) == rows(halves)
    one, other, given = (weights(speechkit.load(folder)) for folder in (whole, halves, start))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    assert not torch.equal(one["encoder.blocks.0.norm.weight"], given["encoder.blocks.0.norm.weight"])
    assert not torch.equal(one["encoder.subsampling.linear.weight"], given["encoder.subsampling.linear.weight"])


def test_a_frozen_batch_norm_keeps_its_statistics(tags: Path, start: Path) -> None:
    folder = run(tags, "still", f"init={start}", "tuning=bottleneck", "trainer.max_steps=4", *SHORT)
    given, learnt = weights(speechkit.load(start)), weights(speechkit.load(folder))
    statistics = [name for name in given if "running_" in name]
    assert statistics and all(torch.equal(given[name], learnt[name]) for name in statistics)


def test_a_method_brings_its_rate_with_it_unless_one_is_given(tags: Path) -> None:
    def rate(*overrides: str) -> float:
        return config.compose(tags, overrides).optim.optimizer.lr

    assert rate() == 1e-2 and rate("tuning=none") == 1e-2
    assert rate("tuning=full") == 5e-5
    assert rate("tuning=full", "optim.optimizer.lr=3e-4") == rate("optim.optimizer.lr=3e-4", "tuning=full") == 3e-4
    listed = tags.with_name("listed.yaml")
    listed.write_text(tags.read_text().replace("  - override /head", "  - /tuning: lora\n  - override /head"))
    assert config.compose(listed).model.tuning.method == "lora"
    assert config.compose(listed, ["tuning=bitfit"]).model.tuning._target_ == "speechkit.tuning.BitFit"
    with pytest.raises(ValueError, match="lorra"):
        config.compose(tags, ["tuning=lorra"])


@pytest.mark.parametrize("method", METHODS)
def test_every_file_of_the_catalogue_is_a_method_with_a_rate(tags: Path, method: str) -> None:
    composed = config.compose(tags, [f"tuning={method}"])
    assert composed.optim.optimizer.weight_decay == 0.1
    assert composed.optim.optimizer.lr in (5e-5, 1e-4, 1e-3, 5e-3, 1e-2)


def test_rates_are_those_of_the_method_in_the_optimizer() -> None:
    model = tuned("ast_tiny", "full")
    task = nn.Module()
    task.model = model
    optim = Optim(optimizer=functools.partial(torch.optim.AdamW, lr=2.0, weight_decay=0.5), schedule=Constant())
    rates = {f"model.{name}": rate for name, rate in model.tuning.rates(model).items()}
    optimizer, schedule = optim(task, rates)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in task.named_parameters():
        assert found[id(parameter)]["lr"] == pytest.approx(2.0 * rates.get(name, 1.0))
        assert found[id(parameter)]["weight_decay"] == (0.5 if parameter.dim() > 1 else 0.0)
    assert optimizer.param_groups[0]["lr"] == 2.0, "the rate that is reported"
    optimizer.step()
    schedule.step()
    assert found[id(model.encoder.class_token)]["lr"] == pytest.approx(2.0 * 0.75**3)


def test_a_new_training_starts_from_a_tuned_model_that_merges(tags: Path, start: Path) -> None:
    first = run(tags, "first", f"init={start}", "tuning=dora", "trainer.max_steps=6", *SHORT)
    still = ["tuning=linear_probe", "optim.optimizer.lr=0", "trainer.max_steps=4"]
    again = run(tags, "again", f"init={first}", *still, *SHORT)
    sound = tags.parents[3] / "dev1.wav"
    torch.testing.assert_close(speechkit.load(again).scores(sound), speechkit.load(first).scores(sound))
    beside = run(tags, "beside", f"init={start}", "tuning=bottleneck", "trainer.max_steps=4", *SHORT)
    with pytest.raises(ValueError, match=r"Adapters must stay beside the weights .* or start from the one it was"):
        train(tags, ["name=refused", f"init={beside}"])


def test_a_merged_model_is_saved_and_loads_as_a_plain_one(tags: Path, start: Path, tmp_path: Path) -> None:
    folder = run(tags, "merged", f"init={start}", "tuning=scale_shift", "trainer.max_steps=6", *SHORT)
    model: Any = speechkit.load(folder)
    node = json.loads((folder / "model" / "config.json").read_text())
    sound = tags.parents[3] / "dev2.wav"
    expected = model.scores(sound)
    model.tuning.merge(model)
    pretrained.save(model, node | {"tuning": None}, tmp_path / "plain")
    plain: Any = speechkit.load(tmp_path / "plain")
    assert plain.tuning is None and weights(plain).keys() == weights(speechkit.load(start)).keys()
    torch.testing.assert_close(plain.scores(sound), expected, atol=1e-6, rtol=1e-5)


def test_a_folder_whose_method_cannot_work_says_so(tags: Path, start: Path) -> None:
    with pytest.raises(ValueError, match="Convpass must see the patches of an AST, but the encoder is a Conformer"):
        train(tags, ["name=never", f"init={start}", "tuning=convpass"])


def test_a_model_that_is_rounded_is_merged_first(tags: Path, start: Path) -> None:
    folder = run(tags, "rounded", f"init={start}", "tuning=dora", "trainer.max_steps=6", *SHORT)
    whole, rounded = speechkit.load(folder), speechkit.load(folder, weights=torch.bfloat16)
    sound = tags.parents[3] / "dev3.wav"
    torch.testing.assert_close(rounded.scores(sound), whole.scores(sound), atol=0.02, rtol=0.05)
    assert rounded.tuning is None


def test_the_plain_model_is_untouched_where_no_method_is_chosen() -> None:
    model = Model(encoder("ast_tiny"))
    config.tune(model, None)
    assert all(p.requires_grad for p in model.parameters())


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe.write(tmp_path_factory.mktemp("spoken"))


@pytest.fixture(scope="module")
def speaks(letters: Path) -> Path:
    """A recogniser that others are tuned from."""
    return run(letters, "speaks", "trainer.max_steps=6")


@pytest.mark.parametrize("method", ["lora", "bottleneck", "conformer_adapter", "gated_prefix", "full"])
def test_a_tuned_recogniser_streams_and_is_traced_as_what_it_is(letters: Path, speaks: Path, method: str) -> None:
    changes = [f"init={speaks}", f"tuning={method}", "optim.optimizer.lr=5e-2"]
    folder = run(letters, f"speaks_{method}", *changes, "trainer.max_steps=6")
    model, given = speechkit.load(folder), speechkit.load(speaks)
    assert isinstance(model, Recogniser) and isinstance(given, Recogniser) and model.tuning is not None
    sound = letters.parents[3] / "dev0.wav"
    samples = torch.from_numpy(read(sound, model.sample_rate))
    whole = model.encode(samples[None], torch.tensor([len(samples)]), context=model.context)
    before = given.encode(samples[None], torch.tensor([len(samples)]), context=given.context)
    assert not torch.allclose(whole.frames, before.frames, atol=1e-3), "it has learned"
    said = model.transcribe(sound, context=model.context).text
    for traced in (False, True):
        session = speechkit.Session(model, slots=1)
        if traced:
            session.trace(1)
        assert [found.text for found in transcribe(session, [samples])] == [said], f"traced: {traced}"


def test_a_recogniser_may_take_its_front_end_and_encoder_from_where_it_starts(letters: Path, speaks: Path) -> None:
    taken = ["model.encoder=null", "fresh=[objective]", f"init={speaks}", "tuning=lora", "text=characters"]
    folder = run(letters, "taken", *taken, "model.text.symbols='abcd e'", "trainer.max_steps=6")
    described = [json.loads((home / "model" / "config.json").read_text()) for home in (folder, speaks)]
    assert described[0]["encoder"] == described[1]["encoder"] and described[0]["features"] == described[1]["features"]
    assert speechkit.load(folder).tokenizer.encode("e")
