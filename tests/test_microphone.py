"""``speechkit stream --mic`` behind a sound card that plays recordings."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from overfit import Overfit
from test_cli import assert_refused, output
from test_vad import LOUD, with_rests
from tiny import node, sound, tiny

from speechkit.app import stream as verb
from speechkit.app.microphone import BLOCK, LATE, Microphone, devices, sound_card
from speechkit.app.stream import _interruptible, _meter, stream
from speechkit.pretrained import save

RATE = 44100
GOOD, LATE_CARD = SimpleNamespace(input_overflow=False), SimpleNamespace(input_overflow=True)


class Card:
    """What is used of sounddevice. It plays ``samples`` from a thread, in one buffer, and then calls ``after``."""

    class PortAudioError(Exception): ...

    default = SimpleNamespace(device=(2, 1))

    def __init__(self, samples: np.ndarray, after: Callable[[], object] | None = None, overflows: int = 0) -> None:
        self.samples, self.after, self.overflows = samples, after, overflows
        self.opened: dict[str, Any] = {}

    def query_devices(self, device: int | str | None = None, kind: str | None = None) -> Any:
        names = [("speaker", 0), ("built-in", 2), ("headset", 1)]
        found = [{"name": n, "max_input_channels": c, "default_samplerate": float(RATE)} for n, c in names]
        if kind is None:
            return found
        if device not in (None, 1, 2, "built-in", "headset"):
            raise ValueError(f"No input device matching {device!r}")
        return found[2]

    def InputStream(self, **options: Any) -> Card:  # noqa: N802 - the name sounddevice has given it
        self.opened = options
        return self

    def start(self) -> None:
        self.thread = threading.Thread(target=self._play)
        self.thread.start()

    def _play(self) -> None:
        size = self.opened["blocksize"]
        buffer = np.zeros((size, 1), np.float32)
        for number, at in enumerate(range(0, len(self.samples), size)):
            block = self.samples[at : at + size]
            buffer[: len(block), 0] = block
            status = LATE_CARD if number < self.overflows else GOOD
            self.opened["callback"](buffer[: len(block)], len(block), None, status)
        buffer[:] = np.nan
        (self.after or self.opened["finished_callback"])()

    def close(self) -> None:
        self.thread.join()
        self.opened["finished_callback"]()


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mic") / "model"
    save(tiny(), node(), folder)
    return str(folder)


def said(capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[list[str], list[str]]:
    """Lines on stdout and stderr."""
    stream(**options)
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


@pytest.mark.parametrize("vad", [False, True])
def test_a_microphone_is_heard_like_a_file_and_ctrl_c_ends_it_with_its_last_words(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, vad: bool
) -> None:
    monkeypatch.setattr(verb, "Vad", lambda: LOUD)
    samples = with_rests(4, bursts=2) if vad else sound(3.3)
    soundfile.write(tmp_path / "a.wav", samples.numpy(), RATE, subtype="FLOAT")
    (*wanted, text, report), _ = said(capsys, model=model, file=str(tmp_path / "a.wav"), vad=vad)
    card, before = Card(samples.numpy(), ctrl_c), signal.getsignal(signal.SIGINT)
    (*lines, again, told), err = said(capsys, model=model, mic=True, vad=vad, card=card)
    assert err == ["speechkit: listening at 44100 Hz; Ctrl-C ends."]
    assert (lines, again) == (wanted, text) and text
    assert told.split(";")[0] == report.split(";")[0] == f"{len(samples) / RATE:.2f} s of audio"
    assert re.search(r"latency: a chunk of 320 ms and \d+ ms to hear it", told)
    assert signal.getsignal(signal.SIGINT) is before
    assert (card.opened["samplerate"], card.opened["channels"], card.opened["device"]) == (RATE, 1, None)


def test_real_words_are_heard_through_a_microphone(overfit: Overfit, capsys: pytest.CaptureFixture[str]) -> None:
    card = Card(overfit.clip(2, RATE), ctrl_c)
    assert said(capsys, model=str(overfit.folder), mic=True, card=card)[0][-2] == overfit.text(2)


def test_what_the_sound_card_lost_is_counted_and_said(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = said(capsys, model=model, mic=True, card=Card(sound(1.0).numpy(), ctrl_c, overflows=3))
    assert err[1:] == ["speechkit: The sound card lost audio 3 times, because this machine was too busy."]


def test_a_microphone_that_is_unplugged_ends_with_what_was_said_and_says_so(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (*_, text, _), err = said(capsys, model=model, mic=True, card=Card(sound(1.5).numpy()))
    assert text and err[1:] == ["speechkit: The microphone stopped by itself; see whether it is still connected."]


def test_the_callback_never_waits_and_loses_what_a_slow_model_cannot_hear() -> None:
    card = Card(sound(1.0).numpy())
    microphone = Microphone(card, "headset")
    assert card.opened["device"] == "headset"
    block = np.full((round(BLOCK * RATE), 1), 0.5, np.float32)
    for _ in range(round(100 / BLOCK)):
        card.opened["callback"](block, len(block), None, GOOD)
    microphone.stop()
    heard = sum(len(samples) for _, samples in microphone) / RATE
    assert heard == pytest.approx(LATE, abs=0.1)
    assert microphone.faults() == ["The model was too slow, and 70.0 s of audio were lost; take a smaller one."]


def test_a_second_ctrl_c_interrupts() -> None:
    stops: list[int] = []
    with pytest.raises(KeyboardInterrupt), _interruptible(lambda: stops.append(1)):
        signal.raise_signal(signal.SIGINT)
        assert stops == [1]
        signal.raise_signal(signal.SIGINT)
    assert stops == [1]


def test_devices_are_listed_with_the_default_marked(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(capsys, model="nowhere", list_devices=True, card=Card(np.zeros(0)))
    assert out == ["    1  built-in  (2 channels, 44100 Hz)", "*   2  headset  (1 channels, 44100 Hz)"]
    deaf = SimpleNamespace(default=Card.default, query_devices=lambda: [])
    assert devices(deaf) == []
    assert said(capsys, model=model, list_devices=True, card=deaf)[0] == ["This machine has no input device."]


def test_a_device_that_is_not_there_is_refused() -> None:
    card = Card(np.zeros(0))
    with pytest.raises(
        ValueError, match=r"there is lamp that can be opened .*matching 'lamp'.*--list-devices shows them"
    ):
        Microphone(card, "lamp")
    with pytest.raises(ValueError, match="there is 7 that can"):
        Microphone(card, "7")
    card.query_devices = lambda *_: (_ for _ in ()).throw(card.PortAudioError("Error querying device -1"))
    with pytest.raises(ValueError, match=r"there is none that can be opened \(Error querying device -1\)"):
        Microphone(card)


def test_without_the_package_or_the_library_it_is_said_how_to_install_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    found = output(capsys, "stream", "nowhere", "--mic")
    assert_refused(found, r"needs the package sounddevice, .*; install it with: pip install 'speechkit\[mic\]'")
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')\n")
    monkeypatch.delitem(sys.modules, "sounddevice")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match="needs the library PortAudio, but it is not found; install it, for example with: apt"
    ):
        sound_card()


def test_the_meter_goes_from_silence_to_full_scale() -> None:
    assert [_meter(level) for level in (-100.0, -60.0, -30.0, -29.25, 0.0, 6.0)] == [
        " " * 10, " " * 10, "█████     ", "█████▏    ", "█" * 10, "█" * 10,
    ]  # fmt: skip
