"""Live audio in, results out: many streams over one batched state.

A `Session` is synchronous and holds no thread: `push` only remembers samples, `step` advances every stream that has a
whole chunk of them, by one chunk, all in one batch. A stream is cut into the same chunks however it was pushed, so its
results are the same in any division and beside any number of other streams. See docs/streaming.md.

What is heard of a stream are its regions: all of it is one, or, behind a `Vad`, every stretch of speech. Each begins
with a fresh row of the state: a stream in silence costs no step of the model, and positions grow within a region only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from speechkit.features import Resampler
from speechkit.recogniser import Recogniser, samples_of
from speechkit.search import Endpoint, Search, stable_prefix
from speechkit.steps import GraphRows, Rows, TracedRows
from speechkit.stream import Context, put, state_bytes, take
from speechkit.types import Hypothesis, Seconds, Transcript, Word
from speechkit.vad import Piece, Vad, Voices, listen

CHUNK: Seconds = 0.64
LEFT: Seconds = 2.56  # four such chunks cost 0.07 % CER against all of the past (wenet runtime/gpu, WenetSpeech)


@dataclass(frozen=True)
class Update:
    """What a stream reads as after one more chunk.

    Attributes:
        slot: the stream.
        segment: counts the segments of the stream from 0; text and words are those of this segment alone.
        text: what was said so far. It may still change, except for its beginning, ``stable``.
        words: with times from the start of the stream.
        final: the segment is over and its text stays.
        ended: the stream is over as well, and its slot is free.
        seconds: audio of the stream heard so far, silence included.
    """

    slot: int
    segment: int
    text: str
    stable: str
    words: tuple[Word, ...]
    final: bool
    ended: bool
    seconds: Seconds


@dataclass
class _Region:
    """A stretch of a stream that is heard from a fresh state."""

    start: int  # samples from the start of the stream, at the model's rate, as are the following
    pending: deque[Tensor] = field(default_factory=deque)  # not heard yet
    waiting: int = 0  # samples in ``pending``
    heard: int = 0
    over: bool = False  # nothing follows what is pending
    before: int = 0  # encoder frames of earlier segments

    def add(self, samples: Float[Tensor, "N"]) -> None:
        self.pending.append(samples)
        self.waiting += len(samples)

    def cut(self, most: int) -> Float[Tensor, "N"]:
        parts, room = [torch.zeros(0)], most
        while room and self.pending:
            block = self.pending.popleft()
            parts.append(block[:room])
            if len(block) > room:
                self.pending.appendleft(block[room:])
            room -= len(parts[-1])
        self.waiting -= most - room
        self.heard += most - room
        return torch.cat(parts)


@dataclass
class _Stream:
    """What a slot holds beside its row of the batched state."""

    resampler: Resampler
    held: Any  # the resampler's state
    voices: Voices | None  # tells what of the stream is heard; ``None`` where all is
    regions: deque[_Region] = field(default_factory=deque)  # those that are not over; all but the last are complete
    ending: bool = False
    segment: int = 0
    frames: int = 0  # encoder frames of this segment

    @property
    def waiting(self) -> int:
        return sum(region.waiting for region in self.regions) + (self.voices.waiting if self.voices else 0)

    def add(self, samples: Float[Tensor, "N"]) -> None:
        if self.voices:
            self.voices.add(samples)
        else:
            self.place(Piece(0, samples, self.ending))

    def place(self, piece: Piece) -> None:
        """The next samples that are heard; the last ones of a stream come when it is ending."""
        if not self.regions or self.regions[-1].over:
            self.regions.append(_Region(piece.start))
        self.regions[-1].add(piece.samples)
        self.regions[-1].over = piece.over

    def ready(self, chunk: int) -> bool:
        return bool(self.regions) and (self.regions[0].over or self.regions[0].waiting >= chunk)


class Session:
    """Streams that join, pause and leave, over one state with a row for each slot.

    ::

        session = Session(recogniser)
        slot = session.join(sample_rate=48000)
        for block in microphone:
            session.push(slot, block)
            for update in session.drain():
                print(update.text)
        session.finish(slot)
        *_, last = session.drain()

    Args:
        recogniser: is put into evaluation mode.
        slots: streams that can be open at once.
        context: chunk and memory; `live_context` of the recogniser unless given.
        search: called as ``search(objective)``, for example `speechkit.search.PrefixBeam`; the recogniser's own
            unless given.
        endpoint: when a segment is over: its text becomes final, and what follows is a new segment. Memory and delay
            of a stream stay bounded by it; ``None`` keeps one segment to the end, whose text alone grows.
        vad: what of a stream is heard; silence costs no step of the model, and the end of speech ends a segment. All is
            heard unless given.

    Raises:
        ValueError: where the encoder cannot stream, or not with this context, or the detector of ``vad`` hears another
            sample rate.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        *,
        slots: int = 1,
        context: Context | None = None,
        search: Callable[[nn.Module], Search] | None = None,
        endpoint: Endpoint | None = Endpoint(),  # noqa: B008 - a frozen value
        vad: Vad | None = None,
    ) -> None:
        if slots < 1:
            raise ValueError(f"Session.slots must be at least 1 stream, but is {slots}.")
        if vad and vad.detector.sample_rate != recogniser.sample_rate:
            raise ValueError(
                f"Session.vad must hear what the model hears, {recogniser.sample_rate} Hz, but its detector is for "
                f"{vad.detector.sample_rate} Hz; leave it out, or pass a detector for that rate."
            )
        self.recogniser = recogniser.eval()
        self.context = (context or live_context(recogniser)).streamable()
        self.search = search(recogniser.objective) if search else recogniser.search
        self.endpoint = endpoint
        self.vad = vad
        self.chunk = self.context.latency() * recogniser.frame_samples  # samples a step takes of each stream
        self._streams: list[_Stream | None] = [None] * slots
        self._rows = Rows(recogniser, self.context, slots)
        self._found = self.search.init_state(slots)

    @torch.inference_mode()
    def trace(self, most: int = 8) -> None:
        """Find out now what a step consists of, a second or so for each number of streams. Before the first stream.

        On a CPU steps of up to ``most`` streams are traced, see `speechkit.traced.Traced`; without it every step walks
        through the modules of the model, which takes some milliseconds more. The weights of linear maps are then held
        a second time, packed, for all numbers of streams together. On a GPU all become CUDA graphs, see
        `speechkit.graphs.Graphs`.
        """
        rows, silence = self._rows, torch.zeros(self.chunk, device=self.recogniser.device)
        if silence.is_cuda:
            self._rows = GraphRows(self.recogniser, self.context, rows.slots, chunk=silence)
        else:
            self._rows = TracedRows(self.recogniser, self.context, rows.slots, most=most, chunk=silence)

    @property
    def free(self) -> int:
        """Slots that no stream holds."""
        return self._streams.count(None)

    @property
    def streams(self) -> int:
        """Slots that hold a stream."""
        return len(self._streams) - self.free

    @property
    def state_bytes(self) -> int:
        """Bytes of the batched state; the same after an hour as after a minute."""
        return state_bytes(self._rows.state)

    def waiting(self, slot: int) -> Seconds:
        """Audio of a stream that was pushed and is to be heard yet: with a server that keeps up, less than a chunk."""
        return self._open(slot).waiting / self.recogniser.sample_rate

    @torch.inference_mode()
    def join(self, *, sample_rate: int | None = None) -> int:
        """Open a stream of samples at ``sample_rate``, the model's own unless given, and say its slot.

        Raises:
            ValueError: where every slot is taken.
        """
        if not self.free:
            raise ValueError(
                f"A stream needs a free slot, but all {len(self._streams)} are taken; finish one, or build the Session "
                f"with more slots."
            )
        slot = self._streams.index(None)
        resampler = Resampler(
            source_hz=sample_rate or self.recogniser.sample_rate, target_hz=self.recogniser.sample_rate
        )
        self._rows.begin([slot])
        self._found = put(self._found, [slot], self.search.init_state(1))
        self._streams[slot] = _Stream(resampler, resampler.init_state(1), self.vad.open() if self.vad else None)
        return slot

    @torch.inference_mode()
    def push(self, slot: int, samples: Float[np.ndarray, "N"] | Float[Tensor, "N"]) -> None:
        """Remember the next samples of a stream, however many. A stream that is not pushed is paused.

        Raises:
            ValueError: unless they are one channel of finite floating point numbers, or where the slot is not open; the
                stream goes on as if they had not been pushed.
        """
        stream = self._open(slot)
        if stream.ending:
            raise ValueError(f"Slot {slot} was finished and takes no more samples; join() opens another stream.")
        new = samples_of(samples, f"The audio pushed to slot {slot}")[None]
        resampled, stream.held = stream.resampler.stream(new, torch.tensor([new.shape[1]]), stream.held)
        stream.add(resampled.samples[0, : int(resampled.lengths)])

    @torch.inference_mode()
    def finish(self, slot: int) -> None:
        """Nothing more will be pushed: the next steps flush what the stream still holds, to its last frame.

        Raises:
            ValueError: where the slot is not open.
        """
        stream = self._open(slot)
        if not stream.ending:
            last = stream.resampler.finish(stream.held)
            stream.ending = True
            stream.add(last.samples[0, : int(last.lengths)])
            if stream.voices:
                stream.voices.end()

    def leave(self, slot: int) -> None:
        """Drop a stream with what it has not said yet, and free its slot.

        Raises:
            ValueError: where the slot is not open.
        """
        self._open(slot)
        self._streams[slot] = None

    def drain(self) -> Iterator[Update]:
        """Steps until no stream has a chunk left."""
        while updates := self.step():
            yield from updates

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Advance by one chunk every stream that has one, or that is ending; one `Update` each, none if all wait."""
        self._listen()
        rows = [slot for slot, stream in enumerate(self._streams) if stream and stream.ready(self.chunk)]
        if not rows:
            return []
        samples, lengths = self._cut(rows)
        encoded = self._rows(rows, samples, lengths)
        beams, found = self.search.step(encoded, take(self._found, rows))
        self._found = put(self._found, rows, found)
        for slot, frames in zip(rows, encoded.lengths.tolist(), strict=True):
            self._open(slot).frames += frames
        left = {slot for slot, length in zip(rows, lengths.tolist(), strict=True) if length < self.chunk}
        over = [slot for slot, beam in zip(rows, beams, strict=True) if slot in left or self._endpoint(slot, beam)]
        readings = dict(zip(rows, beams, strict=True)) | dict(zip(over, self._conclude(over), strict=True))
        updates = [self._update(slot, beam, slot in over, slot in left) for slot, beam in readings.items()]
        self._restart([slot for slot in left if self._streams[slot]])
        return updates

    def _listen(self) -> None:
        """Tell what of the streams is to be heard."""
        streams = [(stream, stream.voices) for stream in self._streams if stream and stream.voices]
        listen([voices for _, voices in streams])
        for stream, voices in streams:
            for piece in voices.take():
                stream.place(piece)

    def _restart(self, rows: Sequence[int]) -> None:
        """These streams have come to the end of a region."""
        if rows:
            self._rows.begin(rows)

    def _open(self, slot: int) -> _Stream:
        stream = self._streams[slot] if 0 <= slot < len(self._streams) else None
        if stream is None:
            raise ValueError(
                f"Slot {slot} must be one that join() gave and that has not ended, but it holds no stream."
            )
        return stream

    def _cut(self, rows: Sequence[int]) -> tuple[Float[Tensor, "B N"], Int[Tensor, "B"]]:
        """The next chunk of each stream. One shorter than a chunk is the last of a region, and may well be empty."""
        samples, lengths = torch.zeros(len(rows), self.chunk), torch.zeros(len(rows), dtype=torch.long)
        for row, slot in enumerate(rows):
            piece = self._open(slot).regions[0].cut(self.chunk)
            samples[row, : len(piece)], lengths[row] = piece, len(piece)
        return samples.to(self.recogniser.device), lengths.to(self.recogniser.device)

    def _endpoint(self, slot: int, beam: list[Hypothesis]) -> bool:
        best = beam[0] if beam else None
        frames = self._open(slot).frames
        return self.endpoint is not None and self.endpoint(best, frames, self.recogniser.frame_seconds)

    def _conclude(self, rows: Sequence[int]) -> list[list[Hypothesis]]:
        """The last word of the search on these streams, which begin a new segment with it."""
        if not rows:
            return []
        beams = self.search.finish(take(self._found, rows))
        self._found = put(self._found, rows, self.search.init_state(len(rows)))
        return beams

    def _update(self, slot: int, beam: list[Hypothesis], final: bool, left: bool) -> Update:
        stream, recogniser = self._open(slot), self.recogniser
        region = stream.regions[0]
        best = beam[0] if beam else Hypothesis()
        best = replace(best, spans=tuple((start + region.before, end + region.before) for start, end in best.spans))
        heard = recogniser.transcript(best, region.heard / recogniser.sample_rate)
        heard = heard.later(region.start / recogniser.sample_rate)
        stable = heard.text if final else recogniser.tokenizer.decode(best.tokens[: stable_prefix(beam)])
        ended = left and stream.ending and len(stream.regions) == 1
        update = Update(
            slot=slot,
            segment=stream.segment,
            text=heard.text,
            stable=commonprefix([heard.text, stable]),  # noqa: RUF071 - of characters
            words=heard.words,
            final=final,
            ended=ended,
            seconds=heard.seconds,
        )
        if final:
            stream.segment, region.before, stream.frames = stream.segment + 1, region.before + stream.frames, 0
        if left:
            stream.regions.popleft()
        if ended:
            self._streams[slot] = None
        return update


def transcript(updates: Iterable[Update]) -> Transcript:
    """The whole of one stream, from its updates; only the final ones matter."""
    finals = [Transcript(update.text, update.words, update.seconds) for update in updates if update.final]
    return Transcript.joined(finals, finals[-1].seconds if finals else 0.0)


def transcribe(session: Session, clips: Sequence[np.ndarray | Tensor]) -> list[Transcript]:
    """Recordings ``[N]`` at the model's rate as streams, as fast as they can be heard and as many at once as slots are.

    Raises:
        ValueError: as `Session.push`, and where the session has streams already.
    """
    if session.streams:
        raise ValueError(
            f"transcribe() must have all slots of a session, but {session.streams} hold streams; give it a new Session."
        )
    finals: list[list[Update]] = [[] for _ in clips]
    waiting, number_in = deque(enumerate(clips)), dict[int, int]()
    while waiting or session.streams:
        while waiting and session.free:
            number, clip = waiting.popleft()
            slot = session.join()
            number_in[slot] = number
            session.push(slot, clip)
            session.finish(slot)
        for update in session.step():
            if update.final:
                finals[number_in[update.slot]].append(update)
    return [transcript(updates) for updates in finals]


def live_context(recogniser: Recogniser, chunk: Seconds | None = None) -> Context:
    """The context to stream a recogniser in: its own as far as that is bounded, with chunks of ``chunk`` seconds.

    What its own leaves open is chunks of `CHUNK` and a past of `LEFT` seconds.

    Raises:
        ValueError: where the encoder cannot stream, or ``chunk`` is not a whole number of its slowest frames.
    """
    own, frames = recogniser.context, _slowest(recogniser.encoder)
    unit = frames * recogniser.frame_seconds
    left = own.left if own.left is not None else frames * round(LEFT / unit)
    if chunk is None:
        return Context(left, own.chunk or frames * max(1, round(CHUNK / unit)))
    count = max(1, round(chunk / unit))
    if abs(count * unit - chunk) > 1e-6:
        raise ValueError(
            f"A chunk of this model must be a multiple of {1000 * unit:g} ms, but is {1000 * chunk:g} ms; "
            f"the nearest is {1000 * unit * count:g} ms."
        )
    return Context(left, frames * count)


def _slowest(encoder: Any) -> int:
    """Encoder frames that one frame of its slowest part covers: chunk and left must be multiples of it.

    An encoder says what it refuses in `init_state`; nothing else needs to know its clocks.
    """
    refused = ValueError("no context was tried")
    for frames in (1, 2, 4, 8, 16):
        try:
            encoder.init_state(1, context=Context(left=frames, chunk=frames))
            return frames
        except ValueError as error:
            refused = error
    raise refused
