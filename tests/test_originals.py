"""Checkpoints of PaSST and Audio-MAE, held against float64 written down from what their papers and layouts say."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchaudio.compliance.kaldi as kaldi
from ast_cases import close, spectrogram
from safetensors.torch import save_file
from tiny import sound
from torch import Tensor

import speechkit
from speechkit import config as configs
from speechkit import features, pretrained
from speechkit.encoders import AST
from speechkit.features import CentredMel
from speechkit.pretrained import audiomae, of_images, passt
from speechkit.pretrained.ast import initialise

DIM, LAYERS = 128, 2
Weights = dict[str, Tensor]


def randoms(shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Random weights of those shapes, in the scale of trained ones."""
    made = {name: spectrogram(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    return {name: w * (0.3 if w.dim() == 1 else w[0].numel() ** -0.5) for name, w in made.items()}


def transformer(**more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of a vision transformer in timm's layout."""
    block = {
        "norm1": (DIM,), "attn.qkv": (3 * DIM, DIM), "attn.proj": (DIM, DIM), "norm2": (DIM,),
        "mlp.fc1": (4 * DIM, DIM), "mlp.fc2": (DIM, 4 * DIM),
    }  # fmt: skip
    maps = {f"blocks.{n}.{name}": shape for n in range(LAYERS) for name, shape in block.items()}
    maps |= {"patch_embed.proj": (DIM, 1, 16, 16), **more}
    both = {f"{name}.{kind}": shape if kind == "weight" else shape[:1] for name, shape in maps.items()
            for kind in ("weight", "bias")}  # fmt: skip
    return both | {"cls_token": (1, 1, DIM)}


def normed(x: Tensor, weights: Weights, name: str, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def blocks(x: Tensor, weights: Weights) -> Tensor:
    """Pre-norm blocks with heads of 64 (2010.11929, equations 2 and 3)."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    for n in range(LAYERS):
        at = f"blocks.{n}"
        q, k, v = (
            part.unflatten(-1, (-1, 64)).transpose(1, 2)
            for part in linear(normed(x, weights, f"{at}.norm1"), f"{at}.attn.qkv").chunk(3, -1)
        )
        y = (q @ k.mT / 8).softmax(-1) @ v
        x = x + linear(y.transpose(1, 2).flatten(2), f"{at}.attn.proj")
        hidden = linear(normed(x, weights, f"{at}.norm2"), f"{at}.mlp.fc1")
        x = x + linear(0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)), f"{at}.mlp.fc2")
    return x


# PaSST


def passt_weights(columns: int = 9, rows: int = 12) -> Weights:
    shapes = transformer(norm=(DIM,), **{"head.0": (DIM,), "head.1": (5, DIM), "head_dist": (5, DIM)})
    shapes |= {"dist_token": (1, 1, DIM), "new_pos_embed": (1, 2, DIM)}
    shapes |= {"freq_new_pos_embed": (1, DIM, rows, 1), "time_new_pos_embed": (1, DIM, 1, columns)}
    return randoms(shapes)


def passt_logits(x: Tensor, weights: Weights, stride: int) -> Tensor:
    """The paper's section 2: frequency goes down and time to the right, two tokens, the mean of both is classified."""
    w = {name: weight.double() for name, weight in weights.items()}
    x = F.conv2d(x.double().mT[:, None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=stride)
    x = (x + w["time_new_pos_embed"] + w["freq_new_pos_embed"]).flatten(2).mT
    tokens = torch.cat([w["cls_token"], w["dist_token"]], 1) + w["new_pos_embed"]
    x = normed(blocks(torch.cat([tokens.expand(len(x), -1, -1), x], 1), w), w, "norm")
    return normed(x[:, :2].mean(1), w, "head.0", 1e-5) @ w["head.1.weight"].T + w["head.1.bias"]


@pytest.mark.parametrize(("rows", "stride"), [(12, 10), (10, 12), (9, 14), (8, 16)])
@torch.no_grad()
def test_a_checkpoint_of_passt_gives_the_logits_of_its_paper(rows: int, stride: int, tmp_path: Path) -> None:
    weights, path = passt_weights(rows=rows), tmp_path / "passt.pt"
    torch.save(weights, path)
    tagger = passt.load_original(path, labels="abcde")
    x = spectrogram(2, 16 + 8 * stride + 3, 128)
    close(tagger.logits(x), passt_logits(x, weights, stride).float())
    assert tagger.labels == tuple("abcde") and tagger.sample_rate == 32000
    assert tagger.encoder.columns(torch.tensor([tagger.frames, tagger.frames + 1])).tolist() == [9, 10]


@torch.no_grad()
def test_passt_is_known_by_its_file_and_tags_a_recording(tmp_path: Path) -> None:
    torch.save(passt_weights(columns=40), tmp_path / "passt.pt")
    tagger = speechkit.load(tmp_path / "passt.pt")
    assert {tag.label for tag in tagger.tag(sound(1.3, sample_rate=32000))} == set("01234")
    assert not of_images(tmp_path / "passt.pt")


def test_passt_features_are_those_of_the_original_where_a_window_lies_inside(recordings: Path) -> None:
    path = min((recordings / "esc10").rglob("*.flac"))
    clip = torch.from_numpy(features.read(path, 32000))[: 32000 * 3 + 111].double()
    y = clip[1:] - 0.97 * clip[:-1]
    window = torch.hann_window(800, periodic=False, dtype=torch.float64)
    power = torch.stft(y, 1024, 320, 800, window, center=True, return_complex=True).abs().square()
    mel, _ = kaldi.get_mel_banks(128, 1024, 32000.0, 0.0, 15000.0, 100.0, -500.0, 1.0)
    expected = (F.pad(mel, (0, 1)).double() @ power + 1e-5).log().T
    got, counts = CentredMel()(clip[None].float(), torch.tensor([len(clip)]))
    assert int(counts) == got.shape[1] and 1 <= len(expected) - got.shape[1] <= 2
    close(got[0, 2:] / 5, expected[2 : got.shape[1]].float() / 5, 1e-4)  # as its norm divides them


def test_passt_features_stream_as_they_are_whole() -> None:
    mel, clip = CentredMel(), sound(0.7, sample_rate=32000)[None]
    whole, count = mel(clip, torch.tensor([clip.shape[1]]))
    state, found = mel.init_state(1), []
    for piece in clip.split(1234, dim=1):
        (frames, counts), state = mel.stream(piece, torch.tensor([piece.shape[1]]), state)
        found.append(frames[0, : int(counts)])
    close(torch.cat(found), whole[0, : int(count)])


# Audio-MAE


def mae_weights(columns: int = 64, **more: tuple[int, ...]) -> Weights:
    return randoms(transformer(**more) | {"pos_embed": (1, 1 + 8 * columns, DIM)})


def mae_patches(x: Tensor, w: Weights) -> Tensor:
    """Patches without overlap, time down, with a class token before them (2207.06405, section 3.1)."""
    x = F.conv2d(x.double()[:, None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + w["pos_embed"]
    return blocks(x, w)


@torch.no_grad()
def test_a_pretrained_audio_mae_is_the_encoder_of_its_paper(tmp_path: Path) -> None:
    weights, path = (
        mae_weights(norm=(DIM,), decoder_embed=(32, DIM)) | {"mask_token": torch.zeros(1, 1, 32)},
        tmp_path / "pretrained.pth",
    )
    torch.save({"model": weights, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}, path)
    encoder, x = speechkit.load(path), spectrogram(1, 1024, 128)
    w = {name: weight.double() for name, weight in weights.items()}
    expected = normed(mae_patches(x, w), w, "norm")
    got = encoder(x)
    assert isinstance(encoder, AST) and not encoder.training and got.frames.shape == (1, 64, DIM)
    close(got.summary, expected[:, 0].float())
    close(got.frames, expected[:, 1:].unflatten(1, (64, 8)).mean(2).float())


@torch.no_grad()
def test_a_fine_tuned_audio_mae_gives_the_logits_of_its_paper(tmp_path: Path) -> None:
    weights, path = mae_weights(fc_norm=(DIM,), head=(5, DIM)), tmp_path / "finetuned.pth"
    torch.save({"model": weights}, path)
    tagger, x = audiomae.load_original(path, labels="abcde"), spectrogram(1, 1024, 128)
    w = {name: weight.double() for name, weight in weights.items()}
    pooled = normed(mae_patches(x, w)[:, 1:].mean(1), w, "fc_norm")
    close(tagger.logits(x), (pooled @ w["head.weight"].T + w["head.bias"]).float())
    assert len(tagger.tag(sound(1.0))) == 5 and not of_images(path)


@torch.no_grad()
def test_an_encoder_of_one_token_takes_other_sizes_and_starts_from_images(tmp_path: Path) -> None:
    torch.save(mae_weights(norm=(DIM,)), tmp_path / "pretrained.pth")
    encoder = speechkit.load(tmp_path / "pretrained.pth")
    encoder.resize(features=64, frames=320)
    assert encoder.positions.tokens.shape == (1, DIM) and encoder(spectrogram(1, 320, 64)).frames.shape == (1, 20, DIM)
    images = mae_weights(columns=2, norm=(DIM,)) | {"patch_embed.proj.weight": torch.randn(DIM, 3, 16, 16)}
    save_file(images, tmp_path / "vit.safetensors")
    assert of_images(tmp_path / "vit.safetensors")
    initialise(encoder, tmp_path / "vit.safetensors")
    close(encoder.positions.tokens, images["pos_embed"][0, :1])
    close(encoder.class_token, images["cls_token"][0, 0])


# Both


@pytest.mark.parametrize("weights", [passt_weights, mae_weights])
def test_what_a_file_is_said_to_be_is_what_it_is_built_as(weights, tmp_path: Path) -> None:
    torch.save(weights(norm=(DIM,)) if weights is mae_weights else weights(), tmp_path / "model.pth")
    model = speechkit.load(tmp_path / "model.pth")
    encoder = getattr(model, "encoder", model)
    nodes = pretrained.describe(tmp_path / "model.pth")
    built = configs.build(nodes["encoder"])
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in encoder.state_dict().items()}
    assert configs.build(nodes["features"]).dim == 128


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(passt_weights(rows=11), path)
    with pytest.raises(ValueError, match=r"must hold a PaSST with 12, 10, 9, 8 rows of patches, .* but has 11; load"):
        speechkit.load(path)
    weights = passt_weights()
    weights["rogue"] = weights.pop("norm.bias")
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"must hold a PaSST, but lacks norm.bias, and has the unknown rogue; load"):
        speechkit.load(path)
    torch.save(passt_weights(), path)
    with pytest.raises(ValueError, match=r"given a label for each of its 5 classes, but labels has 2"):
        passt.load_original(path, labels="ab")
    weights = mae_weights(norm=(DIM,))
    del weights["cls_token"]
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"must hold an Audio-MAE of 128 mel bands, but lacks cls_token; load another"):
        speechkit.load(path)
