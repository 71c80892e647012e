"""AST's checkpoints: held against transformers and the original's layout and features, and what is refused of them."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio.compliance.kaldi as kaldi
from ast_cases import close, full, heard, original_rule, randomised, spectrogram, tiny
from safetensors.torch import load_file, save_file
from tiny import sound
from torch import Tensor, nn

import speechkit
from speechkit import features
from speechkit.encoders import AST
from speechkit.encoders.ast import SeparatePositions
from speechkit.features import LogMel
from speechkit.pretrained import describe, load_recogniser, save
from speechkit.pretrained.ast import initialise, load_original
from speechkit.tagger import Tag, Tagger

theirs = pytest.importorskip("transformers.models.audio_spectrogram_transformer")
extraction = pytest.importorskip(
    "transformers.models.audio_spectrogram_transformer.feature_extraction_audio_spectrogram_transformer"
)

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_mel_bins": 48,
    "max_length": 96,
    "num_labels": 7,
}
CONFIGS = {
    "default": {},
    "strides": {"time_stride": 12, "frequency_stride": 7},
    "no overlap": {"time_stride": 16, "frequency_stride": 16, "layer_norm_eps": 1e-6},
    "one row": {"num_mel_bins": 16, "max_length": 301, "layer_norm_eps": 1e-2},
    "odd": {"num_mel_bins": 61, "max_length": 77, "patch_size": 12, "intermediate_size": 64, "num_attention_heads": 2},
    "no biases": {"qkv_bias": False, "num_labels": 1},
    "two classes": {"num_labels": 2},  # transformers writes no names of two
}


def written(folder: Path, kind: str = "ASTForAudioClassification", **changes) -> nn.Module:
    """Their model, saved to a folder."""
    model = randomised(getattr(theirs, kind)(theirs.ASTConfig(**TINY | changes)))
    model.save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    written(tmp_path)
    theirs.ASTFeatureExtractor(num_mel_bins=48, max_length=96).save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, change: Callable[[dict], object]) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


# Held against transformers


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_encoder_gives_the_hidden_states_of_transformers(name: str, tmp_path: Path) -> None:
    model = written(tmp_path, "ASTModel", **CONFIGS[name])
    encoder = speechkit.load(tmp_path)
    x = spectrogram(3, model.config.max_length, model.config.num_mel_bins)
    expected, out = model(x), encoder(x, full(x))
    patches = expected.last_hidden_state[:, 2:].unflatten(1, (encoder.rows, -1))  # theirs go row by row
    close(out.summary, expected.pooler_output)
    close(out.frames, patches.mean(1))
    assert out.lengths.tolist() == [patches.shape[2]] * 3 and not encoder.training
    assert isinstance(encoder, AST) and (encoder.dim, encoder.stride) == (32, model.config.time_stride)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_tagger_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = written(tmp_path, **CONFIGS[name])
    tagger = speechkit.load(tmp_path)
    x = spectrogram(2, model.config.max_length, model.config.num_mel_bins)
    close(tagger.logits(x), model(x).logits)
    assert isinstance(tagger, Tagger) and tagger.labels == tuple(model.config.id2label.values())


@torch.no_grad()
def test_logits_show_another_eps_so_the_comparison_would_notice_it(tmp_path: Path) -> None:
    model = written(tmp_path, layer_norm_eps=1e-2)
    edit(tmp_path / "config.json", lambda config: config.update(layer_norm_eps=1e-6))
    x = spectrogram(1, 96, 48)
    assert float((speechkit.load(tmp_path).logits(x) - model(x).logits).abs().max()) > 1e-3


def test_gradients_are_those_of_transformers(folder: Path) -> None:
    model, tagger = theirs.ASTForAudioClassification.from_pretrained(folder), speechkit.load(folder)
    model.eval()
    x, weights = spectrogram(2, 96, 48), spectrogram(2, 7, seed=2)
    (model(x).logits * weights).sum().backward()
    (tagger.logits(x) * weights).sum().backward()
    positions = model.audio_spectrogram_transformer.embeddings.position_embeddings.grad[0]
    ours = tagger.encoder.positions
    close(ours.tokens.grad, positions[:2], 1e-4)
    close(ours.table.grad, positions[2:].unflatten(0, (4, 9)).transpose(0, 1), 1e-4)
    kernel = model.audio_spectrogram_transformer.embeddings.patch_embeddings.projection.weight.grad
    close(tagger.encoder.patches.weight.grad, kernel.transpose(2, 3), 1e-3)
    assert [name for name, p in tagger.named_parameters() if p.grad is None] == []


# Features


def clips(recordings: Path) -> list[np.ndarray]:
    """Real recordings of several kinds and lengths, one of them longer than 1024 frames."""
    sets = {"esc10": 6, "librispeech_sample": 4, "fsdd": 2, "wakewords_picovoice": 2}
    files = [f for name, n in sets.items() for f in sorted((recordings / name).rglob("*.flac"))[:: 400 // n][:n]]
    found = [features.read(file, 16000) for file in files]
    assert len(found) >= 8 and max(map(len, found)) > 1024 * 160
    return found


def test_features_are_those_of_transformers_on_real_recordings(recordings: Path) -> None:
    extractor = theirs.ASTFeatureExtractor()
    for clip in clips(recordings):
        expected = extractor(clip, sampling_rate=16000, return_tensors="pt").input_values[0]
        close(heard(clip), expected)


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")  # true of theirs, too
def test_without_torchaudio_transformers_differs_from_us_as_it_does_from_itself(
    recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its two ways are 2e-4 apart in quiet bands, because one rounds to float32: no features equal both."""
    found = clips(recordings)
    extractor = theirs.ASTFeatureExtractor()
    one = [extractor(clip, sampling_rate=16000, return_tensors="pt").input_values[0] for clip in found]
    monkeypatch.setattr(extraction, "is_speech_available", lambda: False)
    extractor = theirs.ASTFeatureExtractor()
    other = [extractor(clip, sampling_rate=16000, return_tensors="pt").input_values[0] for clip in found]
    apart = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
    ours = max(float((heard(clip) - b).abs().max()) for clip, b in zip(found, other, strict=True))
    assert abs(ours - apart) <= 1e-5 and apart <= 5e-4


