"""What a person sees and hears: the page in a browser, before a server whose every word the test decides."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from tab import Tab

RATE = 16000  # of files, on their way to the server
PLAYED = """() => {
  window.played = [];
  const start = AudioBufferSourceNode.prototype.start;
  AudioBufferSourceNode.prototype.start = function (...when) {
    window.played.push({ rate: this.buffer.sampleRate, samples: [...this.buffer.getChannelData(0)] });
    return start.apply(this, when);
  };
}"""
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
    for _ in range(400):
        if len(tab.server.heard) >= wanted:
            return
        tab.page.wait_for_timeout(20)
    raise AssertionError(f"{samples} samples more should have arrived, but {len(tab.server.heard)} bytes are all")


def stopped(tab: Tab) -> None:
    """Wait until the server was told that there is no more."""
    for _ in range(400):
        if tab.server.stopped:
            return
        tab.page.wait_for_timeout(20)
    raise AssertionError("the server should have been told to stop")


def read(tab: Tab, samples: np.ndarray, text: str) -> Any:
    """A page that has read a file and shows its text."""
    page = tab.open()
    drop(page, "speech.wav", wav(samples))
    stopped(tab)
    tab.server.say(text, final=True)
    tab.server.end()
    state(page, "idle")
    return page


def test_words_are_grey_while_they_may_change_and_black_when_they_are_final(tab: Tab) -> None:
    page = listen(tab)
    tab.server.say("one two three", stable="one")
    says(page, "#text", "one two three")
    colours = page.eval_on_selector_all(".word", "words => words.map((word) => getComputedStyle(word).color)")
    assert [page.locator(".word").nth(at).get_attribute("class") for at in range(3)] == [
        "word stable", "word partial", "word partial",
    ]  # fmt: skip
    tab.server.say("one two tree", final=True)
    says(page, "#text", "one two tree")
    final = page.eval_on_selector_all(".word", "words => words.map((word) => getComputedStyle(word).color)")
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert final == [ink] * 3
    assert len({*colours, ink}) == 3


def test_a_new_segment_is_a_new_paragraph_with_its_time(tab: Tab) -> None:
    page = listen(tab)
    tab.server.say("one", final=True)
    tab.server.say("", final=True, segment=1)
    tab.server.say("three", segment=75)
    says(page, "#text", "three")
    assert page.locator("#text p:visible").all_inner_texts() == ["0:00\none", "1:15\nthree"]


def test_unsure_words_are_marked_and_the_legend_says_so(tab: Tab) -> None:
    page = listen(tab)
    tab.server.say("sure", final=True, confidence=0.6)
    tab.server.say("hardly", final=True, segment=1, confidence=0.59)
    says(page, "#text", "hardly")
    assert page.locator("#text .unsure").all_inner_texts() == ["hardly"]
    assert "59 %" in page.locator("#text .unsure").get_attribute("title")
    assert page.locator("#legend .unsure").is_visible()


def test_latency_and_real_time_factor_are_shown(tab: Tab) -> None:
    page = listen(tab)
    tab.server.say("one")
    says(page, "#text", "one")
    assert page.inner_text("#latency") == "41 ms"
    assert page.inner_text("#factor") == "0.13"  # 41 ms of work for a chunk of 320 ms


def test_only_final_text_is_read_aloud_by_screen_readers(tab: Tab) -> None:
    page = listen(tab)
    tab.server.say("maybe")
    tab.server.say("surely", final=True)
    says(page, "#log[aria-live=polite]", "^surely$")
    for segment in range(1, 6):
        tab.server.say(f"segment {segment}", final=True, segment=segment)
    says(page, "#log", "segment 3segment 4segment 5")


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


def test_a_word_replays_its_own_sound(tab: Tab) -> None:
    samples = sweep(3.0)
    tab.context.add_init_script(f"({PLAYED})()")
    page = read(tab, samples, "one two three")
    page.click("text=two")
    page.wait_for_selector(".word.playing:has-text('two')")
    (played,) = page.evaluate("window.played")
    page.wait_for_selector(".word.playing", state="detached")
    assert played["rate"] == RATE
    np.testing.assert_allclose(played["samples"], samples[round(0.4 * RATE) : round(1.0 * RATE)], atol=2e-4)


def test_escape_and_another_word_stop_a_replay(tab: Tab) -> None:
    page = read(tab, sweep(60.0), "one two")
    page.evaluate("document.querySelectorAll('.word').forEach((word) => { word.said.end += 40 })")
    page.click("text=one")
    page.wait_for_selector(".playing:has-text('one')")
    page.click("text=two")
    page.wait_for_selector(".playing:has-text('two')")
    assert page.locator(".playing").count() == 1
    page.keyboard.press("Escape")
    page.wait_for_selector(".playing", state="detached")


def test_words_are_not_replayed_into_an_open_microphone(tab: Tab) -> None:
    page = listen(tab)
    tab.server.say("one", final=True)
    page.click(".word")
    says(page, "#status", "the microphone would hear it")
    assert page.locator(".playing").count() == 0


def test_the_text_can_be_taken_along(tab: Tab) -> None:
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = read(tab, sweep(2.0), "one two")
    page.click("#copy")
    says(page, "#status", "Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "one two\n"
    files = {}
    for kind in ("txt", "srt", "vtt", "json"):
        with page.expect_download() as download:
            page.click(f"[data-save={kind}]")
        assert re.fullmatch(rf"transcript-[\d-]+\.{kind}", download.value.suggested_filename)
        files[kind] = Path(download.value.path()).read_text()
    assert files["txt"] == "one two\n"
    assert files["srt"] == "1\n00:00:00,000 --> 00:00:01,000\none two\n"
    assert files["vtt"] == "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\none two\n"
    written = json.loads(files["json"])
    assert written["model"] == "scripted" and written["segments"][0]["words"][1]["word"] == "two"


def test_text_that_was_not_saved_is_cleared_only_after_asking(tab: Tab) -> None:
    page = read(tab, sweep(1.0), "precious")
    page.click("#clear")
    page.click("text=Keep it")
    assert page.inner_text("#text .said") == "precious"
    page.click("#clear")
    page.click("#discard")
    page.wait_for_selector("#text .word", state="detached")
    assert page.locator("#invitation").is_visible() and page.locator("#tools").is_hidden()


REFUSED = [("NotAllowedError", "allow it"), ("NotFoundError", "No microphone"), ("NotReadableError", "in use elsewhere")]


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


def test_the_microphone_that_was_chosen_is_asked_for_and_remembered(tab: Tab) -> None:
    tab.context.add_init_script(
        """const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
        window.asked = [];
        navigator.mediaDevices.getUserMedia = (wanted) => (window.asked.push(wanted.audio.deviceId?.exact), ask(wanted));"""
    )
    page = listen(tab)
    page.wait_for_selector("#device option:nth-child(2)", state="attached")
    chosen = page.locator("#device option").last.get_attribute("value")
    page.select_option("#device", chosen)  # in the middle of a stream, which goes on
    arrives(tab, 8000)
    assert page.evaluate("window.asked") == [None, chosen]
    assert page.evaluate("localStorage.getItem('device')") == chosen
    assert len(tab.server.hellos) == 1


def test_a_full_server_is_told_and_can_be_tried_again(tab: Tab) -> None:
    answers = iter([{"code": "busy", "message": "All 4 streams are taken: try again later.", "retry": True}, None])
    tab.server.accepts = lambda hello: next(answers)
    page = tab.open()
    page.click("#record")
    says(page, "#trouble", "All 4 streams are taken")
    state(page, "idle")
    page.click("#record")
    says(page, "#status", "Listening")
    assert page.inner_text("#trouble") == ""


def test_a_server_that_does_not_answer_is_told(tab: Tab) -> None:
    tab.server.deaf = True
    page = tab.open()
    page.click("#record")
    says(page, "#trouble", "does not answer")
    state(page, "idle")


def test_a_token_is_asked_for_sent_and_not_asked_for_again(tab: Tab) -> None:
    wrong = {"code": "unauthorised", "message": "This server wants its token."}
    tab.server.accepts = lambda hello: None if hello.get("token") == "open sesame" else wrong
    page = tab.open()
    assert page.locator("#token").is_hidden()
    page.click("#record")
    says(page, "#trouble", "wants its token")
    page.keyboard.type("open sesame")  # it has the focus
    page.keyboard.press("Enter")
    says(page, "#status", "Listening")
    assert page.locator("#token").is_hidden()
    assert [hello.get("token") for hello in tab.server.hellos] == [None, "open sesame"]
    page.reload()
    page.click("#record")
    says(page, "#status", "Listening")


REASONS = [("idle", "heard nothing"), ("limit", "length the server allows"), ("shutdown", "shutting down")]


@pytest.mark.parametrize(("reason", "words"), REASONS)
def test_why_the_server_ended_a_stream_is_told(tab: Tab, reason: str, words: str) -> None:
    page = listen(tab)
    tab.server.end(reason)
    says(page, "#trouble", words)
    state(page, "idle")


def test_a_lost_connection_is_taken_up_again_without_a_gap(tab: Tab) -> None:
    page = tab.open()
    tab.server.forgets = 20000
    samples = sweep(8.0)
    drop(page, "speech.wav", wav(samples))
    stopped(tab)
    tab.server.stopped = False
    tab.server.cut()
    says(page, "#status", "connection was lost")
    stopped(tab)
    assert tab.server.hellos[1] == {"type": "resume", "stream": "one"}
    np.testing.assert_allclose(tab.server.samples, samples, atol=2e-4)
    tab.server.say("all of it", final=True)
    tab.server.end()
    state(page, "idle")
    assert page.inner_text("#text .said") == "all of it"


def test_what_is_said_while_the_connection_is_lost_is_not_lost(tab: Tab) -> None:
    page = listen(tab)
    arrives(tab, 10000)
    tab.server.cut()
    says(page, "#status", "What you say is kept")
    says(page, "#status", "^Listening$")
    kept = page.evaluate("0.4 * 48000 / 2")
    arrives(tab, int(kept))  # at once: the half second of waiting
    assert [hello["type"] for hello in tab.server.hellos] == ["start", "resume"]


def test_a_connection_that_stays_lost_ends_the_stream_after_the_servers_patience(tab: Tab) -> None:
    tab.page.clock.install()
    page = tab.open()
    drop(page, "speech.wav", wav(sweep(1.0)))
    page.clock.run_for(100)
    stopped(tab)
    tab.server.say("so far")
    says(page, "#text", "so far")
    tab.server.deaf = True
    tab.server.cut()
    says(page, "#status", "trying again in 0.5 s")
    page.clock.run_for(500)
    says(page, "#status", "trying again in 1.0 s")
    page.clock.run_for(1000)
    says(page, "#status", "trying again in 2.0 s")
    for _ in range(8):
        page.clock.run_for(2000)
    says(page, "#trouble", "the stream is over")
    assert page.inner_text("#text .said") == "so far"


def test_a_stream_the_server_has_given_up_says_so(tab: Tab) -> None:
    page = listen(tab)
    tab.server.accepts = lambda hello: {"code": "gone", "message": "This stream is over; start another one."}
    tab.server.cut()
    says(page, "#trouble", "This stream is over")
    state(page, "idle")


def test_a_network_that_goes_away_is_noticed_at_once(tab: Tab) -> None:
    page = listen(tab)
    page.evaluate("dispatchEvent(new Event('offline'))")
    says(page, "#status", "connection was lost")
    page.evaluate("dispatchEvent(new Event('online'))")
    says(page, "#status", "^Listening$")


def test_the_whole_journey_goes_by_keyboard(tab: Tab) -> None:
    page = tab.open()
    page.keyboard.press("Space")
    says(page, "#status", "^Listening$")
    arrives(tab, 8000)
    tab.server.say("one two three", final=True)
    says(page, "#text", "three")
    page.keyboard.press("Space")
    stopped(tab)
    tab.server.end()
    state(page, "idle")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('word')"):
            break
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "two"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("End")
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.wait_for_selector(".playing:has-text('one')")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.wait_for_selector("#notes[open]")
    page.keyboard.press("t")  # a dialog is open: nothing turns
    page.keyboard.press("Escape")
    assert page.locator("html").get_attribute("data-theme") == "light"
    page.keyboard.press("t")
    assert page.locator("html").get_attribute("data-theme") == "dark"


def test_every_control_can_be_reached_and_has_a_name(tab: Tab) -> None:
    page = read(tab, sweep(1.0), "word")
    names, seen = [], set()
    for _ in range(20):
        page.keyboard.press("Tab")
        name, key = page.evaluate(
            """() => { const e = document.activeElement;
            return [e.ariaLabel || e.labels?.[0]?.textContent || e.textContent.trim(), e.id + e.dataset.save + e.className]; }"""
        )
        if key in seen:
            break
        seen.add(key)
        names.append(name)
    assert all(names)
    assert {"Light or dark", "Keys and notes", "Copy", "word", "Microphone", "Start listening", "Open a file"} <= set(names)


def test_single_keys_can_be_switched_off(tab: Tab) -> None:
    page = tab.open()
    page.click("#help")
    page.uncheck("#keys")
    page.click("#notes [data-close]")
    page.reload()
    page.keyboard.press("t")
    assert page.locator("html").get_attribute("data-theme") == "light"
    page.click("#theme")
    assert page.locator("html").get_attribute("data-theme") == "dark"


def test_the_theme_is_the_systems_until_it_is_chosen_and_then_remembered(tab: Tab) -> None:
    page = tab.open()
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-theme=dark]")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    page.wait_for_selector("html[data-theme=light]")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    page.reload()
    page.wait_for_selector("html[data-theme=light]")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_enough_contrast(tab: Tab, theme: str) -> None:
    page = tab.open()
    page.emulate_media(color_scheme=theme)
    page.wait_for_selector(f"html[data-theme={theme}]")
    colours = page.evaluate(
        """() => { const style = getComputedStyle(document.documentElement);
        return Object.fromEntries(["paper", "ink", "soft", "faint", "teal", "red", "amber"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()])); }"""
    )

    def luminance(colour: str) -> float:  # WCAG 2.1
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    paper = luminance(colours.pop("paper"))
    for name, colour in colours.items():
        low, high = sorted((paper, luminance(colour)))
        assert (high + 0.05) / (low + 0.05) >= (3.0 if name in ("red", "amber") else 4.5), name


@pytest.mark.parametrize("width", [320, 360, 768, 1440])
def test_no_width_scrolls_sideways(tab: Tab, width: int, screenshots: Path) -> None:
    page = listen(tab)
    page.set_viewport_size({"width": width, "height": 720})
    for segment in range(4):
        tab.server.say("some words and an extraordinarilylongwordthatnobodyeversaidinasinglebreathofair", final=True, segment=segment)
    tab.server.say("and what is not yet certain", stable="and what", segment=4)
    says(page, "#text", "not yet certain")
    page.click("#record")
    stopped(tab)
    tab.server.refuse("internal", "Something broke in the server: try again, and tell the one who runs it.")
    says(page, "#trouble", "Something broke")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=screenshots / f"width-{width}.png")


def test_the_end_of_the_text_stays_in_sight(tab: Tab) -> None:
    page = listen(tab)
    for segment in range(40):
        tab.server.say(f"segment {segment}", final=True, segment=segment)
    page.locator("text=segment 39").last.wait_for()
    bottom, top = page.evaluate(
        """[document.querySelector("#text p:last-child").getBoundingClientRect().bottom,
        document.querySelector("footer").getBoundingClientRect().top]"""
    )
    assert bottom <= top


def test_the_picture_moves_with_the_sound_and_is_painted_in_both_themes(tab: Tab) -> None:
    page = listen(tab)
    arrives(tab, 24000)
    pixels = """() => { const c = document.querySelector("#picture");
      return [...c.getContext("2d").getImageData(c.width - 120, 0, 120, c.height).data] }"""
    pictures = {}
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.wait_for_selector(f"html[data-theme={theme}]")
        page.wait_for_timeout(100)
        pictures[theme] = np.array(page.evaluate(pixels)).reshape(-1, 4)
        assert len(np.unique(pictures[theme][:, :3], axis=0)) > 50
    assert pictures["light"].mean() > pictures["dark"].mean()


def test_nothing_scrolls_where_motion_is_not_wanted(chromium: Any, home: str) -> None:
    with Tab(chromium, home, reduced_motion="reduce") as tab:
        page = tab.open()
        samples = np.zeros(6 * RATE)
        samples[RATE : RATE + 4000] = sweep(0.25)
        drop(page, "speech.wav", wav(samples))
        stopped(tab)
        page.wait_for_timeout(100)
        painted = page.evaluate(
            """() => { const c = document.querySelector("#picture"), y = Math.round(c.height * 0.25);
            const { data } = c.getContext("2d").getImageData(0, y, c.width, 1), found = [];
            for (let x = 0; x < c.width; x++) if (data[4 * x] !== data[4 * (c.width - 1)]) found.push(x);
            return found; }"""
        )
        assert painted and abs(painted[0] - 1.0 / 0.016) < 3  # one second from the left, where it was drawn first
