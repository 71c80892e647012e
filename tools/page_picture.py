"""A picture of the page of `speechkit serve` while it listens: `docs/page.png` of the README.

    python tools/page_picture.py runs/digits data/digits/audio/test/test-0029[0-3].flac --out docs/page.png

A server of its own is started, and a headless Chromium (it must be on the PATH) whose microphone plays the recordings
one after another; the picture is taken at the end of the last.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bench_serve import server
from playwright.sync_api import sync_playwright

from speechkit import audio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("recordings", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("A picture needs Chromium, but none is on the PATH; install it (apt-get install chromium).")
    with (
        tempfile.TemporaryDirectory() as folder,
        server(arguments.model, 0) as (url, _),
        sync_playwright() as playwright,
    ):
        speech = Path(folder) / "speech.wav"
        seconds = joined(arguments.recordings, speech)
        flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        chromium = playwright.chromium.launch(
            executable_path=browser, args=[*flags, f"--use-file-for-fake-audio-capture={speech}%noloop"]
        )
        page = chromium.new_page(viewport={"width": 1000, "height": 620}, device_scale_factor=1.5)
        page.goto(url.replace("ws://", "http://").removesuffix("v1/stream"))
        page.click("#record")
        page.wait_for_selector("[data-state=listening]")
        page.wait_for_timeout(1000 * seconds)
        page.screenshot(path=arguments.out)


def joined(recordings: Sequence[Path], out: Path) -> float:
    """Writes them one after another, all at the rate of the first; their seconds."""
    heard = [audio.read(path) for path in recordings]
    rate = heard[0][1]
    if any(each != rate for _, each in heard):
        sys.exit(f"The recordings must have one sample rate, but have {[each for _, each in heard]} Hz; resample them.")
    samples = np.concatenate([each for each, _ in heard])
    audio.write(out, samples, rate)
    return len(samples) / rate


if __name__ == "__main__":
    main()
