"""wav2vec 2.0, HuBERT and WavLM as transformers saves them, for `speechkit.encoders.Wav2Vec2`.

Of ``...ForSequenceClassification`` a tagger is read; of ``...ForCTC`` with a ``vocab.json`` a recogniser, see
`speechkit.pretrained.vocabulary`; of every other kind the encoder, and what pretraining or recognition had behind it is
left out by name. What corresponds:

* **Features** are samples, normalised by `UtteranceNorm` where ``do_normalize`` says so.
* **Padding.** Ours is never heard. Their models with ``feat_extract_norm`` "group" hear it: batched they give other
  numbers than alone, and ours are those they give alone.
* **The head** is their two linear maps, behind the mean of the frames instead of before it, which is the same.
* Of their settings for training, ``layerdrop``, SpecAugment and the dropouts of features and activations are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from speechkit.attention import Softmax
from speechkit.encoders import Wav2Vec2
from speechkit.encoders.wav2vec2 import Convolutions, Distances, GatedDistance
from speechkit.features import FrontEnd, Samples, UtteranceNorm
from speechkit.heads import Mean
from speechkit.objectives import CTC
from speechkit.pretrained import foreign, vocabulary
from speechkit.pretrained.foreign import Node, Weights, factory, node
from speechkit.pretrained.weights import fill as put_all
from speechkit.recogniser import Recogniser
from speechkit.search import Greedy

MODEL_TYPES = ("wav2vec2", "hubert", "wavlm")
FIXED = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "add_adapter": False,
    "adapter_attn_dim": None,
    "conv_pos_batch_norm": False,
}
UNUSED = ("masked_spec_embed", "quantizer.", "project_q.", "project_hid.")
OUTPUT = "lm_head."
WHAT = "a wav2vec 2.0, HuBERT or WavLM model"
HEARD = 30  # seconds at once

FRONT = {
    "norm_in": "feature_projection.layer_norm",
    "widen": "feature_projection.projection",
    "positions": "encoder.pos_conv_embed.conv",
    "norm": "encoder.layer_norm",
}
WEIGHT_NORM = {
    "positions.gain": "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    "positions.direction": "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
}
OLD_WEIGHT_NORM = {"conv.weight_g": "conv.parametrizations.weight.original0"}
OLD_WEIGHT_NORM |= {"conv.weight_v": "conv.parametrizations.weight.original1"}
BLOCK = {
    "norm_attention": "layer_norm",
    "attention.query": "attention.q_proj",
    "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj",
    "attention.out": "attention.out_proj",
    "attention.gate": "attention.gru_rel_pos_linear",
    "attention.scale": "attention.gru_rel_pos_const",
    "norm_feed": "final_layer_norm",
    "feed.0": "feed_forward.intermediate_dense",
    "feed.3": "feed_forward.output_dense",
}
DISTANCES = "encoder.layers.0.attention.rel_attn_embed.weight"  # in the first layer, for all of them
HEAD = {"head.linear.0": "projector", "head.linear.1": "classifier", "objective.head": "lm_head"}


class Classifier(Mean):
    """The mean of all frames and two linear maps without anything between them, as SUPERB has (2105.01051).

    Args:
        hidden: width between them.
    """

    def __init__(self, *, dim: int, classes: int, hidden: int) -> None:
        super().__init__(dim=dim, classes=classes)
        self.norm: Any = nn.Identity()
        self.linear: Any = nn.Sequential(nn.Linear(dim, hidden), nn.Linear(hidden, classes))


def describes(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of one of these models."""
    return config.get("model_type") in MODEL_TYPES


def describe(folder: Path, config: Mapping[str, Any], weights: Weights) -> Node:
    """The nodes of a model: a tagger's or a recogniser's where it is one, else features and encoder."""
    found: Node = {"features": front_end(foreign.extractor(folder)), "encoder": _encoder(config)}
    if "projector.weight" in weights:
        return found | _head(config, found["features"], weights)
    if f"{OUTPUT}weight" in weights and (folder / vocabulary.VOCABULARY).is_file():
        return found | _output(folder, config, found["features"], weights)
    return found


