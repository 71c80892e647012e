"""Many streams over real sockets against a `Session` that hears each of them alone."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator

import numpy as np
import pytest
from live import STOP, Message, Running, floats, offline, opened, pcm, receive, rest, running, said, speak, start, text
from overfit import Overfit
from websockets.asyncio.client import connect

from speechkit.app.serve.engine import level_db
from speechkit.app.serve.stream import Outbox
from speechkit.app.serve.streams import RATES, Limits
from speechkit.search import Rescored
from speechkit.session import Session, Update
from speechkit.vad import Vad

SILENCE = 1.2  # seconds: an endpoint, and a new segment after it


@pytest.fixture(scope="module")
def server(overfit: Overfit) -> Iterator[Running]:
    limits = Limits(streams=10, per_address=10, resume=0.5)
    with running(Session(overfit.recogniser, slots=10, search=Rescored), limits) as found:
        yield found


def speech(overfit: Overfit, rate: int, *numbers: int) -> np.ndarray:
    gap = np.zeros(round(SILENCE * rate), np.float32)
    return np.concatenate([part for number in numbers for part in (overfit.clip(number, rate), gap)])


def wanted(overfit: Overfit, data: bytes, rate: int, encoding: str) -> list[Update]:
    alone = Session(overfit.recogniser, search=Rescored)
    return offline(alone, floats(data, encoding), rate)


def divided(data: bytes, seed: int) -> list[bytes]:
    """Messages of odd sizes: nothing, single bytes, half samples, and up to two chunks."""
    dice, pieces, at = random.Random(seed), [], 0
    while at < len(data):
        size = dice.choice([0, 1, 3, 333, 4096, dice.randrange(60_000)])
        pieces.append(data[at : at + size])
        at += size
    return pieces


def assert_says(messages: list[Message], finals: list[Update], reason: str = "stop") -> None:
    *texts, end = said(messages)
    assert end == {"type": "end", "seconds": round(finals[-1].seconds, 3), "reason": reason}
    assert [(t["segment"], t["text"], t["seconds"]) for t in texts] == [
        (u.segment, u.text, round(u.seconds, 3)) for u in finals
    ]
    for found, update in zip(texts, finals, strict=True):
        assert [(w["word"], w["start"], w["end"]) for w in found["words"]] == [
            (w.word, round(w.start, 3), round(w.end, 3)) for w in update.words
        ]
        confidences = [w["confidence"] for w in found["words"]]
        assert confidences == pytest.approx([w.confidence for w in update.words], abs=1e-3)


@pytest.mark.parametrize("encoding", ["pcm_s16le", "pcm_f32le"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_a_stream_says_what_a_session_says(server: Running, overfit: Overfit, rate: int, encoding: str) -> None:
    data = pcm(speech(overfit, rate, 0, 1), encoding)
    finals = wanted(overfit, data, rate, encoding)
    messages = asyncio.run(speak(server.url, divided(data, rate), start(rate, encoding)))
    assert_says(messages, finals)
    if rate >= 16000:
        assert [update.text for update in finals[:2]] == [overfit.text(0), overfit.text(1)]


def test_streams_that_join_pause_and_leave_do_not_disturb_each_other(server: Running, overfit: Overfit) -> None:
    dice = random.Random(5)
    rates = [16000, 48000, 44100, 8000, 22050, 16000]
    encodings = ["pcm_s16le", "pcm_f32le"] * 3
    data = [
        pcm(speech(overfit, rate, *dice.sample(range(4), 3)), encoding)
        for rate, encoding in zip(rates, encodings, strict=True)
    ]

    async def vanish(rate: int, encoding: str, part: bytes) -> None:
        await asyncio.sleep(dice.random() / 2)
        socket = await connect(server.url)
        await opened(socket, start(rate, encoding))
        await socket.send(part[: dice.randrange(len(part))])
        await asyncio.sleep(dice.random() / 5)
        socket.transport.abort()

    async def stay(number: int) -> list[Message]:
        await asyncio.sleep(dice.random() / 2)
        hello, pieces = start(rates[number], encodings[number]), divided(data[number], number)
        return await speak(server.url, pieces, hello, lambda: dice.choice([0.0, 0.0, 0.02]))

    async def together() -> list[list[Message]]:
        leaving = [vanish(rates[n], encodings[n], data[n]) for n in (0, 1, 2)]
        return (await asyncio.gather(*map(stay, range(6)), *leaving))[:6]

    for number, messages in enumerate(asyncio.run(together())):
        assert_says(messages, wanted(overfit, data[number], rates[number], encodings[number]))
    server.settle()


def test_messages_are_what_the_protocol_says(server: Running, overfit: Overfit) -> None:
    clip = overfit.clip(0)
    data = pcm(clip)

    async def talk() -> tuple[Message, list[Message]]:
        async with connect(server.url) as socket:
            ready = await opened(socket, start())
            await socket.send(data)
            await socket.send(STOP)
            return ready, await rest(socket)

    ready, messages = asyncio.run(talk())
    assert isinstance(ready.pop("stream"), str)
    assert ready == {
        "type": "ready",
        "chunk_ms": 320.0,
        "sample_rate": 16000,
        "received": 0,
        "model": "overfit",
        "search": "Rescored",
        "resume_seconds": 0.5,
    }
    texts = messages[:-1]
    assert text(messages) == overfit.text(0)
    assert all(m["text"].startswith(m["stable"]) and m["latency_ms"] > 0 for m in texts)
    assert [m["final"] for m in texts] == [False] * (len(texts) - 1) + [True]
    for number, message in enumerate(texts[:-1]):
        chunk = floats(data, "pcm_s16le")[number * 5120 : (number + 1) * 5120]
        assert message["seconds"] == pytest.approx((number + 1) * 0.32)
        assert message["level_db"] == pytest.approx(10 * np.log10(np.mean(chunk**2)), abs=0.06)
        assert message["level_db"] == round(level_db(chunk), 1)


@pytest.mark.parametrize("rate", RATES)
def test_every_rate_of_the_table_is_heard_chunk_by_chunk(server: Running, overfit: Overfit, rate: int) -> None:
    clip = overfit.clip(1, rate)

    async def talk() -> list[float]:
        async with connect(server.url) as socket:
            await opened(socket, start(rate))
            seconds = []
            chunk, late = round(0.32 * rate) * 2, round(0.05 * rate) * 2  # the resampler looks less than 50 ms ahead
            data = pcm(clip)
            for number in range(3):
                await socket.send(data[number * chunk + (number > 0) * late : (number + 1) * chunk + late])
                seconds.append((await receive(socket))["seconds"])
            return seconds

    assert asyncio.run(talk()) == pytest.approx([0.32, 0.64, 0.96])
    server.settle()


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.93])
def test_a_connection_that_was_cut_is_taken_up_without_a_trace(server: Running, overfit: Overfit, cut: float) -> None:
    data = pcm(speech(overfit, 48000, 2, 3), "pcm_f32le")
    at = int(cut * len(data)) | 1  # inside of a sample

    async def talk() -> list[Message]:
        first = await connect(server.url)
        ready = await opened(first, start(48000, "pcm_f32le"))
        for begin in range(0, at, 10_000):
            await first.send(data[begin : min(at, begin + 10_000)])
        early = asyncio.create_task(rest(first))
        await asyncio.sleep(0.1)
        first.transport.abort()
        messages = await early
        async with connect(server.url) as second:
            again = await opened(second, json.dumps({"type": "resume", "stream": ready["stream"]}))
            assert again["stream"] == ready["stream"] and 0 < again["received"] <= at // 4
            await second.send(data[4 * again["received"] :])
            await second.send(STOP)
            messages += await rest(second)
        return messages

    messages = asyncio.run(talk())
    finals = {m["segment"]: m for m in messages if m["type"] == "text" and m["final"]}
    assert_says([*finals.values(), messages[-1]], wanted(overfit, data, 48000, "pcm_f32le"))
    server.settle()


def test_a_connection_may_be_cut_after_stop_and_replaced_while_it_lives(server: Running, overfit: Overfit) -> None:
    data = pcm(overfit.clip(0))

    async def talk() -> tuple[list[Message], list[Message]]:
        first = await connect(server.url)
        ready = await opened(first, start())
        resume = json.dumps({"type": "resume", "stream": ready["stream"]})
        await first.send(data)
        second = await connect(server.url)
        assert (await opened(second, resume))["type"] == "ready"
        replaced = await rest(first)
        await second.send(STOP)
        second.transport.abort()
        async with connect(server.url) as third:
            await opened(third, resume)
            return replaced, await rest(third)

    replaced, messages = asyncio.run(talk())
    assert replaced[-1]["code"] == "replaced" and not replaced[-1]["retry"]
    received = messages[-1]["seconds"]
    assert messages[-1]["reason"] == "stop" and received <= len(data) / 32000 + 1e-3
    assert text(messages) == overfit.text(0) or received < len(data) / 32000 - 1e-3
    server.settle()


def test_a_slow_reader_gets_every_final_text_and_of_the_others_the_newest() -> None:
    async def talk() -> list[str | None]:
        outbox = Outbox()
        for segment in "ab":
            for number in range(3):
                outbox.put(f"{segment}{number}", final=False)
            outbox.put(f"{segment} is final", final=True)
        for number in range(3):
            outbox.put(f"c{number}", final=False)
        first = [await outbox.take() for _ in range(3)]
        outbox.close("end")
        first += [await outbox.take(), await outbox.take()]
        outbox.repeat()
        return [*first, *[await outbox.take() for _ in range(4)]]

    assert asyncio.run(talk()) == [
        "a is final",
        "b is final",
        "c2",
        "end",
        None,
        "a is final",
        "b is final",
        "end",
        None,
    ]


def test_a_client_faster_than_speech_is_slowed_not_buffered(server: Running, overfit: Overfit) -> None:
    data = pcm(speech(overfit, 16000, *[0, 1, 2, 3] * 6))  # a minute
    most = 0

    async def talk() -> list[Message]:
        nonlocal most
        talking = asyncio.create_task(
            speak(server.url, [data[i : i + 500_000] for i in range(0, len(data), 500_000)], start())
        )
        while not talking.done():
            streams = server.service.streams.open
            most = max(most, *(stream.waiting_bytes for stream in streams), 0)
            await asyncio.sleep(0.002)
        return await talking

    messages = asyncio.run(talk())
    assert text(messages) == " ".join(overfit.texts.values()) + (" " + " ".join(overfit.texts.values())) * 5
    assert 0 < most <= 500_000 + 2 * 32_000 + 2 * 10_240


def test_behind_voice_activity_a_server_hears_speech_alone_and_ends_silent_streams(overfit: Overfit) -> None:
    pytest.importorskip("silero_vad", reason="silero-vad is not installed")
    hush = np.zeros(3 * 16000, np.float32)
    data = pcm(np.concatenate([hush, speech(overfit, 16000, 0, 1), hush]))
    session = Session(overfit.recogniser, slots=2, vad=Vad())
    session.trace()
    finals = offline(Session(overfit.recogniser, vad=Vad()), floats(data, "pcm_s16le"), 16000)
    assert [update.text for update in finals if update.text] == [overfit.text(0), overfit.text(1)]
    with running(session, Limits(streams=2, per_address=2)) as server:

        async def both() -> list[list[Message]]:
            silent = speak(server.url, [pcm(hush)], start())
            return await asyncio.gather(speak(server.url, divided(data, 1), start()), silent)

        spoken, silent = asyncio.run(both())
    assert_says(spoken, finals)
    assert silent[-1] == {"type": "end", "seconds": 3.0, "reason": "stop"}
    assert not text(silent)