@pytest.mark.parametrize("samples", [0, 399, 400, 559, 560, 16000])
def test_frames_begin_with_the_first_whole_window_where_edges_are_snipped(samples: int) -> None:
    x = 0.1 * torch.randn(1, samples)
    options = {"scale": 1.0, "floor": 2.0**-23, "bands": 40, "float32_tables": True}
    frames, counts = LogMel(hann_power=1.0, snip_edges=True, **options)(x, torch.tensor([samples]))
    expected = kaldi.fbank(x, num_mel_bins=40, window_type="hanning") if samples >= 400 else torch.zeros(0, 40)
    assert counts.tolist() == [len(expected)]
    close(frames[0], expected)


def test_snipped_frames_are_the_same_in_any_division_of_the_samples() -> None:
    mel = LogMel(snip_edges=True)
    x = torch.randn(1, 5000)
    whole = mel(x, torch.tensor([5000])).frames[0]
    state, found = mel.init_state(1), []
    for piece in x.split([1, 398, 1, 161, 2000, 2439], dim=1):
        (frames, counts), state = mel.stream(piece, torch.tensor([piece.shape[1]]), state)
        found.append(frames[0, : int(counts)])
    close(torch.cat(found), whole, 1e-4)


# Recordings


def test_tags_of_a_recording_are_those_of_transformers(folder: Path, recordings: Path) -> None:
    file = sorted((recordings / "esc10").rglob("*.flac"))[0]
    model = theirs.ASTForAudioClassification.from_pretrained(folder).eval()
    clip = features.read(file, 16000)
    short = clip[: 95 * 160]
    for audio, heard_at in ((short, short), (torch.from_numpy(short), short)):
        x = theirs.ASTFeatureExtractor.from_pretrained(folder)(heard_at, sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            scores = model(**x).logits[0].sigmoid()
        tags = speechkit.load(folder).tag(audio, top=3)
        assert [tag.label for tag in tags] == [f"LABEL_{i}" for i in scores.topk(3).indices.tolist()]
        close(torch.tensor([tag.score for tag in tags]), scores.topk(3).values)
    assert len(speechkit.load(folder).tag(file, top=100)) == 7


@torch.no_grad()
def test_a_long_recording_has_the_mean_scores_of_its_pieces(folder: Path) -> None:
    tagger, seconds = speechkit.load(folder), 2.345
    clip = sound(seconds)
    frames = tagger.features(clip[None], torch.tensor([len(clip)])).frames[0]
    assert len(frames) == 233
    pieces = torch.stack([frames[:96], frames[96:192], frames[-96:]])
    expected = tagger.logits(pieces).sigmoid().mean(0)
    tags = {tag.label: tag.score for tag in tagger.tag(clip, top=7)}
    close(torch.tensor([tags[label] for label in tagger.labels]), expected)


def test_a_recording_of_any_rate_and_length_is_tagged(folder: Path, tmp_path: Path) -> None:
    tagger = speechkit.load(folder)
    speechkit.audio.write(tmp_path / "long.wav", sound(25.0, sample_rate=8000).numpy(), 8000)
    from_file = tagger.tag(tmp_path / "long.wav", top=7)
    from_samples = tagger.tag(features.read(tmp_path / "long.wav", 16000), top=7)
    assert [tag.label for tag in from_file] == [tag.label for tag in from_samples]
    close(torch.tensor([tag.score for tag in from_file]), torch.tensor([tag.score for tag in from_samples]))
    assert all(isinstance(tag, Tag) for tag in tagger.tag(sound(0.026)))


def test_classes_that_exclude_each_other_have_scores_that_add_up(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(problem_type="single_label_classification"))
    assert abs(sum(tag.score for tag in speechkit.load(folder).tag(sound(0.5), top=7)) - 1) < 1e-5


def test_what_is_no_recording_is_named(folder: Path) -> None:
    tagger = speechkit.load(folder)
    with pytest.raises(ValueError, match=r"must have at least 400 samples, one feature frame, but is shorter; record"):
        tagger.tag(torch.zeros(399))
    with pytest.raises(ValueError, match=r"must be one channel of samples"):
        tagger.tag(torch.zeros(2, 16000))
    with pytest.raises(ValueError, match=r"a.wav must be an audio file, but does not exist"):
        tagger.tag("a.wav")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"must have a front end .* but its folder had no preprocessor_config.json"):
        speechkit.load(folder).tag(sound(1.0))


