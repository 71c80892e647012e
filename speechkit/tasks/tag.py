"""Sound to labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from speechkit import metrics
from speechkit.stream import ceil_div, valid
from speechkit.tagger import Tagger
from speechkit.tasks.base import Optim, Parts, Task
from speechkit.types import EncoderOutput, Event, Seconds, TagBatch, Timing

Rows = Float[Tensor, "B *_"]


@dataclass(frozen=True, kw_only=True)
class Mixup:
    """Two clips of a batch on top of each other, and their targets likewise (1710.09412, equation 1).

    ``x = share a + (1 - share) b`` with a share from Beta(alpha, alpha), drawn for each clip; b is another clip.

    Args:
        of: ``"samples"`` mixes sounds (AST), ``"features"`` normalised spectrograms (PaSST).
        alpha: 10 is near one half (AST); 0.3 is near one of both (PaSST).
        probability: of a clip to be mixed.
    """

    of: Literal["samples", "features"] = "samples"
    alpha: float = 10.0
    probability: float = 0.5

    def __post_init__(self) -> None:
        if not self.alpha > 0 or not 0 <= self.probability <= 1:
            raise ValueError(
                f"Mixup.alpha must be more than 0 and its probability within 0 and 1, but they are {self.alpha} and "
                f"{self.probability}; leave mixup out with task.mixup=null."
            )

    def draw(self, batch: int, device: torch.device) -> tuple[Float[Tensor, "B"], Int[Tensor, "B"]]:
        """The share each clip keeps, and its partner: chance of torch's own generator."""
        share = torch.distributions.Beta(self.alpha, self.alpha).sample((batch,)).to(device)
        mixed = torch.rand(batch, device=device) < self.probability
        return torch.where(mixed, share, 1.0), torch.randperm(batch, device=device)


def mix(x: Rows, share: Float[Tensor, "B"], partner: Int[Tensor, "B"]) -> Rows:
    """``share x + (1 - share) x[partner]``."""
    share = share.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    return share * x + (1 - share) * x[partner]


def frame_targets(events: Timing, shape: Sequence[int], seconds: Seconds) -> Float[Tensor, "B U C"]:
    """The share of each frame in which each class is heard.

    Args:
        shape: B, U and C.
        seconds: how long a frame is.
    """
    clips, frames, classes = shape
    begin = torch.arange(frames, device=events.times.device) * seconds
    start, end = events.times[:, :1], events.times[:, 1:]
    shares = ((torch.minimum(end, begin + seconds) - torch.maximum(start, begin)) / seconds).clamp(min=0)  # [E, U]
    heard = torch.zeros(clips, classes, frames, device=shares.device)
    heard = heard.index_put((events.clips, events.classes), shares, accumulate=True)
    return heard.clamp(max=1).mT  # events of one class may overlap


def listed(events: Timing, clip: int, labels: Sequence[str]) -> tuple[Event, ...]:
    """The events of one clip."""
    own = events.clips == clip
    rows = zip(events.classes[own].tolist(), events.times[own].tolist(), strict=True)
    return tuple(Event(labels[row], start, end) for row, (start, end) in rows)


