"""What a person does with the page, and what is waited for after it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import soundfile
from tab import Tab

RATE = 16000  # of files, on their way to the server
DROP = """([name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name));
  for (const kind of ["dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: data }));
  }
}"""


def sweep(seconds: float) -> np.ndarray:
    """A tone that rises, so that no two moments are alike: ``[N]``."""
    time = np.arange(round(seconds * RATE)) / RATE
    return 0.4 * np.sin(2 * np.pi * (200 + 150 * time) * time)


def wav(samples: np.ndarray, sample_rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def drop(page: Any, name: str, content: bytes) -> None:
    page.evaluate(DROP, [name, base64.b64encode(content).decode()])


def state(page: Any, *names: str) -> None:
    """Wait until the page is in one of these states."""
    page.wait_for_selector(", ".join(f"[data-state={name}]" for name in names))


def says(page: Any, selector: str, pattern: str) -> None:
    page.locator(selector, has_text=re.compile(pattern)).wait_for(state="attached")


def listen(tab: Tab) -> Any:
    """A page that listens, and whose first samples have arrived."""
    page = tab.open()
    page.click("#record")
    says(page, "#status", "^Listening$")
    arrives(tab, 1)
    return page


def arrives(tab: Tab, samples: int) -> None:
    """Wait until so many samples more have arrived."""
    wanted = len(tab.server.heard) + 2 * samples
    wait(tab, lambda: len(tab.server.heard) >= wanted, f"{samples} samples more should arrive")


def stopped(tab: Tab) -> None:
    """Wait until the server was told that there is no more."""
    wait(tab, lambda: tab.server.stopped, "the server should be told to stop")


def wait(tab: Tab, true: Callable[[], bool], wish: str) -> None:
    for _ in range(400):
        if true():
            return
        tab.page.wait_for_timeout(20)
    raise AssertionError(f"{wish}, but that did not happen in eight seconds")


def read(tab: Tab, samples: np.ndarray, text: str) -> Any:
    """A page that has read a file and shows its text."""
    page = tab.open()
    drop(page, "speech.wav", wav(samples))
    stopped(tab)
    tab.server.say(text, final=True)
    tab.server.end()
    state(page, "idle")
    return page
