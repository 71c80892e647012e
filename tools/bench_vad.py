"""What voice activity costs beside the model, and a long recording beside many short ones; one run, in turns.

    python tools/bench_vad.py runs/demo FOLDER_OF_AUDIO [--batches 1 8 40] [--rounds 10] [--threads 1]

The first table is a chunk of 320 ms of as many streams, all speech: telling it from silence, and hearing it. The second
is the recordings of the folder, each for itself and joined into one with a second of rest between them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import speechkit
from speechkit import features
from speechkit.cut import clips
from speechkit.recogniser import Recogniser
from speechkit.session import Session, live_context
from speechkit.vad import Vad, listen

CHUNK, REST = 0.32, 1.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 40])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, vad = speechkit.load(arguments.model), Vad()
    assert isinstance(model, Recogniser)
    recordings = [
        torch.from_numpy(features.read(f, model.sample_rate)) for f in sorted(arguments.folder.rglob("*.flac"))
    ]
    print("milliseconds for a second of audio of one stream, median (quartiles)")
    for batch in arguments.batches:
        show(f"{batch} streams", live(model, vad, torch.cat(recordings[:20]), batch, arguments.rounds))
    seconds = sum(map(len, recordings)) / model.sample_rate
    print(f"{len(recordings)} recordings, {seconds:.0f} s; milliseconds for a second of them, rests included")
    show("", whole(model, vad, recordings, arguments.rounds))


def live(model: Recogniser, vad: Vad, speech: torch.Tensor, batch: int, rounds: int) -> dict[str, list[float]]:
    session = Session(model, slots=batch, context=live_context(model, CHUNK), endpoint=None)
    slots, voices = [session.join() for _ in range(batch)], [vad.open() for _ in range(batch)]
    times: dict[str, list[float]] = {"voice activity": [], "model": []}
    for number, chunk in enumerate(speech.split(session.chunk)[: 4 * rounds]):
        for slot, stream in zip(slots, voices, strict=True):
            session.push(slot, chunk)
            stream.add(chunk)
        for name, run in {"voice activity": lambda: listen(voices), "model": session.step}.items():
            took = timed(run) * 1e3 / CHUNK / batch
            if number >= 8:  # then the model's memory is full
                times[name].append(took)
        for stream in voices:
            stream.take()
    return times


def whole(model: Recogniser, vad: Vad, recordings: list[torch.Tensor], rounds: int) -> dict[str, list[float]]:
    rest = torch.zeros(round(REST * model.sample_rate))
    joined = torch.cat([part for recording in recordings for part in (recording, rest)])
    alone = sum(map(len, recordings))
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "alone": (alone, lambda: model.transcribe(recordings)),
        "joined": (len(joined), lambda: model.transcribe(joined)),
        "joined, voice activity": (
            len(joined),
            lambda: model.transcribe(
                [clip.samples for clip in clips(joined.split(160_000), model.sample_rate, vad=vad)]
            ),
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (samples, run) in ways.items():
            times[name].append(timed(run) * 1e3 * model.sample_rate / samples)
    return times


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def show(what: str, times: dict[str, list[float]]) -> None:
    first = statistics.median(next(iter(times.values())))
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"{what:>12} {name:<24} {middle:7.2f} ({low:.2f} - {high:.2f})  {middle / first:5.2f}x")


if __name__ == "__main__":
    main()
