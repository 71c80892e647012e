"""What a person reads, replays and takes along, by mouse and by keyboard."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from acts import RATE, arrives, listen, read, says, state, stopped, sweep
from tab import Tab

PLAYED = """() => {
  window.played = [];
  const start = AudioBufferSourceNode.prototype.start;
  AudioBufferSourceNode.prototype.start = function (...when) {
    window.played.push({ rate: this.buffer.sampleRate, samples: [...this.buffer.getChannelData(0)] });
    return start.apply(this, when);
  };
}"""


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


def test_a_word_keeps_the_focus_while_the_text_around_it_changes(tab: Tab) -> None:
    page = listen(tab)
    tab.server.say("one two", stable="one")
    says(page, "#text", "one two")
    page.locator(".word").first.focus()
    tab.server.say("one too three four", stable="one")
    says(page, "#text", "three four")
    tab.server.say("one three", final=True)
    says(page, "#text", "one three")
    assert page.evaluate("document.activeElement.textContent") == "one"
    assert page.locator("#text .word").all_inner_texts() == ["one", "three"]


def test_text_without_words_is_shown_as_it_is(tab: Tab) -> None:
    page = listen(tab)
    message = {"type": "text", "segment": 0, "stable": "", "words": [], "seconds": 1.0, "latency_ms": 1.0}
    tab.server.send(**message, text="not timed yet", final=False)
    says(page, "#text .said", "^not timed yet$")
    assert page.locator("#text .partial").count() == 1
    tab.server.say("timed now", final=True)
    says(page, "#text .said", "^timed now$")


def test_unsure_words_are_marked_and_the_legend_says_so(tab: Tab) -> None:
    page = listen(tab)
    tab.server.say("sure", final=True, confidence=0.6)
    tab.server.say("hardly", final=True, segment=1, confidence=0.59)
    says(page, "#text", "hardly")
    assert page.locator("#text .unsure").all_inner_texts() == ["hardly"]
    assert "less than 60 %" in page.text_content("#notes")
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


def test_the_page_is_not_left_with_text_that_was_not_saved(tab: Tab) -> None:
    page = read(tab, sweep(1.0), "precious")
    page.click("#help")  # browsers ask only those who have touched the page
    asked: list[str] = []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    page.close(run_before_unload=True)
    page.wait_for_timeout(300)
    assert asked == ["beforeunload"]


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
            """() => {
              const e = document.activeElement, label = e.ariaLabel || e.labels?.[0]?.textContent;
              return [label || e.textContent.trim(), e.id + e.dataset.save + e.className];
            }"""
        )
        if key in seen:
            break
        seen.add(key)
        names.append(name)
    assert all(names)
    assert {"Light or dark", "Keys and notes", "Copy", "word", "Microphone", "Start listening", "Open a file"} <= set(
        names
    )


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
