"""What clients do wrong, over real sockets: nobody else is disturbed, and nothing is kept."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import pytest
from live import STOP, Message, Running, offline, opened, pcm, receive, rest, running, said, speak, start, text
from overfit import Overfit
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from speechkit.app.serve import stream as stream_module
from speechkit.app.serve.stream import Stream
from speechkit.app.serve.streams import Limits
from speechkit.session import Session, Update


@pytest.fixture(scope="module")
def server(overfit: Overfit) -> Iterator[Running]:
    limits = Limits(streams=40, per_address=40, resume=0.2)
    with running(Session(overfit.recogniser, slots=40), limits) as found:
        yield found


async def refused(url: str, *messages: str | bytes) -> tuple[Message, int]:
    """The last message to a client that says this, and the close code."""
    async with connect(url) as client:
        with suppress(ConnectionClosed):  # sooner than the last of them was sent
            for message in messages:
                await client.send(message)
        answers = await rest(client)
        return answers[-1] if answers else {}, client.close_code


@pytest.mark.parametrize(
    ("opening", "sentence"),
    [
        ("{", "must be text like .* but was '{'"),
        ("[]", "must be text like"),
        ("null", "must be text like"),
        ("[" * 100_000, "must be text like"),
        ('{"type": ["start"]}', "must be text like"),
        ("\u0000", "must be text like"),
        (b"\x00\x00", "but was binary"),
        (STOP, "must be text like"),
        (start(16001), "sample_rate must be one of 8000, .* but is 16001; resample"),
        (start("16000"), "sample_rate must be one of .* but is '16000'"),  # type: ignore[arg-type]
        (start(True), "sample_rate must be one of .* but is True"),  # type: ignore[arg-type]
        (start(16000.0), "sample_rate must be one of .* but is 16000.0"),  # type: ignore[arg-type]
        (start(10**40), "sample_rate must be one of"),
        (start(16000, "opus"), "encoding must be pcm_s16le or pcm_f32le, but is 'opus'"),
        (start(16000, ["pcm_s16le"]), "encoding must be"),  # type: ignore[arg-type]
    ],
)
def test_an_opening_that_makes_no_sense_is_told_so(server: Running, opening: str | bytes, sentence: str) -> None:
    error, code = asyncio.run(refused(server.url, opening))
    assert (error["type"], error["code"], error["retry"], code) == ("error", "bad_message", False, 1008)
    assert re.search(sentence, error["message"]) and error["message"].endswith(".")


@pytest.mark.parametrize("junk", ["hello", "{}", '{"type": "start"}', "1" * 100_000, '"\\ud800"'])
def test_text_where_audio_is_due_ends_the_stream(server: Running, junk: str) -> None:
    error, code = asyncio.run(refused(server.url, start(), bytes(20_000), junk))
    assert (error["code"], code) == ("bad_message", 1008)
    assert error["message"].startswith("A client that is ready must send audio as binary messages")
    server.settle(2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, 32767.0])
def test_floats_that_are_no_sound_are_refused(server: Running, value: float) -> None:
    samples = np.full(20_000, 0.01, "<f4")
    samples[7000] = value
    error, code = asyncio.run(refused(server.url, start(16000, "pcm_f32le"), samples.tobytes()))
    assert (error["code"], code) == ("bad_audio", 1008)
    assert f"but sample 1880 of a chunk is {value:g}" in error["message"]
    server.settle(2)


def test_a_message_of_10_megabytes_closes_its_connection(server: Running) -> None:
    _, code = asyncio.run(refused(server.url, start(), bytes(10_000_000)))
    assert code == 1009
    server.settle(2)


def test_half_a_sample_at_the_end_is_left_out(server: Running, overfit: Overfit) -> None:
    data = pcm(overfit.clip(0), "pcm_f32le")
    messages = asyncio.run(speak(server.url, [data, b"\x00\x00\x80"], start(16000, "pcm_f32le")))
    assert text(messages) == overfit.text(0)
    assert messages[-1]["seconds"] == round(len(data) / 64000, 3)


def test_a_stream_without_audio_ends_at_once(server: Running) -> None:
    final, end = asyncio.run(speak(server.url, [], start()))
    assert (final["text"], final["final"]) == ("", True)
    assert end == {"type": "end", "seconds": 0.0, "reason": "stop"}


def test_an_unknown_or_ended_stream_cannot_be_resumed(server: Running) -> None:
    for identity in ("nobody", None, 5, ["a"]):
        error, code = asyncio.run(refused(server.url, json.dumps({"type": "resume", "stream": identity})))
        assert (error["code"], error["retry"], code) == ("gone", False, 1008)


def test_five_hundred_clients_that_vanish_disturb_nobody_and_leave_nothing(server: Running, overfit: Overfit) -> None:
    data, dice = pcm(np.tile(np.append(overfit.clip(3), np.zeros(20_000, np.float32)), 4)), random.Random(0)

    async def vanish() -> None:
        """Gone at any moment: before the handshake, in the middle of it or of a frame, as a stream, without a word."""
        await asyncio.sleep(3 * dice.random())
        kind = dice.randrange(4)
        if kind == 0:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /v1/stream HTTP/1.1\r\nHost: a\r\n"[: dice.randrange(36)])
            writer.transport.abort()
            return
        client = await connect(server.url)
        if kind > 1:
            await opened(client, start(dice.choice([8000, 48000])))
            await client.send(dice.randbytes(dice.randrange(30_000)))
        if kind == 3:
            client.transport.write(b"\x82\xfe\xff\xff\x00\x00\x00\x00half a frame")
            await asyncio.sleep(0.02)
        client.transport.abort()

    async def together() -> list[Message]:
        messages, *_ = await asyncio.gather(
            speak(server.url, [data[i : i + 3000] for i in range(0, len(data), 3000)], start(), lambda: 0.02),
            *(vanish() for _ in range(500)),
        )
        return messages

    server.settle()
    messages = asyncio.run(together())
    finals = offline(Session(overfit.recogniser), np.frombuffer(data, "<i2") / np.float32(32768), 16000)
    assert [(m["text"], m["seconds"]) for m in said(messages)[:-1]] == [(u.text, round(u.seconds, 3)) for u in finals]
    server.settle()
    gc.collect()
    assert not any(type(found) is Stream for found in gc.get_objects())
    assert server.service.streams.engine.depth == 0 and not server.service.streams.engine._voices


def test_a_client_that_stops_and_vanishes_is_forgotten_though_its_stream_lasts_longer(
    server: Running, overfit: Overfit, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear = Session.step

    def slowly(session: Session) -> list[Update]:
        time.sleep(0.05)
        return hear(session)

    monkeypatch.setattr(Session, "step", slowly)

    async def talk() -> None:
        client = await connect(server.url)
        await opened(client, start())
        await client.send(pcm(overfit.clip(0)) * 2)
        await client.send(STOP)
        wait = server.service.streams
        async with asyncio.timeout(5):
            while not wait.open[0].reason:
                await asyncio.sleep(0.01)
        client.transport.abort()

    asyncio.run(talk())
    server.settle()


def test_a_client_that_never_reads_is_cut(server: Running, overfit: Overfit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "OUTBOX", 4)
    data = pcm(np.append(overfit.clip(0), np.zeros(20_000, np.float32)))

    async def talk() -> None:
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        narrow.connect(("127.0.0.1", server.port))
        client = await connect(server.url, sock=narrow, max_queue=1, ping_interval=None)
        await client.send(start())
        cut = ("speechkit_streams_refused_total", 'code="slow_client"')
        sending = asyncio.create_task(flood(client))
        async with asyncio.timeout(30):
            while not server.service.streams.metrics.counts[cut]:
                await asyncio.sleep(0.01)
        sending.cancel()
        client.transport.abort()

    async def flood(client: ClientConnection) -> None:
        while True:
            await client.send(data)

    asyncio.run(talk())
    server.settle()


def test_what_was_wrong_is_counted(server: Running) -> None:
    asyncio.run(refused(server.url, "{"))
    page = httpx.get(f"{server.http}/metrics").text
    assert re.search(r'^speechkit_streams_refused_total\{code="bad_message"\} [1-9]', page, re.MULTILINE)
    for line in page.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{\w+=\"[^\"]*\"\})? [\d.e+-]+", line), line
    names = re.findall(r"^# TYPE (\w+)", page, re.MULTILINE)
    assert len(names) == len(set(names)) >= 12


def test_a_failing_model_is_told_and_the_server_goes_on(
    server: Running, overfit: Overfit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(type(overfit.recogniser), "stream", fail)
        error, code = asyncio.run(refused(server.url, start(), bytes(20_000)))
    assert (error["code"], error["retry"], code) == ("internal", True, 1011)
    assert text(asyncio.run(speak(server.url, [pcm(overfit.clip(2))], start()))) == overfit.text(2)
    server.settle()


def test_a_stream_ends_when_nothing_comes_or_too_much(overfit: Overfit) -> None:
    data = pcm(overfit.clip(1))
    with running(Session(overfit.recogniser), Limits(streams=1, resume=0.1, idle=0.3, seconds=2.0)) as short:

        async def talk(sound: bytes) -> list[Message]:
            async with connect(short.url) as client:
                await opened(client, start())
                await client.send(sound)
                return await rest(client)

        idle = asyncio.run(talk(data))
        assert text(idle) == overfit.text(1) and idle[-1]["reason"] == "idle"
        short.settle()
        assert asyncio.run(talk(data + data))[-1]["reason"] == "limit"


class Command:
    """``speechkit serve`` as a process."""

    def __init__(self, model: object, *options: str) -> None:
        code = "import sys; from speechkit.app.cli import main; sys.exit(main())"
        argv = [sys.executable, "-c", code, "serve", str(model), "--port", "0", *options]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        assert self.process.stdout
        self.line = self.process.stdout.readline()
        found = re.search(r"http://(\S+)", self.line)
        assert found, self.line + (self.process.stderr.read() if self.process.stderr else "")
        self.url = f"ws://{found[1]}/v1/stream"

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_stopped_flushes_every_stream(overfit: Overfit, by: signal.Signals) -> None:
    async def talk(server: Command, number: int, heard: asyncio.Event) -> list[Message]:
        async with connect(server.url) as client:
            await opened(client, start())
            await client.send(pcm(overfit.clip(number)))
            last = int(len(overfit.clip(number)) / 5120) * 0.32
            messages = []
            while not messages or messages[-1]["seconds"] < last - 1e-6:
                messages.append(await receive(client))
            heard.set()
            return messages + await rest(client)

    async def together(server: Command) -> list[list[Message]]:
        events = [asyncio.Event() for _ in range(4)]
        talks = [asyncio.create_task(talk(server, number, event)) for number, event in enumerate(events)]
        for event in events:
            await event.wait()
        server.process.send_signal(by)
        return await asyncio.gather(*talks)

    with Command(overfit.folder) as server:
        assert re.fullmatch(
            r"speechkit: model listens on http://127\.0\.0\.1:\d+ \(Rescored, chunks of 320 ms, 64 streams, cpu\)\n",
            server.line,
        )
        for number, messages in enumerate(asyncio.run(together(server))):
            assert text(messages) == overfit.text(number)
            seconds = round(len(overfit.clip(number)) / 16000, 3)
            assert messages[-1] == {"type": "end", "seconds": seconds, "reason": "shutdown"}
        assert server.process.wait(10) in (-by, 130)
        assert server.process.stderr and server.process.stderr.read() == ""


def test_a_stopping_server_takes_no_new_streams(overfit: Overfit) -> None:
    with running(Session(overfit.recogniser, slots=2), Limits(streams=2)) as ending:
        ending.service.streams.closing = True
        error, code = asyncio.run(refused(ending.url, start()))
        assert (error["code"], error["retry"], code) == ("shutdown", True, 1013)
        assert httpx.get(f"{ending.http}/health").status_code == 503
