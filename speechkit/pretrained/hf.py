"""Every other audio encoder of transformers, in one adapter: Whisper, W2V-BERT, Moonshine, Data2Vec, SEW, UniSpeech ...

What it computes is computed by transformers, features included, which is why it takes samples. Its config and that of
its features are part of ours, so a fine-tuned copy needs nothing but its own folder, and the extra ``hf``.

A clip gives the same alone and in a batch: clips of different lengths are encoded one length after the other, since
many of these architectures hear padding. Of encoder-decoders the encoder is read. In training they neither mask
features nor leave out layers, as their configs may say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.features import FrontEnd, Samples
from speechkit.pretrained.foreign import Node, node
from speechkit.pretrained.weights import CONFIG, some
from speechkit.types import EncoderOutput, Seconds

NATIVE = "Audio Spectrogram Transformer, wav2vec 2.0, HuBERT, WavLM and NemotronAsrStreaming"
SHORTEST: Seconds = 0.1  # a shorter clip is filled up with silence: no architecture's first convolution is longer
CALM = {"apply_spec_augment": False, "layerdrop": 0.0, "encoder_layerdrop": 0.0}


class Transformers(nn.Module):
    """An encoder of transformers and its own features. It is given samples, ``[B, N, 1]``, as `Samples` gives them.

    Args:
        config: what is in its ``config.json``.
        extractor: what is in its ``preprocessor_config.json``.

    Raises:
        ValueError: where transformers is absent, does not know it, or it does not hear sound.
    """

    def __init__(self, *, config: dict[str, Any], extractor: dict[str, Any]) -> None:
        super().__init__()
        self.extractor = _extractor(extractor)
        self.model = _model(config)
        self.dim: int = self.model.config.hidden_size
        self.sample_rate: int = self.extractor.sampling_rate
        seconds = (10, 30)
        early, late = (self._encoded(self._heard(torch.zeros(1, s * self.sample_rate))) for s in seconds)
        self.stride = round((seconds[1] - seconds[0]) * self.sample_rate / (late - early))

    def forward(self, features: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"] | None = None) -> EncoderOutput:
        """Encode whole utterances.

        Args:
            features: samples ``[B, N, 1]``; those past a length may hold anything.
            lengths: real samples of each; all of them unless given.

        Raises:
            ValueError: for features that are not samples, and clips longer than the architecture hears.
        """
        if features.shape[2] != 1:
            raise ValueError(
                f"{type(self.model).__name__} must be given samples, [B, N, 1], but the features have "
                f"{features.shape[2]} bands; choose features=samples."
            )
        if lengths is None:
            lengths = torch.full((len(features),), features.shape[1], device=features.device)
        rows, found = [], []
        for length in lengths.unique().tolist():
            same = (lengths == length).nonzero().flatten()
            rows.append(same)
            found.append(self._encode(features[same, :length, 0]))
        counts = lengths.new_zeros(len(lengths))
        frames = features.new_zeros(len(lengths), max(x.shape[1] for x in found), self.dim)
        for same, x in zip(rows, found, strict=True):
            counts[same] = x.shape[1]
            frames = frames.index_put((same,), F.pad(x, (0, 0, 0, frames.shape[1] - x.shape[1])).to(frames.dtype))
        return EncoderOutput(frames, counts)

    def _encode(self, clips: Float[Tensor, "B N"]) -> Float[Tensor, "B U D"]:
        if not clips.shape[1]:
            return clips.new_zeros(len(clips), 0, self.dim)
        heard = self._heard(clips)
        inputs = {name: x.to(clips.device) for name, x in heard.items()}
        return self.model(**inputs).last_hidden_state[:, : self._encoded(heard)]

    def _heard(self, clips: Float[Tensor, "B N"]) -> dict[str, Tensor]:
        """The inputs of the model, as its own extractor makes them of clips of one length."""
        most = getattr(self.extractor, "n_samples", clips.shape[1])
        if clips.shape[1] > most:
            raise ValueError(
                f"{type(self.model).__name__} must be given clips of at most {most / self.sample_rate:g} s, but one is "
                f"{clips.shape[1] / self.sample_rate:g} s long; hear it in pieces: set the tagger's frames to {most}."
            )
        clips = F.pad(clips, (0, max(0, round(SHORTEST * self.sample_rate) - clips.shape[1])))
        return dict(
            self.extractor(
                list(clips.detach().float().cpu().numpy()),
                sampling_rate=self.sample_rate,
                return_tensors="pt",
                return_attention_mask=True,
            )
        )

    def _encoded(self, heard: Mapping[str, Tensor]) -> int:
        """How many frames the model makes of inputs, by its own rule; as many as it is given where it has none."""
        count = heard["attention_mask"][0].sum()
        rule = getattr(self.model, "_get_feat_extract_output_lengths", lambda count: count)
        return int(rule(count))


def describes(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is one of transformers at all."""
    return "model_type" in config


