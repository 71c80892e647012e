"""A headless Chromium, and pages in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tab import ROOT, Files, Tab

FLAGS = [
    "--no-sandbox",  # which root is not allowed
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
    "--host-resolver-rules=MAP speech.test 127.0.0.1",
]


@pytest.fixture(scope="module")
def playwright() -> Iterator[Any]:
    """Ended with each module: its event loop would stand in the way of those of other tests."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    with api.sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def launch(playwright: Any) -> Iterator[Callable[..., Any]]:
    """Start a Chromium with more flags than the usual."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is on the PATH: apt-get install chromium")
    started = []

    def start(*flags: str) -> Any:
        started.append(playwright.chromium.launch(executable_path=path, args=[*FLAGS, *flags]))
        return started[-1]

    yield start
    for browser in started:
        browser.close()


@pytest.fixture(scope="module")
def chromium(launch: Callable[..., Any]) -> Any:
    """Its microphone beeps."""
    return launch()


@pytest.fixture(scope="module")
def home() -> Iterator[str]:
    """Where the page is served; its sockets are answered by the tests."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def tab(chromium: Any, home: str) -> Iterator[Tab]:
    with Tab(chromium, home) as opened:
        yield opened


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """Where pictures of the page are kept: SPEECHKIT_SCREENSHOTS, or build/browser."""
    folder = Path(os.environ.get("SPEECHKIT_SCREENSHOTS", ROOT / "build" / "browser"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
