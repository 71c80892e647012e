"""Configs: what composes, what is refused and in which words, and what is built."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import recipe
import torch

from speechkit import config
from speechkit.schema import check
from speechkit.stream import Context

HERE = "test_config"
OF_TAGGERS = ("head", "tuning")
OF_PRETRAINING = ("decoder", "mask")


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe.write(tmp_path_factory.mktemp("config"), train=1, dev=1)


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe.write_tags(tmp_path_factory.mktemp("config"), train=1, dev=1)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEECHKIT_ALLOW", HERE)


@dataclass(frozen=True)
class Thing:
    size: int
    rate: float = 1.0
    names: tuple[str, ...] = ()
    inner: Any = None
    context: Context | None = None

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"Thing.size must be at least 0, but is {self.size}; leave it out.")


def thing(**keys: Any) -> dict[str, Any]:
    return {"_target_": f"{HERE}.Thing", **keys}


def refusal(call: Any, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


def test_recipe_and_catalogue_compose_into_one_config(tones: Path) -> None:
    composed = config.compose(tones)
    assert composed.name == "tones" and composed.run.endswith("runs/tones")
    assert composed.model.encoder.dim == 16 and composed.model.encoder.features == 20
    assert composed.model.encoder.attention == composed.model.attention


def test_overrides_choose_files_and_set_values(tones: Path) -> None:
    composed = config.compose(tones, ["encoder=squeezeformer_tiny", "attention=rotary", "model.encoder.dim=24"])
    assert composed.model.encoder._target_ == "speechkit.encoders.Squeezeformer" and composed.model.encoder.dim == 24
    assert composed.model.encoder.attention.position._target_ == "speechkit.attention.Rotary"


def test_argument_that_no_file_mentions_can_be_set(tones: Path) -> None:
    assert config.compose(tones, ["model.encoder.expansion=2"]).model.encoder.expansion == 2
    assert config.compose(tones, ["trainer.detect_anomaly=true"]).trainer.detect_anomaly is True


def test_every_file_of_the_catalogue_can_be_chosen(tones: Path, tags: Path) -> None:
    needs = {
        "sentencepiece": ["~model.text.symbols", "model.text.model=x"],
        "words": ["~model.text.symbols"],
        "recorded": ["augment.effects.noise.source.path=x"],
        "ast": ["optim.optimizer.lr=1e-5", "optim.schedule.first=2", "optim.schedule.every=1"],
        **{f"ast_{size}": ["~model.encoder.subsampling"] for size in ("mini", "tiny", "small", "base")},
        "wav2vec2_base": ["~model.encoder.subsampling"],
        "samples": ["~model.features.mel.bands", "model.encoder.features=1"],
    }
    for file in sorted(config.catalogue().glob("*/*.yaml")):
        group, choice = file.parent.name, file.stem
        if "speechkit.datamodule.TagData" in file.read_text() or group in OF_TAGGERS:
            config.compose(tags, [f"{'+' * (group == 'data')}{group}={choice}", "fold=1"])
        elif group in OF_PRETRAINING:
            config.compose("recipes/sounds_mae/conf/sounds_mae.yaml", [f"{group}={choice}"])
        else:
            config.compose(tones, [f"{'+' * (group == 'data')}{group}={choice}", *needs.get(choice, [])])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.encoder.detph=3", ["model.encoder.detph", "speechkit.encoders.Conformer", "dim", "layers"]),
        ("model.encoder.dropuot=0", ["model.encoder.dropuot", "did you mean dropout?"]),
        ("model.attention.posiiton=x", ["model.attention.posiiton", "did you mean position?"]),
        ("trainer.max_step=3", ["trainer.max_step", "did you mean max_steps"]),
        ("encodr=conformer_s", ["encodr", "did you mean encoder"]),
        ("sede=1", ["sede", "did you mean seed"]),
        ("model.encodr.dim=1", ["model.encodr", "did you mean encoder?"]),
        ("encoder=conformer_z", ["conf/encoder/conformer_z.yaml", "conformer_s", "did you mean"]),
        ("model.encoder.dim=wide", ["model.encoder.dim", "an integer", "'wide'"]),
        ("model.encoder.dropout=much", ["model.encoder.dropout", "a number", "'much'"]),
        ("trainer.accelerator=3", ["trainer.accelerator", "text", "3"]),
        ("model.encoder.attention=softmax", ["model.encoder.attention", "_target_", "'softmax'"]),
        ("seed=abc", ["seed", "an integer", "'abc'"]),
        ("model.encoder.convolution.causal=maybe", ["convolution.causal", "true or false", "'maybe'"]),
        ("name=???", ["name must be given"]),
        ("--fast", ["key=value", "--fast"]),
        ("augment=recorded", ["augment.effects.noise.source.path must be given"]),
        ("model.encoder._target_=os.system", ["model.encoder._target_", "os.system", "SPEECHKIT_ALLOW"]),
        ("model.encoder._target_=speechkit.encoders.Conformr", ["Conformr", "did you mean Conformer"]),
    ],
)
def test_wrong_override_is_one_sentence_that_names_it(tones: Path, override: str, words: list[str]) -> None:
    sentence = refusal(config.compose, tones, [override])
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence


def test_a_recipe_can_leave_to_the_command_what_the_catalogue_fills_in(tones: Path) -> None:
    file = tones.with_name("open.yaml")
    file.write_text(tones.read_text().replace("every: 4", "every: '???'").replace("name: tones", "init: ???"))
    assert "init must be given" in refusal(config.compose, file, ["name=b"])
    assert "checkpoint.every must be given" in refusal(config.compose, file, ["name=b", "init=null"])
    composed = config.compose(file, ["init=runs/a", "checkpoint.every=5", "name=b", "encoder=conformer_s"])
    assert (composed.init, composed.checkpoint.every, composed.run[-7:]) == ("runs/a", 5, "/runs/b")


def test_a_config_that_stands_on_nothing_is_told_what_to_stand_on(tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text("name: a\nseed: 1\n")
    assert "must begin its defaults with /train, /tag or /pretrain" in refusal(config.compose, tmp_path / "bare.yaml")


def test_misspelt_key_of_a_file_is_named_too(tones: Path) -> None:
    file = tones.with_name("misspelt.yaml")
    file.write_text(tones.read_text().replace("max_seconds: 4", "max_second: 4").replace("name: tones", "nmae: tones"))
    assert "nmae is not a key of a training config" in refusal(config.compose, file)
    file.write_text(tones.read_text().replace("max_seconds: 4", "max_second: 4"))
    assert "data.max_second" in refusal(config.compose, file) and "did you mean max_seconds" in refusal(
        config.compose, file
    )


def test_catalogue_in_a_folder_with_a_strange_name_is_found(tones: Path, monkeypatch: Any, tmp_path: Path) -> None:
    copy = tmp_path / "the one's, conf=1"
    shutil.copytree(config.catalogue(), copy)
    monkeypatch.setattr(config, "catalogue", lambda: copy)
    assert config.compose(tones).name == "tones"


def test_absent_file_and_broken_yaml_are_sentences(tones: Path) -> None:
    assert "recipes/digits/conf/dmeo.yaml is not there" in refusal(config.compose, "recipes/digits/conf/dmeo.yaml")
    file = tones.with_name("broken.yaml")
    file.write_text("name: [1,\nmodel: }")
    assert str(file) in refusal(config.compose, file)


def test_nested_plain_node_is_built_once_and_a_factory_for_each_call(plugin: None) -> None:
    built = config.build(thing(size=1, inner=thing(size=2)))
    assert built == Thing(1, inner=Thing(2))
    make = config.build(thing(size=1, _partial_=True))
    assert make(rate=2.0) == Thing(1, 2.0) and make() is not make()


def test_layers_get_mechanisms_of_their_own(tones: Path) -> None:
    model = config.build_model(config.compose(tones, ["model.encoder.layers=3"]).model)
    parts = [id(p) for block in model.encoder.blocks for p in block.attention.parameters()]
    assert len(parts) == len(set(parts)) == sum(1 for b in model.encoder.blocks for _ in b.attention.parameters())


def test_extra_arguments_arrive_as_they_are(plugin: None) -> None:
    names, context = ("a", "b"), Context(left=4, chunk=2)
    built = config.build(thing(size=1), names=names, context=context)
    assert built.names is names and built.context is context


def test_no_node_is_no_object() -> None:
    assert config.build(None) is None


def test_refusal_of_a_constructor_is_passed_on_as_it_is(plugin: None) -> None:
    assert refusal(config.build, thing(size=-1)) == "Thing.size must be at least 0, but is -1; leave it out."
    assert refusal(config.build, thing(size=1, inner=thing(size=-2))).startswith("Thing.size must be at least 0")


def test_required_argument_is_asked_for(plugin: None) -> None:
    assert "thing.size must be given" in refusal(config.build, thing(), "thing")
    assert "thing.inner.size must be given" in refusal(config.build, thing(size=1, inner=thing()), "thing")
    assert config.build(thing(), size=3) == Thing(3)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "speechkit.audio.os.system",
        "speechkit.config.hydra.utils.get_method",
        "speechkit.app.train.subprocess.Popen",
        "speechkit.text.os",
        "speechkit.audio.write",
        "torch.hub.load",
        "torch.load",
        "torch.nn.modules.module.os.system",
        "speechkitty.Anything",
        "",
        7,
        None,
    ],
)
def test_only_classes_of_known_homes_are_built(target: Any) -> None:
    for node in ({"_target_": target}, {"_target_": "torch.nn.Identity", "x": [{"y": {"_target_": target}}]}):
        with pytest.raises(ValueError):
            config.build(node)


def test_home_of_the_class_counts_and_not_the_path_to_it() -> None:
    import speechkit.audio

    assert "speechkit.audio.Path" in refusal(check, {"_target_": "speechkit.audio.Path"}, where="here")
    assert hasattr(speechkit.audio, "Path")


def test_positional_arguments_and_modes_of_hydra_are_refused() -> None:
    for key in ("_args_", "_recursive_", "_convert_"):
        assert key in refusal(config.build, {"_target_": "torch.nn.Identity", key: []})


def test_model_built_from_its_json_is_the_same(tones: Path) -> None:
    node = config.compose(tones).model
    torch.manual_seed(0)
    one = config.build_model(node)
    torch.manual_seed(0)
    other = config.build_model(json.loads(json.dumps(config.plain(node))))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_differences_are_named_by_their_keys() -> None:
    old, new = {"a": {"b": 1, "c": [1]}, "d": 0}, {"a": {"b": 2, "c": [1]}, "e": 0}
    assert config.differences(old, new) == ["a.b: 1 -> 2", "d: 0 -> absent", "e: absent -> 0"]


def test_saved_config_reads_back_the_same(tones: Path, tmp_path: Path) -> None:
    composed = config.compose(tones)
    config.save(composed, tmp_path / "config.yaml")
    assert config.differences(config.load(tmp_path / "config.yaml"), composed) == []
