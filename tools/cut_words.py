"""Cut recorded strings into words: what made ``recipes/fsdd/words.jsonl`` out of the digit strings of speechocean762.

    speechkit prepare fsdd && speechkit train recipes/fsdd/conf/fsdd.yaml
    python tools/cut_words.py runs/fsdd data/fsdd/real.jsonl recipes/fsdd/words.jsonl

A model trained on the strings says about where each word is; the quietest moment between two words parts them, and
what is quiet at the ends of a word is left out. A string that aligns badly is left out, and so is a word that is not of
a word's length.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

import speechkit
from speechkit.features import read
from speechkit.types import Seconds, Transcript

HERTZ = 16000
FRAME = 160  # samples
CONFIDENCE = 0.75  # of a string, on average
QUIET_DB, QUIET_SHARE = (
    25.0,
    0.3,
)  # under the loudest moment of a word, and of the way there from the recording's quietest
CLOSURE = 12  # frames, as between the k and the s of six
LENGTH = (0.15, 1.0)  # seconds


def main(run: str, manifest: str, out: str) -> None:
    model = speechkit.load(run)
    with open(out, "w", encoding="utf-8") as file:
        for line in Path(manifest).read_text(encoding="utf-8").splitlines():
            said = json.loads(line)
            aligned = model.align(said["audio"], said["text"])
            if np.mean([word.confidence for word in aligned.words]) >= CONFIDENCE:
                words = list(cut(read(said["audio"], HERTZ), aligned))
                file.write(json.dumps({"id": said["id"], "words": words}) + "\n")


def cut(samples: np.ndarray, aligned: Transcript) -> Iterator[tuple[str, Seconds, Seconds]]:
    """Each word with where it starts and ends."""
    loudness = decibels(samples)
    floor = np.percentile(loudness, 5)
    peaks = [round((word.start + word.end) / 2 * HERTZ / FRAME) for word in aligned.words]
    parted = [left + int(np.argmin(loudness[left : right + 1])) for left, right in pairwise(peaks)]
    for word, first, past in zip(aligned.words, [0, *parted], [*parted, len(loudness)], strict=True):
        top = first + int(np.argmax(loudness[first : max(past, first + 1)]))
        least = max(loudness[top] - QUIET_DB, floor + QUIET_SHARE * (loudness[top] - floor))
        loud = np.flatnonzero(loudness[first:past] >= least) + first
        start = max(0, _reach(loud[::-1], top) - 2) * FRAME / HERTZ
        end = min(len(samples), (_reach(loud, top) + 4) * FRAME) / HERTZ
        if LENGTH[0] <= end - start <= LENGTH[1]:
            yield word.word, round(start, 2), round(end, 2)


def _reach(loud: np.ndarray, top: int) -> int:
    """The last of the frames from ``top`` on that are apart by no more than the closure of a stop."""
    last = top
    for frame in loud[list(loud).index(top) :] if top in loud else ():
        if abs(frame - last) > CLOSURE:
            break
        last = int(frame)
    return last


def decibels(samples: np.ndarray) -> np.ndarray:
    """The level of each 10 ms, smoothed over 50."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    return np.convolve(10 * np.log10(np.mean(frames**2, axis=1) + 1e-10), np.ones(5) / 5, "same")


if __name__ == "__main__":
    main(*sys.argv[1:])
