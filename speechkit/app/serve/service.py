"""The routes of a server, and what is said on a connection: docs/serving.md is the protocol."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from speechkit.app.serve.engine import SCALE
from speechkit.app.serve.stream import Stream, StreamError
from speechkit.app.serve.streams import RATES, Limits, Streams
from speechkit.session import Session
from speechkit.types import Seconds

PAGE = Path(__file__).parents[1] / "page"
OPENING: Seconds = 10.0  # for the first message of a connection
TEXT_CHARACTERS = 4096
# Not the tables of the machine: some call scripts plain text, which browsers then refuse to run.
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".wav": "audio/wav",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; worker-src 'self' blob:; style-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'; manifest-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def is_local(host: str) -> bool:
    """Whether only this machine can reach that address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Service:
    """The routes of a server.

    Args:
        session: with a slot for each of the streams that ``limits`` allow.
        name: of the model.
        token: what a client must say, if anything.
        origins: pages that may use this server beside its own, for example ``https://speech.example.com``.
        local: only names of this machine are its own, so that no other name can be made to point here (DNS rebinding).
    """

    def __init__(
        self,
        session: Session,
        limits: Limits,
        *,
        name: str = "",
        token: str | None = None,
        origins: Sequence[str] = (),
        local: bool = True,
    ) -> None:
        self.streams = Streams(session, limits)
        self.limits, self.name, self.token, self.origins, self.local = limits, name, token, origins, local
        recogniser = session.recogniser
        self.chunk_ms = round(1000 * session.chunk / recogniser.sample_rate, 3)
        self.search = type(session.search).__name__
        self.about = f"{self.search}, chunks of {self.chunk_ms:g} ms, {limits.streams} streams, {recogniser.device}"
        self.page = files(PAGE)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self.get_page),
                Route("/page/{name}", self.get_page),
                Route("/health", self.get_health),
                Route("/metrics", self.get_metrics),
                WebSocketRoute("/v1/stream", self.stream),
                Route("/{rest:path}", self.get_nothing),
            ],
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.streams.start()
        yield

    async def get_page(self, request: Request) -> Response:
        file = self.page.get(request.path_params.get("name", "index.html"))
        if file is None:
            return await self.get_nothing(request)
        kind = KINDS.get(file.suffix, "application/octet-stream")
        return FileResponse(file, headers=HEADERS, media_type=kind)

    async def get_nothing(self, _: Request) -> Response:
        return PlainTextResponse("There is no such page here; try /, /health or /metrics.\n", 404, HEADERS)

    async def get_health(self, _: Request) -> Response:
        closing, count = self.streams.closing, len(self.streams.open)
        status = {"status": "stopping" if closing else "ok", "model": self.name, "search": self.search}
        numbers = {"chunk_ms": self.chunk_ms, "streams": count, "max_streams": self.limits.streams}
        return JSONResponse(status | numbers, 503 if closing else 200, HEADERS)

    async def get_metrics(self, request: Request) -> Response:
        said = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not self._knows(said):
            return PlainTextResponse("Send the token of this server: Authorization: Bearer TOKEN\n", 401, HEADERS)
        return PlainTextResponse(self.streams.exposition(), media_type="text/plain; version=0.0.4", headers=HEADERS)

    async def stream(self, websocket: WebSocket) -> None:
        """One connection, from its opening message to its end."""
        if not self._own(websocket.headers.get("origin"), websocket.headers.get("host", "")):
            await websocket.close()  # before it is accepted: HTTP 403
            return
        await websocket.accept()
        try:
            stream = await self._open(websocket)
            await self._converse(websocket, stream)
        except StreamError as refusal:
            self.streams.metrics.count("speechkit_streams_refused_total", label=f'code="{refusal.code}"')
            await _refuse(websocket, refusal)
        except WebSocketDisconnect:
            pass

    def _own(self, origin: str | None, host: str) -> bool:
        """Whether a page of ``origin`` may use this server; a client that is no browser has none."""
        if origin is None or origin in self.origins:
            return True
        page = urlsplit(origin)
        return page.netloc == host and (not self.local or is_local(page.hostname or ""))

    def _knows(self, token: object) -> bool:
        return self.token is None or secrets.compare_digest(repr(token), repr(self.token))

    async def _open(self, websocket: WebSocket) -> Stream:
        """The stream that the opening message asks for."""
        try:
            async with asyncio.timeout(OPENING):
                opening = _opening(await _receive(websocket))
        except TimeoutError as error:
            raise StreamError(
                "bad_message", f"The first message must come within {OPENING:g} s; connect again."
            ) from error
        if not self._knows(opening.get("token", "")):
            raise StreamError("unauthorised", "The first message must hold this server's token; ask who runs it.")
        if opening["type"] == "resume":
            return self.streams.resume(opening.get("stream"))
        address = websocket.client.host if websocket.client else ""
        rate, encoding = _format(opening)
        return self.streams.join(address=address, sample_rate=rate, encoding=encoding)

    async def _converse(self, websocket: WebSocket, stream: Stream) -> None:
        """Hear and say at once, until one of them is at its end.

        Raises:
            StreamError: for what the client did wrong, or what became of its stream.
        """
        tasks = [asyncio.ensure_future(work) for work in (self._hear(websocket, stream), self._say(websocket, stream))]
        dropped: list[StreamError] = []

        def drop(refusal: StreamError) -> None:
            dropped.append(refusal)
            for task in tasks:
                task.cancel()

        stream.drop = drop
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        hearing, saying = await asyncio.gather(*tasks, return_exceptions=True)
        mine = stream.drop is drop
        if not dropped and saying is None:
            self.streams.told(stream)
            await websocket.close()
        elif isinstance(hearing, StreamError) and mine:
            self.streams.remove(stream, hearing.code)
        elif mine:
            self.streams.lost(stream)
        for error in (*dropped, hearing, saying):
            if isinstance(error, Exception):
                raise error

    async def _hear(self, websocket: WebSocket, stream: Stream) -> None:
        """Hear a client until its stream is to end, then wait for it to go away."""
        while stream.reason is None:
            try:
                async with asyncio.timeout(self.limits.idle):
                    message = await _receive(websocket)
            except TimeoutError:
                stream.finish("idle")
                break
            if isinstance(message, bytes):
                await stream.hear(message)
                if stream.received > self.limits.seconds * stream.sample_rate:
                    stream.finish("limit")
            elif _parsed(message).get("type") == "stop":
                stream.finish("stop")
            else:
                raise StreamError(
                    "bad_message",
                    f'A client that is ready must send audio as binary messages, or the text {{"type": "stop"}}, '
                    f"but sent the text {message[:60]!r}; see docs/serving.md.",
                )
        while True:
            await _receive(websocket)

    async def _say(self, websocket: WebSocket, stream: Stream) -> None:
        ready = {
            "type": "ready",
            "stream": stream.id,
            "chunk_ms": self.chunk_ms,
            "sample_rate": stream.sample_rate,
            "received": stream.received,
            "model": self.name,
            "search": self.search,
            "resume_seconds": self.limits.resume,
        }
        await websocket.send_text(json.dumps(ready))
        while text := await stream.outbox.take():
            await websocket.send_text(text)


