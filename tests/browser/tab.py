"""A page in a browser, and a server for it whose every word a test decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "speechkit" / "app" / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


class Tab:
    """A page with its own storage. Leaving it asserts that nothing went wrong that a reader would not see.

    Attributes:
        page: playwright's.
        server: what answers its WebSocket, unless the page came from a real server.
    """

    def __init__(self, chromium: Any, home: str, **settings: Any) -> None:
        self.home = home
        self.context = chromium.new_context(viewport={"width": 1000, "height": 760}, **settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(5_000)
        self.server = Scripted()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))

    def open(self, host: str = "localhost") -> Any:
        """The page from its files, with the scripted server behind it."""
        self.page.route_web_socket("**/v1/stream", self.server.accept)
        self.page.goto(self.home.replace("localhost", host))
        return self.page

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.context.close()
        if kind is None:
            assert self.errors == []


class Files(BaseHTTPRequestHandler):
    """The page and its files, as a server gives them."""

    def do_GET(self) -> None:
        path = PAGE / (self.path.split("?")[0].rsplit("/", 1)[-1] or "index.html")
        if path.name == "health":
            self._send("application/json", b'{"status": "ok", "model": "scripted", "search": "Greedy"}')
        elif path.is_file():
            self._send(TYPES[path.suffix], path.read_bytes())
        else:
            self.send_error(404)

    def _send(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


class Scripted:
    """A server whose every word a test decides.

    Attributes:
        hellos: opening messages, parsed.
        heard: the samples of the stream, as a server would have them that resumes where it stopped hearing.
        stopped: whether the client said that there is no more.
        socket: the connection that is open.
    """

    def __init__(self) -> None:
        self.hellos: list[dict[str, Any]] = []
        self.heard = b""
        self.stopped = False
        self.socket: Any = None
        self.accepts: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda hello: None
        self.forgets = 0  # samples that were on their way when a connection broke
        self.deaf = False  # nothing is answered at all

    def accept(self, socket: Any) -> None:
        if self.deaf:
            socket.close(code=1011)
            return
        self.socket = socket
        socket.on_message(lambda message: self._take(socket, message))

    def send(self, **message: Any) -> None:
        self.socket.send(json.dumps(message))

    def say(
        self, text: str, *, stable: str = "", final: bool = False, segment: int = 0, confidence: float = 0.9
    ) -> None:
        """A ``text`` message: half a second for each word, from the second that has the segment's number."""
        start = 1.0 * segment
        words = [
            {"word": word, "start": start + 0.5 * at, "end": start + 0.5 * at + 0.4, "confidence": confidence}
            for at, word in enumerate(text.split())
        ]
        self.send(
            type="text", segment=segment, text=text, stable=text if final else stable, final=final, words=words,
            seconds=len(self.heard) / 2 / self.hellos[0]["sample_rate"], level_db=-20.0, latency_ms=41.0,
        )  # fmt: skip

    def end(self, reason: str = "stop") -> None:
        self.send(type="end", seconds=1.0, reason=reason)

    def refuse(self, code: str, message: str, *, retry: bool = False) -> None:
        self.send(type="error", code=code, message=message, retry=retry)
        self.socket.close(code=1008)

    def cut(self) -> None:
        """Break the connection; the last samples never arrived."""
        self.heard = self.heard[: max(0, len(self.heard) - 2 * self.forgets)]
        self.socket.close(code=1011)

    def _take(self, socket: Any, message: str | bytes) -> None:
        if isinstance(message, bytes):
            self.heard += message
        elif (hello := json.loads(message))["type"] == "stop":
            self.stopped = True
        else:
            self.hellos.append(hello)
            error = self.accepts(hello)
            if error:
                self.refuse(**error)
            else:
                self.send(
                    type="ready", stream="one", chunk_ms=320, sample_rate=self.hellos[0]["sample_rate"],
                    received=len(self.heard) // 2, model="scripted", search="greedy",
                )  # fmt: skip

    @property
    def samples(self) -> np.ndarray:
        return np.frombuffer(self.heard, "<i2") / 32768
