"""``speechkit serve``: live transcription over WebSockets, and the page that uses it. See docs/serving.md."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch

from speechkit.app.serve.streams import Limits
from speechkit.app.transcribe import search_of, seconds
from speechkit.pretrained import load_recogniser
from speechkit.recogniser import Recogniser
from speechkit.search import Rescored
from speechkit.session import Session, live_context
from speechkit.types import Seconds
from speechkit.vad import Vad

try:
    import uvicorn

    from speechkit.app.serve.service import Service, is_local
except ImportError as error:
    raise ImportError(
        f"speechkit serve needs starlette, uvicorn and websockets, but {error.name} is not installed; "
        f"install them with: pip install 'speechkit[serve]'"
    ) from error

MESSAGE_BYTES = 1 << 20  # a longer message is not read: the connection is closed with 1009
FLUSH: Seconds = 10.0  # for all streams when the server is stopped
STALLED_MS = 20_000  # a connection whose client takes nothing for so long is lost
CONNECTIONS = 1000


def serve(
    *,
    model: str,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    device: str | None = None,
    chunk_ms: float | None = None,
    search: str | None = None,
    max_streams: int = Limits.streams,
    max_per_address: int = Limits.per_address,
    max_seconds: Seconds = Limits.seconds,
    resume_seconds: Seconds = Limits.resume,
    idle_seconds: Seconds = Limits.idle,
    allow_origin: Sequence[str] = (),
    vad: bool = False,
) -> None:
    """Serve a model until the process is told to stop; then every stream is flushed.

    Raises:
        ValueError: where the model cannot stream, the device is absent, or the port cannot be had.
    """
    recogniser = ready(model, device, search)
    limits = Limits(max_streams, max_per_address, resume_seconds, idle_seconds, max_seconds)
    context = live_context(recogniser, seconds(chunk_ms))
    session = Session(recogniser, slots=max_streams, context=context, vad=Vad() if vad else None)
    with listen(host, port) as listening:
        session.trace()  # builds operators too: no client should wait for that
        name = Path(model).resolve().name
        service = Service(session, limits, name=name, token=token, origins=allow_origin, local=is_local(host))
        print(f"speechkit: {name} listens on {url(listening)} ({service.about})", flush=True)
        Server(service).run([listening])


def ready(model: str, device: str | None, search: str | None) -> Recogniser:
    """The model on its device. Where it has both heads and nothing else is asked for, they decide in two passes."""
    recogniser = load_recogniser(model)
    try:
        recogniser = recogniser.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"--device must be a device of this machine, but {device} is not ({reason}); leave it out, or pass cpu."
        ) from error
    both = recogniser.objective.ctc is not None and recogniser.objective.attention is not None
    recogniser.search = Rescored(recogniser.objective) if both and search is None else search_of(recogniser, search)
    return recogniser


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections hold little and give a dead client up.

    Raises:
        ValueError: where it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        remedy = "choose another one with --port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "check --host"
        raise ValueError(
            f"The server must get an address of its own, but {host} port {port} cannot be had ({reason}); {remedy}."
        ) from error
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # RFC 5482; inherited by the connections, as the line above
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)
    return listening


def url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, which would cut all connections when told to stop: the streams are flushed before."""

    def __init__(self, service: Service) -> None:
        self.service = service
        super().__init__(
            uvicorn.Config(
                service.app(),
                http="h11",
                ws="websockets-sansio",  # stops reading where nobody takes what was read
                ws_max_size=MESSAGE_BYTES,
                ws_ping_timeout=None,  # the answer waits behind audio that is not read yet
                ws_per_message_deflate=False,
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=1,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.service.streams.close(FLUSH)
        await super().shutdown(sockets)
