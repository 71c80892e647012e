"""Light and dark, wide and narrow, moving and still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from acts import RATE, arrives, drop, listen, says, stopped, sweep, wav
from tab import Tab


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
        """(names) => {
          const style = getComputedStyle(document.documentElement);
          return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
        }""",
        ["paper", "ink", "soft", "faint", "teal", "red", "amber"],
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
        tab.server.say(
            "some words and an extraordinarilylongwordthatnobodyeversaidinasinglebreathofair",
            final=True,
            segment=segment,
        )
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
    colours = """() => {
      const picture = document.querySelector("#picture");
      const { data } = picture.getContext("2d").getImageData(picture.width - 100, 0, 100, picture.height);
      return [...new Set(new Uint32Array(data.buffer))].slice(0, 1000);
    }"""
    painted = {}
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.wait_for_selector(f"html[data-theme={theme}]")
        page.wait_for_timeout(100)
        painted[theme] = set(page.evaluate(colours))
        assert len(painted[theme]) > 50
    assert len(painted["light"] & painted["dark"]) < 10


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
