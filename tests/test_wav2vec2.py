"""wav2vec 2.0, HuBERT and WavLM: held against transformers on real recordings, alone, in batches and as taggers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ast_cases import close, randomised
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tiny import sound
from wav2vec2_cases import CASES, CONFIGS, KINDS, LARGE, TINY, heard, padded, written

import speechkit
from speechkit import config as configs
from speechkit import pretrained
from speechkit.encoders import AudioEncoder, Wav2Vec2
from speechkit.encoders.wav2vec2 import Convolutions, Distances, GatedDistance
from speechkit.features import FrontEnd, Samples, UtteranceNorm
from speechkit.heads import Mean
from speechkit.stream import Context, fresh_span
from speechkit.tagger import Tagger

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def clips(recordings: Path) -> list[np.ndarray]:
    return heard(recordings)


# Held against transformers


@pytest.mark.parametrize(("kind", "name"), CASES)
@torch.no_grad()
def test_a_batch_of_recordings_gives_what_transformers_gives_of_each(
    kind: str, name: str, tmp_path: Path, clips: list[np.ndarray]
) -> None:
    model, encoder = written(tmp_path, kind, **CONFIGS[name]), speechkit.load(tmp_path)
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    front = configs.build(pretrained.describe(tmp_path)["features"])
    heard = front(*padded(clips))
    out = encoder(heard.frames, heard.lengths)
    for n, clip in enumerate(clips):
        x = extractor(clip, sampling_rate=16000, return_tensors="pt").input_values
        expected = model(x).last_hidden_state[0]
        close(heard.frames[n, : len(clip), 0], x[0])
        close(out.frames[n, : out.lengths[n]], expected)
        alone = encoder(x[..., None])
        close(alone.frames[0], expected)
    assert isinstance(encoder, AudioEncoder) and isinstance(encoder, Wav2Vec2) and not encoder.training


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_batch_without_norm_over_time_is_that_of_transformers_with_its_mask(
    kind: str, tmp_path: Path, clips: list[np.ndarray]
) -> None:
    model, encoder = written(tmp_path, kind, **LARGE), speechkit.load(tmp_path)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    inputs = extractor(clips, sampling_rate=16000, return_tensors="pt", padding=True)
    expected = model(**inputs).last_hidden_state
    out = encoder(inputs.input_values[..., None], inputs.attention_mask.sum(1))
    for n, length in enumerate(out.lengths.tolist()):
        close(out.frames[n, :length], expected[n, :length])


def test_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    model, encoder, x = written(tmp_path, "WavLM"), speechkit.load(tmp_path), sound(0.5)[None]
    out = encoder(x[..., None]).frames
    weights = torch.randn(out.shape)
    (out * weights).sum().backward()
    (model(x).last_hidden_state * weights).sum().backward()
    layer, block = model.encoder.layers, encoder.blocks
    assert block[2].attention.distances is block[0].attention.distances
    close(block[0].attention.distances.table.grad, layer[0].attention.rel_attn_embed.weight.grad, 1e-4)
    close(block[1].attention.gate.weight.grad, layer[1].attention.gru_rel_pos_linear.weight.grad, 1e-4)
    close(block[1].attention.scale.grad, layer[1].attention.gru_rel_pos_const.grad.flatten(), 1e-4)
    positions = model.encoder.pos_conv_embed.conv.parametrizations.weight
    close(encoder.positions.gain.grad, positions.original0.grad, 1e-3)
    close(encoder.positions.direction.grad, positions.original1.grad, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_classifier_is_a_tagger_with_the_logits_of_transformers(
    kind: str, tmp_path: Path, clips: list[np.ndarray]
) -> None:
    model = written(tmp_path, kind, "ForSequenceClassification", normalised=False)
    tagger = speechkit.load(tmp_path)
    assert isinstance(tagger, Tagger) and tagger.labels == tuple(model.config.id2label.values())
    heard = tagger.hear(*padded(clips))
    logits = tagger.logits(*heard)
    for n, clip in enumerate(clips):
        close(logits[n], model(torch.from_numpy(clip)[None]).logits[0])
    scores = {tag.label: tag.score for tag in tagger.tag(torch.from_numpy(clips[0]))}
    close(torch.tensor([scores[label] for label in tagger.labels]), logits[0].sigmoid())


@pytest.mark.parametrize(
    ("kind", "ending"), [("Wav2Vec2", "ForPreTraining"), ("Wav2Vec2", "ForCTC"), ("Hubert", "ForCTC")]
)
@torch.no_grad()
def test_of_other_kinds_the_encoder_is_read(kind: str, ending: str, tmp_path: Path) -> None:
    model, x = written(tmp_path, kind, ending), sound(0.5)[None]
    inside = getattr(model, model.base_model_prefix)
    close(speechkit.load(tmp_path)(x[..., None]).frames, inside(x).last_hidden_state)


@torch.no_grad()
def test_files_with_the_old_names_of_the_weight_norm_are_read(tmp_path: Path) -> None:
    model, x = written(tmp_path, "Hubert", feat_proj_layer_norm=False), sound(0.5)[None]
    weights = load_file(tmp_path / "model.safetensors")
    new = "conv.parametrizations.weight.original"
    old = {name.replace(f"{new}0", "conv.weight_g").replace(f"{new}1", "conv.weight_v") for name in weights}
    assert old != weights.keys()
    save_file(
        {n.replace(f"{new}0", "conv.weight_g").replace(f"{new}1", "conv.weight_v"): w for n, w in weights.items()},
        tmp_path / "model.safetensors",
    )
    close(speechkit.load(tmp_path)(x[..., None]).frames, model(x).last_hidden_state)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_copy_is_saved_and_loaded_without_the_original(kind: str, tmp_path: Path) -> None:
    written(tmp_path / "theirs", kind, "ForSequenceClassification")
    tagger = speechkit.load(tmp_path / "theirs")
    found = pretrained.describe(tmp_path / "theirs")
    head = {"_target_": "speechkit.pretrained.wav2vec2.Classifier", "_partial_": True, "hidden": 12}
    pretrained.save(tagger, found | {"head": head, "labels": list("abcde"), "frames": 16000}, tmp_path / "ours")
    copy, x = speechkit.load(tmp_path / "ours"), sound(0.5)[None]
    close(copy.logits(*copy.hear(x, torch.tensor([8000]))), tagger.logits(*tagger.hear(x, torch.tensor([8000]))), 0.0)


# By itself


def tiny(**changes) -> Wav2Vec2:
    convolutions = Convolutions(channels=(8, 8), kernels=(10, 4), strides=(5, 4), norm="group")
    sizes = {"convolutions": convolutions, "dim": 16, "heads": 2, "layers": 2}
    return randomised(Wav2Vec2(**sizes | {"position_kernel": 6, "position_groups": 2} | changes))


@torch.no_grad()
def test_a_clip_shorter_than_a_window_is_heard_with_silence_behind_it() -> None:
    encoder, x = tiny(), sound(0.1)[None, :, None]
    assert encoder.convolutions.window == 25 and encoder.stride == 20
    filled = torch.cat([x[:, :11], torch.zeros(1, 14, 1)], 1)
    for length in (11, 24):
        alone = encoder(x[:, :length], torch.tensor([length]))
        beside = encoder(x.expand(2, -1, -1), torch.tensor([length, 1600]))
        assert alone.lengths.tolist() == [1] and beside.lengths[0] == 1
        close(alone.frames[0, 0], beside.frames[0, 0])
    assert encoder(filled).frames.shape == (1, 1, 16)
    assert encoder(x, torch.tensor([0])).lengths.tolist() == [0]


def test_padding_gives_no_gradient_and_no_nan() -> None:
    encoder, x = tiny(), sound(0.2)[None, :, None].repeat(2, 1, 1)
    x[1, 900:] = float("nan")
    x.requires_grad_()
    out = encoder(x, torch.tensor([3200, 900]))
    Mean(dim=16, classes=2).forward(out).sum().backward()
    assert torch.isfinite(out.frames).all() and all(torch.isfinite(p.grad).all() for p in encoder.parameters())
    assert not x.grad[1, 900:].nan_to_num(1.0).any() and x.grad[1, :900].any()


@torch.no_grad()
def test_gated_attention_is_the_equation_of_its_paper() -> None:
    """WavLM, section 3.1: r = d (sigma(u q) (sigma(w q) s - 1) + 2), the gates being sums of four maps each."""
    attention = randomised(
        GatedDistance(dim=16, heads=2, distances=Distances(heads=2, buckets=8, furthest=10))
    ).double()
    x, U = torch.randn(1, 13, 16, dtype=torch.float64), 13
    q, k, v = (
        getattr(attention, name)(x)[0].unflatten(-1, (2, 8)).transpose(0, 1) for name in ("query", "key", "value")
    )
    bias = torch.zeros(2, U, U, dtype=torch.float64)
    for h in range(2):
        for i in range(U):
            maps = attention.gate(x[0, i, 8 * h : 8 * h + 8])
            gate = maps[:4].sum().sigmoid() * (maps[4:].sum().sigmoid() * attention.scale[h] - 1) + 2
            for j in range(U):
                away = abs(j - i)
                far = 2 + int(np.log(away / 2) / np.log(10 / 2) * 2) if away >= 2 else away
                bias[h, i, j] = gate * attention.distances.table[min(far, 3) + 4 * (j > i), h]
    y = ((q @ k.mT / 8**0.5 + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)
    out, _ = attention(x, fresh_span(torch.tensor([U]), Context()))
    close(out[0], attention.out(y), 1e-6)


def test_an_utterance_norm_hears_real_samples_alone() -> None:
    x = torch.randn(2, 50, 1) * 3 + 5
    x[1, 30:] = float("nan")
    out = UtteranceNorm()(x, torch.tensor([50, 30]))
    for n, length in enumerate((50, 30)):
        real = x[n, :length].double()
        close(out.frames[n, :length], ((real - real.mean()) / (real.var(correction=0) + 1e-7).sqrt()).float())
    assert not out.frames[1, 30:].any()
    with pytest.raises(ValueError, match="UtteranceNorm must hear whole utterances"):
        FrontEnd(mel=Samples(), norm=UtteranceNorm()).init_state(1)


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match=r"Wav2Vec2 must hear whole utterances, .* stream a Conformer"):
        tiny().init_state(1)
    with pytest.raises(ValueError, match="GatedDistance must see whole utterances"):
        GatedDistance(dim=16, heads=2, distances=Distances(heads=2)).init_state(1, Context())
    with pytest.raises(ValueError, match=r"must be given samples, \[B, N, 1\], but the features have 80 bands"):
        tiny()(torch.zeros(1, 100, 80))
    with pytest.raises(ValueError, match=r"as many channels as kernels and strides, but have 2, 1 and 2; list one"):
        Convolutions(channels=[8, 8], kernels=[3], strides=[2, 2])


def test_a_tagger_of_samples_is_not_given_the_frames_of_spectrograms() -> None:
    front = FrontEnd(mel=Samples(), norm=UtteranceNorm())
    with pytest.raises(
        ValueError, match=r"1024 are 0.064 s, since each is 1 samples; for 10 s set model.frames=160000"
    ):
        Tagger(features=front, encoder=tiny(), labels=["a"], frames=1024, head=Mean)


def test_the_base_size_of_the_catalogue_has_as_many_weights_as_published() -> None:
    """94.37 M, of which the mask of pretraining, one vector, is left out (2006.11477, and transformers' default)."""
    node = OmegaConf.load(configs.catalogue() / "encoder" / "wav2vec2_base.yaml")
    with torch.device("meta"):
        ours = configs.build(node, "model.encoder")
        other = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config())
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in other.parameters()) - 768 == 94_370_944