def files(folder: Path) -> dict[str, Path]:
    """The files of the page by name. What is not in this table cannot be asked for."""
    return {file.name: file for file in sorted(folder.iterdir()) if file.is_file()} if folder.is_dir() else {}


async def _receive(websocket: WebSocket) -> bytes | str:
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    said = message.get("bytes")
    return message["text"] if said is None else said


async def _refuse(websocket: WebSocket, refusal: StreamError) -> None:
    """Say why and close, if the client takes that; the connection is given up otherwise."""
    with suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
        async with asyncio.timeout(1.0):
            await websocket.send_text(refusal.message)
            await websocket.close(refusal.close_code, refusal.code)


def _parsed(message: str) -> dict[str, Any]:
    """A JSON object, or an empty one where the text is none."""
    try:
        said = json.loads(message) if len(message) <= TEXT_CHARACTERS else None
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _opening(message: bytes | str) -> dict[str, Any]:
    """The first message of a client, which says what it wants."""
    said = _parsed(message) if isinstance(message, str) else {}
    if said.get("type") not in ("start", "resume"):
        what = "was binary" if isinstance(message, bytes) else f"was {message[:60]!r}"
        raise StreamError(
            "bad_message",
            'The first message must be text like {"type": "start", "sample_rate": 16000, "encoding": "pcm_s16le"}, '
            f"but {what}; see docs/serving.md.",
        )
    return said


def _format(opening: dict[str, Any]) -> tuple[int, str]:
    """Sample rate and encoding of a stream."""
    rate, encoding = opening.get("sample_rate"), opening.get("encoding")
    if type(rate) is not int or rate not in RATES:
        raise StreamError(
            "bad_message",
            f"sample_rate must be one of {', '.join(map(str, RATES))} Hz, but is {rate!r:.40}; resample first.",
        )
    if not isinstance(encoding, str) or encoding not in SCALE:
        raise StreamError(
            "bad_message", f"encoding must be {' or '.join(SCALE)}, but is {encoding!r:.40}; convert first."
        )
    return rate, encoding
