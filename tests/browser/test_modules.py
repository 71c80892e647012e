"""The page's arithmetic, run in the browser it is for and held against other people's."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import librosa
import numpy as np
import pytest
from tab import Tab


@pytest.fixture(scope="module")
def run(chromium: Any, home: str) -> Iterator[Callable[..., Any]]:
    """``run(module, body, given)``: the value of a JavaScript body with the module's exports as ``m``."""
    with Tab(chromium, home) as tab:
        page = tab.open()

        def call(module: str, body: str, given: Any = None) -> Any:
            script = f"async (given) => {{ const m = await import('/page/{module}.js'); {body} }}"
            return page.evaluate(script, given)

        yield call


def spoken(seed: int) -> list[dict[str, Any]]:
    """Segments of random words: short and long ones, said fast and slowly, pauses, sentences that end."""
    dice = random.Random(seed)
    segments, now = [], dice.uniform(0, 3)
    for _ in range(dice.randrange(1, 6)):
        words, slow = [], dice.choice([1, 1, 2.5])
        for _ in range(dice.randrange(1, 40)):
            length = slow * dice.uniform(0.05, 0.6)
            word = "".join(dice.choices("abcdefgh", k=dice.randrange(1, 14))) + dice.choice(["", "", "", "", ".", ","])
            words.append({"word": word, "start": now, "end": now + length, "confidence": dice.random()})
            now += length + slow * dice.choice([0, 0, 0.1, 0.3, 1.0])
        segments.append({"text": " ".join(word["word"] for word in words), "words": words})
        now += dice.choice([0.0, 1.0, 8.0])
    return segments


def seconds(clock: str) -> float:
    hours, minutes, rest = re.fullmatch(r"(\d\d):([0-5]\d):([0-5]\d[.,]\d{3})", clock).groups()
    return 3600 * int(hours) + 60 * int(minutes) + float(rest.replace(",", "."))


def parse_srt(text: str) -> list[tuple[float, float, list[str]]]:
    cues = []
    for number, block in enumerate(text.rstrip("\n").split("\n\n"), start=1):
        head, times, *lines = block.split("\n")
        assert head == str(number)
        start, end = times.split(" --> ")
        cues.append((seconds(start), seconds(end), lines))
    return cues


def test_subtitles_are_short_enough_to_read_and_stand_long_enough(run: Callable[..., Any]) -> None:
    for segments in map(spoken, range(60)):
        cues = parse_srt(run("exports", "return m.toSRT(given)", segments))
        for number, (start, end, lines) in enumerate(cues):
            follows = cues[number + 1][0] if number + 1 < len(cues) else np.inf
            assert 1 <= len(lines) <= 2 and max(map(len, lines)) <= 42
            assert 0.999 <= end - start <= 7.001
            assert end <= follows


def test_subtitles_hold_every_word_at_its_time(run: Callable[..., Any]) -> None:
    for segments in map(spoken, range(60)):
        cues = parse_srt(run("exports", "return m.toSRT(given)", segments))
        words = [word for segment in segments for word in segment["words"]]
        assert " ".join(line for *_, lines in cues for line in lines) == " ".join(word["word"] for word in words)
        heard = iter(words)
        for start, end, lines in cues:
            said = [next(heard) for _ in " ".join(lines).split()]
            assert start == pytest.approx(said[0]["start"], abs=1e-3)
            assert end >= said[-1]["end"] - 1e-3


