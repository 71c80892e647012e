"""A real server on a real socket, in a thread, and clients that talk to it as docs/serving.md says."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

pytest.importorskip("uvicorn", reason="the server is not installed: pip install 'speechkit[serve]'")

from speechkit.app.serve import Server, listen
from speechkit.app.serve.service import Service
from speechkit.app.serve.streams import Limits
from speechkit.session import Session, Update

Message = dict[str, Any]
SCALES = {"pcm_s16le": ("<i2", 32767), "pcm_f32le": ("<f4", 1)}


class Running:
    """A server that runs: its service, and where it is."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.service, self.port = server, server.service, port
        self.url, self.http = f"ws://127.0.0.1:{port}/v1/stream", f"http://127.0.0.1:{port}"

    def settle(self, within: float = 10.0) -> None:
        """Wait until no connection is left, no stream holds a slot, and nothing is remembered of any."""
        streams, state = self.service.streams, self.server.server_state
        wait_for(lambda: not (state.connections or state.tasks), within)
        wait_for(lambda: not (streams._all or streams.engine.session.streams), within)


@contextmanager
def running(session: Session, limits: Limits | None = None, **options: Any) -> Iterator[Running]:
    with listen("127.0.0.1", 0) as listening:
        server = Server(Service(session, limits or Limits(resume=0.3), name="overfit", **options))
        thread = threading.Thread(target=server.run, args=([listening],))
        port = listening.getsockname()[1]
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield Running(server, port)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def wait_for(true: Callable[[], Any], within: float = 10.0) -> None:
    until = time.monotonic() + within
    while not true():
        assert time.monotonic() < until, "this did not happen in time"
        time.sleep(0.01)


def pcm(clip: np.ndarray, encoding: str = "pcm_s16le") -> bytes:
    kind, scale = SCALES[encoding]
    return (np.clip(clip, -1, 1) * scale).astype(kind).tobytes()


def floats(data: bytes, encoding: str) -> np.ndarray:
    """What a server makes of `pcm`, by the definition of both encodings."""
    return np.frombuffer(data, SCALES[encoding][0]).astype(np.float32) / (32768 if encoding == "pcm_s16le" else 1)


def start(sample_rate: int = 16000, encoding: str = "pcm_s16le", **more: Any) -> str:
    return json.dumps({"type": "start", "sample_rate": sample_rate, "encoding": encoding, **more})


STOP = json.dumps({"type": "stop"})


async def receive(socket: ClientConnection) -> Message:
    async with asyncio.timeout(20):
        return json.loads(await socket.recv())


async def rest(socket: ClientConnection) -> list[Message]:
    """All messages until the connection is closed, by whomever."""
    messages = []
    with suppress(ConnectionClosed):
        async with asyncio.timeout(30):
            async for message in socket:
                messages.append(json.loads(message))
    return messages


async def opened(socket: ClientConnection, hello: str) -> Message:
    await socket.send(hello)
    return await receive(socket)


async def speak(
    url: str, pieces: Iterable[bytes], hello: str, pause: Callable[[], float] = lambda: 0.0
) -> list[Message]:
    """One stream from start to end: all messages after `ready`."""
    async with connect(url) as socket:
        ready = await opened(socket, hello)
        assert ready["type"] == "ready", ready
        reader = asyncio.create_task(rest(socket))
        for piece in pieces:
            await socket.send(piece)
            await asyncio.sleep(pause())
        await socket.send(STOP)
        return await reader


def said(messages: Sequence[Message]) -> list[Message]:
    """What a stream said in the end: the final texts with their words and times, and how it ended."""
    finals = [m for m in messages if m["type"] == "text" and m["final"]]
    kept = ("segment", "text", "words", "seconds")
    return [{key: m[key] for key in kept} for m in finals] + [m for m in messages if m["type"] != "text"]


def text(messages: Sequence[Message]) -> str:
    return " ".join(m["text"] for m in messages if m["type"] == "text" and m["final"] and m["text"])


def offline(session: Session, clip: np.ndarray, sample_rate: int) -> list[Update]:
    """The final updates of a session that hears a recording at once."""
    slot = session.join(sample_rate=sample_rate)
    session.push(slot, clip)
    session.finish(slot)
    return [update for update in session.drain() if update.final]
