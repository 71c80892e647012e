"""One stream as the event loop sees it: what waits to be heard, and what waits to be said.

Nothing here waits for a model and nothing grows without bound: a stream holds `AHEAD` seconds of sound and one message
more, one text that may still change, and `OUTBOX` texts that may not.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections import deque
from collections.abc import Callable

from speechkit.app.serve.engine import SCALE, Engine, Heard
from speechkit.types import Seconds

AHEAD: Seconds = 2.0  # of sound beyond a chunk, that a client may be ahead of what was heard
OUTBOX = 64  # final texts that wait for a client that does not read
REPEATED = 16  # final texts that are said again after a lost connection, because they may have been lost with it

# Code of an error: the close code of RFC 6455, section 7.4.1, that goes with it, and whether to try again may help.
ERRORS = {
    "busy": (1013, True),
    "shutdown": (1013, True),
    "slow_client": (1008, True),
    "internal": (1011, True),
    "bad_message": (1008, False),
    "bad_audio": (1008, False),
    "unauthorised": (1008, False),
    "gone": (1008, False),
    "replaced": (1008, False),
}


class StreamError(Exception):
    """A client is told no: a code of `ERRORS`, and a sentence with the remedy."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code

    @property
    def close_code(self) -> int:
        return ERRORS[self.code][0]

    @property
    def message(self) -> str:
        return json.dumps(
            {"type": "error", "code": self.code, "message": str(self), "retry": ERRORS[self.code][1]},
            ensure_ascii=False,
        )


class Outbox:
    """What waits to be said to a client: every final text, and of the others the newest."""

    def __init__(self) -> None:
        self.finals: deque[str] = deque()
        self.newest: str | None = None
        self.end: str | None = None  # the last thing to say
        self.done = False
        self.said: deque[str] = deque(maxlen=REPEATED)
        self.changed = asyncio.Event()

    def put(self, text: str, *, final: bool) -> None:
        """Raises `StreamError` where too many final texts wait."""
        if final:
            self.finals.append(text)
        self.newest = None if final else text
        self.changed.set()
        if len(self.finals) > OUTBOX:
            self.finals.popleft()
            raise StreamError(
                "slow_client",
                f"A client must read what it is sent, but {OUTBOX} final texts are waiting; read them in a task of "
                f"their own, beside the sending of audio.",
            )

    def close(self, text: str) -> None:
        """The last thing to say."""
        self.end = text
        self.changed.set()

    async def take(self) -> str | None:
        """What is to be said next, as soon as there is something; ``None`` after the end."""
        while (text := self._next()) is None and not self.done:
            self.changed.clear()
            await self.changed.wait()
        return text

    def repeat(self) -> None:
        """Say again what may have been lost with a connection."""
        self.finals.extendleft(reversed(self.said))
        self.said.clear()
        self.done = False
        self.changed.set()

    def _next(self) -> str | None:
        if self.finals:
            self.said.append(self.finals.popleft())
            return self.said[-1]
        if self.newest:
            text, self.newest = self.newest, None
            return text
        if self.end and not self.done:
            self.done = True
            return self.end
        return None


class Stream:
    """One stream, connected or waiting for its client."""

    def __init__(self, engine: Engine, *, address: str, sample_rate: int, encoding: str, latency: int) -> None:
        self.id = secrets.token_urlsafe(16)
        self.engine, self.address, self.sample_rate, self.encoding = engine, address, sample_rate, encoding
        self.outbox = Outbox()
        self.received = 0  # samples
        self.reason: str | None = None  # why it is to end
        self.ended = False
        self.forsaken = False  # nobody can take it up again
        self.drop: Callable[[StreamError], None] | None = None  # its connection; None while it waits for its client
        self.expiry: asyncio.TimerHandle | None = None
        self._width = SCALE[encoding][1]
        self._chunk = engine.session.chunk / engine.session.recogniser.sample_rate
        self._latency = latency  # samples that the resampler holds back
        self._held = bytearray()  # not fed: less than a chunk, or what there is no room for
        self._pieces = self._fed = 0  # fed pieces, and the samples in them
        self._unheard = 0  # bytes that were fed and that the engine has not taken
        self._room = asyncio.Event()

    async def hear(self, samples: bytes) -> None:
        """More samples, cut anywhere. Returns when there is room for the next ones."""
        arrived = time.monotonic()
        self._held += samples
        self.received += (len(self._held) // self._width) - self._whole
        while self.reason is None and len(self._held) >= (size := self._piece()):
            await self._wait_for_room()
            self._feed(size, arrived)

    @property
    def waiting_bytes(self) -> int:
        """Sound that was received and that the engine has not taken."""
        return self._unheard + len(self._held)

    @property
    def _whole(self) -> int:
        """Whole samples held and counted."""
        return self.received - self._fed

    def finish(self, reason: str) -> None:
        """Hear what is held, then end. Later reasons change nothing."""
        if self.reason is None:
            self.reason = reason
            self._feed(len(self._held) // self._width * self._width, time.monotonic())
            self.engine.finish(self)
            self._room.set()

    def forget_half_a_sample(self) -> None:
        """The connection was lost inside of one; the client sends all of it again."""
        del self._held[self._whole * self._width :]

    def taken(self, count: int) -> Seconds:
        """The engine has taken so many bytes, which is so much sound."""
        self._unheard -= count
        self._room.set()
        return count / (self._width * self.sample_rate)

    def say(self, heard: Heard) -> None:
        """Put what was heard into the outbox. Raises `StreamError` where that is full."""
        update = heard.update
        if update.ended:
            self.ended = True
            end = {"type": "end", "seconds": round(update.seconds, 3), "reason": self.reason}
            self.outbox.close(json.dumps(end))
        self.outbox.put(message_of(heard), final=update.final)

    def _piece(self) -> int:
        """Bytes up to the next border of a chunk, and what the resampler holds back there."""
        border = math.ceil((self._pieces + 1) * self._chunk * self.sample_rate - 1e-6) + self._latency
        return (border - self._fed) * self._width

    async def _wait_for_room(self) -> None:
        most = AHEAD * self.sample_rate * self._width
        while self._unheard > most and self.reason is None:
            self._room.clear()
            await self._room.wait()

    def _feed(self, size: int, arrived: Seconds) -> None:
        piece = bytes(self._held[:size])
        del self._held[:size]
        if piece:
            self._pieces += 1
            self._fed += len(piece) // self._width
            self._unheard += len(piece)
            self.engine.feed(self, piece, arrived)


def message_of(heard: Heard) -> str:
    """The `text` message of a chunk."""
    update = heard.update
    return json.dumps(
        {
            "type": "text",
            "segment": update.segment,
            "text": update.text,
            "stable": update.stable,
            "final": update.final,
            "words": [
                {
                    "word": word.word,
                    "start": round(word.start, 3),
                    "end": round(word.end, 3),
                    "confidence": round(word.confidence, 4),
                }
                for word in update.words
            ],
            "seconds": round(update.seconds, 3),
            "level_db": round(heard.level_db, 1),
            "latency_ms": round(1000 * (time.monotonic() - heard.arrived), 1),
        },
        ensure_ascii=False,
    )