def test_the_browsers_own_parser_reads_the_vtt_as_it_was_said(run: Callable[..., Any], chromium: Any) -> None:
    words = ["a<b>", "&", "-->", "fish", "4000", "hours", "later"]
    said = [
        {"word": word, "start": 2.0 * at + 3598, "end": 2.0 * at + 3599.5, "confidence": 1}
        for at, word in enumerate(words)
    ]
    vtt = run("exports", "return m.toVTT(given)", [{"text": " ".join(words), "words": said}])
    page = chromium.new_page()
    read = page.evaluate(
        """(vtt) => new Promise((resolve) => {
          const video = document.body.appendChild(document.createElement("video"));
          const element = video.appendChild(document.createElement("track"));
          const told = (cue) => [cue.startTime, cue.endTime, cue.getCueAsHTML().textContent];
          element.onload = () => resolve([...element.track.cues].map(told));
          element.src = URL.createObjectURL(new Blob([vtt], { type: "text/vtt" }));
          element.track.mode = "hidden";
        })""",
        vtt,
    )
    page.close()
    assert vtt.startswith("WEBVTT\n\n")
    assert " ".join(text for *_, text in read).split() == words
    assert read[0][0] == 3598.0 and read[-1][1] == pytest.approx(3611.5)


def test_text_and_json_hold_what_was_said(run: Callable[..., Any]) -> None:
    segments = spoken(3)
    assert run("exports", "return m.toText(given)", segments) == "".join(f"{s['text']}\n" for s in segments)
    written = json.loads(run("exports", "return m.toJSON(given, {model: 'x'})", segments))
    assert written == {"model": "x", "text": "\n".join(s["text"] for s in segments), "segments": segments}


def test_nothing_said_makes_empty_files(run: Callable[..., Any]) -> None:
    wrote = run("exports", "return [m.toText([]), m.toSRT([]), m.toVTT([]), JSON.parse(m.toJSON([])).segments]")
    assert wrote == ["", "", "WEBVTT\n", []]


def test_a_word_longer_than_a_line_stands_alone(run: Callable[..., Any]) -> None:
    words = [
        {"word": w, "start": at, "end": at + 0.9, "confidence": 1} for at, w in enumerate(["so", "x" * 60, "it", "is"])
    ]
    cues = parse_srt(run("exports", "return m.toSRT(given)", [{"text": "", "words": words}]))
    assert [line for *_, lines in cues for line in lines] == ["so", "x" * 60, "it is"]


