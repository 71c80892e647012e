"""Voice activity: which parts of a stream hold speech, told while it comes in.

Two things, apart: a `Detector` says for each frame how likely it is speech, and a `Gate` makes regions of that.
`Voices` runs both over one stream, `listen` over many in one batch. Any division of a stream gives the same regions.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from speechkit.stream import State, stack, take
from speechkit.types import Seconds


class Detector(Protocol):
    """How likely each frame is speech. State goes in and comes out, stream on axis 0."""

    sample_rate: int
    frame: int  # samples

    def init_state(self, batch: int) -> State: ...

    def __call__(self, samples: Float[Tensor, "B N"], state: State) -> tuple[Float[Tensor, "B T"], State]: ...


class Silero:
    """The network of silero-vad 6.2 (github.com/snakers4/silero-vad, MIT) with the weights of its package.

    Magnitudes of 16 ms, four convolutions and an LSTM: one probability for each 32 ms. Only what lies between frames is
    kept here, so that streams share a batch. It computes in double precision, because a threshold makes of a rounding
    error another region, and rounding depends on how many streams are heard together.

    Raises:
        ValueError: where the package is not installed.
    """

    sample_rate, frame = 16000, 512
    tail, window, hop = 64, 256, 128  # samples: heard again with each frame, and of the transform

    def __init__(self) -> None:
        weights = _silero_weights()
        self.shape = weights["stft.forward_basis_buffer"][0, 0]  # the basis at 0 Hz is its window
        self.convolutions = [
            (weights[f"encoder.{i}.reparam_conv.weight"].flatten(1), weights[f"encoder.{i}.reparam_conv.bias"], stride)
            for i, stride in enumerate((1, 2, 2, 1))
        ]
        self.lstm = nn.LSTM(128, 128, batch_first=True, dtype=torch.float64)
        self.lstm.load_state_dict(
            {f"{name}_l0": weights[f"decoder.rnn.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        )
        self.weight, self.bias = weights["decoder.decoder.2.weight"].flatten(), weights["decoder.decoder.2.bias"]

    def init_state(self, batch: int) -> State:
        """The last samples, and the two memories of the LSTM."""
        return tuple(torch.zeros(batch, size, dtype=torch.float64) for size in (self.tail, 128, 128))

    @torch.inference_mode()
    def __call__(self, samples: Float[Tensor, "B N"], state: State) -> tuple[Float[Tensor, "B T"], State]:
        """The next frames of each stream, whole ones."""
        tail, hidden, cell = state
        seen = torch.cat([tail, samples.double()], dim=1)
        frames = seen.unfold(1, self.tail + self.frame, self.frame).flatten(0, 1)  # [B * T, N]
        frames = F.pad(frames, (0, self.tail), mode="reflect").unfold(1, self.window, self.hop)  # [B * T, 4, N]
        bins = torch.fft.rfft(frames * self.shape)
        x = (bins.real.square() + bins.imag.square()).sqrt().transpose(1, 2)  # [B * T, F, 4]
        for weight, bias, stride in self.convolutions:
            taps = F.pad(x, (1, 1)).unfold(2, 3, stride).transpose(1, 2).flatten(2)  # [B * T, 4 ... 1, 3 F]
            x = F.linear(taps, weight, bias).relu().transpose(1, 2)
        x, (hidden, cell) = self.lstm(x.reshape(len(samples), -1, 128), (hidden[None], cell[None]))
        return (x.relu() @ self.weight + self.bias).sigmoid(), (seen[:, -self.tail :], hidden[0], cell[0])


@cache
def _silero_weights() -> dict[str, Tensor]:
    # Found and not imported: importing the package leaves torch with one thread.
    found = importlib.util.find_spec("silero_vad")
    if found is None or found.origin is None:
        raise ValueError(
            "Voice activity needs the package silero-vad, but it is not installed; "
            "install it with: pip install 'speechkit[vad]'"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and is how these weights come
        model = torch.jit.load(str(Path(found.origin).with_name("data") / "silero_vad.jit"))
    return {name: weight.double() for name, weight in model._model.state_dict().items()}


class Run(NamedTuple):
    """Where a `Gate` stands: the speech it is in the middle of. Counts are frames from the start of the stream."""

    now: int = 0
    speech: bool = False
    voiced: int = 0  # frames of speech in this run; 0 outside of one
    first: int = 0
    last: int = 0  # the frame after its last speech
    end: int = 0  # of the region before
    over: bool = False  # a region ended with this frame


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Which frames are heard, from how likely each is speech.

    A frame is speech from ``threshold`` on, and after speech from ``release`` on. Frames of speech with less than
    ``hang`` between them are one run. A run that holds ``shortest`` of speech is a region, from ``before`` its first
    frame (or the end of the region before) to ``hang`` after its last. Thresholds are silero-vad's own; its other
    defaults are for cutting speech out of recordings, these for hearing it: a word alone is kept, a pause inside a
    sentence does not end it, and the sentence is over sooner than by `speechkit.search.Endpoint`.

    Args:
        threshold, release: probabilities.
        shortest: seconds; what is shorter is a click.
        before: seconds of pre-roll, for the beginning of a word that is not recognised as speech yet.
        hang: seconds of hang-over.

    Raises:
        ValueError: where a value makes no sense.
    """

    threshold: float = 0.5
    release: float = 0.35
    shortest: Seconds = 0.1
    before: Seconds = 0.3
    hang: Seconds = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.release <= self.threshold <= 1:
            raise ValueError(
                f"Gate must have 0 < release <= threshold <= 1, but release is {self.release:g} and threshold "
                f"{self.threshold:g}; 0.35 and 0.5 are a good start."
            )
        for name in ("shortest", "before", "hang"):
            value = getattr(self, name)
            if not (0 < value < math.inf or (name == "before" and value == 0)):
                raise ValueError(f"Gate.{name} must be a finite number of seconds above 0, but is {value}.")

    def step(self, run: Run, probability: float, frame: Seconds) -> Run:
        """After one more frame of ``frame`` seconds."""
        now, speech = run.now + 1, probability >= (self.release if run.speech else self.threshold)
        if speech:
            first = run.first if run.voiced else run.now
            return Run(now, True, run.voiced + 1, first, now, run.end)
        if run.voiced and now - run.last >= _frames(self.hang, frame):
            over = self.opened(run, frame)
            return Run(now, end=now if over else run.end, over=over)
        return run._replace(now=now, speech=False, over=False)

    def opened(self, run: Run, frame: Seconds) -> bool:
        """Whether a run is a region."""
        return run.voiced >= _frames(self.shortest, frame)

    def start(self, run: Run, frame: Seconds) -> int:
        """The first frame of the region that a run is, or may become."""
        return max(run.end, (run.first if run.voiced else run.now) - _frames(self.before, frame))