def describe(folder: Path, config: Mapping[str, Any]) -> Node:
    """The nodes of a folder's encoder.

    Raises:
        ValueError: where it does not say how it hears.
    """
    library = _library()
    try:
        extractor = library.AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever its many readers come to
        raise ValueError(
            f"{folder} must say in preprocessor_config.json how its model hears, but does not "
            f"({type(error).__name__}); copy that file beside {CONFIG}."
        ) from error
    about = json.loads(extractor.to_json_string())
    front = node(FrontEnd, mel=node(Samples, sample_rate=about["sampling_rate"]))
    return {"features": front, "encoder": node(Transformers, config=dict(config), extractor=about)}


def load(folder: Path, config: Mapping[str, Any]) -> Transformers:
    """The encoder of a folder.

    Raises:
        ValueError: where transformers cannot build it, or the weights do not fit.
    """
    parts = describe(folder, config)["encoder"]
    encoder = Transformers(config=parts["config"], extractor=parts["extractor"])
    kind = type(encoder.model)
    try:
        whole, about = _library().AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        raise ValueError(
            f"{folder} must hold the weights of {kind.__name__} as safetensors, but they cannot be read "
            f"({type(error).__name__}: {_flat(error)}); copy it again."
        ) from error
    _require_all(folder, kind, about)
    encoder.model.load_state_dict(_encoder_of(whole).state_dict())
    return encoder


def _require_all(folder: Path, kind: type, about: Mapping[str, Any]) -> None:
    inside = "encoder." if "Encoder" in kind.__name__ else ""
    missing = sorted(name for name in about["missing_keys"] if name.startswith(inside))
    resized = sorted(str(one[0]) for one in about.get("mismatched_keys", ()))
    if missing or resized:
        raise ValueError(
            f"{folder} must hold all weights of {kind.__name__}, but lacks {some(missing) or 'none'} and has other "
            f"sizes of {some(resized) or 'none'}; put the {CONFIG} beside them that they were saved with."
        )


def _model(config: Mapping[str, Any]) -> Any:
    library, kind = _library(), config.get("model_type")
    try:
        settings = library.AutoConfig.for_model(**config)
        for name, value in CALM.items():
            if hasattr(settings, name):
                setattr(settings, name, value)
        model = _encoder_of(library.AutoModel.from_config(settings))
    except Exception as error:
        raise ValueError(
            f"{CONFIG} must describe an audio encoder that this transformers ({library.__version__}) can build, but "
            f"model_type is {kind} ({type(error).__name__}: {_flat(error)}); install a newer one, or load another."
        ) from error
    if getattr(model, "main_input_name", None) not in ("input_values", "input_features"):
        raise ValueError(f"{CONFIG} must describe a model that hears sound, but {kind} does not; load another model.")
    return model


def _encoder_of(model: Any) -> Any:
    return model.get_encoder() if model.config.is_encoder_decoder else model


def _extractor(about: Mapping[str, Any]) -> Any:
    library, kind = _library(), about.get("feature_extractor_type")
    found = getattr(library, str(kind), None)
    if not (isinstance(found, type) and issubclass(found, library.SequenceFeatureExtractor)):
        raise ValueError(
            f"feature_extractor_type must be one of transformers' extractors of sound, but is {kind}; copy "
            f"preprocessor_config.json again."
        )
    extractor: Any = found
    return extractor.from_dict(dict(about))


def _library() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"{NATIVE} are built in, but any other model of transformers must have that library, which is absent "
            f"({error}); install it with: pip install 'speechkit[hf]'"
        ) from error
    return transformers


def _flat(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]
