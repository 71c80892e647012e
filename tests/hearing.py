"""A tagger whose weights are set by hand: it hears a low and a high tone when they are there, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechkit import audio
from speechkit.config import build_model
from speechkit.pretrained import save
from speechkit.tagger import Tagger
from speechkit.types import Event

RATE, HERTZ = 16000, {"low": 500.0, "high": 3000.0}
LABELS = tuple(HERTZ)
BANDS, SIZE = 16, 1000.0  # a patch is as wide as high, and so as many frames long


def node(**changes: Any) -> dict[str, Any]:
    """An AST without layers, of one row of patches: frames are a linear map of the spectrogram, every 20 ms."""
    mel = {"_target_": "speechkit.features.LogMel", "bands": BANDS}
    encoder = {"features": BANDS, "frames": 200, "dim": 6, "heads": 1, "layers": 0, "patch": BANDS, "stride": 2}
    return {
        "features": {"_target_": "speechkit.features.FrontEnd", "mel": mel},
        "encoder": {"_target_": "speechkit.encoders.AST", **encoder, "normed": False},
        "head": {"_target_": "speechkit.heads.LinearSoftmax", "_partial_": True},
        "labels": list(LABELS),
        "frames": 200,
        "exclusive": False,
    } | changes


def made(folder: Path, **changes: Any) -> Tagger:
    """Save it. A frame is the loudness of each tone, and the same negated, beside two large constants: so the layer
    norm of the head, which takes away a mean of 0 and divides by what is nearly constant, leaves loudness as it is."""
    tagger = build_model(node(**changes)).eval()
    with torch.no_grad():
        for parameter in tagger.encoder.parameters():
            parameter.zero_()
        for row, band in enumerate(map(loudest, HERTZ.values())):
            for sign in (1, -1):
                tagger.encoder.patches.weight[2 * row + (sign < 0), 0, :2, band] = sign / 2
        tagger.encoder.patches.bias[4:] = torch.tensor([SIZE, -SIZE])
        tagger.head.linear.weight.zero_()
        tagger.head.linear.weight[0, 0] = tagger.head.linear.weight[1, 2] = 2 * SIZE / math.sqrt(3)
        tagger.head.linear.bias[:2] = -2 * 15.0  # between tone and noise
        tagger.head.linear.bias[2:] = 0.0  # of a class that is heard where neither tone is
    save(tagger, node(**changes), folder)
    return tagger


def loudest(hertz: float) -> int:
    """The band a tone is in."""
    from speechkit.features import LogMel

    tone = 0.3 * torch.sin(2 * math.pi * hertz * torch.arange(RATE) / RATE)
    return int(LogMel(bands=BANDS)(tone[None], torch.tensor([RATE])).frames[0].mean(0).argmax())


def sounds(path: Path, events: Sequence[Event], seconds: float, seed: int = 0) -> None:
    """Write the tones of events, in a little noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    heard = 1e-4 * np.random.default_rng(seed).standard_normal(len(time))
    for label, start, end, _ in events:
        heard += 0.3 * np.sin(2 * np.pi * HERTZ[label] * time) * ((time >= start) & (time < end))
    audio.write(path, heard.astype(np.float32), RATE)
