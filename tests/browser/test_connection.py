"""The stream to the server: refused, ended, lost and taken up again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from acts import RATE, arrives, drop, listen, says, state, stopped, sweep, wav
from tab import Tab

SOCKET = """() => {
  window.WebSocket = class {
    static sockets = [];
    bufferedAmount = 0;
    sent = 0;
    constructor() {
      WebSocket.sockets.push(this);
      setTimeout(() => this.onopen());
    }
    send(data) {
      if (typeof data === "string") return;
      this.sent += data.byteLength;
      this.bufferedAmount += data.byteLength;
    }
    close() {}
    says(message) {
      this.onmessage({ data: JSON.stringify(message) });
    }
  };
}"""
READY = {"type": "ready", "stream": "one", "chunk_ms": 320, "received": 0, "model": "", "search": ""}


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
    says(page, "#trouble", "wants a token")
    page.keyboard.type("abracadabra")  # it has the focus
    page.keyboard.press("Enter")
    says(page, "#trouble", "not this server's token")
    page.fill("#token", "open sesame")
    page.keyboard.press("Enter")
    says(page, "#status", "Listening")
    assert page.locator("#token").is_hidden()
    assert [hello.get("token") for hello in tab.server.hellos] == [None, "abracadabra", "open sesame"]
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
    tab.context.add_init_script(
        """const Node = AudioWorkletNode;
        window.captured = [];
        window.AudioWorkletNode = class extends Node {
          constructor(...given) {
            super(...given);
            this.port.addEventListener("message", ({ data }) => window.captured.push(...(data ?? [null])));
          }
        };"""
    )
    page = listen(tab)
    arrives(tab, 10000)
    tab.server.forgets = 5000
    tab.server.cut()
    says(page, "#status", "Nothing is lost")
    says(page, "#status", "^Listening$")
    arrives(tab, 10000)
    page.click("#record")
    stopped(tab)
    assert [hello["type"] for hello in tab.server.hellos] == ["start", "resume"]
    *captured, last = page.evaluate("window.captured")
    assert last is None  # the worklet handed out all it had
    captured = np.clip(captured, -1, 1)
    assert len(tab.server.samples) == len(captured) and np.abs(captured).max() > 0.01
    np.testing.assert_allclose(tab.server.samples, captured, atol=1e-4)


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


def reading(tab: Tab) -> Any:
    """A page that reads half a minute of sound to a socket of the test's own, at a clock of the test's own."""
    tab.page.add_init_script(f"({SOCKET})()")
    tab.page.clock.install()
    page = tab.page
    page.goto(tab.home)
    drop(page, "speech.wav", wav(sweep(30.0)))
    page.wait_for_selector("[data-state=reading]")
    page.clock.run_for(100)
    page.evaluate("(ready) => WebSocket.sockets[0].says(ready)", READY)
    return page


def test_a_slow_network_is_not_given_more_than_it_takes(tab: Tab) -> None:
    page = reading(tab)
    sent = []
    for _ in range(10):
        page.clock.run_for(500)
        sent.append(page.evaluate("WebSocket.sockets[0].sent"))
        page.evaluate("WebSocket.sockets[0].bufferedAmount = 0")
    per_second = 2 * RATE
    assert sent[0] <= 5 * per_second
    assert max(np.diff(sent)) <= 5 * per_second
    assert sent[-1] == 30 * per_second


def test_a_network_that_is_silent_for_too_long_is_given_up(tab: Tab) -> None:
    page = reading(tab)
    page.clock.run_for(6000)
    assert page.inner_text("#status") == "Reading speech.wav"
    page.clock.run_for(4000)
    says(page, "#status", "connection was lost")
    assert page.evaluate("WebSocket.sockets.length") == 2
