"""Audio Spectrogram Transformers (2104.01778) of others, for `speechkit.encoders.AST` and `speechkit.tagger.Tagger`.

Three layouts are read, by the names in the files:

* a folder of transformers, ``ASTModel`` (an encoder) or ``ASTForAudioClassification`` (a tagger), with `load`;
* a file of the original repository, with `load_original`;
* a DeiT or ViT of images, in timm's layout, as the start of a training, with `initialise`.

What corresponds:

* **Patches** are ours column by column, theirs row by row: kernel and position table are turned.
* **Eps.** transformers has one for all layer norms, 1e-12 unless its config says otherwise, the original 1e-6 in the
  encoder and 1e-5 in the head. At random weights that alone moves logits by 0.001.
* **Features** are those of ``ASTFeatureExtractor`` where torchaudio is installed, samples between -1 and 1, normalised
  to ``(x - mean) / (2 std)``. The original also subtracts the mean of the recording, which moves them by 1e-4 at most.
* **Scores** are sigmoids, as the published checkpoints were trained, unless ``problem_type`` says that classes exclude
  each other.
* Of the settings for training, ``hidden_dropout_prob`` serves inside the feed-forward too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speechkit.attention import Softmax
from speechkit.encoders import AST
from speechkit.encoders.ast import TOKENS, Positions
from speechkit.features import FrontEnd, GlobalNorm, LogMel
from speechkit.heads import Summary
from speechkit.pretrained.weights import CONFIG, fill, put, read, tensors_of
from speechkit.tagger import Tagger

MODEL_TYPE = "audio-spectrogram-transformer"
INSIDE = "audio_spectrogram_transformer."  # before the names of the encoder in a tagger
EXTRACTOR = "preprocessor_config.json"
AUDIOSET = {"mean": -4.2677393, "std": 4.5689974}
KALDI_FLOOR = 2.0**-23  # torchaudio's, the epsilon of float32
HEAD_WIDTH = 64  # of an attention head, in every DeiT
QKV = ("query", "key", "value")


@dataclass(frozen=True)
class Layout:
    """Names of theirs for names of ours: tensors and modules before and behind the blocks, and those of a block."""

    front: Mapping[str, str]
    blocks: str
    block: Mapping[str, str]
    head: Mapping[str, str]


def _front(class_token: str, distillation_token: str, positions: str, patches: str, norm: str) -> dict[str, str]:
    names = {"class_token": class_token, "distillation_token": distillation_token, "patches": patches, "norm": norm}
    return names | {"positions.tokens": f"{positions}[tokens]", "positions.table": f"{positions}[patches]"}


TRANSFORMERS = Layout(
    front=_front(
        "embeddings.cls_token",
        "embeddings.distillation_token",
        "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection",
        "layernorm",
    ),
    blocks="encoder.layer",
    block={
        "norm_attention": "layernorm_before",
        **{f"attention.{part}": f"attention.attention.{part}" for part in QKV},
        "attention.out": "attention.output.dense",
        "norm_feed": "layernorm_after",
        "feed.0": "intermediate.dense",
        "feed.3": "output.dense",
    },
    head={"norm": "classifier.layernorm", "linear": "classifier.dense"},
)
TIMM = Layout(
    front=_front("cls_token", "dist_token", "pos_embed", "patch_embed.proj", "norm"),
    blocks="blocks",
    block={
        "norm_attention": "norm1",
        **{f"attention.{part}": f"attn.qkv[{part}]" for part in QKV},
        "attention.out": "attn.proj",
        "norm_feed": "norm2",
        "feed.0": "mlp.fc1",
        "feed.3": "mlp.fc2",
    },
    head={"norm": "mlp_head.0", "linear": "mlp_head.1"},
)
IMAGE_PATCHES = "patch_embed.proj.weight"
IMAGES = ("head.", "head_dist.")  # classifiers of images, which the original keeps and does not use


def describes(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of one of these models."""
    return config.get("model_type") == MODEL_TYPE


def front_end(*, mean: float, std: float, sample_rate: int = 16000, bands: int = 128) -> FrontEnd:
    """The features that AST was trained on: Kaldi's, of samples between -1 and 1, as ``(x - mean) / (2 std)``."""
    mel = LogMel(
        sample_rate=sample_rate,
        bands=bands,
        scale=1.0,
        floor=KALDI_FLOOR,
        hann_power=1.0,
        snip_edges=True,
        float32_tables=True,
    )
    return FrontEnd(mel=mel, norm=GlobalNorm(dim=bands, mean=mean, std=2 * std))


