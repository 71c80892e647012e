"""A recogniser of a few thousand random weights, of the real classes and from a real config node."""

from __future__ import annotations

from typing import Any

import torch

from speechkit.config import build_model
from speechkit.recogniser import Recogniser

SYMBOLS = " abcdefg"


def node(**changes: Any) -> dict[str, Any]:
    """The ``model`` node of a config; ``changes`` replace whole keys of it."""
    attention = {
        "_target_": "speechkit.attention.Softmax",
        "_partial_": True,
        "position": {"_target_": "speechkit.attention.RelativePosition", "_partial_": True},
    }
    head = {"_target_": "speechkit.objectives.CTC", "_partial_": True}
    decoder = {"_target_": "speechkit.objectives.AttentionDecoder", "_partial_": True, "layers": 1, "heads": 2}
    mel = {"_target_": "speechkit.features.LogMel", "bands": 16}
    return {
        "features": {"_target_": "speechkit.features.FrontEnd", "mel": mel},
        "text": {"_target_": "speechkit.text.Characters", "symbols": SYMBOLS},
        "encoder": {
            "_target_": "speechkit.encoders.Conformer",
            "features": 16,
            "dim": 16,
            "heads": 2,
            "layers": 2,
            "attention": attention,
            "context": {"_target_": "speechkit.stream.Context", "left": 16, "chunk": 8},
        },
        "objective": {
            "_target_": "speechkit.objectives.Hybrid",
            "_partial_": True,
            "ctc": head,
            "attention": decoder,
        },
        "search": {"_target_": "speechkit.search.Greedy", "_partial_": True},
    } | changes


def tiny(**changes: Any) -> Recogniser:
    """The recogniser of `node`, its head set so that every token is about as likely over time, and blank more so."""
    torch.manual_seed(0)
    recogniser = build_model(node(**changes)).eval()
    with torch.no_grad():
        heard = sound(8.0)[None]
        frames = recogniser.encode(heard, torch.tensor([heard.shape[1]])).frames[0]
        head = recogniser.objective.ctc.head
        head.weight.mul_(2.0 / (frames @ head.weight.T).std(0)[:, None])
        head.bias.copy_(-(frames @ head.weight.T).mean(0))
        head.bias[0] += 1.5
    return recogniser


def sound(seconds: float, seed: int = 0, sample_rate: int = 16000) -> torch.Tensor:
    """A tone that changes its pitch and loudness ten times a second, in a little noise: ``[N]``."""
    generator = torch.Generator().manual_seed(seed)
    count, step = round(seconds * sample_rate), sample_rate // 10
    pitch_hz, gain = 10 ** (torch.rand(2, 1 + count // step, generator=generator) * torch.tensor([[1.5], [-2.0]]))
    phase = (100 * pitch_hz).repeat_interleave(step)[:count].cumsum(0) * (2 * torch.pi / sample_rate)
    return 0.3 * gain.repeat_interleave(step)[:count] * phase.sin() + 0.003 * torch.randn(count, generator=generator)
