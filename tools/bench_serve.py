"""How many live streams a server carries, and whether an hour changes anything.

    python tools/bench_serve.py [MODEL] [--chunks 160 320 640] [--seconds 10] [--most 256]
    python tools/bench_serve.py MODEL --hour recordings/*.flac [--minutes 60]

Load: the largest number of real-time streams whose 95th percentile of latency stays under one chunk, at each length of
chunk. A stream sends 16 kHz audio in messages of 100 ms, at its own phase; its latency is counted by the client, from
the moment the last sample of a chunk was due until its text is there, so audio that the server does not take in time
counts as well. Two servers take turns, point by point: one with compiled operators and traced steps, one in plain eager
PyTorch (SPEECHKIT_KERNELS=off, nothing traced). Each is a process with one thread on the first core; all clients are
this process, on the last.
Without MODEL, a Conformer S of random weights that hears nothing but blanks.

Hour: real recordings, one after the other, to one stream, each chunk sent when the text of the one before is there. It
is the clock of the audio that runs for an hour; latency and memory of the server at its end stand beside those of its
start.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from websockets.asyncio.client import connect

from speechkit.config import build_model, compose, plain
from speechkit.features import read
from speechkit.pretrained import load_recogniser, save

RATE, MESSAGE = 16000, 0.1  # Hz, seconds
SETTLING = 2.0  # seconds of a point that do not count: the streams' memories fill
SERVE = "import sys; from speechkit.app.cli import main; sys.exit(main())"
EAGER = "from speechkit.session import Session; Session.trace = lambda session: None; "
CANDIDATES = {"compiled": (SERVE, {}), "plain": (EAGER + SERVE, {"SPEECHKIT_KERNELS": "off"})}  # code, environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--chunks", nargs="+", type=int, default=[160, 320, 640], metavar="MS")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a point (default 10)")
    parser.add_argument("--most", type=int, default=256, help="streams tried at most (default 256)")
    parser.add_argument("--hour", nargs="+", metavar="FILE")
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the servers would outlive this process
    with contextlib.ExitStack() as stack:
        model = arguments.model or random_model(Path(stack.enter_context(tempfile.TemporaryDirectory()), "conformer_s"))
        cores = sorted(os.sched_getaffinity(0))
        print(machine(model, cores), flush=True)
        os.sched_setaffinity(0, cores[-1:])
        if arguments.hour:
            hour(model, cores[0], arguments.hour, arguments.minutes)
        else:
            load(model, cores[0], arguments)


def random_model(folder: Path) -> str:
    """The recipe of the digits with a Conformer S, fresh, its head silent."""
    torch.manual_seed(0)
    node = compose("recipes/digits/conf/digits.yaml", ["encoder=conformer_s"]).model
    recogniser = build_model(node)
    with torch.no_grad():
        recogniser.objective.ctc.head.weight.zero_()
        recogniser.objective.ctc.head.bias.zero_()[0] = 5.0
    config = plain(node)
    config.pop("attention")  # the encoder holds it, its references being filled in
    save(recogniser, config, folder)
    return str(folder)


def machine(model: str, cores: Sequence[int]) -> str:
    weights = sum(weight.numel() for weight in load_recogniser(model).parameters()) / 1e6
    cpu = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    return (
        f"{cpu[1] if cpu else platform.processor()}; server: one thread on core {cores[0]}, clients: core {cores[-1]}; "
        f"torch {torch.__version__}; {weights:.1f} M weights; load before: {os.getloadavg()[0]:.1f}\n"
    )


@contextlib.contextmanager
def server(model: str, core: int, *options: str, candidate: str = "compiled") -> Iterator[tuple[str, int]]:
    """A server that runs: its address, and its process."""
    code, env = CANDIDATES[candidate]
    command = [sys.executable, "-c", code, "serve", model, "--port", "0", "--device", "cpu", *options]
    limits = ["--max-streams", "256", "--max-per-address", "256", "--resume-seconds", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    process = subprocess.Popen([*command, *limits], stdout=subprocess.PIPE, text=True, env=environment)
    os.sched_setaffinity(process.pid, [core])
    try:
        assert process.stdout
        found = re.search(r"http://(\S+)", process.stdout.readline())
        assert found, "the server did not start"
        yield f"ws://{found[1]}/v1/stream", process.pid
    finally:
        process.terminate()
        process.wait(20)


def load(model: str, core: int, arguments: argparse.Namespace) -> None:
    print(
        "| chunk | operators | streams | median, ms | 95 %, ms | too many: streams, 95 % |\n|---|---|---|---|---|---|"
    )
    for chunk in arguments.chunks:
        with contextlib.ExitStack() as stack:
            options = ("--chunk-ms", str(chunk), "--search", "greedy")
            urls = {name: stack.enter_context(server(model, core, *options, candidate=name))[0] for name in CANDIDATES}
            searches = {name: Search(url, chunk / 1000, arguments) for name, url in urls.items()}
            while not all(search.over for search in searches.values()):  # in turns
                for search in searches.values():
                    search.point()
        best = {name: search.best for name, search in searches.items()}
        for name, search in searches.items():
            print(f"| {chunk} ms | {name} | {search.row()} |")
        print(f"| {chunk} ms | ratio | {best['compiled'] / max(1, best['plain']):.1f}x | | | |", flush=True)


class Search:
    """The largest number of streams that keep up, by doubling and then halving the gap."""

    def __init__(self, url: str, chunk: float, arguments: argparse.Namespace) -> None:
        self.url, self.chunk, self.seconds, self.most = url, chunk, arguments.seconds, arguments.most
        self.best, self.worst = 0, arguments.most + 1
        self.doubted: set[int] = set()
        self.found: dict[int, tuple[float, float]] = {}  # median and 95th percentile by streams

    @property
    def over(self) -> bool:
        return self.worst - self.best <= max(1, self.best // 16)

    def point(self) -> None:
        if self.over:
            return
        middle = (self.best + self.worst) // 2
        count = min(self.most, 2 * self.best or 8, middle if self.worst <= self.most else self.most)
        late = asyncio.run(point(self.url, count, self.chunk, self.seconds))
        self.found[count] = (statistics.median(late), statistics.quantiles(late, n=20)[18])
        if self.found[count][1] < self.chunk:
            self.best = count
        elif count in self.doubted:
            self.worst = count
        else:
            self.doubted.add(count)  # the machine may have had something else to do: it is tried once more

    def row(self) -> str:
        median, most = self.found.get(self.best, (float("nan"),) * 2)
        beyond = f"{self.worst}, {1000 * self.found[self.worst][1]:.0f} ms" if self.worst in self.found else "-"
        return f"{self.best} | {1000 * median:.0f} | {1000 * most:.0f} | {beyond}"


async def point(url: str, count: int, chunk: float, seconds: float) -> list[float]:
    """Latencies of so many streams together, without those of the first seconds."""
    dice, start = random.Random(count), time.monotonic() + 0.5
    late = await asyncio.gather(*(stream(url, start + dice.random(), chunk, seconds) for _ in range(count)))
    return list(itertools.chain.from_iterable(late))


async def stream(url: str, start: float, chunk: float, seconds: float) -> list[float]:
    noise = (1000 * np.random.default_rng(0).standard_normal(round(seconds * RATE))).astype("<i2").tobytes()
    step, late = 2 * round(MESSAGE * RATE), []
    async with connect(url, ping_interval=None, compression=None) as socket:
        await socket.send(json.dumps({"type": "start", "sample_rate": RATE, "encoding": "pcm_s16le"}))

        async def send() -> None:
            for at in range(0, len(noise), step):
                due = start + (at + step) / (2 * RATE)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await socket.send(noise[at : at + step])

        sending = asyncio.create_task(send())
        last = int(seconds / chunk + 1e-6) * chunk
        async with asyncio.timeout(4 * seconds + 20):
            async for message in socket:
                told = json.loads(message)
                assert told["type"] in ("ready", "text"), told
                if told["type"] == "text":
                    # The message that completes a chunk is due at the next whole step of the client.
                    due = start + MESSAGE * math.ceil(told["seconds"] / MESSAGE - 1e-6)
                    if told["seconds"] > SETTLING:
                        late.append(time.monotonic() - due)
                    if told["seconds"] > last - 1e-6:
                        break
        sending.cancel()
    return late


def hour(model: str, core: int, files: Sequence[str], minutes: float) -> None:
    with server(model, core) as (url, process):
        late, memory, words = asyncio.run(one(url, process, files, 60 * minutes))
    tenth = max(1, len(late) // 10)
    print("| part | median, ms | 95 %, ms | slowest, ms | resident, MB |\n|---|---|---|---|---|")
    rows = {"first": (late[:tenth], memory[tenth - 1]), "last": (late[-tenth:], memory[-1])}
    for name, (part, held) in rows.items():
        most = statistics.quantiles(part, n=20)[18]
        figures = f"{1000 * statistics.median(part):.1f} | {1000 * most:.1f} | {1000 * max(part):.1f} | {held:.0f}"
        print(f"| {name} tenth | {figures} |")
    print(f"\n{len(late)} chunks, {words} words, {sum(late):.0f} s to hear {minutes:g} minutes")


async def one(url: str, process: int, files: Sequence[str], seconds: float) -> tuple[list[float], list[float], int]:
    """Latency and memory after each chunk of one stream, and the words it said."""
    late: list[float] = []
    memory: list[float] = []
    words = 0
    async with connect(url, ping_interval=None, compression=None) as socket:
        await socket.send(json.dumps({"type": "start", "sample_rate": RATE, "encoding": "pcm_s16le"}))
        size = round(json.loads(await socket.recv())["chunk_ms"] * RATE / 1000) * 2
        for chunk in itertools.islice(chunks(files, size), int(seconds * RATE * 2 / size)):
            sent = time.monotonic()
            await socket.send(chunk)
            told = json.loads(await socket.recv())
            late.append(time.monotonic() - sent)
            memory.append(resident(process))
            words += len(told["words"]) if told["final"] else 0
    return late, memory, words


def chunks(files: Sequence[str], size: int) -> Iterator[bytes]:
    """Recordings, again and again, in pieces of ``size`` bytes."""
    held = b""
    for file in itertools.cycle(files):
        held += (32767 * read(file, RATE).clip(-1, 1)).astype("<i2").tobytes()
        while len(held) >= size:
            yield held[:size]
            held = held[size:]


def resident(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
