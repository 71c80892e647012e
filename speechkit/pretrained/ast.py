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

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechkit import config as configs
from speechkit.attention import Softmax
from speechkit.encoders import AST
from speechkit.encoders.ast import TOKENS, Positions
from speechkit.features import FrontEnd, GlobalNorm, LogMel
from speechkit.heads import Summary
from speechkit.pretrained import foreign
from speechkit.pretrained.foreign import Node, Weights, factory, node
from speechkit.pretrained.weights import CONFIG, put, tensors_of
from speechkit.pretrained.weights import fill as put_all
from speechkit.tagger import Tagger

WHAT = "an Audio Spectrogram Transformer"
MODEL_TYPE = "audio-spectrogram-transformer"
INSIDE = "audio_spectrogram_transformer."  # before the names of the encoder in a tagger
AUDIOSET = {"mean": -4.2677393, "std": 4.5689974}
KALDI_FLOOR = 2.0**-23  # torchaudio's, the epsilon of float32
HEAD_WIDTH = 64  # of an attention head, in every DeiT
QKV = ("query", "key", "value")


@dataclass(frozen=True)
class Layout:
    """Names of theirs for names of ours: tensors and modules before and behind the blocks, and those of a block.

    ``by_column`` says that patches go column by column as ours, not row by row.
    """

    front: Mapping[str, str]
    blocks: str
    block: Mapping[str, str]
    head: Mapping[str, str]
    by_column: bool = False


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
    return configs.build(front_node(mean=mean, std=std, sample_rate=sample_rate, bands=bands))


def front_node(*, mean: float, std: float, sample_rate: int = 16000, bands: int = 128) -> Node:
    """`front_end` as a config node."""
    mel = node(
        LogMel,
        sample_rate=sample_rate,
        bands=bands,
        scale=1.0,
        floor=KALDI_FLOOR,
        hann_power=1.0,
        snip_edges=True,
        float32_tables=True,
    )
    return node(FrontEnd, mel=mel, norm=node(GlobalNorm, dim=bands, mean=mean, std=2 * std))


def describe(folder: Path, config: Mapping[str, Any], weights: Weights) -> Node:
    """The nodes of a model that transformers wrote: a tagger's where it has a classifier, else features and encoder."""
    encoder = _encoder(config)
    found = {"features": _extractor(folder, encoder["features"]), "encoder": encoder}
    return found | (_head(config, len(weights["classifier.dense.bias"])) if _prefix(weights) else {})


def fill(model: AST | Tagger, folder: Path, config: Mapping[str, Any], weights: Weights) -> None:
    """Put the weights of a model that transformers wrote into ours.

    Raises:
        ValueError: where they do not fit.
    """
    parts, prefix = foreign.parts(model), _prefix(weights)
    encoder: Any = parts["encoder"]
    if not config["qkv_bias"]:
        weights = _zero_biases(encoder, prefix) | dict(weights)
    names = foreign.names(parts, _modules(encoder, TRANSFORMERS, prefix))
    put_all(parts, dict(_unpacked(weights, encoder.positions, TRANSFORMERS)), folder, names)


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
    kept = _of_sound(tensors_of(path))
    encoder = shaped(path, kept, "v.", features=features, frames=frames, stride=stride)
    tagger = foreign.built(
        {
            "features": front_node(mean=mean, std=std, bands=features),
            "encoder": encoder,
            "head": factory(Summary),
            "labels": named(path, len(kept.get("mlp_head.1.bias", ())), labels),
            "frames": frames,
            "filled": True,
        }
    )
    if faults := put_timm(tagger, kept, TIMM, "v."):
        raise ValueError(
            f"{path} must hold an AST of {frames} frames, {features} mel bands and stride {stride}, but {faults}; "
            f"say the frames, features and stride it was trained with, or load another file."
        )
    return tagger.eval()