def fill(model: Any, folder: Path, config: Mapping[str, Any], weights: Weights) -> None:
    """Put the weights of a model of theirs into ours.

    Raises:
        ValueError: where they do not fit.
    """
    inside, parts = f"{config['model_type']}.", foreign.parts(model)
    renamed = dict(_renamed(name.removeprefix(inside), weight) for name, weight in weights.items())
    unused = UNUSED if isinstance(model, Recogniser) else (*UNUSED, OUTPUT)
    kept = {name: weight for name, weight in renamed.items() if not name.startswith(unused)}
    if isinstance(model, Recogniser):
        rows = vocabulary.read(folder, len(kept[f"{OUTPUT}weight"])).rows
        kept |= {name: weight[rows] for name, weight in kept.items() if name.startswith(OUTPUT)}
    put_all(parts, kept, folder, foreign.names(parts, _modules(parts["encoder"])))


def front_end(about: Mapping[str, Any] | None) -> Node | None:
    """The nodes of ``Wav2Vec2FeatureExtractor``.

    Raises:
        ValueError: for features that are not samples.
    """
    if about is None:
        return None
    foreign.require(about, {"feature_size": 1, "feature_extractor_type": "Wav2Vec2FeatureExtractor"})
    norm = node(UtteranceNorm) if about["do_normalize"] else None
    return node(FrontEnd, mel=node(Samples, sample_rate=about["sampling_rate"]), norm=norm)


def _encoder(config: Mapping[str, Any]) -> Node:
    foreign.require(config, FIXED)
    heads, dropout = config["num_attention_heads"], config["attention_dropout"]
    attention = factory(Softmax, dropout=dropout)
    if config["model_type"] == "wavlm":
        buckets = {"buckets": config["num_buckets"], "furthest": config["max_bucket_distance"]}
        attention = factory(GatedDistance, distances=node(Distances, heads=heads, **buckets), dropout=dropout)
    return node(
        Wav2Vec2,
        convolutions=node(
            Convolutions,
            channels=list(config["conv_dim"]),
            kernels=list(config["conv_kernel"]),
            strides=list(config["conv_stride"]),
            norm=config["feat_extract_norm"],
            bias=config["conv_bias"],
        ),
        dim=config["hidden_size"],
        heads=heads,
        layers=config["num_hidden_layers"],
        expansion=foreign.times(config),
        position_kernel=config["num_conv_pos_embeddings"],
        position_groups=config["num_conv_pos_embedding_groups"],
        pre_norm=config["do_stable_layer_norm"],
        normed=config.get("feat_proj_layer_norm", True),
        attention=attention,
        dropout=config["hidden_dropout"],
        eps=config["layer_norm_eps"],
    )


def _head(config: Mapping[str, Any], front: Node | None, weights: Weights) -> Node:
    foreign.require(config, {"use_weighted_layer_sum": False})
    return {
        "head": factory(Classifier, hidden=config["classifier_proj_size"]),
        "labels": foreign.labels(config, len(weights["classifier.bias"])),
        "frames": HEARD * (16000 if front is None else front["mel"]["sample_rate"]),
        "exclusive": foreign.exclusive(config),
    }


def _output(folder: Path, config: Mapping[str, Any], front: Node | None, weights: Weights) -> Node:
    if front is None:
        raise ValueError(f"{foreign.EXTRACTOR} must say what it hears, but is not there")
    return {
        "text": vocabulary.read(folder, len(weights[f"{OUTPUT}weight"])).text,
        "objective": factory(CTC, dropout=config.get("final_dropout", 0.0)),
        "search": factory(Greedy),
    }


def _modules(encoder: Any) -> dict[str, str]:
    """What their files call each module of ours, or tensor."""
    theirs = FRONT | WEIGHT_NORM
    for n in range(len(encoder.convolutions.layers)):
        theirs[f"convolutions.layers.{n}"] = f"feature_extractor.conv_layers.{n}.conv"
        theirs[f"convolutions.norms.{n}"] = f"feature_extractor.conv_layers.{n}.layer_norm"
    for n in range(len(encoder.blocks)):
        theirs |= {f"blocks.{n}.{name}": f"encoder.layers.{n}.{other}" for name, other in BLOCK.items()}
        theirs[f"blocks.{n}.attention.distances.table"] = DISTANCES
    ours = {f"encoder.{name}": other for name, other in theirs.items()}
    return ours | HEAD


def _renamed(name: str, weight: Tensor) -> tuple[str, Tensor]:
    """A tensor of theirs by its name of today and in the shape of ours."""
    for old, new in OLD_WEIGHT_NORM.items():
        name = name.replace(old, new)
    return name, weight.flatten() if name.endswith("gru_rel_pos_const") else weight