def _frames(seconds: Seconds, frame: Seconds) -> int:
    return math.ceil(seconds / frame - 1e-6)


class Piece(NamedTuple):
    """Samples of a region, in order and without gaps. The last ones of a region may be none."""

    start: int  # of the first sample, from the start of the stream
    samples: Float[Tensor, "N"]
    over: bool  # the region ends with them


@dataclass(frozen=True, kw_only=True)
class Vad:
    """A detector and a gate: what the streams of a `speechkit.session.Session` are heard through."""

    detector: Detector = field(default_factory=Silero)
    gate: Gate = Gate()

    @property
    def frame_seconds(self) -> Seconds:
        return self.detector.frame / self.detector.sample_rate

    def open(self) -> Voices:
        """A stream that has heard nothing."""
        return Voices(self)


class Voices:
    """One stream, cut into its voiced regions. Memory stays constant, because silence is forgotten."""

    def __init__(self, vad: Vad) -> None:
        self.vad, self.run = vad, Run()
        self.state = vad.detector.init_state(1)
        self.ending = self.ended = False
        self._held, self._start = torch.zeros(0), 0  # samples that are not given or forgotten, and where they start
        self._pieces: list[Piece] = []

    @property
    def heard(self) -> int:
        """Samples that were told from silence."""
        return self.run.now * self.vad.detector.frame

    @property
    def waiting(self) -> int:
        """Samples that were not."""
        return max(0, self._start + len(self._held) - self.heard)

    @property
    def frames(self) -> int:
        """Frames that can be told from silence; the last one of a stream need not be whole."""
        frame = self.vad.detector.frame
        return -(-self.waiting // frame) if self.ending else self.waiting // frame

    def add(self, samples: Float[Tensor, "N"]) -> None:
        """Remember the next samples, at the detector's rate; `listen` tells what they hold."""
        self._held = torch.cat([self._held, samples])

    def end(self) -> None:
        """No more samples will be added."""
        self.ending = True

    def take(self) -> list[Piece]:
        """The pieces that were not taken yet. The last of a stream is empty, over, and starts where the stream ends."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def push(self, samples: Float[Tensor, "N"]) -> list[Piece]:
        """What is to be heard, as far as that is known after the next samples."""
        self.add(samples)
        listen([self])
        return self.take()

    def finish(self) -> list[Piece]:
        """The rest."""
        self.end()
        listen([self])
        return self.take()

    def next(self, frames: int) -> Float[Tensor, "N"]:
        """The samples of the next frames, silence after the last."""
        size = frames * self.vad.detector.frame
        samples = self._held[self.heard - self._start :][:size]
        return F.pad(samples, (0, size - len(samples)))

    def told(self, probabilities: Sequence[float]) -> None:
        """Go on by frames that are so likely to be speech."""
        gate, seconds = self.vad.gate, self.vad.frame_seconds
        for probability in probabilities:
            before, self.run = self.run, gate.step(self.run, probability, seconds)
            if self.run.over:
                self._give(before, over=True)
        if gate.opened(self.run, seconds):
            self._give(self.run, over=False)
        else:
            self._forget(gate.start(self.run, seconds) * self.vad.detector.frame)

    def close(self) -> None:
        """The stream is over and everything in it told."""
        if self.ending and not self.ended:
            self._pieces.append(Piece(self._start + len(self._held), torch.zeros(0), True))
            self.ended = True

    def _give(self, run: Run, over: bool) -> None:
        self._forget(self.vad.gate.start(run, self.vad.frame_seconds) * self.vad.detector.frame)
        samples = self._held[: self.heard - self._start]
        self._pieces.append(Piece(self._start, samples, over))
        self._forget(self._start + len(samples))

    def _forget(self, before: int) -> None:
        gone = min(max(0, before - self._start), len(self._held))
        self._held, self._start = self._held[gone:], self._start + gone


@torch.inference_mode()
def listen(streams: Sequence[Voices]) -> None:
    """Tell voice from silence in what streams of one `Vad` were given, in as few batches as their lengths allow."""
    while rows := [stream for stream in streams if stream.frames]:
        frames = min(stream.frames for stream in rows)
        samples, state = torch.stack([stream.next(frames) for stream in rows]), stack([stream.state for stream in rows])
        told, state = rows[0].vad.detector(samples, state)
        for row, (stream, probabilities) in enumerate(zip(rows, told.tolist(), strict=True)):
            stream.state = take(state, [row])
            stream.told(probabilities)
    for stream in streams:
        stream.close()
