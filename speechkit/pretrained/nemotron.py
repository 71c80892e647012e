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
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from speechkit.attention import RelativePosition, Softmax
from speechkit.encoders import Conformer
from speechkit.layers import Convolution, FeedForward, Subsampling
from speechkit.pretrained.weights import CONFIG, fill, read
from speechkit.stream import Context

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


def load(folder: Path, config: Mapping[str, Any]) -> Conformer:
    """The encoder of a folder, with the context of its default look-ahead.

    Raises:
        ValueError: where the config asks for what this encoder is not, or the weights do not fit.
    """
    whole = config["model_type"] == RECOGNISER
    try:
        config = config["encoder_config"] if whole else config
        encoder = _built(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG} must describe a NemotronAsrStreamingEncoder that a Conformer can be, but no encoder "
            f"can be built from it ({type(error).__name__}: {str(error).rstrip('.')}); copy it again, or encode with "
            f"transformers."
        ) from error
    weights = read(folder)
    if whole:
        weights = {k.removeprefix("encoder."): w for k, w in weights.items() if not k.startswith(TRANSDUCER)}
    scale = encoder.dim**0.5 if config["scale_input"] else 1.0
    weights = {name: _converted(name, weight, scale) for name, weight in weights.items()}
    fill(encoder, weights, folder, _names(encoder))
    return encoder.eval()


def _built(config: Mapping[str, Any]) -> Conformer:
    for key, value in FIXED.items():
        if config[key] != value:
            raise ValueError(f"{key} must be {value}, but is {config[key]}")
    dim, hidden = config["hidden_size"], config["intermediate_size"]
    if hidden % dim:
        raise ValueError(f"intermediate_size must be a multiple of hidden_size, {dim}, but is {hidden}")
    return Conformer(
        features=config["num_mel_bins"],
        dim=dim,
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        attention=partial(
            Softmax,
            position=RelativePosition,
            kv_heads=config["num_key_value_heads"],
            bias=config["attention_bias"],
            dropout=config["attention_dropout"],
        ),
        subsampling=partial(
            Subsampling,
            channels=config["subsampling_conv_channels"],
            stages=config["subsampling_factor"].bit_length() - 1,
            separable=True,
            before=2,
        ),
        convolution=partial(Convolution, kernel=config["conv_kernel_size"], bias=config["convolution_bias"]),
        feed_forward=partial(FeedForward, bias=config["attention_bias"]),
        expansion=hidden // dim,
        dropout=config["dropout"],
        context=context(left=config["sliding_window"] - 1, lookahead=config["default_num_lookahead_tokens"]),
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
