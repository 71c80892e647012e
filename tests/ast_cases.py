"""Small random ASTs, spectrograms for them, and what they are held against."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechkit.encoders import AST
from speechkit.pretrained.ast import front_end


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter away from its neutral start, positions included."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            plain = tensor.dim() == 1 or "token" in name or "position" in name
            tensor.copy_(0.3 * noise if plain else noise * tensor[0].numel() ** -0.5)
            if "norm" in name and name.endswith("weight"):
                tensor += 1
    return module.eval()


def spectrogram(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def full(x: Tensor) -> Tensor:
    return torch.full((len(x),), x.shape[1])


@torch.no_grad()
def close(ours: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == other.shape and torch.isfinite(ours).all() and torch.isfinite(other).all()
    worst = float((ours - other).abs().max()) if ours.numel() else 0.0
    assert worst <= tolerance, f"they differ by {worst:.3g}"


def tiny(**changes) -> AST:
    sizes = {"features": 40, "frames": 96, "dim": 32, "heads": 4, "layers": 2} | changes
    return randomised(AST(**sizes))


def original_rule(table: Tensor, columns: int, rows: int) -> Tensor:
    """How the original makes ``[D, F, T]`` positions fit, one axis after the other (section 2.2)."""
    F_, T = table.shape[1:]
    if columns <= T:
        first = int(T / 2) - int(columns / 2)
        table = table[:, :, first : first + columns]
    else:
        table = F.interpolate(table[None], size=(F_, columns), mode="bilinear")[0]
    if rows <= F_:
        first = int(F_ / 2) - int(rows / 2)
        return table[:, first : first + rows]
    return F.interpolate(table[None], size=(rows, columns), mode="bilinear")[0]


def heard(clip: np.ndarray, **options: float) -> Tensor:
    """Our features, filled up or cut to 1024 frames as theirs are."""
    front = front_end(**{"mean": -4.2677393, "std": 4.5689974} | options)
    frames = front.mel(torch.from_numpy(clip)[None], torch.tensor([len(clip)])).frames[:, :1024]
    frames = F.pad(frames, (0, 0, 0, 1024 - frames.shape[1]))
    return front.norm(frames, torch.tensor([1024])).frames[0]
