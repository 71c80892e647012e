"""Cache-aware FastConformers (2305.05084, 2312.17279) as transformers saves them, for `speechkit.encoders.Conformer`.

``NemotronAsrStreamingEncoder`` is the architecture of ``nvidia/nemotron-speech-streaming-en-0.6b``; of a folder of the
whole recogniser, ``NemotronAsrStreamingForRNNT``, the encoder is read and the transducer left out. What corresponds:

* **Context.** Their look-ahead of L frames is a chunk of L + 1, see `context`.
* **Alignment.** Their downsampling is ``Subsampling(before=2)``: frame u hears features up to ``8 u``. A stream takes
  ``8 (L + 1)`` features for L + 1 frames from its first chunk on, where theirs begins with the ``8 L + 1`` it needs.
* **The end.** T features are ``ceil(T / 8)`` frames, as in their stream. Their whole-utterance pass adds one that is
  half zeros unless T is a multiple of 8 plus 1, and the frames of its chunk see it. Up to 7 features at the end are
  unheard otherwise: put silence behind them.
* **Scale.** Their factor ``sqrt(dim)`` behind the subsampling is multiplied into its linear map.
* Of their settings for training, ``layerdrop`` and ``dropout_positions`` are left out, and ``dropout`` serves for
  ``activation_dropout``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from speechkit.attention import RelativePosition, Softmax
from speechkit.encoders import Conformer
from speechkit.layers import Convolution, FeedForward, Subsampling
from speechkit.pretrained import foreign
from speechkit.pretrained.foreign import Node, Weights, factory, node
from speechkit.pretrained.weights import fill as put_all
from speechkit.stream import Context

WHAT = "a NemotronAsrStreamingEncoder that a Conformer can be"
ENCODER, RECOGNISER = "nemotron_asr_streaming_encoder", "nemotron_asr_streaming"
TRANSDUCER = ("encoder_projector.", "decoder.", "joint.")
FIXED = {"hidden_act": "silu", "subsampling_conv_kernel_size": 3, "subsampling_conv_stride": 2}

# Ours on the left, theirs on the right. A trap: `norm_out` is ours before the second feed-forward, theirs behind it.
FRONT = {"subsampling.stages.0": "subsampling.conv_in", "subsampling.linear": "subsampling.linear"}
STAGE = {"0": "depthwise_conv", "1": "pointwise_conv"}
BLOCK = {
    "norm_in": "norm_feed_forward1",
    "feed_in.0": "feed_forward1.linear1",
    "feed_in.3": "feed_forward1.linear2",
    "norm_attention": "norm_self_att",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.position.linear": "self_attn.relative_k_proj",
    "attention.position": "self_attn",
    "norm_convolution": "norm_conv",
    "convolution.widen": "conv.pointwise_conv1",
    "convolution.depthwise.conv": "conv.depthwise_conv",
    "convolution.norm": "conv.norm",
    "convolution.project": "conv.pointwise_conv2",
    "norm_out": "norm_feed_forward2",
    "feed_out.0": "feed_forward2.linear1",
    "feed_out.3": "feed_forward2.linear2",
    "norm": "norm_out",
}
PARAMETER = {"u": "bias_u", "v": "bias_v"}


def describes(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of one of these models."""
    return config.get("model_type") in (ENCODER, RECOGNISER)


def context(*, left: int = 70, lookahead: int) -> Context:
    """The context in which our encoder gives what theirs gives with ``num_lookahead_tokens=lookahead``.

    A frame sees its own chunk of ``lookahead + 1`` frames and as many whole chunks before it as ``left`` frames hold
    (their ``sliding_window - 1``), so it looks ahead by ``lookahead`` frames at most.
    """
    chunk = lookahead + 1
    return Context(left=left - left % chunk, chunk=chunk)


def describe(folder: Path, config: Mapping[str, Any], weights: Weights) -> Node:
    """The nodes of the encoder, with the context of its default look-ahead; its features are for who loads it."""
    return {"features": None, "encoder": _encoder(_inside(config))}


def fill(model: Conformer, folder: Path, config: Mapping[str, Any], weights: Weights) -> None:
    """Put the weights of theirs into ours.

    Raises:
        ValueError: where they do not fit.
    """
    if config["model_type"] == RECOGNISER:
        weights = {k.removeprefix("encoder."): w for k, w in weights.items() if not k.startswith(TRANSDUCER)}
    scale = model.dim**0.5 if _inside(config)["scale_input"] else 1.0
    put_all(model, {name: _converted(name, weight, scale) for name, weight in weights.items()}, folder, _names(model))


def _inside(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config["encoder_config"] if config["model_type"] == RECOGNISER else config


def _encoder(config: Mapping[str, Any]) -> Node:
    for key, value in FIXED.items():
        if config[key] != value:
            raise ValueError(f"{key} must be {value}, but is {config[key]}")
    heard = context(left=config["sliding_window"] - 1, lookahead=config["default_num_lookahead_tokens"])
    return node(
        Conformer,
        features=config["num_mel_bins"],
        dim=config["hidden_size"],
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        attention=factory(
            Softmax,
            position=factory(RelativePosition),
            kv_heads=config["num_key_value_heads"],
            bias=config["attention_bias"],
            dropout=config["attention_dropout"],
        ),
        subsampling=factory(
            Subsampling,
            channels=config["subsampling_conv_channels"],
            stages=config["subsampling_factor"].bit_length() - 1,
            separable=True,
            before=2,
        ),
        convolution=factory(Convolution, kernel=config["conv_kernel_size"], bias=config["convolution_bias"]),
        feed_forward=factory(FeedForward, bias=config["attention_bias"]),
        expansion=foreign.times(config),
        dropout=config["dropout"],
        context=node(Context, left=heard.left, chunk=heard.chunk),
    )


def _names(encoder: Conformer) -> dict[str, str]:
    """What their files call each tensor of ours."""
    modules = dict(FRONT)
    for n in range(1, len(encoder.subsampling.stages)):
        modules |= {f"subsampling.stages.{n}.{o}": f"subsampling.layers.{n - 1}.{t}" for o, t in STAGE.items()}
    for n in range(len(encoder.blocks)):
        modules |= {f"blocks.{n}.{ours}": f"layers.{n}.{theirs}" for ours, theirs in BLOCK.items()}
    split = {name: name.rpartition(".") for name in encoder.state_dict()}
    return {name: f"{modules[module]}.{PARAMETER.get(last, last)}" for name, (module, _, last) in split.items()}


def _converted(name: str, weight: Tensor, scale: float) -> Tensor:
    """A tensor of theirs as ours: pointwise convolutions are linear maps, and the scale is part of one."""
    if ".conv.pointwise_conv" in name and weight.dim() == 3:
        return weight.squeeze(-1)
    return weight.float() * scale if name.startswith("subsampling.linear.") else weight