def test_the_spectrum_is_numpys(run: Callable[..., Any]) -> None:
    samples = np.random.default_rng(0).normal(size=512)
    power = run("mel", "return [...m.fft(512)(Float32Array.from(given))]", samples.tolist())
    np.testing.assert_allclose(power, abs(np.fft.rfft(samples)) ** 2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_the_mel_bands_are_librosas(run: Callable[..., Any], rate: int) -> None:
    size = 2 ** round(np.log2(0.025 * rate))
    rows = np.zeros((64, size // 2 + 1))
    for row, band in zip(rows, run("mel", "return m.filters(...given)", [rate, size]), strict=True):
        row[band["from"] : band["from"] + len(band["weights"])] = band["weights"]
    theirs = librosa.filters.mel(sr=rate, n_fft=size, n_mels=64, fmin=60, fmax=8000, htk=True, norm=None)
    wide = theirs.max(1) > 0.1  # ours gives narrower ones their nearest bin
    assert wide.sum() > 50 and (rows.max(1) > 0.1).all()
    np.testing.assert_allclose(rows[wide], theirs[wide], atol=1e-4)


def test_a_full_scale_tone_is_loudest_in_its_own_band(run: Callable[..., Any]) -> None:
    levels = run(
        "mel",
        """const analyse = m.logMel(16000);
        const tone = (_, n) => Math.sin(2 * Math.PI * 1000 * n / 16000);
        return [...analyse(Float32Array.from({length: analyse.size}, tone))]""",
    )
    edges = librosa.mel_frequencies(66, fmin=60, fmax=8000, htk=True)
    assert abs(int(np.argmax(levels)) - int(np.argmin(abs(edges[1:-1] - 1000)))) <= 1
    assert -3 < max(levels) < 2


def test_the_audio_thread_hands_over_every_sample_in_blocks_and_the_last_ones_when_asked(tab: Tab) -> None:
    blocks = tab.open().evaluate(
        """async () => {
          const posted = [], port = { postMessage: (block) => posted.push(block && [...block]) };
          globalThis.AudioWorkletProcessor = class { port = port; };
          globalThis.registerProcessor = (_, Processor) => (globalThis.Capture = Processor);
          await import("/page/capture.js");
          const capture = new Capture({ processorOptions: { samples: 300 } });
          for (let at = 0; at < 8 * 128; at += 128) {
            capture.process([[Float32Array.from({ length: 128 }, (_, k) => at + k)]]);
          }
          capture.process([[]]); // a microphone that went away
          port.onmessage();
          return [posted, capture.process([[]])];
        }"""
    )
    (*full, rest, end), runs = blocks
    assert [len(block) for block in full] == [300, 300, 300]
    assert [x for block in (*full, rest) for x in block] == list(range(1024))
    assert end is None and runs is False


def test_the_tape_gives_back_what_it_took_and_forgets_what_is_more_than_an_hour_old(run: Callable[..., Any]) -> None:
    first, again, forgotten, kept = run(
        "tape",
        """const tape = new m.Tape();
        const one = tape.begin(100);
        for (let at = 0; at < 2500; at += 70) one.add(Int16Array.from({length: 70}, (_, k) => at + k));
        const first = [...tape.cut(12.34, 12.36).samples];
        const next = tape.begin(50);
        next.add(Int16Array.from({length: 500}, (_, k) => -k));
        const again = [...tape.cut(next.offset + 2, next.offset + 2.02).samples];
        next.add(new Int16Array(50 * 3595));
        return [first, again, tape.cut(1, 2), tape.cut(next.offset + 3000, next.offset + 3001).samples.length];""",
    )
    assert first == list(range(1224, 1246))  # with a tenth of a second on both sides
    assert again == list(range(-95, -106, -1))
    assert forgotten is None and kept == 60


def test_loud_samples_are_clipped_and_the_rest_is_rounded(run: Callable[..., Any]) -> None:
    assert run("tape", "return [...m.toInt16(Float32Array.of(0, 0.5, -1, 1, 3, -3))]") == [
        0, 16384, -32767, 32767, 32767, -32767,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("http://localhost:8000/", "ws://localhost:8000/v1/stream"),
        ("https://example.org/live/?a#b", "wss://example.org/live/v1/stream"),
    ],
)
def test_the_stream_is_sought_beside_the_page(run: Callable[..., Any], base: str, url: str) -> None:
    assert run("protocol", "return m.address(given)", base) == url


def test_words_keep_their_times_over_several_streams(run: Callable[..., Any]) -> None:
    said = {"segment": 0, "text": "yes", "stable": "yes", "final": True,
            "words": [{"word": "yes", "start": 1, "end": 2, "confidence": 1}]}  # fmt: skip
    segments = run(
        "transcript",
        """const said = new m.Transcript();
        said.begin(0); said.apply(given);
        said.begin(10); said.apply({...given, text: "no", final: false});
        said.close();
        return said.spoken;""",
        said,
    )
    assert [(s["text"], s["words"][0]["start"], s["final"]) for s in segments] == [("yes", 1, True), ("no", 11, True)]


def test_what_is_stable_is_told_word_by_word(run: Callable[..., Any]) -> None:
    words = [{"word": word, "start": 0, "end": 1, "confidence": 1} for word in ("one", "two", "three")]
    heard = {"text": "one, two three.", "stable": "one, two", "final": False, "words": words}
    parts = run("transcript", "return m.pieces(given)", heard)
    assert [(p["before"], p["word"]["word"], p["sure"]) for p in parts["found"]] == [
        ("", "one", "stable"), (", ", "two", "stable"), (" ", "three", "partial"),
    ]  # fmt: skip
    assert parts["after"] == "."
    assert run("transcript", "return m.pieces(given)", heard | {"text": "other words"}) is None