class Tag(Task):
    """Sound to labels: a `Tagger` learns from clips.

    The loss is cross-entropy where classes exclude each other and binary cross-entropy, the mean over classes, where
    they do not. Both take targets between 0 and 1, as mixup and label smoothing make them.

    Where a clip says when its sounds are heard, each encoder frame has a loss of the same kind beside that of the clip:
    its target is the share of the frame in which a class is heard. Where classes exclude each other, frames in which
    none is heard have no target. ``loss`` is then ``clip + events * (what training reports as events)``.

    Args:
        model: what learns.
        mixup: of clips in a batch.
        spec_augment: of the features, in training; called as ``spec_augment(frames, lengths)``.
        binary: binary cross-entropy also where classes exclude each other, as AST was trained on Speech Commands.
        label_smoothing: share of a target that is spread over all classes (or, for those that do not exclude each
            other, moved towards one half).
        events: the weight of the loss of frames; 0 learns from clips alone.
    """

    def __init__(
        self,
        *,
        model: Tagger,
        optim: Optim,
        mixup: Mixup | None = None,
        spec_augment: Callable[[Tensor, Tensor], Tensor] | None = None,
        binary: bool = False,
        label_smoothing: float = 0.0,
        events: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(model=model, optim=optim, seed=seed)
        if not 0 <= events < math.inf:
            raise ValueError(f"task.events must be a weight of 0 or more, but is {events}; 1 weighs frames as clips.")
        self.mixup, self.spec_augment, self.label_smoothing = mixup, spec_augment, label_smoothing
        self.events = events
        self.exclusive = model.exclusive and not binary

    def losses(self, batch: TagBatch, dice: int) -> Parts:
        samples, targets, lengths = batch.samples, self.smooth(batch.targets), batch.sample_lengths
        share, partner = (self.mixup or Mixup(probability=0.0)).draw(len(samples), samples.device)
        lengths = torch.where(share < 1, torch.maximum(lengths, lengths[partner]), lengths)
        mixed = self.mixup.of if self.mixup else None
        with torch.no_grad():  # nothing in a front end is trained
            frames, counts = self.model.hear(mix(samples, share, partner) if mixed == "samples" else samples, lengths)
        if mixed == "features":
            frames = mix(frames, share, partner)
        if self.spec_augment is not None:
            frames = self.spec_augment(frames, counts)
        self._meter.frames += counts.sum()
        encoded = self.model.encoder(frames, None if self.model.filled else counts)
        parts = self.model.head.learn(encoded, partial(self.loss, targets=mix(targets, share, partner)))
        if batch.events is None or not self.events:
            return parts
        known = batch.events.known & (batch.events.known[partner] | (share == 1))
        events = self._frame_loss(encoded, batch.events, torch.where(known, lengths, 0), share, partner)
        return parts | {"loss": parts["loss"] + self.events * events, "clip": parts["loss"], "events": events}

    def _frame_loss(
        self,
        encoded: EncoderOutput,
        events: Timing,
        lengths: Int[Tensor, "B"],
        share: Float[Tensor, "B"],
        partner: Int[Tensor, "B"],
    ) -> Float[Tensor, ""]:
        """The loss of the frames of which it is known what is heard: those within ``lengths`` samples of each clip."""
        logits, stride = self.model.head.frames(encoded), self.model.encoder.stride
        heard = mix(frame_targets(events, logits.shape, self.model.seconds(stride)), share, partner)
        counts = torch.minimum(encoded.lengths, ceil_div(lengths // self.model.features.hop, stride))
        real = valid(counts, logits.shape[1]) & (encoded.frames != 0).any(-1)  # patchout leaves zeros
        if self.exclusive:
            real &= heard.sum(-1) > 0
        return self.loss(logits[real].float(), self.smooth(heard[real])) if real.any() else logits.new_zeros(())

    def smooth(self, targets: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
        even = targets.sum(1, keepdim=True) / targets.shape[1] if self.exclusive else 0.5
        return (1 - self.label_smoothing) * targets + self.label_smoothing * even

    def loss(self, logits: Float[Tensor, "N C"], targets: Float[Tensor, "N C"]) -> Float[Tensor, ""]:
        if self.exclusive:
            return F.cross_entropy(logits, targets)
        return F.binary_cross_entropy_with_logits(logits, targets)

    def on_validation_epoch_start(self) -> None:
        self._scores: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._timed: list[tuple[tuple[Event, ...], ...]] = []  # what is there, and what was found

    def validation_step(self, batch: TagBatch, index: int) -> Float[Tensor, "B C"]:
        """The scores of the clips, the long ones heard piece by piece."""
        rows = []
        for row, pieces in enumerate(self.model.clips(batch.samples, batch.sample_lengths)):
            if batch.events is None or not batch.events.known[row]:
                rows.append(self.model.scores_in(pieces))
                continue
            scores, found = self.model.scores_and_events(pieces)
            rows.append(scores)
            self._timed.append((listed(batch.events, row, self.model.labels), found))
        self._scores.append(torch.stack(rows))
        self._targets.append(batch.targets.cpu())
        return self._scores[-1]

    def on_validation_epoch_end(self) -> None:
        scores, targets = (torch.cat(self.from_all(rows)) for rows in (self._scores, self._targets))
        known = scores.double().clamp(1e-12, 1 - 1e-12)
        right = targets * known.log() + (0 if self.model.exclusive else (1 - targets) * (1 - known).log())
        loss = -(right.sum(1).mean() if self.model.exclusive else right.mean())
        values = {"loss": float(loss), **metrics.tagging(scores.numpy(), targets.numpy(), self.model.exclusive)}
        if timed := self.from_all(self._timed):
            there, found = zip(*timed, strict=True)
            values["segment_f1"] = metrics.segment_hits(there, found, self.model.labels).micro
        self.log_dict({f"dev/{name}": value for name, value in values.items()}, logger=False)  # for early stopping
        self.report("dev", values)

    def error_rate(self) -> float | None:
        """The share of clips named wrongly; where classes do not exclude each other, what mean average precision lacks
        to 1."""
        best = self.latest.get("dev/accuracy" if self.model.exclusive else "dev/mAP")
        return None if best is None else 1 - best
