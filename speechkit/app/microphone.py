"""A microphone as blocks of samples, through sounddevice (PortAudio)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import numpy as np
from jaxtyping import Float

from speechkit.types import Seconds

BLOCK: Seconds = 0.05
LATE: Seconds = 30.0  # of audio that may wait for the model before more of it is lost


def sound_card() -> Any:
    """The module sounddevice.

    Raises:
        ValueError: where it, or the library below it, is absent.
    """
    try:
        import sounddevice
    except ImportError as error:
        raise ValueError(
            "The microphone needs the package sounddevice, but it is not installed; "
            "install it with: pip install 'speechkit[mic]'"
        ) from error
    except OSError as error:
        raise ValueError(
            "The microphone needs the library PortAudio, but it is not found; "
            "install it, for example with: apt install libportaudio2"
        ) from error
    return sounddevice


def devices(card: Any) -> list[str]:
    """A line for each input device: its number and name, its channels and rate, a star where it is the default."""
    default = card.default.device[0]
    return [
        f"{'*' if number == default else ' '} {number:3}  {about['name']}  "
        f"({about['max_input_channels']} channels, {about['default_samplerate']:.0f} Hz)"
        for number, about in enumerate(card.query_devices())
        if about["max_input_channels"]
    ]


class Microphone:
    """Blocks as they arrive, each with the time it did, until `stop` or until the device is gone.

    The thread of the sound card only puts them into a queue: it never waits for the model, whose delay is bounded by
    losing blocks once too many wait.

    Args:
        card: the module sounddevice, or what stands in for it.
        device: number, or part of the name; the default one unless given.

    Raises:
        ValueError: where there is no such device, or it cannot be opened.
    """

    def __init__(self, card: Any, device: str | None = None) -> None:
        self.card = card
        self.device = int(device) if device is not None and device.isdecimal() else device
        self.overflows = self.lost = 0  # blocks before which the card, and blocks that the model, was too late
        self._stopped = False
        self._queue: SimpleQueue[tuple[float, np.ndarray] | None] = SimpleQueue()
        try:
            self.sample_rate = int(card.query_devices(self.device, "input")["default_samplerate"])
            self._stream = card.InputStream(
                samplerate=self.sample_rate,
                blocksize=round(BLOCK * self.sample_rate),
                device=self.device,
                channels=1,
                dtype="float32",
                callback=self._arrived,
                finished_callback=self._end,
            )
        except (ValueError, card.PortAudioError) as error:
            named = "is none" if device is None else f"is {device}"
            raise ValueError(
                f"The microphone must be an input device of this machine, but there {named} that can be opened "
                f"({error}); choose one with --device: --list-devices shows them."
            ) from error

    def __enter__(self) -> Microphone:
        self._stream.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[tuple[float, Float[np.ndarray, "N"]]]:
        while (item := self._queue.get()) is not None:
            yield item

    def stop(self) -> None:
        """What has arrived is handed over, and then no more. May be called from any thread, and by a signal."""
        self._stopped = True
        self._end()

    def faults(self) -> list[str]:
        """Sentences on what of the audio is missing."""
        said = []
        if self.overflows:
            said.append(f"The sound card lost audio {self.overflows} times, because this machine was too busy.")
        if self.lost:
            said.append(
                f"The model was too slow, and {self.lost * BLOCK:.1f} s of audio were lost; take a smaller one."
            )
        if not self._stopped:
            said.append("The microphone stopped by itself; see whether it is still connected.")
        return said

    def _end(self) -> None:
        self._queue.put(None)

    def _arrived(self, samples: Float[np.ndarray, "N 1"], _count: int, _time: object, status: Any) -> None:
        self.overflows += bool(status.input_overflow)
        if self._queue.qsize() * BLOCK < LATE:
            self._queue.put((time.perf_counter(), samples[:, 0].copy()))  # the card reuses its buffer
        else:
            self.lost += 1
