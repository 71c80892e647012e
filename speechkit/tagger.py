"""What is heard in a recording: a front end, an encoder, a head and the names of its classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.features import FrontEnd, blocks
from speechkit.heads import Head, Summary
from speechkit.recogniser import Audio, evaluating, samples_of
from speechkit.stream import keep_valid
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
        encoder: any of `speechkit.encoders`, called with frames and their lengths.
        labels: the names of the classes.
        frames: feature frames heard at once; a longer recording is heard piece by piece.
        head: called as ``head(dim=, classes=)``, one of `speechkit.heads`.
        exclusive: one class is right (softmax), or each may be by itself (sigmoid).
        filled: a shorter recording is filled up to ``frames`` with zeros before these are normalised, and the encoder
            hears them, as AST's published checkpoints were trained. Otherwise it is told the length.
    """

    features: FrontEnd | None
    encoder: Any
    head: Head

    def __init__(
        self,
        *,
        features: FrontEnd | None,
        encoder: nn.Module,
        labels: Sequence[str],
        frames: int,
        head: Callable[..., Head] = Summary,
        exclusive: bool = False,
        filled: bool = False,
    ) -> None:
        super().__init__()
        if not labels:
            raise ValueError("Tagger.labels must name at least one class, but is empty; list the names of the classes.")
        self.features, self.encoder = features, encoder
        self.labels, self.frames, self.exclusive, self.filled = tuple(labels), frames, exclusive, filled
        self.head = head(dim=self.encoder.dim, classes=len(labels))

    @property
    def sample_rate(self) -> int:
        return self._front().sample_rate

    def hear(self, samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"]) -> FeatureOutput:
        """The features of clips, as the encoder hears them; all of one length where they are `filled`."""
        front = self._front()
        if not self.filled:
            return front(samples, lengths)
        frames, counts = front.mel(samples, lengths)
        return self._normalised(keep_valid(frames, counts), counts)

    def logits(self, features: Float[Tensor, "B T F"], lengths: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B C"]:
        """A logit for each class.

        Args:
            features: as `hear` gives them; frames past a length may hold anything.
            lengths: real feature frames of each; all of them unless given.
        """
        return self.head(self.encoder(features, lengths))

    def probabilities(self, logits: Float[Tensor, "*_ C"]) -> Float[Tensor, "*_ C"]:
        """How sure the tagger is of each class, 0 to 1."""
        return logits.softmax(-1) if self.exclusive else logits.sigmoid()

    @torch.inference_mode()
    def tag(self, audio: Audio, *, top: int = 5) -> tuple[Tag, ...]:
        """The classes of highest score in a recording: a file of any rate, or samples ``[N]`` at the model's rate.

        A recording longer than ``frames`` has the mean scores of its pieces, the last of which overlaps the one before.

        Raises:
            ValueError: where the tagger has no front end, the recording cannot be read, or is shorter than one frame.
        """
        scores = self.scores(audio)
        best = scores.topk(min(top, len(self.labels)))
        return tuple(Tag(self.labels[i], s) for i, s in zip(best.indices.tolist(), best.values.tolist(), strict=True))

    @torch.inference_mode()
    def scores(self, audio: Audio) -> Float[Tensor, "C"]:
        """The score of every class in a recording, in the order of ``labels``; as `tag`."""
        with evaluating(self):
            return torch.stack([self._scores(*piece) for piece in self._pieces(audio)]).mean(0)

    def _scores(self, frames: Float[Tensor, "T F"], count: int) -> Float[Tensor, "C"]:
        device = next(self.head.parameters()).device
        heard = self._normalised(frames[None].to(device), torch.tensor([count], device=device))
        lengths = None if self.filled else heard.lengths
        return self.probabilities(self.logits(heard.frames, lengths)[0].float()).cpu()

    def _pieces(self, audio: Audio) -> Iterator[tuple[Float[Tensor, "T F"], int]]:
        """Pieces of at most ``frames`` feature frames that together are the recording, in memory for two of them."""
        front = self._front()
        last = heard = torch.zeros(0, front.dim)
        for frames in self._read(audio, front):
            heard = torch.cat([heard, frames])
            while len(heard) > self.frames:
                last, heard = heard[: self.frames], heard[self.frames :]
                yield last, self.frames
        if not len(heard):
            raise ValueError(
                f"The recording must have at least {front.mel.window} samples, one feature frame, but is shorter; "
                f"record it again, or put silence behind it."
            )
        heard = torch.cat([last, heard])[-self.frames :]
        yield heard, len(heard)

    def _front(self) -> FrontEnd:
        if self.features is None:
            raise ValueError(
                "Tagger.tag must have a front end to hear a recording, but its folder had no preprocessor_config.json; "
                "copy that file beside config.json, or compute features and call logits()."
            )
        return self.features

    def _read(self, audio: Audio, front: FrontEnd) -> Iterator[Float[Tensor, "T F"]]:
        device, state = next(front.buffers()).device, front.mel.init_state(1)
        for samples in self._blocks(audio, front.sample_rate):
            lengths = torch.tensor([len(samples)], device=device)
            (frames, counts), state = front.mel.stream(samples[None].to(device), lengths, state)
            yield frames[0, : int(counts)].cpu()

    def _blocks(self, audio: Audio, sample_rate: int) -> Iterator[Tensor]:
        if isinstance(audio, str | Path):
            yield from map(torch.from_numpy, blocks(audio, sample_rate, BLOCK))
        else:
            yield from samples_of(audio, "The recording").split(round(BLOCK * sample_rate))

    def _normalised(self, frames: Float[Tensor, "B T F"], counts: Int[Tensor, "B"]) -> FeatureOutput:
        if self.filled:
            frames = F.pad(frames, (0, 0, 0, max(0, self.frames - frames.shape[1])))
            counts = torch.full_like(counts, frames.shape[1])
        norm = self._front().norm
        return FeatureOutput(frames, counts) if norm is None else norm(frames, counts)
