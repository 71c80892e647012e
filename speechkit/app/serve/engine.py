"""One model, one loop: the thread that hears every stream of a server.

All work on a `Session` happens on this thread. What it is to do comes through a queue; what it has to say goes to a
callback once a turn. A stream is any object, by which the caller knows it.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from speechkit.session import Session, Update
from speechkit.types import Seconds

log = logging.getLogger("speechkit")

SCALE = {"pcm_s16le": ("<i2", 2, 32768.0), "pcm_f32le": ("<f4", 4, 1.0)}  # type, bytes a sample, full scale
LOUDEST = 8.0  # times full scale: resampled and mixed sound overshoots, but 16-bit numbers sent as floats do more
QUIETEST_DB = -120.0  # what digital silence is called


class Heard(NamedTuple):
    """A chunk of a stream: what it reads as, how loud it was, and when its last sample arrived (`time.monotonic`)."""

    stream: Any
    update: Update
    level_db: float
    arrived: Seconds


class Turn(NamedTuple):
    """What a turn of the loop has to say.

    Attributes:
        heard: in order for each stream.
        taken: bytes of each stream that no longer wait in the queue.
        failed: streams that were dropped, with code and sentence.
        seconds: what the step took.
    """

    heard: list[Heard]
    taken: dict[Any, int]
    failed: list[tuple[Any, str, str]]
    seconds: Seconds


@dataclass
class _Voice:
    """A stream as the thread sees it."""

    slot: int
    encoding: str
    pieces: deque[tuple[bytes, Seconds]] = field(default_factory=deque)
    finishing: bool = False  # nothing is added to ``pieces`` any more
    level_db: float = QUIETEST_DB
    arrived: Seconds = 0.0


class Engine:
    """The thread. Every method may be called from any other and returns at once.

    Args:
        session: nobody else may use it any more.
        tell: called on the thread of the engine with what a turn has to say.
    """

    def __init__(self, session: Session, tell: Callable[[Turn], None]) -> None:
        self.session = session
        self._tell = tell
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._voices: dict[Any, _Voice] = {}
        self._stream_in: dict[int, Any] = {}
        self._failed: list[tuple[Any, str, str]] = []
        self._chunk: Seconds = session.chunk / session.recogniser.sample_rate
        self._running = True
        self._thread = threading.Thread(target=self._run, name="speechkit-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the turn it is in, and wait for that."""
        self._orders.put(self._halt)
        self._thread.join()

    @property
    def depth(self) -> int:
        """Orders that the thread has not come to."""
        return self._orders.qsize()

    def join(self, stream: Any, *, sample_rate: int, encoding: str) -> None:
        """Open a stream; the caller sees to it that a slot is free."""
        self._orders.put(partial(self._join, stream, sample_rate, encoding))

    def feed(self, stream: Any, samples: bytes, arrived: Seconds) -> None:
        """The next whole samples of a stream: best a chunk of them, for that is what a step needs."""
        self._orders.put(partial(self._feed, stream, samples, arrived))

    def finish(self, stream: Any) -> None:
        """No more samples: hear what is left. The last `Heard` of the stream says ``ended``."""
        self._orders.put(partial(self._finish, stream))

    def leave(self, stream: Any) -> None:
        """Drop a stream; nothing more is said about it, apart from what is on its way."""
        self._orders.put(partial(self._leave, stream))

    def _run(self) -> None:
        busy = True
        while self._running:
            self._obey(wait=not busy)
            taken = self._push()
            started = time.perf_counter()
            heard = self._step()
            failed, self._failed = self._failed, []
            busy = bool(heard or taken)
            if busy or failed:
                self._tell(Turn(heard, taken, failed, time.perf_counter() - started))

    def _obey(self, *, wait: bool) -> None:
        """Everything that was ordered; where there is nothing else to do, wait for an order."""
        try:
            while True:
                self._orders.get(block=wait)()
                wait = False
        except queue.Empty:
            return

    def _push(self) -> dict[Any, int]:
        """Hand the session what its next step needs, and no more: the rest waits as bytes, and its client with it."""
        taken: dict[Any, int] = {}
        for stream, voice in list(self._voices.items()):
            try:
                while voice.pieces and self.session.waiting(voice.slot) < self._chunk:
                    taken[stream] = taken.get(stream, 0) + self._push_piece(voice)
                if voice.finishing and not voice.pieces:
                    voice.finishing = False
                    self.session.finish(voice.slot)
            except ValueError as error:
                self._fail(stream, "bad_audio", str(error))
        return taken

    def _push_piece(self, voice: _Voice) -> int:
        piece, voice.arrived = voice.pieces.popleft()
        samples = decode(piece, voice.encoding)
        voice.level_db = level_db(samples)
        self.session.push(voice.slot, samples)
        return len(piece)

    def _step(self) -> list[Heard]:
        try:
            return [self._heard(update) for update in self.session.step()]
        except Exception:
            # Whatever it was, a server goes on: rows of the state are made anew when streams join.
            log.exception("A step of the model failed, and %d streams were dropped with it.", len(self._voices))
            for stream in list(self._voices):
                self._fail(stream, "internal", "The model failed on this server; start again, and tell who runs it.")
            return []

    def _heard(self, update: Update) -> Heard:
        stream = self._stream_in[update.slot]
        voice = self._voices[stream]
        if update.ended:
            self._forget(stream)
        return Heard(stream, update, voice.level_db, voice.arrived)

    def _join(self, stream: Any, sample_rate: int, encoding: str) -> None:
        slot = self.session.join(sample_rate=sample_rate)
        self._voices[stream], self._stream_in[slot] = _Voice(slot, encoding), stream

    def _feed(self, stream: Any, samples: bytes, arrived: Seconds) -> None:
        if stream in self._voices:
            self._voices[stream].pieces.append((samples, arrived))

    def _finish(self, stream: Any) -> None:
        if stream in self._voices:
            self._voices[stream].finishing = True

    def _leave(self, stream: Any) -> None:
        if stream in self._voices:
            self.session.leave(self._forget(stream))

    def _fail(self, stream: Any, code: str, sentence: str) -> None:
        self._leave(stream)
        self._failed.append((stream, code, sentence))

    def _forget(self, stream: Any) -> int:
        slot = self._voices.pop(stream).slot
        del self._stream_in[slot]
        return slot

    def _halt(self) -> None:
        self._running = False


def decode(samples: bytes, encoding: str) -> np.ndarray:
    """PCM as floats ``[N]`` between -1 and 1.

    Raises:
        ValueError: where floating point samples are not finite, or far beyond full scale.
    """
    kind, _, scale = SCALE[encoding]
    decoded = np.frombuffer(samples, kind).astype(np.float32) / np.float32(scale)
    if encoding == "pcm_f32le" and not (np.abs(decoded) <= LOUDEST).all():
        at = int(np.argmin(np.abs(decoded) <= LOUDEST))
        raise ValueError(
            f"Samples of pcm_f32le must be finite numbers between -1 and 1, but sample {at} of a chunk is "
            f"{decoded[at]:g}; divide by the full scale, and replace what is not a number by 0."
        )
    return decoded


def level_db(samples: np.ndarray) -> float:
    """Root mean square in decibels of full scale."""
    power = float(np.dot(samples, samples)) / len(samples) if len(samples) else 0.0
    return max(QUIETEST_DB, 10 * math.log10(power)) if power > 0 else QUIETEST_DB
