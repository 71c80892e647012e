"""What is heard in a recording: a front end, an encoder, a head and the names of its classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.features import FrontEnd, blocks
from speechkit.recogniser import Audio, evaluating, samples_of
from speechkit.types import FeatureOutput, Seconds

BLOCK: Seconds = 10.0  # of a file, read at once


class Tag(NamedTuple):
    """A class, and how sure the tagger is that it is heard, 0 to 1."""

    label: str
    score: float


class Tagger(nn.Module):
    """Samples in, labels out.

    Args:
        features: the front end; ``None`` for a tagger that is given features, and tags no recordings.
        encoder: one whose output has a ``summary``, for example `speechkit.encoders.AST`.
        labels: the names of the classes.
        frames: feature frames heard at once. A shorter recording is filled up with zeros before they are normalised,
            as AST's checkpoints were trained; a longer one is heard piece by piece.
        exclusive: one class is right (softmax), or each may be by itself (sigmoid).
        eps: of the head's layer norm.
    """

    features: FrontEnd | None
    encoder: Any

    def __init__(
        self,
        *,
        features: FrontEnd | None,
        encoder: nn.Module,
        labels: Sequence[str],
        frames: int,
        exclusive: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.features, self.encoder = features, encoder
        self.labels, self.frames, self.exclusive = tuple(labels), frames, exclusive
        self.head = nn.Sequential(nn.LayerNorm(self.encoder.dim, eps=eps), nn.Linear(self.encoder.dim, len(labels)))

    def logits(self, features: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B C"]:
        """A logit for each class.

        Args:
            features: as the front end gives them; frames past a length may hold anything.
            lengths: real feature frames of each; all of them unless given.
        """
        return self.head(self.encoder(features, lengths).summary)

    @torch.inference_mode()
    def tag(self, audio: Audio, *, top: int = 5) -> tuple[Tag, ...]:
        """The classes of highest score in a recording: a file of any rate, or samples ``[N]`` at the model's rate.

        A recording longer than ``frames`` has the mean scores of its pieces, the last of which overlaps the one before.

        Raises:
            ValueError: where the tagger has no front end, the recording cannot be read, or is shorter than one frame.
        """
        with evaluating(self):
            scores = torch.stack([self._scores(window) for window in self._windows(audio)]).mean(0)
        best = scores.topk(min(top, len(self.labels)))
        return tuple(Tag(self.labels[i], s) for i, s in zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def _scores(self, window: Float[Tensor, "T F"]) -> Float[Tensor, "C"]:
        device = next(self.head.parameters()).device
        logits = self.logits(window[None].to(device))[0].float().cpu()
        return logits.softmax(0) if self.exclusive else logits.sigmoid()

    def _windows(self, audio: Audio) -> Iterator[Float[Tensor, "T F"]]:
        """Pieces of ``frames`` normalised feature frames that together are the recording, in memory for two of them."""
        front = self._front()
        last = heard = front.mel.mel.new_zeros(0, front.dim)
        for frames in self._frames(audio, front):
            heard = torch.cat([heard, frames])
            while len(heard) > self.frames:
                last, heard = heard[: self.frames], heard[self.frames :]
                yield self._normalised(last, front)
        if not len(heard):
            raise ValueError(
                f"The recording must have at least {front.mel.window} samples, one feature frame, but is shorter; "
                f"record it again, or put silence behind it."
            )
        heard = torch.cat([last, heard])[-self.frames :]
        yield self._normalised(F.pad(heard, (0, 0, 0, self.frames - len(heard))), front)

    def _front(self) -> FrontEnd:
        if self.features is None:
            raise ValueError(
                "Tagger.tag must have a front end to hear a recording, but its folder had no preprocessor_config.json; "
                "copy that file beside config.json, or compute features and call logits()."
            )
        return self.features

    def _frames(self, audio: Audio, front: FrontEnd) -> Iterator[Float[Tensor, "T F"]]:
        device, state = front.mel.taper.device, front.mel.init_state(1)
        for samples in self._blocks(audio, front.sample_rate):
            lengths = torch.tensor([len(samples)], device=device)
            (frames, counts), state = front.mel.stream(samples[None].to(device), lengths, state)
            yield frames[0, : int(counts)]

    def _blocks(self, audio: Audio, sample_rate: int) -> Iterator[Tensor]:
        if isinstance(audio, str | Path):
            yield from map(torch.from_numpy, blocks(audio, sample_rate, BLOCK))
        else:
            yield from samples_of(audio, "The recording").split(round(BLOCK * sample_rate))

    def _normalised(self, frames: Float[Tensor, "T F"], front: FrontEnd) -> Float[Tensor, "T F"]:
        heard = FeatureOutput(frames[None], torch.tensor([len(frames)], device=frames.device))
        return (heard if front.norm is None else front.norm(*heard)).frames[0]