# Folders that do not fit


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "relu"}, "hidden_act must be gelu, but is relu"),
        ({"adapter_attn_dim": 16}, "adapter_attn_dim must be None, but is 16"),
        ({"add_adapter": True}, "add_adapter must be False, but is True"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm must be False, but is True"),
        ({"use_weighted_layer_sum": True}, "use_weighted_layer_sum must be False, but is True"),
        ({"intermediate_size": 50}, "intermediate_size must be a multiple of hidden_size, 32, but is 50"),
        ({"id2label": {"0": "a"}}, "id2label must name the classes 0 to 4 of the weights, but names 1"),
        ({"conv_stride": [5, 2]}, "as many channels as kernels and strides, but have 7, 7 and 2"),
        ({"feat_extract_norm": "batch"}, "norm must be one of group, layer, but is 'batch'"),
        ({"layer_norm_eps": None}, "eps must be a number, but is None"),
    ],
)
def test_a_config_that_no_model_of_ours_can_be_is_named(change: dict, said: str, tmp_path: Path) -> None:
    written(tmp_path, "Wav2Vec2", "ForSequenceClassification")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"must describe a wav2vec 2.0, HuBERT or WavLM model as transf") as error:
        speechkit.load(tmp_path)
    assert said in str(error.value)


def test_a_config_without_a_key_and_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    written(tmp_path, "WavLM")
    weights = load_file(tmp_path / "model.safetensors")
    weights["encoder.rogue"] = weights.pop("encoder.layers.0.attention.rel_attn_embed.weight")
    save_file(weights, tmp_path / "model.safetensors")
    sentence = "lacks encoder.layers.0.attention.rel_attn_embed.weight, and has the unknown encoder.rogue; it is of"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        speechkit.load(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "conv_stride"}))
    with pytest.raises(ValueError, match=r"no model can be built from it \(KeyError: 'conv_stride'\); copy it again"):
        speechkit.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"feature_size": 80}))
    path.write_text(json.dumps(transformers.WavLMConfig(**TINY).to_dict()))
    with pytest.raises(ValueError, match="feature_size must be 1, but is 80"):
        speechkit.load(tmp_path)
