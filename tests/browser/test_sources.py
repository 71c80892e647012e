"""Sound in: microphones and files, those that work and those that do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from acts import RATE, arrives, drop, listen, says, state, stopped, sweep, wav
from tab import Tab


def test_the_level_follows_the_sound(tab: Tab) -> None:
    page = listen(tab)
    says(page, "#status", "Listening")
    page.wait_for_selector("#level:not([aria-valuenow='-60'])")


def test_stopping_sends_everything_and_keeps_the_text(tab: Tab) -> None:
    page = listen(tab)
    arrives(tab, 4000)
    tab.server.say("unfinished")
    says(page, "#text", "unfinished")
    page.click("#record")
    stopped(tab)
    state(page, "stopping")
    tab.server.end()
    state(page, "idle")
    assert page.inner_text("#status") == "Done"
    assert page.locator("#text .word").get_attribute("class") == "word"


def test_a_second_stream_goes_on_below_the_first(tab: Tab) -> None:
    page = listen(tab)
    tab.server.say("first", final=True)
    arrives(tab, 30000)
    page.click("#record")
    stopped(tab)
    tab.server.end()
    state(page, "idle")
    page.click("#record")
    says(page, "#status", "Listening")
    tab.server.say("second", final=True, segment=0)
    says(page, "#text", "second")
    assert page.locator("#text p:visible .said").all_inner_texts() == ["first", "second"]
    title = page.locator("#text .word").nth(1).evaluate("(word) => word.said.start")
    assert title > 0.5


def test_a_dropped_file_arrives_whole(tab: Tab) -> None:
    samples = sweep(6.0)
    page = tab.open()
    drop(page, "speech.wav", wav(samples))
    stopped(tab)
    says(page, "#status", "Reading speech.wav")
    tab.server.say("half")
    says(page, "#text", "half")
    assert page.locator("#progress").evaluate("(bar) => bar.value") == pytest.approx(1.0)
    tab.server.end()
    state(page, "idle")
    assert tab.server.hellos == [{"type": "start", "sample_rate": RATE, "encoding": "pcm_s16le"}]
    np.testing.assert_allclose(tab.server.samples, samples, atol=2e-4)


def test_a_stereo_file_of_another_rate_is_mixed_and_resampled(tab: Tab) -> None:
    time = np.arange(44100) / 44100
    left = 0.5 * np.sin(2 * np.pi * 440 * time)
    page = tab.open()
    drop(page, "music.wav", wav(np.stack([left, 0 * left], axis=1), 44100))
    stopped(tab)
    tab.server.end()
    state(page, "idle")
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert abs(len(tab.server.samples) - RATE) <= 1
    np.testing.assert_allclose(tab.server.samples[200:-200], expected[200 : len(tab.server.samples) - 200], atol=0.01)


def test_a_chosen_file_is_read_and_can_be_chosen_again(tab: Tab, tmp_path: Path) -> None:
    page = tab.open()
    (tmp_path / "a.wav").write_bytes(wav(sweep(0.5)))
    for _ in range(2):
        tab.server.stopped = False
        with page.expect_file_chooser() as chooser:
            page.click("#open")
        chooser.value.set_files(tmp_path / "a.wav")
        stopped(tab)
        tab.server.end()
        state(page, "idle")
    assert len(tab.server.hellos) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"this is no recording", "speech.wav.*cannot|not a recording"), (wav(np.zeros(0)), "speech.wav")],
    ids=["text", "empty"],
)
def test_a_file_without_sound_is_refused_in_words(tab: Tab, content: bytes, words: str) -> None:
    page = tab.open()
    drop(page, "speech.wav", content)
    says(page, "#trouble", words)
    state(page, "idle")
    assert tab.server.hellos == []


REFUSED = [
    ("NotAllowedError", "allow it"),
    ("NotFoundError", "No microphone"),
    ("NotReadableError", "in use elsewhere"),
]


@pytest.mark.parametrize(("name", "words"), REFUSED)
def test_a_microphone_that_cannot_be_had_is_told_in_words(tab: Tab, name: str, words: str) -> None:
    tab.context.add_init_script(
        f"navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', '{name}'))"
    )
    page = tab.open()
    page.click("#record")
    says(page, "#trouble[role=alert]", words)
    state(page, "idle")
    assert tab.server.hellos == []


def test_a_page_that_browsers_do_not_trust_says_what_to_do(tab: Tab) -> None:
    page = tab.open("speech.test")
    page.click("#record")
    says(page, "#trouble", r"https.*ssh -L (\d+):localhost:\1 speech.test")
    drop(page, "speech.wav", wav(sweep(0.5)))
    stopped(tab)
    assert page.inner_text("#trouble") == ""


def test_a_microphone_that_is_unplugged_ends_the_stream_and_keeps_the_text(tab: Tab) -> None:
    tab.context.add_init_script(
        """const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
        navigator.mediaDevices.getUserMedia = async (wanted) => (window.given = await ask(wanted));"""
    )
    page = listen(tab)
    tab.server.say("kept")
    page.evaluate("window.given.getAudioTracks()[0].dispatchEvent(new Event('ended'))")
    stopped(tab)
    tab.server.end()
    says(page, "#trouble", "unplugged")
    assert page.inner_text("#text .said") == "kept"


def test_a_muted_microphone_is_noticed(tab: Tab) -> None:
    tab.context.add_init_script(
        """navigator.mediaDevices.getUserMedia = async () => new AudioContext().createMediaStreamDestination().stream"""
    )
    page = listen(tab)
    says(page, "#status", "is it muted")


def test_the_microphone_that_was_chosen_is_asked_for_and_remembered(tab: Tab) -> None:
    tab.context.add_init_script(
        """const devices = navigator.mediaDevices, ask = devices.getUserMedia.bind(devices);
        window.asked = [];
        devices.getUserMedia = (wanted) => (window.asked.push(wanted.audio.deviceId?.exact), ask(wanted));"""
    )
    page = listen(tab)
    page.wait_for_selector("#device option:nth-child(2)", state="attached")
    chosen = page.locator("#device option").last.get_attribute("value")
    page.select_option("#device", chosen)  # in the middle of a stream, which goes on
    arrives(tab, 8000)
    assert page.evaluate("window.asked") == [None, chosen]
    assert page.evaluate("localStorage.getItem('device')") == chosen
    assert len(tab.server.hellos) == 1
