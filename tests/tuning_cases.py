"""Every encoder of the catalogue at a tiny size, with a head behind it, tuned by every method of the catalogue."""

from __future__ import annotations

from functools import cache
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from speechkit.config import build, catalogue, plain
from speechkit.stream import keep_valid
from speechkit.types import EncoderOutput

BANDS = 24
CLASSES = 3


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (catalogue() / group).glob("*.yaml"))


METHODS = [name for name in names("tuning") if name != "none"]


class Model(nn.Module):
    """What a tagger is to a method: a front end (none here), an encoder, and a head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.features, self.encoder = None, encoder
        self.head = nn.Linear(encoder.dim, CLASSES)

    def heard(self, x: Tensor, lengths: Tensor | None = None) -> EncoderOutput:
        lengths = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
        if hasattr(self.encoder, "convolutions"):  # its features are samples
            return self.encoder(x.flatten(1)[..., None], lengths * BANDS)
        return self.encoder(x, lengths)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        heard = self.heard(x, lengths)
        mean = keep_valid(heard.frames, heard.lengths).sum(1) / heard.lengths[:, None]
        return self.head(mean if heard.summary is None else heard.summary + mean)


def encoder(name: str, **changes: Any) -> nn.Module:
    """An encoder of ``conf/encoder``, with its own parts and few of each, every one away from a neutral start."""
    return randomised(build(described(name) | changes, "model.encoder"))


@cache
def described(name: str) -> dict[str, Any]:
    """The node of a tiny encoder."""
    with hydra.initialize_config_dir(str(catalogue()), version_base="1.3"):
        overrides = [f"+encoder={name}", "+attention=relative", f"+model.features.mel.bands={BANDS}"]
        node = plain(hydra.compose(overrides=overrides).model.encoder)
    if node["_target_"].endswith(".AST"):
        node |= {"frames": 96, "features": BANDS}
    if "subsampling" in node:
        node["subsampling"]["channels"] = 8
    if "convolutions" in node:
        node["convolutions"] |= {"channels": [8, 8], "kernels": [8, 4], "strides": [8, 4]}
        node |= {"position_kernel": 8, "position_groups": 4}
    return node | {"dim": 24, "heads": 4, "layers": 2}


def distinct() -> list[str]:
    """The encoders of the catalogue that differ in more than size."""
    found: dict[str, str] = {}
    for name in names("encoder"):
        found.setdefault(repr(described(name)), name)
    return list(found.values())


def randomised(module: nn.Module, seed: int = 5) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.dtype.is_floating_point and (name.endswith(("bias", "u", "v", "running_mean"))):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return module


def node(method: str) -> dict[str, Any]:
    """What ``model.tuning`` is where a method is chosen, reductions fit for a tiny width."""
    found = plain(OmegaConf.load(catalogue() / "tuning" / f"{method}.yaml").model.tuning)
    if "adapter" in found:
        found["adapter"]["reduction"] = 4
    return found


def tuned(name: str, method: str, **changes: Any) -> Model:
    torch.manual_seed(0)
    model = Model(encoder(name, **changes))
    build(node(method), "model.tuning").apply(model)
    return model


def refused(name: str, method: str) -> bool:
    """Whether a method must say that it cannot work in an encoder."""
    node = described(name)
    ast, chunked = node["_target_"].endswith(".AST"), "subsampling" in node
    return {
        "convpass": not ast,
        "conformer_adapter": not (ast or chunked),
        "soft_moa": bool((node.get("context") or {}).get("chunk")),
    }.get(method, chunked and method in ("prefix", "prompt_deep", "prompt_shallow"))


def sounds(count: int = 3, frames: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(count, frames, BANDS, generator=torch.Generator().manual_seed(seed))


def train(model: Model, steps: int = 3, rate: float = 1e-2) -> None:
    """A few steps of Adam on labels that no model knows yet."""
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0, fused=True
    )
    x, labels = sounds(), torch.arange(3) % CLASSES
    for step in range(steps):
        model.tuning.at(model, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    model.eval()
