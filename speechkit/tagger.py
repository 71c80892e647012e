"""What is heard in a recording: a front end, an encoder, a head and the names of its classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit import events
from speechkit.features import FrontEnd, blocks
from speechkit.heads import Head, Summary
from speechkit.recogniser import Audio, evaluating, samples_of
from speechkit.stream import ceil_div, keep_valid
from speechkit.types import EncoderOutput, Event, FeatureOutput, Seconds

SHORTEST: Seconds = 0.1  # that can be heard at once: less is a count of spectra where the features are samples
BLOCK: Seconds = 10.0  # of a file, read at once


class Tag(NamedTuple):
    """A class, and how sure the tagger is that it is heard, 0 to 1."""

    label: str
    score: float


class Piece(NamedTuple):
    """At most ``Tagger.frames`` feature frames of a recording, and what the encoder made of them."""

    start: int  # feature frames from the beginning of the recording
    length: int  # of them that are real; the rest is filled up
    features: Float[Tensor, "1 T F"]
    encoded: EncoderOutput


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
    tuning: Any = None  # the fine-tuning method that changed it, see `speechkit.tuning`

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
        if features is not None and frames * features.hop < SHORTEST * features.sample_rate:
            raise ValueError(
                f"Tagger.frames must be at least {SHORTEST:g} s of features, but {frames} are "
                f"{frames * features.hop / features.sample_rate:.3g} s, since each is {features.hop} samples; for 10 s "
                f"set model.frames={10 * features.sample_rate // features.hop}."
            )
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
        return self.best(self.scores(audio), top)

    def best(self, scores: Float[Tensor, "C"], top: int) -> tuple[Tag, ...]:
        """The classes of highest score, highest first."""
        best = scores.topk(min(top, len(self.labels)))
        return tuple(Tag(self.labels[i], s) for i, s in zip(best.indices.tolist(), best.values.tolist(), strict=True))

    @torch.inference_mode()
    def scores(self, audio: Audio) -> Float[Tensor, "C"]:
        """The score of every class in a recording, in the order of ``labels``; as `tag`."""
        return self.scores_in(self.pieces(audio))

    @torch.inference_mode()
    def scores_in(self, pieces: Iterable[Piece]) -> Float[Tensor, "C"]:
        """`scores` of a recording by its `pieces`."""
        return torch.stack([self.score(piece) for piece in pieces]).mean(0)

    @torch.inference_mode()
    def score(self, piece: Piece) -> Float[Tensor, "C"]:
        """The score of every class in a piece of a recording."""
        return self.probabilities(self.head(piece.encoded)[0].float()).cpu()

    @torch.inference_mode()
    def events(
        self,
        audio: Audio,
        *,
        threshold: float = 0.5,
        low: float | None = None,
        median: Seconds = 0.3,
        progress: Callable[[Seconds], None] | None = None,
    ) -> tuple[Event, ...]:
        """The classes heard in a recording of any length, with their times in it, in order.

        Args:
            threshold: the score of a frame of an event, above 0 and below 1.
            low: the score at which an event, having reached ``threshold``, begins and ends; ``threshold`` unless given.
            median: scores are the medians over so long; 0 is as they are.
            progress: as of `pieces`.

        Raises:
            ValueError: as `tag`, or for a threshold that is none.
        """
        return self.events_in(self.pieces(audio, progress), threshold=threshold, low=low, median=median)

    @torch.inference_mode()
    def events_in(
        self, pieces: Iterable[Piece], *, threshold: float, low: float | None = None, median: Seconds
    ) -> tuple[Event, ...]:
        """`events` of a recording by its `pieces`, for whoever wants more of them than that."""
        scores, seconds, total = self.frame_scores(pieces)
        return events.found(
            scores, self.labels, seconds, total=total, threshold=threshold, low=low, width=round(median / seconds)
        )

    @torch.inference_mode()
    def scores_and_events(
        self, pieces: Iterable[Piece], *, threshold: float = 0.5, median: Seconds = 0.3
    ) -> tuple[Float[Tensor, "C"], tuple[Event, ...]]:
        """`scores` and `events` of a recording by its `pieces`, which are gone through once."""
        rows = []

        def heard() -> Iterator[Piece]:
            for piece in pieces:
                rows.append(self.score(piece))
                yield piece

        found = self.events_in(heard(), threshold=threshold, median=median)
        return torch.stack(rows).mean(0), found

    @torch.inference_mode()
    def frame_scores(self, pieces: Iterable[Piece]) -> tuple[Float[Tensor, "U C"], Seconds, Seconds]:
        """The score of every class in each encoder frame of a recording, how long one is, and how long the recording.

        Where pieces overlap, the mean; frames that no piece reaches have the scores of those before them.
        """
        stride = self.encoder.stride
        rows = [(piece.start, piece.length, self._frame_scores(piece)) for piece in pieces]
        total = max(start + count for start, count, _ in rows)
        found = events.joined([(round(start / stride), scores) for start, _, scores in rows], ceil_div(total, stride))
        return found, stride * self.seconds(1), self.seconds(total)

    def seconds(self, frames: int) -> Seconds:
        """How long so many feature frames are."""
        return frames * self._front().hop / self.sample_rate

    def _frame_scores(self, piece: Piece) -> Float[Tensor, "U C"]:
        real = min(int(piece.encoded.lengths), ceil_div(piece.length, self.encoder.stride))
        return self.probabilities(self.head.frames(piece.encoded)[0, :real].float()).cpu()

    @torch.no_grad()
    def pieces(self, audio: Audio, progress: Callable[[Seconds], None] | None = None) -> Iterator[Piece]:
        """A recording in pieces of ``frames`` feature frames, the last of which overlaps the one before; or all of it.

        Args:
            progress: called with how much of the recording was heard, after each piece.

        Raises:
            ValueError: as `tag`.
        """
        device = next(self.head.parameters()).device
        with evaluating(self):
            for start, frames in self._cut(audio):
                count = torch.tensor([len(frames)], device=device)
                heard = self._normalised(frames[None].to(device), count)
                encoded = self.encoder(heard.frames, None if self.filled else heard.lengths)
                yield Piece(start, len(frames), heard.frames, encoded)
                if progress:
                    progress(self.seconds(start + len(frames)))

    @torch.no_grad()
    def clips(self, samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"]) -> Iterator[Iterable[Piece]]:
        """The `pieces` of each of many clips, encoded together where none is longer than ``frames``."""
        front = self._front()
        enough = (self.frames + 1) * front.hop + front.mel.window  # to see whether a clip is longer, if it has hours
        frames, counts = front.mel(samples[:, :enough], lengths.clamp(max=enough))
        if frames.shape[1] > self.frames:
            yield from (self.pieces(clip[:n]) for clip, n in zip(samples.cpu(), lengths.tolist(), strict=True))
            return
        with evaluating(self):
            heard = self._normalised(keep_valid(frames, counts), counts)
            encoded = self.encoder(heard.frames, None if self.filled else heard.lengths)
        for row, count in enumerate(counts.tolist()):
            own = EncoderOutput._make(None if part is None else part[row : row + 1] for part in encoded)
            yield [Piece(0, count, heard.frames[row : row + 1], own)]

    def _cut(self, audio: Audio) -> Iterator[tuple[int, Float[Tensor, "T F"]]]:
        """Where each piece begins, and its frames; no more than two pieces are in memory."""
        front, start = self._front(), 0
        last = heard = torch.zeros(0, front.dim)
        for frames in self._read(audio, front):
            heard = torch.cat([heard, frames])
            while len(heard) > self.frames:
                last, heard = heard[: self.frames], heard[self.frames :]
                yield start, last
                start += self.frames
        if not len(heard):
            raise ValueError(
                f"The recording must have at least {front.mel.window} samples, one feature frame, but is shorter; "
                f"record it again, or put silence behind it."
            )
        ends = start + len(heard)
        heard = torch.cat([last, heard])[-self.frames :]
        yield ends - len(heard), heard

    def _front(self) -> FrontEnd:
        if self.features is None:
            raise ValueError(
                "Tagger.tag must have a front end to hear a recording, but its folder had no preprocessor_config.json; "
                "copy that file beside config.json, or compute features and call logits()."
            )
        return self.features

    def _read(self, audio: Audio, front: FrontEnd) -> Iterator[Float[Tensor, "T F"]]:
        device, state = next(self.head.parameters()).device, front.mel.init_state(1)
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
