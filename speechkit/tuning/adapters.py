"""Small modules behind or beside the attention and feed-forward modules of a frozen encoder, and what they are made of.

Every one of them adds 0 at first, because its last map starts at zero; the map before it does not, so both learn: the
last from the first step on, the others from the second.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.layers import Linear
from speechkit.stream import Context, Span, State, split, valid
from speechkit.tuning.base import Around, Tuning
from speechkit.tuning.sites import Kind, Site, sites

Frames = Float[Tensor, "B U D"]
Lengths = Int[Tensor, "B"]


class Adapters(Tuning):
    """An adapter for every module of some kinds.

    Args:
        adapter: called as ``adapter(dim=)``: `Bottleneck` or `DenseMixture` anywhere; `SoftMixture`, `Convpass` and
            `TimeConvolution` look across frames and go beside attention only.
        where: Houlsby's (1902.00751) are ``[attention, feed_forward]``, Pfeiffer's (2005.00247) ``[feed_forward]``.
        parallel: beside the module, hearing what it hears (2110.04366), in place of behind it, hearing what it says.

    Raises:
        ValueError: on `apply`, where the encoder has no such modules, or the adapter cannot be in such a place.
    """

    def __init__(
        self,
        *,
        adapter: Callable[..., nn.Module],
        where: Sequence[Kind] = ("attention", "feed_forward"),
        parallel: bool = False,
    ) -> None:
        self.adapter, self.where, self.parallel = adapter, tuple(where), parallel

    def adapt(self, encoder: nn.Module) -> None:
        for site in sites(encoder, self.where):
            adapter = self.adapter(dim=site.dim)
            if isinstance(adapter, Across):
                self._require_beside_attention(site, adapter)
                adapter.fit(encoder)
                site.replace(AcrossFrames(site.part, adapter))
            else:
                site.replace(Adapted(site.part, adapter, self.parallel))

    def _require_beside_attention(self, site: Site, adapter: nn.Module) -> None:
        known = "span" in inspect.signature(site.part.forward).parameters
        if not (known and self.parallel):
            raise ValueError(
                f"{type(adapter).__name__} must be beside the attention of an encoder of speechkit, where lengths are "
                f"known, but was to be {'beside' if self.parallel else 'behind'} {type(site.part).__name__}; set "
                f"tuning.parallel=true and tuning.where=[attention], or take tuning=bottleneck."
            )


class Adapted(Around):
    """A module and an adapter that looks at each frame by itself."""

    def __init__(self, part: nn.Module, adapter: nn.Module, parallel: bool) -> None:
        super().__init__(part)
        self.adapter, self.parallel = adapter, parallel

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.part(*args, **kwargs)
        y, *rest = output if isinstance(output, tuple) else (output,)
        x = (args[0] if args else kwargs["hidden_states"]) if self.parallel else y
        y = y + self.adapter(x)
        return (y, *rest) if isinstance(output, tuple) else y


class Across(nn.Module):
    """An adapter that looks across frames: ``(x, lengths, state) -> (y, state)``, as a convolution that remembers."""

    def fit(self, encoder: nn.Module) -> None:
        """Learn what must be known of the encoder.

        Raises:
            ValueError: where the adapter cannot work in it.
        """

    def init_state(self, batch: int) -> State:
        """What a stream remembers beside what attention does."""
        raise NotImplementedError


class AcrossFrames(Around):
    """Attention and an `Across` beside it."""

    def __init__(self, part: nn.Module, adapter: Across) -> None:
        super().__init__(part)
        self.adapter = adapter

    def init_state(self, batch: int, context: Context) -> State:
        return self.part.init_state(batch, context), self.adapter.init_state(batch)

    def forward(self, x: Frames, span: Span, state: State | None = None) -> tuple[Frames, State | None]:
        heard, own = split(state, 2)
        y, heard = self.part(x, span, heard)
        more, own = self.adapter(x, span.lengths, own)
        return y + more, None if state is None else (heard, own)


class Bottleneck(nn.Module):
    """Down, GELU, up (1902.00751, figure 2).

    Args:
        reduction: how many times narrower the middle is than the frames.
        scale: of what is added (2110.04366, section 4.6).
    """

    def __init__(self, *, dim: int, reduction: float = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.down, self.up = Linear(dim, narrow(dim, reduction)), silent(Linear(narrow(dim, reduction), dim))
        self.scale = scale

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return self.scale * self.up(F.gelu(self.down(x)))


class DenseMixture(nn.Module):
    """Bottlenecks that all hear every frame, mixed by a router frame by frame (Dense-MoA, 2402.00828).

    Args:
        experts: bottlenecks.
        reduction: of each of them.
    """

    def __init__(self, *, dim: int, experts: int = 7, reduction: float = 48) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Bottleneck(dim=dim, reduction=reduction) for _ in range(experts))
        self.router = Linear(dim, experts)

    def forward(self, x: Frames) -> Frames:
        said = torch.stack([expert(x) for expert in self.experts], dim=-1)  # [B, U, D, E]
        return torch.einsum("bude,bue->bud", said, self.router(x).softmax(-1))


class SoftMixture(Across):
    """Soft-MoA (2402.00828): bottlenecks as the experts of a soft mixture (Soft MoE, 2308.00951, section 2.1).

    Each slot is a mixture of all frames, softmax over frames; an expert hears its slots and nothing else; each frame is
    given a mixture of all slots, softmax over slots. The work of the experts does not grow with the frames. Frames of
    padding are in no slot. Whole utterances only.

    Args:
        experts: bottlenecks, 7 in the paper.
        slots: that each expert hears, 1 in the paper.
        reduction: of each expert; 128 in the paper, for frames of 768.
    """

    def __init__(self, *, dim: int, experts: int = 7, slots: int = 1, reduction: float = 48) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Bottleneck(dim=dim, reduction=reduction) for _ in range(experts))
        self.slots = nn.Parameter(torch.randn(experts, slots, dim) * dim**-0.5)

    def fit(self, encoder: nn.Module) -> None:
        context = getattr(encoder, "context", None)
        if context is not None and context.streams:
            raise ValueError(
                f"SoftMixture must hear whole utterances, because its slots are mixtures of all frames, but this "
                f"{type(encoder).__name__} streams; take tuning=dense_moa, or an encoder with a whole context."
            )

    def init_state(self, batch: int) -> State:
        raise ValueError(
            "SoftMixture must hear whole utterances, but a stream was asked for; encode with forward(), or tune the "
            "encoder with tuning=dense_moa."
        )

    def forward(self, x: Frames, lengths: Lengths, state: State | None = None) -> tuple[Frames, None]:
        real = valid(lengths, x.shape[1])[:, :, None]  # [B, U, 1]
        x = torch.where(real, x, 0.0)
        logits = torch.einsum("bud,esd->bues", x, self.slots)
        dispatch = torch.where(real[..., None], logits, torch.finfo(logits.dtype).min).softmax(1)
        combine = logits.flatten(2).softmax(2)  # [B, U, E S]
        heard = torch.einsum("bues,bud->besd", dispatch, x)
        said = torch.cat([expert(heard[:, i]) for i, expert in enumerate(self.experts)], dim=1)  # [B, E S, D]
        return combine @ said, None


def narrow(dim: int, reduction: float) -> int:
    """The width of a bottleneck, at least 1."""
    return max(1, round(dim / reduction))


def silent(linear: nn.Linear) -> nn.Linear:
    """The same map, saying 0 whatever it hears."""
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
