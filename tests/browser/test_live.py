"""The whole of it: a recording in the microphone of a real browser, the real server, and the words on the page."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from overfit import Overfit
from tab import Tab

sys.path.append(str(Path(__file__).parents[1] / "server"))
from live import Running, running

from speechkit.app.serve.streams import Limits
from speechkit.session import Session

RATE = 48000
PAUSE = 1.4  # seconds between sentences: more than ends a segment
SPOKEN = (0, 3)  # of the recordings, one after the other in the microphone, over and over


@pytest.fixture(scope="module")
def server(overfit: Overfit) -> Iterator[Running]:
    with running(Session(overfit.recogniser, slots=4), Limits(streams=4, resume=5.0)) as found:
        yield found


@pytest.fixture(scope="module")
def speaking(launch: Callable[..., Any], overfit: Overfit, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A browser whose microphone speaks."""
    path = tmp_path_factory.mktemp("microphone") / "speech.wav"
    soundfile.write(path, speech(overfit, *SPOKEN), RATE, subtype="PCM_16")
    return launch(f"--use-file-for-fake-audio-capture={path}")


@pytest.fixture
def tab(speaking: Any, server: Running) -> Iterator[Tab]:
    with Tab(speaking, server.http) as opened:
        yield opened


def speech(overfit: Overfit, *numbers: int) -> np.ndarray:
    gap = np.zeros(round(PAUSE * RATE), np.float32)
    return np.concatenate([part for number in numbers for part in (gap, overfit.clip(number, RATE))] + [gap])


def final(page: Any, text: str) -> None:
    """Wait until a segment says exactly this, and none of its words can change any more."""
    said = page.locator("#text .said:not(:has(.stable, .partial))", has_text=re.compile(f"^{text}$"))
    said.first.wait_for(timeout=20_000)


def test_what_is_spoken_into_the_microphone_appears_on_the_page(tab: Tab, overfit: Overfit, screenshots: Path) -> None:
    tab.page.goto(tab.home)
    tab.page.locator("#model:text-is('overfit')").wait_for()
    tab.page.click("#record")
    for number in SPOKEN:
        final(tab.page, overfit.text(number))
    tab.page.screenshot(path=screenshots / "live.png")
    tab.page.click("#record")
    tab.page.wait_for_selector("[data-state=idle]")
    assert tab.page.inner_text("#trouble") == ""


def test_a_dropped_recording_is_read(tab: Tab, overfit: Overfit, tmp_path: Path, screenshots: Path) -> None:
    path = tmp_path / "speech.flac"
    soundfile.write(path, speech(overfit, 0, 1, 2, 3), RATE)
    tab.page.goto(tab.home)
    tab.page.set_input_files("#file", path)
    tab.page.wait_for_selector("#progress:not([hidden])")
    tab.page.locator("#status:text-is('Done')").wait_for()
    said = tab.page.locator("#text .said:visible").all_inner_texts()
    assert said == [overfit.text(number) for number in range(4)]
    tab.page.emulate_media(color_scheme="dark")
    tab.page.screenshot(path=screenshots / "file.png")


def test_a_connection_that_breaks_changes_no_word(tab: Tab, overfit: Overfit) -> None:
    """It is cut between the browser and the server, in the middle of the speech."""
    passed: list[Any] = []

    def between(socket: Any) -> None:
        passed.append((socket, socket.connect_to_server()))

    tab.page.route_web_socket("**/v1/stream", between)
    tab.page.goto(tab.home)
    tab.page.click("#record")
    tab.page.wait_for_selector("#text .word")
    for side in passed[0]:
        side.close(code=3001)
    for number in SPOKEN:
        final(tab.page, overfit.text(number))
    tab.page.click("#record")
    tab.page.wait_for_selector("[data-state=idle]")
    assert len(passed) == 2
    assert tab.page.inner_text("#trouble") == ""


def test_the_servers_own_policy_lets_the_page_do_all_it_does(tab: Tab) -> None:
    answer = tab.page.goto(tab.home)
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    tab.page.click("#record")  # the worklet comes from the server as well
    tab.page.locator("#status:text-is('Listening')").wait_for()
    tab.page.click("#record")
    tab.page.wait_for_selector("[data-state=idle]")