def load(folder: Path, config: Mapping[str, Any]) -> AST | Tagger:
    """The model of a folder that transformers wrote: a tagger where it has a classifier, else the encoder.

    Raises:
        ValueError: where a config asks for what this model is not, or the weights do not fit.
    """
    weights = read(folder)
    prefix = INSIDE if any(name.startswith(INSIDE) for name in weights) else ""
    try:
        encoder = _built(config)
        tagger = _tagger(folder, config, encoder, weights) if prefix else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG} must describe an Audio Spectrogram Transformer as transformers does, but no model can "
            f"be built from it ({type(error).__name__}: {str(error).rstrip('.')}); copy it again, or use transformers."
        ) from error
    parts = _parts(encoder, tagger)
    if not config["qkv_bias"]:
        weights = _zero_biases(encoder, prefix) | weights
    fill(parts, dict(_unpacked(weights, encoder.positions)), folder, _names(parts, TRANSFORMERS, prefix))
    return encoder if tagger is None else tagger


def load_original(
    path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    features: int = 128,
    frames: int = 1024,
    stride: int = 10,
    mean: float = AUDIOSET["mean"],
    std: float = AUDIOSET["std"],
) -> Tagger:
    """The tagger of a checkpoint of the original repository, which says nothing about itself but its weights.

    Args:
        path: a ``.pth`` file.
        labels: names of the classes; their numbers unless given.
        features, frames, stride: mel bands, feature frames and stride of the patches it was trained with.
        mean, std: what its features were normalised with; those of AudioSet unless given.

    Raises:
        ValueError: where the file is not only tensors, they are of another model, or ``labels`` are too few or many.
    """
    path = Path(path)
    weights = {name.removeprefix("module."): weight for name, weight in tensors_of(path).items()}
    kept = {name: weight for name, weight in weights.items() if not name.removeprefix("v.").startswith(IMAGES)}
    encoder = _shaped(path, kept, "v.", features=features, frames=frames, stride=stride)
    classes = len(kept.get("mlp_head.1.bias", ()))
    if labels is not None and len(labels) != classes:
        raise ValueError(
            f"{path} must be given a label for each of its {classes} classes, but labels has {len(labels)}; give it "
            f"those of the data it was trained on."
        )
    names = [str(n) for n in range(classes)] if labels is None else labels
    front = front_end(mean=mean, std=std, bands=features)
    tagger = Tagger(features=front, encoder=encoder, labels=names, frames=frames, filled=True)
    parts = _parts(encoder, tagger)
    if faults := put(parts, dict(_unpacked(kept, encoder.positions)), _names(parts, TIMM, "v.")):
        raise ValueError(
            f"{path} must hold an AST of {frames} frames, {features} mel bands and stride {stride}, but {faults}; "
            f"say the frames, features and stride it was trained with, or load another file."
        )
    return tagger.eval()