def describe_original(path: Path, weights: Weights) -> Node:
    """Features and encoder of a checkpoint of the original repository, of AudioSet's sizes."""
    encoder = shaped(path, _of_sound(weights), "v.", features=128, frames=1024, stride=10)
    return {"features": front_node(mean=AUDIOSET["mean"], std=AUDIOSET["std"]), "encoder": encoder}


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
    tokens = len(encoder.tokens)
    if "dist_token" not in weights and tokens == TOKENS:
        weights |= _distilled(weights)
    side = math.isqrt(max(0, weights["pos_embed"].numel() // encoder.dim - tokens)) if "pos_embed" in weights else 1
    sound, image = encoder.positions, Positions(columns=side, rows=side, dim=encoder.dim, tokens=tokens)
    try:
        encoder.positions = image
        faults = put_timm(encoder, weights, TIMM)
    finally:
        encoder.positions = sound
    if faults:
        raise ValueError(
            f"{path} must hold a vision transformer of {len(encoder.blocks)} layers of width {encoder.dim} in timm's "
            f"layout, but {faults}; load one of the encoder's size."
        )
    sound.adopt(image)


def _prefix(weights: Weights) -> str:
    """What is before the names of the encoder: something, in a tagger."""
    return INSIDE if any(name.startswith(INSIDE) for name in weights) else ""


def _encoder(config: Mapping[str, Any]) -> Node:
    foreign.require(config, {"hidden_act": "gelu"})
    return node(
        AST,
        features=config["num_mel_bins"],
        frames=config["max_length"],
        dim=config["hidden_size"],
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        patch=config["patch_size"],
        stride=config["time_stride"],
        band_stride=config["frequency_stride"],
        expansion=foreign.times(config),
        attention=factory(Softmax, dropout=config["attention_probs_dropout_prob"]),
        dropout=config["hidden_dropout_prob"],
        eps=config["layer_norm_eps"],
    )


def _head(config: Mapping[str, Any], classes: int) -> Node:
    return {
        "head": factory(Summary, eps=config["layer_norm_eps"]),
        "labels": foreign.labels(config, classes),
        "frames": config["max_length"],
        "exclusive": foreign.exclusive(config),
        "filled": True,
    }


def _extractor(folder: Path, bands: int) -> Node | None:
    about = foreign.extractor(folder)
    if about is None:
        return None
    if about["num_mel_bins"] != bands:
        raise ValueError(
            f"{foreign.EXTRACTOR} must have the {bands} num_mel_bins of {CONFIG}, but has {about['num_mel_bins']}"
        )
    norm = {key: about[key] for key in AUDIOSET} if about["do_normalize"] else {"mean": 0.0, "std": 0.5}
    return front_node(sample_rate=about["sampling_rate"], bands=bands, **norm)


def _of_sound(weights: Weights) -> dict[str, Tensor]:
    named = {name.removeprefix("module."): weight for name, weight in weights.items()}
    return {name: weight for name, weight in named.items() if not name.removeprefix("v.").startswith(IMAGES)}


def named(path: Path, classes: int, labels: Sequence[str] | None) -> list[str]:
    """The labels of a checkpoint that says nothing of them: those given, or numbers.

    Raises:
        ValueError: where there is not one for each class.
    """
    if labels is not None and len(labels) != classes:
        raise ValueError(
            f"{path} must be given a label for each of its {classes} classes, but labels has {len(labels)}; give it "
            f"those of the data it was trained on."
        )
    return list(map(str, range(classes))) if labels is None else list(labels)


def shaped(path: Path, weights: Weights, prefix: str, *, frames: int, stride: int, **options: Any) -> Node:
    """An encoder of the width and depth of weights in timm's layout.

    Raises:
        ValueError: where they are of no such encoder.
    """
    patches = weights.get(f"{prefix}{IMAGE_PATCHES}")
    if patches is None or patches.dim() != 4 or len(patches) % HEAD_WIDTH:
        raise ValueError(
            f"{path} must hold an AST of the original repository, but has no {prefix}patch_embed.proj.weight of "
            f"[{HEAD_WIDTH} heads, channels, patch, patch]; load another file."
        )
    layers = {name.split(".")[prefix.count(".") + 1] for name in weights if name.startswith(f"{prefix}blocks.")}
    return node(
        AST,
        frames=frames,
        dim=len(patches),
        heads=len(patches) // HEAD_WIDTH,
        layers=len(layers),
        patch=patches.shape[-1],
        stride=stride,
        band_stride=stride,
        **options,
    )


def put_timm(model: Any, weights: Weights, layout: Layout, prefix: str = "") -> str:
    """Put weights in timm's layout into a model of ours, or say what does not fit."""
    parts = foreign.parts(model)
    encoder: Any = parts["encoder"]
    names = foreign.names(parts, _modules(encoder, layout, prefix))
    return put(parts, dict(_unpacked(weights, encoder.positions, layout)), names)


def _modules(encoder: AST, layout: Layout, prefix: str) -> dict[str, str]:
    """What their files call each module of ours, or tensor; ``prefix`` is before the names of the encoder."""
    modules = {f"encoder.{ours}": prefix + theirs for ours, theirs in layout.front.items()}
    for n in range(len(encoder.blocks)):
        for ours, theirs in layout.block.items():
            modules[f"encoder.blocks.{n}.{ours}"] = f"{prefix}{layout.blocks}.{n}.{theirs}"
    return modules | {f"head.{ours}": theirs for ours, theirs in layout.head.items()}


def _unpacked(weights: Weights, positions: Positions, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Tensors of theirs in the shapes of ours; what is of another size is left for `put` to name."""
    for name, weight in weights.items():
        module, _, last = name.rpartition(".")
        if last in ("cls_token", "distillation_token", "dist_token"):
            yield name, weight.flatten()
        elif last in ("position_embeddings", "pos_embed"):
            tokens, table = weight.flatten(0, -2).tensor_split([len(positions.tokens)])
            yield f"{name}[tokens]", tokens
            yield f"{name}[patches]", _by_column(table, positions, layout)
        elif module.endswith(".attn.qkv"):
            yield from ((f"{module}[{part}].{last}", third) for part, third in zip(QKV, weight.chunk(3), strict=True))
        elif weight.dim() == 4:
            kernel = weight.sum(1, keepdim=True)
            yield name, kernel if layout.by_column else kernel.transpose(2, 3)
        else:
            yield name, weight


def _by_column(table: Tensor, positions: Positions, layout: Layout) -> Tensor:
    columns, rows, _ = positions.table.shape
    if len(table) != rows * columns:
        return table
    if layout.by_column:
        return table.unflatten(0, (columns, rows))
    return table.unflatten(0, (rows, columns)).transpose(0, 1)


def _distilled(weights: Weights) -> dict[str, Tensor]:
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
