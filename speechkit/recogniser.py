"""The one module that is trained, saved, loaded and streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.cut import clips as cut
from speechkit.features import read
from speechkit.search import Search, align
from speechkit.stream import Context, State
from speechkit.text import Tokenizer, words
from speechkit.types import EncoderOutput, Hypothesis, Seconds, Transcript

Audio = str | Path | np.ndarray | Tensor
BATCH_SECONDS: Seconds = 120.0  # of padded audio encoded together at most; a longer recording is cut


class Recogniser(nn.Module):
    """Samples in, text out: a front end, an encoder, an objective with its heads, a search and a tokenizer.

    Args:
        features: the front end, for example `speechkit.features.FrontEnd`.
        encoder: a streaming encoder, for example `speechkit.encoders.Conformer`; or one of whole utterances, which has
            no ``context`` and whose ``init_state`` says so.
        objective: heads and loss, for example `speechkit.objectives.Hybrid`.
        search: called as ``search(objective)``, for example `speechkit.search.Greedy`.
        tokenizer: says what the tokens of the heads mean.
    """

    features: Any
    encoder: Any
    objective: Any
    tuning: Any = None  # the fine-tuning method that changed it, see `speechkit.tuning`

    def __init__(
        self,
        *,
        features: nn.Module,
        encoder: nn.Module,
        objective: nn.Module,
        search: Callable[[nn.Module], Search],
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__()
        self.features = features
        self.encoder = encoder
        self.objective = objective
        self.search = search(objective)
        self.tokenizer = tokenizer

    @property
    def sample_rate(self) -> int:
        return self.features.sample_rate

    @property
    def context(self) -> Context:
        """What the encoder sees where no other context is given."""
        return getattr(self.encoder, "context", Context())

    @property
    def frame_samples(self) -> int:
        """Samples an encoder frame covers."""
        return self.features.hop * self.encoder.stride

    @property
    def frame_seconds(self) -> Seconds:
        """Seconds an encoder frame covers."""
        return self.frame_samples / self.sample_rate

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(
        self, samples: Float[Tensor, "B N"], lengths: Int[Tensor, "B"], *, context: Context | None = None
    ) -> EncoderOutput:
        """Encode whole utterances."""
        heard = self.features(samples, lengths)
        return self.encoder(heard.frames, heard.lengths, context=context)

    def init_state(self, batch: int, *, context: Context | None = None) -> State:
        """The state of ``batch`` streams that have heard nothing."""
        back = self.encoder.init_state(batch, context=context)  # first: it is for the encoder to refuse streams
        return self.features.init_state(batch), back

    def stream(
        self,
        samples: Float[Tensor, "B N"],
        lengths: Int[Tensor, "B"],
        state: State,
        *,
        context: Context | None = None,
    ) -> tuple[EncoderOutput, State]:
        """Encode the next samples of each stream: a multiple of context.chunk frames, or fewer to end, or none."""
        front, back = state
        heard, front = self.features.stream(samples, lengths, front)
        encoded, back = self.encoder.stream(heard.frames, heard.lengths, back, context=context)
        return encoded, (front, back)

    @overload
    def transcribe(
        self, audio: Audio, *, context: Context = ..., search: Search | None = ..., batch: int = ...
    ) -> Transcript: ...

    @overload
    def transcribe(
        self,
        audio: list[Any] | tuple[Any, ...],
        *,
        context: Context = ...,
        search: Search | None = ...,
        batch: int = ...,
    ) -> list[Transcript]: ...

    @torch.inference_mode()
    def transcribe(
        self,
        audio: Audio | list[Any] | tuple[Any, ...],
        *,
        context: Context = Context(),  # noqa: B008 - a frozen value
        search: Search | None = None,
        batch: int = 16,
    ) -> Transcript | list[Transcript]:
        """The text of recordings: files of any rate and number of channels, or samples ``[N]`` at the model's rate.

        Memory beside the samples is bounded: recordings are encoded in batches of similar length, and one beyond two
        minutes is cut at its quietest places into clips of 10 to 20 s (`speechkit.cut`), each heard from a fresh state.

        Args:
            audio: one recording, or several.
            context: what the encoder may see; all of the recording, or of the clip, unless given.
            search: instead of the model's own.
            batch: recordings encoded together at most.

        Returns:
            A `Transcript`, or for several recordings a list of them in the order given.

        Raises:
            ValueError: naming the recording that cannot be read, or is not a row of finite floating point numbers.
        """
        if isinstance(audio, Audio):
            return self.transcribe([audio], context=context, search=search, batch=batch)[0]
        clips = [self._clip(item, f"Recording {number}") for number, item in enumerate(audio)]
        transcripts: dict[int, Transcript] = {}
        with evaluating(self):
            for rows in batches([len(clip) for clip in clips], batch, int(BATCH_SECONDS * self.sample_rate)):
                if len(clips[rows[0]]) > BATCH_SECONDS * self.sample_rate:
                    heard = [self._hear_cut(clips[rows[0]], context, search, batch)]
                else:
                    heard = self._hear([clips[row] for row in rows], context, search or self.search)
                transcripts |= zip(rows, heard, strict=True)
        return [transcripts[row] for row in range(len(clips))]

    @torch.inference_mode()
    def align(self, audio: Audio, text: str) -> Transcript:
        """When each word of a known text was said: forced alignment with the CTC head.

        Args:
            audio: a file of any rate and number of channels, or samples ``[N]`` at the model's rate.
            text: what was said in it, in the vocabulary of the tokenizer.

        Returns:
            The text with its words' times and confidences, by the most likely CTC path that reads so.

        Raises:
            ValueError: where the model has no CTC head, the text is outside of the vocabulary or too long for the
                recording, or the recording cannot be read.
        """
        if self.objective.ctc is None:
            raise ValueError(
                "Recogniser.align needs a CTC head, but this model's objective has none; load one trained with CTC."
            )
        clip, said = self._clip(audio, "The recording"), Hypothesis(tuple(self.tokenizer.encode(text)))
        with evaluating(self):
            lengths = torch.tensor([len(clip)], device=self.device)
            encoded = self.encode(clip[None].to(self.device), lengths, context=Context())
            found = align(said, self.objective.ctc.log_probs(encoded.frames)[0].cpu())
        if said.tokens and not found.spans:
            raise ValueError(
                f"The recording must have a frame for each of the {len(said.tokens)} tokens of its text and one more "
                f"between equal ones, but has {encoded.frames.shape[1]} frames; check that it and the text are a pair."
            )
        return self.transcript(found, len(clip) / self.sample_rate)

    def transcript(self, hypothesis: Hypothesis, seconds: Seconds) -> Transcript:
        """What a hypothesis reads as, with times counted from the start of the stream."""
        timed = words(hypothesis, self.tokenizer, self.frame_seconds)
        return Transcript(self.tokenizer.decode(hypothesis.tokens), timed, seconds)

    def _clip(self, audio: Audio, name: str) -> Tensor:
        if isinstance(audio, str | Path):
            return samples_of(read(audio, self.sample_rate), str(audio))
        return samples_of(audio, name)

    def _hear(self, clips: list[Tensor], context: Context, search: Search) -> list[Transcript]:
        width = max(self.frame_samples, *map(len, clips))  # no layer has to cope with a width of 0
        samples = torch.stack([nn.functional.pad(clip, (0, width - len(clip))) for clip in clips])
        lengths = torch.tensor([len(clip) for clip in clips])
        found = search(self.encode(samples.to(self.device), lengths.to(self.device), context=context))
        return [
            self.transcript(best, len(clip) / self.sample_rate) for clip, (best, *_) in zip(clips, found, strict=True)
        ]

    def _hear_cut(self, clip: Tensor, context: Context, search: Search | None, batch: int) -> Transcript:
        parts = list(cut([clip], self.sample_rate))
        heard = self.transcribe([part.samples for part in parts], context=context, search=search, batch=batch)
        whole = [found.later(part.start / self.sample_rate) for part, found in zip(parts, heard, strict=True)]
        return Transcript.joined(whole, len(clip) / self.sample_rate)


def samples_of(audio: np.ndarray | Tensor, name: str) -> Float[Tensor, "N"]:
    """Samples as a float32 row, refused where a model could not make sense of them.

    Raises:
        ValueError: unless they are one channel of finite floating point numbers.
    """
    samples = torch.as_tensor(audio)
    if samples.dim() != 1:
        raise ValueError(
            f"{name} must be one channel of samples [N], but has shape {list(samples.shape)}; "
            f"fold channels together first, for example with samples.mean(axis) over the channel axis."
        )
    if not samples.is_floating_point():
        raise ValueError(
            f"{name} must be floating point samples between -1 and 1, but is of type {samples.dtype}; "
            f"divide by the full scale first, for example samples / 32768 for 16 bits."
        )
    if not bool(torch.isfinite(samples).all()):
        first = int((~torch.isfinite(samples)).nonzero()[0])
        raise ValueError(
            f"{name} must hold finite samples, but sample {first} is {float(samples[first])}; "
            f"decode it again, or replace such samples by 0."
        )
    return samples.to("cpu", torch.float32)


def batches(lengths: Sequence[int], batch: int, padded: int) -> Iterator[list[int]]:
    """Groups of similar length: at most ``batch`` recordings and ``padded`` samples each, padding included."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda r: lengths[r]):
        if rows and (len(rows) == batch or (len(rows) + 1) * lengths[row] > padded):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout and the like are off inside; every part is put back into the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