def initialise(encoder: AST, path: str | Path) -> None:
    """Start from a vision transformer that was trained on images, DeiT (2012.12877) or ViT, as AST does (section 2.2).

    The three colours of its patches are added up, and its position table is cut or interpolated. A ViT has no
    distillation token: it starts like the class token.

    Args:
        path: a checkpoint in timm's layout, ``.safetensors`` or ``.pth``.

    Raises:
        ValueError: where it does not fit; the encoder is then as it was.
    """
    path = Path(path)
    weights = {name: weight for name, weight in tensors_of(path).items() if not name.startswith(IMAGES)}
    if "dist_token" not in weights:
        weights |= _distilled(weights)
    side = math.isqrt(max(0, weights["pos_embed"].numel() // encoder.dim - TOKENS)) if "pos_embed" in weights else 1
    sound, image = encoder.positions, Positions(columns=side, rows=side, dim=encoder.dim)
    try:
        encoder.positions = image
        parts = _parts(encoder, None)
        faults = put(parts, dict(_unpacked(weights, image)), _names(parts, TIMM, ""))
    finally:
        encoder.positions = sound
    if faults:
        raise ValueError(
            f"{path} must hold a vision transformer of {len(encoder.blocks)} layers of width {encoder.dim} in timm's "
            f"layout, but {faults}; load one of the encoder's size."
        )
    sound.adopt(image)


def _parts(encoder: AST, tagger: Tagger | None) -> nn.ModuleDict:
    """What has weights in a file: not the front end."""
    return nn.ModuleDict({"encoder": encoder} | ({} if tagger is None else {"head": tagger.head}))


def _built(config: Mapping[str, Any]) -> AST:
    if config["hidden_act"] != "gelu":
        raise ValueError(f"hidden_act must be gelu, but is {config['hidden_act']}")
    dim, hidden = config["hidden_size"], config["intermediate_size"]
    if hidden % dim:
        raise ValueError(f"intermediate_size must be a multiple of hidden_size, {dim}, but is {hidden}")
    return AST(
        features=config["num_mel_bins"],
        frames=config["max_length"],
        dim=dim,
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        patch=config["patch_size"],
        stride=config["time_stride"],
        band_stride=config["frequency_stride"],
        expansion=hidden // dim,
        attention=partial(Softmax, dropout=config["attention_probs_dropout_prob"]),
        dropout=config["hidden_dropout_prob"],
        eps=config["layer_norm_eps"],
    )


def _tagger(folder: Path, config: Mapping[str, Any], encoder: AST, weights: Mapping[str, Tensor]) -> Tagger:
    names = {int(number): label for number, label in config["id2label"].items()}
    classes = len(weights["classifier.dense.bias"])
    if sorted(names) != list(range(classes)):
        raise ValueError(f"id2label must name the classes 0 to {classes - 1} of the weights, but names {len(names)}")
    return Tagger(
        features=_extractor(folder, encoder),
        encoder=encoder,
        labels=[names[number] for number in range(classes)],
        frames=config["max_length"],
        head=partial(Summary, eps=config["layer_norm_eps"]),
        exclusive=config.get("problem_type") == "single_label_classification",
        filled=True,
    )


def _extractor(folder: Path, encoder: AST) -> FrontEnd | None:
    if not (folder / EXTRACTOR).is_file():
        return None
    about = json.loads((folder / EXTRACTOR).read_text(encoding="utf-8"))
    if about["num_mel_bins"] != encoder.features:
        raise ValueError(
            f"{EXTRACTOR} must have the {encoder.features} num_mel_bins of {CONFIG}, but has {about['num_mel_bins']}"
        )
    norm = {key: about[key] for key in AUDIOSET} if about["do_normalize"] else {"mean": 0.0, "std": 0.5}
    return front_end(sample_rate=about["sampling_rate"], bands=encoder.features, **norm)


def _shaped(path: Path, weights: Mapping[str, Tensor], prefix: str, *, features: int, frames: int, stride: int) -> AST:
    """An encoder of the width and depth of weights in timm's layout."""
    patches = weights.get(f"{prefix}patch_embed.proj.weight")
    if patches is None or patches.dim() != 4 or len(patches) % HEAD_WIDTH:
        raise ValueError(
            f"{path} must hold an AST of the original repository, but has no {prefix}patch_embed.proj.weight of "
            f"[{HEAD_WIDTH} heads, channels, patch, patch]; load another file."
        )
    layers = {name.split(".")[2] for name in weights if name.startswith(f"{prefix}blocks.")}
    return AST(
        features=features,
        frames=frames,
        dim=len(patches),
        heads=len(patches) // HEAD_WIDTH,
        layers=len(layers),
        patch=patches.shape[-1],
        stride=stride,
        band_stride=stride,
    )


def _names(parts: nn.ModuleDict, layout: Layout, prefix: str) -> dict[str, str]:
    """What their files call each tensor of ours; ``prefix`` is before the names of the encoder."""
    modules = {f"encoder.{ours}": prefix + theirs for ours, theirs in layout.front.items()}
    for n in range(len(parts["encoder"].blocks)):  # type: ignore[arg-type]
        for ours, theirs in layout.block.items():
            modules[f"encoder.blocks.{n}.{ours}"] = f"{prefix}{layout.blocks}.{n}.{theirs}"
    modules |= {f"head.{ours}": theirs for ours, theirs in layout.head.items()}
    split = {name: name.rpartition(".") for name in parts.state_dict()}
    return {name: modules.get(name) or f"{modules[module]}.{last}" for name, (module, _, last) in split.items()}


def _unpacked(weights: Mapping[str, Tensor], positions: Positions) -> Iterator[tuple[str, Tensor]]:
    """Tensors of theirs in the shapes of ours; what is of another size is left for `put` to name."""
    columns, rows, _ = positions.table.shape
    for name, weight in weights.items():
        module, _, last = name.rpartition(".")
        if last in ("cls_token", "distillation_token", "dist_token"):
            yield name, weight.flatten()
        elif last in ("position_embeddings", "pos_embed"):
            tokens, table = weight.flatten(0, -2).tensor_split([TOKENS])
            fits = len(table) == rows * columns
            yield f"{name}[tokens]", tokens
            yield f"{name}[patches]", table.unflatten(0, (rows, columns)).transpose(0, 1) if fits else table
        elif module.endswith(".attn.qkv"):
            yield from ((f"{module}[{part}].{last}", third) for part, third in zip(QKV, weight.chunk(3), strict=True))
        elif weight.dim() == 4:
            yield name, weight.sum(1, keepdim=True).transpose(2, 3)
        else:
            yield name, weight


def _distilled(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a ViT lacks of a DeiT."""
    if not {"cls_token", "pos_embed"} <= weights.keys():
        return {}
    first = weights["pos_embed"][:, :1]
    return {"dist_token": weights["cls_token"], "pos_embed": torch.cat([first, weights["pos_embed"]], dim=1)}


def _zero_biases(encoder: AST, prefix: str) -> dict[str, Tensor]:
    names = (
        f"{prefix}{TRANSFORMERS.blocks}.{n}.{TRANSFORMERS.block[f'attention.{part}']}.bias"
        for n in range(len(encoder.blocks))
        for part in QKV
    )
    return {name: torch.zeros(encoder.dim) for name in names}