@torch.no_grad()
def test_a_copy_is_saved_and_loaded_without_the_original(folder: Path, tmp_path: Path) -> None:
    tagger, head = speechkit.load(folder), {"_target_": "speechkit.heads.Summary", "_partial_": True, "eps": 1e-12}
    node = describe(folder) | {"head": head, "labels": [*tagger.labels], "frames": tagger.frames, "filled": True}
    save(tagger, node, tmp_path / "copy")
    copy, clip = speechkit.load(tmp_path / "copy"), sound(0.7)
    close(copy.scores(clip), tagger.scores(clip), 0.0)


# Folders that do not fit


def test_weights_that_do_not_fit_are_named_with_all_lists(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["audio_spectrogram_transformer.rogue"] = weights.pop("classifier.layernorm.bias")
    del weights["audio_spectrogram_transformer.embeddings.cls_token"]
    weights["audio_spectrogram_transformer.encoder.layer.0.output.dense.weight"] = torch.zeros(3, 128)
    save_file(weights, path)
    with pytest.raises(ValueError) as error:
        speechkit.load(folder)
    assert (
        "lacks audio_spectrogram_transformer.embeddings.cls_token, classifier.layernorm.bias, and has the unknown "
        "audio_spectrogram_transformer.rogue, and has the wrong sizes "
        "audio_spectrogram_transformer.encoder.layer.0.output.dense.weight [3, 128] instead of [32, 128]; it is of"
    ) in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "relu"}, "ValueError: hidden_act must be gelu, but is relu"),
        ({"intermediate_size": 100}, "ValueError: intermediate_size must be a multiple of hidden_size, 32, but is 100"),
        ({"hidden_size": None}, "TypeError: "),
        ({"num_attention_heads": 5}, "ValueError: Softmax.dim must be a multiple of heads, 5, but is 32"),
        ({"max_length": 12}, "ValueError: AST.frames must be at least a patch, 16, but is 12"),
        ({"num_mel_bins": 64}, "ValueError: preprocessor_config.json must have the 64 num_mel_bins of config.json"),
        ({"id2label": {"0": "a", "1": "b"}}, "ValueError: id2label must name the classes 0 to 6 of the weights"),
    ],
)
def test_a_config_that_no_ast_can_be_is_named(folder: Path, change: dict, said: str) -> None:
    edit(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(ValueError, match=r"must describe an Audio Spectrogram Transformer .*; copy it again") as error:
        speechkit.load(folder)
    assert f"no model can be built from it ({said}" in str(error.value)


def test_a_config_of_another_length_is_refused_by_its_position_table(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(max_length=200))
    sentence = "embeddings.position_embeddings[patches] [36, 32] instead of [19, 4, 32]; it is of another model"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        speechkit.load(folder)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def test_a_pickle_in_disguise_is_refused_unopened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="must be a safetensors file, but is a Python pickle"):
        speechkit.load(folder)
    torch.save({"v.cls_token": Bomb()}, folder / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb.pth must hold tensors and nothing else, but cannot be opened so \(Unp"):
        speechkit.load(folder / "bomb.pth")
    assert not Path("exploded").exists()


def test_a_tagger_writes_no_text(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold a recogniser, but holds a tagger, .*; use it with speechkit tag"):
        load_recogniser(folder)


# The original repository's layout


def timm(model: nn.Module) -> dict[str, Tensor]:
    """The weights of transformers' AST as the original repository names them."""
    weights, found = model.audio_spectrogram_transformer.state_dict(), {}
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.distillation_token": "dist_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "layernorm": "norm",
    }
    for name, weight in weights.items():
        if match := re.match(r"layers\.(\d+)\.attention\.q_proj\.(\w+)$", name):
            n, last = match.groups()
            thirds = [weights[f"layers.{n}.attention.{part}_proj.{last}"] for part in "qkv"]
            found[f"blocks.{n}.attn.qkv.{last}"] = torch.cat(thirds)
        elif not re.search(r"[kv]_proj", name):
            module, _, last = name.replace("layers.", "", 1).rpartition(".")
            n, _, part = module.partition(".")
            inside = f"blocks.{n}.{names[part]}.{last}" if n.isdigit() else None
            found[inside or names.get(name) or f"{names[module]}.{last}"] = weight
    head = model.classifier.state_dict()
    heads = {
        f"mlp_head.{i}.{k}": head[f"{m}.{k}"] for i, m in enumerate(("layernorm", "dense")) for k in ("weight", "bias")
    }
    unused = {f"v.{name}.{k}": torch.randn(5) for name in ("head", "head_dist") for k in ("weight", "bias")}
    return {f"v.{name}": weight for name, weight in found.items()} | heads | unused


ORIGINAL = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512, "layer_norm_eps": 1e-6}
SIZES = {"features": 48, "frames": 96}


@pytest.fixture
def original(tmp_path: Path) -> tuple[nn.Module, dict[str, Tensor], Path]:
    """transformers' model with the head's own eps, its weights in the original layout, and where they are saved."""
    model = written(tmp_path, **ORIGINAL)
    model.classifier.layernorm.eps = 1e-5
    weights = timm(model)
    torch.save({f"module.{name}": weight for name, weight in weights.items()}, tmp_path / "audio_model.pth")
    return model, weights, tmp_path / "audio_model.pth"


@torch.no_grad()
def test_a_checkpoint_of_the_original_gives_the_same_logits(original: tuple, tmp_path: Path) -> None:
    model, weights, path = original
    x = spectrogram(2, 96, 48)
    tagger = load_original(path, labels="abcdefg", **SIZES)
    close(tagger.logits(x), model(x).logits)
    assert tagger.labels == tuple("abcdefg") and tagger.features.norm.std[0] == 2 * 4.5689974 and not tagger.training
    torch.save(weights, tmp_path / "bare.pth")  # without DataParallel's prefix
    close(load_original(tmp_path / "bare.pth", **SIZES).logits(x), model(x).logits)


@torch.no_grad()
def test_a_checkpoint_of_the_published_size_is_loaded_by_its_path_alone(tmp_path: Path) -> None:
    model = randomised(
        theirs.ASTForAudioClassification(
            theirs.ASTConfig(**TINY | ORIGINAL | {"num_mel_bins": 128, "max_length": 1024})
        )
    )
    torch.save(timm(model), tmp_path / "audio_model.pth")
    tagger = speechkit.load(tmp_path / "audio_model.pth")
    assert tagger.labels == tuple("0123456") and tagger.encoder.positions.table.shape == (101, 12, 128)


def test_an_original_checkpoint_that_does_not_fit_is_named(original: tuple, tmp_path: Path) -> None:
    _, weights, path = original
    with pytest.raises(ValueError, match=r"given a label for each of its 7 classes, but labels has 3; give it those"):
        load_original(path, labels=["a", "b", "c"], **SIZES)
    sentence = "v.pos_embed[patches] [36, 128] instead of [101, 4, 128]; say the frames, features and stride it was"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_original(path, features=48)
    changed = dict(weights)
    changed["v.blocks.1.rogue"] = changed.pop("v.blocks.1.attn.qkv.weight")
    torch.save(changed, path)
    sentence = (
        "lacks v.blocks.1.attn.qkv[query].weight, v.blocks.1.attn.qkv[key].weight, v.blocks.1.attn.qkv[value].weight, "
        "and has the unknown v.blocks.1.rogue; say the frames"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_original(path, **SIZES)
    torch.save({"state": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"must hold an AST of the original repository, but has no v.patch_embed"):
        load_original(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match=r"must hold tensors by name, but holds Tensor; load another file"):
        load_original(path)
    for content in (b"", b"PK\x03\x04", b"audio"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"must hold tensors and nothing else, but cannot be opened so"):
            load_original(path)
    with pytest.raises(ValueError, match=r"nowhere.pth must be a checkpoint, but does not exist; check the path"):
        speechkit.load(tmp_path / "nowhere.pth")


# From images


def images(side: int, *, distilled: bool, dim: int = 32) -> dict[str, Tensor]:
    """A vision transformer of three colours in timm's layout, with classifiers."""
    block = {
        "norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "norm2": (dim,),
        "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim),
    }  # fmt: skip
    shapes = {f"blocks.{n}.{name}.weight": shape for n in range(2) for name, shape in block.items()}
    shapes |= {"patch_embed.proj.weight": (dim, 3, 16, 16), "norm.weight": (dim,), "head.weight": (1000, dim)}
    shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    shapes |= {"cls_token": (1, 1, dim), "pos_embed": (1, side * side + 1 + distilled, dim)}
    if distilled:
        shapes |= {"dist_token": (1, 1, dim), "head_dist.weight": (1000, dim), "head_dist.bias": (1000,)}
    return {name: spectrogram(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_an_encoder_starts_from_images_as_the_original_does(tmp_path: Path, distilled: bool, suffix: str) -> None:
    weights, path, encoder = images(6, distilled=distilled), tmp_path / f"deit.{suffix}", tiny(frames=200)
    torch.save({"model": weights}, path) if suffix == "pth" else save_file(weights, path)
    initialise(encoder, path)
    table = weights["pos_embed"][0, 1 + distilled :].T.unflatten(1, (6, 6))  # [D, F, T]
    close(encoder.positions.table, original_rule(table, 19, 3).permute(2, 1, 0))
    close(encoder.positions.tokens, weights["pos_embed"][0, [0, int(distilled)]])
    close(encoder.distillation_token, weights["dist_token" if distilled else "cls_token"][0, 0])
    close(encoder.patches.weight[:, 0], weights["patch_embed.proj.weight"].sum(1).mT)
    close(encoder.blocks[1].attention.value.weight, weights["blocks.1.attn.qkv.weight"][64:])
    close(encoder.blocks[1].feed[3].bias, weights["blocks.1.mlp.fc2.bias"])


@torch.no_grad()
def test_separate_positions_start_from_images_as_the_nearest_sum(tmp_path: Path) -> None:
    weights, encoder = images(6, distilled=True), tiny(positions=SeparatePositions)
    one, other = torch.randn(6, 1, 32), torch.randn(1, 6, 32)
    weights["pos_embed"][0, 2:] = (one + other).flatten(0, 1)
    save_file(weights, tmp_path / "deit.safetensors")
    initialise(encoder, tmp_path / "deit.safetensors")
    expected = original_rule((one + other).permute(2, 0, 1), 9, 3).permute(2, 1, 0)
    close(encoder.positions.grid(), expected)


def test_an_encoder_that_images_do_not_fit_stays_as_it_was(tmp_path: Path) -> None:
    save_file(images(6, distilled=True, dim=64), tmp_path / "deit.safetensors")
    encoder = tiny()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"must hold a vision transformer of 2 layers of width 32 .* wrong sizes cls_token"
    ):
        initialise(encoder, tmp_path / "deit.safetensors")
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in before.items())
    with pytest.raises(ValueError, match=r"width 32 in timm's layout, but lacks cls_token"):
        save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
        initialise(encoder, tmp_path / "other.safetensors")
