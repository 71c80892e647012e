"""The streams of a server: who may open one, and what becomes of it when its connection is lost.

A `Stream` outlives its connection: a client that comes back within `Limits.resume` goes on as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

from speechkit.app.serve.engine import Engine, Heard, Turn
from speechkit.app.serve.metrics import Metrics
from speechkit.app.serve.stream import Stream, StreamError
from speechkit.features import Resampler
from speechkit.session import Session
from speechkit.types import Seconds

# What sound cards and files have. A kernel for rates with hardly a common divisor would take long to make.
RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000, 176400, 192000)


@dataclass(frozen=True)
class Limits:
    """What a server allows.

    Attributes:
        streams: at once.
        per_address: of them from one address.
        resume: how long a stream waits for a client that lost its connection.
        idle: without audio, after which a stream ends.
        seconds: of audio, after which a stream ends.
    """

    streams: int = 64
    per_address: int = 16
    resume: Seconds = 15.0
    idle: Seconds = 60.0
    seconds: Seconds = 4 * 3600.0


class Streams:
    """All of them, and who may have one.

    Args:
        session: with as many slots as `Limits.streams`.
    """

    def __init__(self, session: Session, limits: Limits) -> None:
        self.limits, self.metrics = limits, Metrics()
        self.engine = Engine(session, self._tell)
        self.closing = False
        self._all: dict[str, Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        rate = session.recogniser.sample_rate
        self._latency = {source: Resampler(source_hz=source, target_hz=rate).latency for source in RATES}

    def start(self) -> None:
        """Begin to hear; called in the event loop that everything else here is called in."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    async def close(self, within: Seconds) -> None:
        """Take no more streams, flush all, wait until they are told, but no longer than ``within``."""
        self.closing = True
        for stream in self.open:
            stream.finish("shutdown")
            if stream.drop is None:
                self._wait_no_more(stream)
        until = time.monotonic() + within
        while any(stream.drop or not stream.ended for stream in self._all.values()) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self.engine.stop)

    @property
    def open(self) -> list[Stream]:
        """Those that hold a slot; the others are over, and could still be asked for."""
        return [stream for stream in self._all.values() if not stream.ended]

    def join(self, *, address: str, sample_rate: int, encoding: str) -> Stream:
        """Open a stream.

        Raises:
            StreamError: where there are too many, or the server ends.
        """
        self._require_room(address)
        latency = self._latency[sample_rate]
        stream = Stream(self.engine, address=address, sample_rate=sample_rate, encoding=encoding, latency=latency)
        self._all[stream.id] = stream
        self.engine.join(stream, sample_rate=sample_rate, encoding=encoding)
        self.metrics.count("speechkit_streams_joined_total")
        return stream

    def resume(self, identity: object) -> Stream:
        """Take up a stream again; a connection that it still has is dropped.

        Raises:
            StreamError: where there is none.
        """
        stream = self._all.get(identity) if isinstance(identity, str) else None
        if stream is None or stream.forsaken:
            raise StreamError(
                "gone",
                f"A stream must be taken up again within {self.limits.resume:g} s, but this one is over or was never "
                f"there; start another one.",
            )
        if stream.drop:
            stream.drop(StreamError("replaced", "Another connection has taken up this stream; use that one."))
        if stream.expiry:
            stream.expiry.cancel()
        stream.forget_half_a_sample()
        stream.outbox.repeat()
        self.metrics.count("speechkit_streams_resumed_total")
        return stream

    def lost(self, stream: Stream) -> None:
        """A stream has no connection any more: it waits for its client for a while, unless there is nothing to keep."""
        stream.drop = None
        wait = 0.0 if self.closing or not stream.received else self.limits.resume
        assert self._loop
        stream.expiry = self._loop.call_later(wait, self._wait_no_more, stream)

    def remove(self, stream: Stream, reason: str) -> None:
        """Drop a stream at once, with what it has not said."""
        if self._all.pop(stream.id, None) and not stream.ended:
            self.engine.leave(stream)
            stream.ended = True
            self._count_end(reason)

    def told(self, stream: Stream) -> None:
        """The client has its `end`. Should it have been lost, it is said again to a client that asks for it."""
        self.lost(stream)
        over = [one for one in self._all.values() if one.ended and not one.drop]
        for oldest in over[: -self.limits.streams]:
            self._wait_no_more(oldest)

    def exposition(self) -> str:
        """The page of /metrics."""
        lost = sum(stream.drop is None for stream in self.open)
        waiting = sum(stream.waiting_bytes for stream in self.open)
        return self.metrics.text(
            {
                "speechkit_streams_open": ("Streams that hold a slot.", len(self.open)),
                "speechkit_streams_lost": ("Of them, those whose connection was lost.", lost),
                "speechkit_streams_limit": ("Streams that can be open at once.", self.limits.streams),
                "speechkit_waiting_bytes": ("Audio that was received and not yet given to the model.", waiting),
                "speechkit_queue_depth": ("Orders that the thread of the model has not come to.", self.engine.depth),
            }
        )

    def _require_room(self, address: str) -> None:
        if self.closing:
            raise StreamError("shutdown", "This server is being stopped and takes no streams; try again in a minute.")
        addresses = Counter(stream.address for stream in self.open)
        if sum(addresses.values()) >= self.limits.streams:
            raise StreamError("busy", f"All {self.limits.streams} streams of this server are taken; try again later.")
        if addresses[address] >= self.limits.per_address:
            raise StreamError(
                "busy",
                f"An address may have {self.limits.per_address} streams at once, but {address} has that many; end one "
                f"of them first.",
            )

    def _wait_no_more(self, stream: Stream) -> None:
        """Nobody comes back for this stream: flush it, and forget it once that is done."""
        stream.forsaken = True
        stream.finish("lost")
        if stream.ended:
            self._all.pop(stream.id, None)

    def _tell(self, turn: Turn) -> None:
        assert self._loop
        self._loop.call_soon_threadsafe(self._hear, turn)

    def _hear(self, turn: Turn) -> None:
        """What the engine has to say, on the event loop."""
        if turn.heard:
            self.metrics.times["speechkit_step_seconds"].add(turn.seconds)
            self.metrics.count("speechkit_chunks_total", len(turn.heard))
        for stream, count in turn.taken.items():
            self.metrics.count("speechkit_audio_seconds_total", stream.taken(count))
        for heard in turn.heard:
            self._say(heard)
        for stream, code, sentence in turn.failed:
            self.remove(stream, code)
            if stream.drop:
                stream.drop(StreamError(code, sentence))

    def _say(self, heard: Heard) -> None:
        stream: Stream = heard.stream
        if stream.id not in self._all:
            return  # dropped while this was on its way
        self.metrics.times["speechkit_latency_seconds"].add(time.monotonic() - heard.arrived)
        try:
            stream.say(heard)
        except StreamError as refusal:
            if stream.drop:
                stream.drop(refusal)
        if stream.ended:
            self._count_end(stream.reason or "")
            if stream.forsaken:
                self._all.pop(stream.id, None)

    def _count_end(self, reason: str) -> None:
        self.metrics.count("speechkit_streams_ended_total", label=f'reason="{reason}"')
