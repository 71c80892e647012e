"""Small random models of transformers' wav2vec family in folders, and recordings for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ast_cases import randomised
from torch import Tensor, nn

from speechkit import features

transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 12,
    "num_labels": 5,
}
LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
ODD = {
    "conv_dim": [8, 12, 16],
    "conv_kernel": [12, 4, 3],
    "conv_stride": [4, 3, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 7,
    "layer_norm_eps": 1e-2,
    "conv_bias": True,
    "intermediate_size": 96,
}
CONFIGS = {"base": {}, "large": LARGE, "odd": ODD, "odd and large": ODD | LARGE}
KINDS = ("Wav2Vec2", "Hubert", "WavLM")
CASES = [(kind, name) for kind in KINDS for name in CONFIGS]


def written(folder: Path, kind: str, ending: str = "Model", *, normalised: bool = True, **changes) -> nn.Module:
    """Their model, saved to a folder with its extractor."""
    config = getattr(transformers, f"{kind}Config")(**TINY | changes)
    model = randomised(getattr(transformers, f"{kind}{ending}")(config))
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=normalised).save_pretrained(folder)
    return model


def heard(recordings: Path) -> list[np.ndarray]:
    """Three real recordings of speech and one of a sound, 0.3 to 1.5 s, at 16 kHz."""
    speech = sorted((recordings / "fsdd").rglob("*.*"))
    files = [file for file in speech if file.suffix in (".wav", ".flac")][::50][:3]
    return [features.read(file, 16000)[:24000] for file in (*files, min((recordings / "esc10").rglob("*.flac")))]


def padded(clips: list[np.ndarray], value: float = float("nan")) -> tuple[Tensor, Tensor]:
    """Clips in a batch, with anything behind the shorter ones."""
    lengths = torch.tensor([len(clip) for clip in clips])
    batch = torch.full((len(clips), int(lengths.max())), value)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = torch.from_numpy(clip)
    return batch, lengths
