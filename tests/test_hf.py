"""The adapter of transformers' encoders, held against each of them called directly."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import recipe
import torch
from ast_cases import close, randomised
from safetensors.torch import load_file, save_file
from test_train import run
from tiny import sound
from torch import nn

import speechkit
from speechkit import config as configs
from speechkit import pretrained
from speechkit.encoders import AudioEncoder

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WAVE = SIZES | {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
SEQUENCE = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
CASES = {
    "Data2VecAudio": (WAVE | {"num_conv_pos_embeddings": 5}, "Wav2Vec2", 320),
    "SEW": (WAVE | {"conv_dim": [16] * 13}, "Wav2Vec2", 320),
    "UniSpeech": (WAVE, "Wav2Vec2", 320),
    "UniSpeechSat": (WAVE, "Wav2Vec2", 320),
    "Wav2Vec2Conformer": (WAVE, "Wav2Vec2", 320),
    "Wav2Vec2Bert": (SIZES, "SeamlessM4T", 320),
    "Whisper": (
        SEQUENCE | {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
                    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        "Whisper", 320,
    ),
    "Moonshine": (
        SEQUENCE | {"hidden_size": 32, "intermediate_size": 64, "encoder_num_hidden_layers": 2,
                    "decoder_num_hidden_layers": 1, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4},
        "Wav2Vec2", 384,
    ),
}  # fmt: skip


def written(folder: Path, name: str) -> tuple[nn.Module, object]:
    """Their model and extractor, saved to a folder."""
    sizes, extractor, _ = CASES[name]
    model = randomised(getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes)))
    model.save_pretrained(folder)
    heard = getattr(transformers, f"{extractor}FeatureExtractor")()
    heard.save_pretrained(folder)
    return model, heard


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_each_clip_of_a_batch_gives_what_transformers_gives_of_it_alone(name: str, tmp_path: Path) -> None:
    model, extractor = written(tmp_path, name)
    encoder = speechkit.load(tmp_path)
    inner = model.get_encoder() if model.config.is_encoder_decoder else model
    lengths = torch.tensor([16000, 9123, 0, 16000])
    samples = torch.stack([sound(1.0, seed=n) for n in range(4)])
    out = encoder(
        samples[..., None].masked_fill(torch.arange(16000)[:, None] >= lengths[:, None, None], torch.nan), lengths
    )
    for n, length in enumerate(lengths.tolist()):
        if length:
            inputs = extractor([samples[n, :length].numpy()], sampling_rate=16000, return_tensors="pt")
            close(out.frames[n, : out.lengths[n]], inner(**inputs).last_hidden_state[0, : out.lengths[n]])
    assert abs(int(out.lengths[0]) - 16000 / encoder.stride) <= 2 and out.lengths[2] == 0
    assert isinstance(encoder, AudioEncoder) and (encoder.dim, encoder.stride) == (32, CASES[name][2])


@pytest.mark.parametrize("name", CASES)
def test_a_fine_tuned_copy_is_saved_and_loaded_without_the_original(name: str, tmp_path: Path) -> None:
    written(tmp_path / "theirs", name)
    head = {"_target_": "speechkit.heads.Mean", "_partial_": True}
    nodes = pretrained.describe(tmp_path / "theirs")
    node = nodes | {"head": head, "labels": ["a", "b"], "frames": 16000}
    tagger = configs.build_model(node)
    tagger.encoder.load_state_dict(speechkit.load(tmp_path / "theirs").state_dict())
    x, lengths = sound(0.6)[None], torch.tensor([9600])
    tagger.train()
    tagger.logits(*tagger.hear(x, lengths)).sum().backward()
    learnt = [p for p in tagger.encoder.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(learnt) > 20
    with torch.no_grad():
        for parameter in learnt:
            parameter -= 0.01 * parameter.grad
    tagger.eval()
    pretrained.save(tagger, node, tmp_path / "ours")
    copy = speechkit.load(tmp_path / "ours")
    with torch.no_grad():
        close(copy.logits(*copy.hear(x, lengths)), tagger.logits(*tagger.hear(x, lengths)), 0.0)
    assert len(copy.tag(sound(2.3))) == 2


@torch.no_grad()
def test_clips_that_are_too_short_or_too_long_are_no_surprise(tmp_path: Path) -> None:
    written(tmp_path / "sew", "SEW")
    encoder = speechkit.load(tmp_path / "sew")
    short = encoder(sound(0.005)[None, :, None])
    close(short.frames, encoder(torch.nn.functional.pad(sound(0.005), (0, 1520))[None, :, None]).frames)
    with pytest.raises(ValueError, match=r"must be given samples, \[B, N, 1\], but the features have 80 bands"):
        encoder(torch.zeros(1, 100, 80))
    written(tmp_path / "whisper", "Whisper")
    sentence = "WhisperEncoder must be given clips of at most 30 s, but one is 30.5 s long; hear it in pieces: set"
    with pytest.raises(ValueError, match=sentence):
        speechkit.load(tmp_path / "whisper")(torch.zeros(1, 488000, 1))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_that_do_not_fit_are_named(tmp_path: Path) -> None:
    written(tmp_path, "SEW")
    weights = load_file(tmp_path / "model.safetensors")
    taken = weights.pop("encoder.layers.0.attention.k_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"all weights of SEWModel, but lacks encoder.layers.0.attention.k_proj.weight"
    ):
        speechkit.load(tmp_path)
    weights["encoder.layers.0.attention.k_proj.weight"] = taken[:3].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold .*weights of SEWModel"):
        speechkit.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04cos\nmkdir\n.")
    with pytest.raises(ValueError, match=r"weights of SEWModel as safetensors, but they cannot be read"):
        speechkit.load(tmp_path)
    edit(tmp_path / "preprocessor_config.json", feature_extractor_type="SEWModel")
    with pytest.raises(
        ValueError, match=r"must (be one of transformers' extractors of sound|say in preprocessor_conf)"
    ):
        speechkit.load(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"must say in preprocessor_config.json how its model hears, but does not"):
        speechkit.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("bert", "must describe a model that hears sound, but bert does not"),
        ("nosuch", "can build, but model_type is nosuch"),
    ],
)
def test_architectures_that_do_not_hear_are_refused(kind: str, said: str, tmp_path: Path) -> None:
    written(tmp_path, "SEW")
    edit(tmp_path / "config.json", model_type=kind, auto_map={"AutoModel": "code.Evil"})
    with pytest.raises(ValueError, match=re.escape(said)):
        speechkit.load(tmp_path)


def test_where_transformers_is_absent_the_sentence_says_what_is_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "SEW")
    monkeypatch.setitem(sys.modules, "transformers", None)
    sentence = r"Audio Spectrogram Transformer, wav2vec 2.0, .* are built in, but .*; install it with: pip install 'spe"
    with pytest.raises(ValueError, match=sentence):
        speechkit.load(tmp_path)


# Fine-tuned by a config


@pytest.mark.parametrize(("kind", "frames"), [("UniSpeech", 16000), ("Wav2Vec2", 16000), ("AST", 96)])
def test_a_config_without_an_encoder_fine_tunes_that_of_somebody_else(kind: str, frames: int, tmp_path: Path) -> None:
    other, tags = tmp_path / "other", recipe.write_tags(tmp_path / "tags")
    if kind == "AST":
        sizes = {"num_mel_bins": 48, "max_length": 96, "num_labels": 3}
        model = transformers.ASTForAudioClassification(transformers.ASTConfig(**SIZES, **sizes))
        heard = transformers.ASTFeatureExtractor(num_mel_bins=48, max_length=96)
    else:
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**WAVE))
        heard = transformers.Wav2Vec2FeatureExtractor()
    randomised(model).save_pretrained(other)
    heard.save_pretrained(other)
    lines = [line for line in tags.read_text().splitlines() if "encoder" not in line and "features:" not in line]
    tags.write_text("\n".join(lines))
    changes = [f"init={other}", f"model.frames={frames}", "trainer.max_steps=3", "trainer.val_check_interval=3"]
    folder = run(tags, "tuned", *changes, "optim=constant", "optim.optimizer.lr=1e-5", "data.batch=2")
    given, tuned = speechkit.load(other), speechkit.load(folder)
    before, after = getattr(given, "encoder", given).parameters(), tuned.encoder.parameters()
    moved = [float((p - q).detach().abs().max()) for p, q in zip(before, after, strict=True)]
    assert 0 < max(moved) < 1e-4, "it begins with their weights"
    assert len(tuned.tag(sound(1.7))) == 4
