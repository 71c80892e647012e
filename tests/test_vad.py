"""Voice activity: the gate against its definition, the detector against its package, sessions behind both."""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from overfit import Overfit
from test_session import CHUNK, CONTEXT, assert_same, assert_same_words, pieces, run
from tiny import sound, tiny

from speechkit import features, vad
from speechkit.recogniser import Recogniser
from speechkit.search import Endpoint
from speechkit.session import Session, transcribe, transcript
from speechkit.types import Transcript
from speechkit.vad import Gate, Piece, Silero, Vad, Voices, listen

FRAME = 512


class Loud:
    """A detector whose probability is the loudest sample of the frame, and which counts the frames of its streams."""

    def __init__(self, frame: int = FRAME, sample_rate: int = 16000) -> None:
        self.frame, self.sample_rate = frame, sample_rate

    def init_state(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch, dtype=torch.long)

    def __call__(self, samples: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frames = samples.unflatten(1, (-1, self.frame)).abs().amax(2)
        return frames, state + frames.shape[1]


def by_definition(gate: Gate, probabilities: list[float], frame: float) -> list[tuple[int, int]]:
    """The regions that the docstring of `Gate` says, in frames, from all probabilities at once."""
    shortest, before, hang = (-int(-seconds // frame) for seconds in (gate.shortest, gate.before, gate.hang))
    speech: list[int] = []
    for t, p in enumerate(probabilities):
        if p >= gate.threshold or (p >= gate.release and speech[-1:] == [t - 1]):
            speech.append(t)
    runs: list[list[int]] = []
    for t in speech:
        if runs and t - runs[-1][-1] - 1 < hang:
            runs[-1].append(t)
        else:
            runs.append([t])
    regions: list[tuple[int, int]] = []
    for run_ in runs:
        if len(run_) >= shortest:
            end = regions[-1][1] if regions else 0
            regions.append((max(end, run_[0] - before), min(run_[-1] + 1 + hang, len(probabilities))))
    return regions


def joined(found: list[Piece]) -> list[tuple[int, torch.Tensor]]:
    """Start and samples of each region, from its pieces."""
    regions: list[tuple[int, torch.Tensor]] = []
    over = True
    for piece in found:
        if over:
            regions.append((piece.start, piece.samples))
        else:
            start, samples = regions[-1]
            assert piece.start == start + len(samples), "a gap"
            regions[-1] = (start, torch.cat([samples, piece.samples]))
        over = piece.over
    assert over
    return regions


@pytest.mark.parametrize("seed", range(40))
def test_the_gate_makes_the_regions_of_its_definition_in_any_division(seed: int) -> None:
    dice = random.Random(seed)
    frame, size = 4, dice.randrange(0, 1200)
    gate = Gate(
        threshold=0.6, release=dice.choice([0.2, 0.6]), shortest=dice.choice([1, 2, 3, 5]) / 10,
        before=dice.choice([0, 1, 4, 9]) / 10, hang=dice.choice([1, 2, 6]) / 10,
    )  # fmt: skip
    p, samples = 0.0, []
    for _ in range(-(-size // frame)):
        p = dice.random() if dice.random() < dice.choice([0.1, 0.9]) else p
        samples += [p] * frame
    clip = torch.tensor(samples[:size])
    wanted = [
        (start * frame, clip[start * frame : end * frame])
        for start, end in by_definition(gate, clip[::frame].tolist(), 0.1)
    ]
    voices, found = Voices(Vad(detector=Loud(frame, 40), gate=gate)), []
    for piece in clip.split([*pieces(size, seed), 0]):
        found += voices.push(piece)
    regions = joined(found + voices.finish())
    if not regions[-1][1].numel():  # it ended in silence
        assert regions.pop()[0] == size
    assert [start for start, _ in regions] == [start for start, _ in wanted]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(regions, wanted, strict=True))


def test_many_streams_together_have_the_regions_of_each_alone() -> None:
    one, clips, dice = Vad(detector=Loud()), [0.9 * sound(4.0, seed) for seed in range(5)], random.Random(0)
    alone = [joined((voices := one.open()).push(clip) + voices.finish()) for clip in clips]
    streams, found, left = [one.open() for _ in clips], [[] for _ in clips], [list(clip.split(700)) for clip in clips]
    while any(left):
        for stream, waiting in zip(streams, left, strict=True):
            if waiting and dice.random() < 0.5:
                stream.add(waiting.pop(0))
        listen(streams)
        for stream, got in zip(streams, found, strict=True):
            got += stream.take()
    for stream, got, wanted in zip(streams, found, alone, strict=True):
        regions = joined(got + stream.finish())
        assert [start for start, _ in regions] == [start for start, _ in wanted]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(regions, wanted, strict=True))


def test_silence_is_forgotten() -> None:
    voices = Voices(Vad(detector=Loud()))
    for _ in range(600):
        assert voices.push(torch.zeros(16000)) == []
    assert len(voices._held) < 16000


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"release": 0.7}, "0 < release <= threshold <= 1, but release is 0.7 and threshold 0.5; 0.35 and 0.5 are a"),
        ({"threshold": 1.5}, "threshold 1.5"),
        ({"hang": 0.0}, r"Gate.hang must be a finite number of seconds above 0, but is 0.0\."),
        ({"shortest": float("inf")}, "Gate.shortest must be a finite number"),
        ({"before": -1.0}, "Gate.before must be a finite number"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Gate(**change)


def test_without_the_package_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    vad._silero_weights.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"but it is not installed; install it with: pip install 'speechkit\[vad\]'"):
        Vad()


@pytest.fixture(scope="module")
def silero() -> Silero:
    need_silero()
    return Silero()


def need_silero() -> None:
    if importlib.util.find_spec("silero_vad") is None:  # importing it leaves torch with one thread
        pytest.skip("the package silero-vad is not installed")


def strings(recordings: Path, dataset: str, count: int, rest: float, noise: float) -> tuple[torch.Tensor, list]:
    """Recordings with ``rest`` seconds before, between and after them, all in noise, and where each of them is."""
    lines = [json.loads(line) for line in (recordings / dataset / "manifest.jsonl").read_text().splitlines()]
    lines = random.Random(0).sample([line for line in lines if line["duration"] < 6], count)
    quiet, clips, places = torch.zeros(round(rest * 16000)), [], []
    at = 0
    for line in lines:
        clip = torch.from_numpy(features.read(recordings / dataset / line["audio"], 16000))
        places.append((at + len(quiet), at + len(quiet) + len(clip)))
        clips += [quiet, clip]
        at = places[-1][1]
    whole = torch.cat([*clips, quiet])
    return whole + noise * torch.randn(len(whole), generator=torch.Generator().manual_seed(0)), places


def test_the_detector_is_the_network_of_its_package(silero: Silero, recordings: Path) -> None:
    clip, _ = strings(recordings, "fsdd", 20, 0.5, 0.001)
    frames = clip[: len(clip) // FRAME * FRAME].split(FRAME)
    package = torch.jit.load(Path(importlib.util.find_spec("silero_vad").origin).with_name("data") / "silero_vad.jit")
    with torch.inference_mode():
        wanted = torch.stack([package(frame, 16000)[0, 0] for frame in frames])
    found, _ = silero(torch.cat(frames)[None], silero.init_state(1))
    assert wanted.min() < 0.1 and wanted.max() > 0.9
    torch.testing.assert_close(found[0].float(), wanted, atol=1e-4, rtol=0)


def test_its_probabilities_depend_neither_on_the_division_nor_on_other_streams(
    silero: Silero, recordings: Path
) -> None:
    clip = strings(recordings, "fsdd", 8, 0.3, 0.001)[0]
    clip = clip[: len(clip) // (4 * FRAME) * 4 * FRAME]
    whole, last = silero(clip[None], silero.init_state(1))
    state, found = silero.init_state(3), []
    for piece in clip.split([FRAME, *[FRAME * 4] * (len(clip) // FRAME // 4 - 1), FRAME * 3]):
        told, state = silero(torch.stack([piece, -piece, 0.1 * piece]), state)
        found.append(told[0])
    torch.testing.assert_close(torch.cat(found), whole[0], atol=1e-12, rtol=0)
    for a, b in zip(state, last, strict=True):
        torch.testing.assert_close(a[0], b[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dataset", "count", "noise"), [("fsdd", 25, 0.0), ("fsdd", 25, 0.002), ("vctk_mini", 5, 0.0)])
def test_every_recording_with_a_rest_around_it_is_heard(
    silero: Silero, recordings: Path, dataset: str, count: int, noise: float
) -> None:
    clip, places = strings(recordings, dataset, count, 1.5, noise)
    voices = Voices(Vad(detector=silero))
    regions = joined(voices.push(clip) + voices.finish())
    assert len(regions) == count + 1 and not len(regions[-1][1])  # it ends in silence
    heard = torch.zeros(len(clip), dtype=torch.bool)
    for start, samples in regions:
        heard[start : start + len(samples)] = True
    loud = clip.abs() > 0.1 * clip.abs().max()
    for first, end in places:
        assert heard[first:end][loud[first:end]].all()
    assert heard.sum() < sum(end - first for first, end in places) + count * 16000  # 0.9 s of margins each


def test_noise_and_rooms_are_not_heard(silero: Silero, recordings: Path) -> None:
    files = sorted((recordings / "rir_noise_multimic" / "audio").glob("rir*.flac"))
    rooms = torch.cat([torch.from_numpy(features.read(file, 16000)) for file in files])
    hiss = 0.05 * torch.randn(160000, generator=torch.Generator().manual_seed(0))
    for clip in (torch.zeros(160000), hiss, rooms):
        voices = Voices(Vad(detector=silero))
        (end,) = voices.push(clip) + voices.finish()
        assert end == Piece(len(clip), end.samples, True) and not len(end.samples)


# A session


@pytest.fixture(scope="module")
def model() -> Recogniser:
    return tiny()


LOUD = Vad(detector=Loud(), gate=Gate(threshold=0.02, release=0.02))


def with_rests(seed: int, bursts: int = 3) -> torch.Tensor:
    """Sound with digital silence before, between and after."""
    dice = random.Random(seed)
    parts = [torch.zeros(dice.randrange(30000))]
    for number in range(bursts):
        burst = sound(dice.uniform(0.4, 2.5), 10 * seed + number)
        parts += [burst, torch.zeros(dice.randrange(12000, 40000))]
    return torch.cat(parts)


def regions_of(clip: torch.Tensor) -> list[tuple[int, int]]:
    levels = torch.nn.functional.pad(clip, (0, -len(clip) % FRAME)).unflatten(0, (-1, FRAME)).abs().amax(1)
    found = by_definition(LOUD.gate, levels.tolist(), FRAME / 16000)
    return [(start * FRAME, min(end * FRAME, len(clip))) for start, end in found]


@pytest.mark.parametrize("seed", range(4))
def test_a_region_is_heard_like_a_recording_of_its_own(model: Recogniser, seed: int) -> None:
    clip = with_rests(seed)
    regions = regions_of(clip)
    updates = run(Session(model, endpoint=None, vad=LOUD), clip, sizes=pieces(len(clip), seed))
    finals = [update for update in updates if update.final]
    assert len(regions) >= 2 and finals[-1].ended
    assert finals.pop().text == "" and updates[-1].seconds == len(clip) / 16000  # it ends in silence
    for number, (final, (start, end)) in enumerate(zip(finals, regions, strict=True)):
        whole = model.transcribe(clip[start:end], context=CONTEXT)
        assert isinstance(whole, Transcript)
        assert (final.text, final.segment, final.ended) == (whole.text, number, False)
        assert_same_words(final, whole.later(start / 16000))
        assert final.seconds == pytest.approx(end / 16000)
    assert [update.seconds for update in updates] == sorted(update.seconds for update in updates)


def test_a_stream_that_ends_inside_a_region_ends_with_its_words(model: Recogniser) -> None:
    clip = torch.cat([torch.zeros(20000), sound(1.5)])
    *_, last = run(Session(model, vad=LOUD), clip)
    assert last.final and last.ended and last.text and last.seconds == len(clip) / 16000


@pytest.mark.parametrize("rate", [16000, 44100])
def test_any_division_of_a_stream_with_silence_gives_the_same_updates(model: Recogniser, rate: int) -> None:
    clip = with_rests(7)
    wanted = run(Session(model, vad=LOUD), clip, rate=rate)
    for seed in range(3):
        assert_same(run(Session(model, vad=LOUD), clip, rate=rate, sizes=pieces(len(clip), seed)), wanted)


def test_finishing_before_or_after_all_is_heard_gives_the_same_updates(model: Recogniser) -> None:
    clip = with_rests(5, bursts=2)
    session = Session(model, vad=LOUD)
    slot = session.join()
    session.push(slot, clip)
    session.finish(slot)
    assert_same(list(session.drain()), run(Session(model, vad=LOUD), clip))


def test_streams_with_silence_do_not_disturb_each_other(model: Recogniser) -> None:
    dice, session = random.Random(3), Session(model, slots=3, vad=LOUD)
    clips = [with_rests(seed, bursts=2) for seed in range(6)]
    todo, left, open_, heard = list(range(6)), {}, {}, {number: [] for number in range(6)}
    while todo or open_:
        if todo and session.free:
            number = todo.pop(0)
            open_[session.join()], left[number] = number, clips[number]
        for slot, number in open_.items():
            if left[number] is not None and dice.random() < 0.5:
                size = dice.randrange(3 * CHUNK)
                session.push(slot, left[number][:size])
                left[number] = left[number][size:] if size < len(left[number]) else None
                if left[number] is None:
                    session.finish(slot)
        for update in session.step():
            heard[open_[update.slot]].append(update)
            if update.ended:
                del open_[update.slot]
    for number, updates in heard.items():
        assert_same(updates, run(Session(model, vad=LOUD), clips[number]))


def test_recordings_with_silence_are_streamed_in_order(model: Recogniser) -> None:
    clips = [with_rests(seed, bursts=2) for seed in range(4)]
    together = transcribe(Session(model, slots=2, vad=LOUD), clips)
    assert [t.text for t in together] == [transcript(run(Session(model, vad=LOUD), clip)).text for clip in clips]
    assert [t.seconds for t in together] == [len(clip) / 16000 for clip in clips]


def test_an_hour_of_silence_costs_no_step_and_what_follows_has_its_time(
    model: Recogniser, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, burst = Session(model, vad=LOUD), torch.cat([sound(1.024), torch.zeros(16384)])
    steps, stream = [], model.stream
    monkeypatch.setattr(model, "stream", lambda *args, **named: steps.append(1) or stream(*args, **named))
    slot, memory = session.join(), session.state_bytes
    at_start, after = [], []
    session.push(slot, torch.cat([torch.zeros(16384), burst]))
    at_start += session.drain()
    count = len(steps)
    for _ in range(60):
        session.push(slot, torch.zeros(60 * 16000))
        assert session.step() == [] and session.waiting(slot) < 0.1
    assert len(steps) == count and session.state_bytes == memory
    # All of these are whole numbers of frames of the detector, so that the burst lies in its frames as before.
    session.push(slot, torch.cat([torch.zeros(16384), burst]))
    after += session.drain()
    assert len(at_start) == len(after) > 3
    hour = 3600 + (16384 + len(burst)) / 16000
    for early, late in zip(at_start, after, strict=True):
        assert (late.text, late.stable, late.final) == (early.text, early.stable, early.final)
        assert late.seconds == pytest.approx(early.seconds + hour, abs=1e-6)
        moved = [(w.word, pytest.approx(w.start + hour), pytest.approx(w.end + hour)) for w in early.words]
        assert [(w.word, w.start, w.end) for w in late.words] == moved


def test_an_endpoint_still_ends_a_segment_inside_a_region(model: Recogniser) -> None:
    clip = torch.cat([torch.zeros(16384), sound(9.0)])
    ((start, _),) = regions_of(clip)
    rules = Endpoint(longest=2.0)
    updates = run(Session(model, endpoint=rules, vad=LOUD), clip)
    bare = run(Session(model, endpoint=rules), clip[start:])
    assert sum(update.final for update in bare) >= 3
    assert [update.text for update in updates] == [update.text for update in bare]
    moved = [replace(w, start=w.start + start / 16000, end=w.end + start / 16000) for u in bare for w in u.words]
    for word, wanted in zip((w for u in updates for w in u.words), moved, strict=True):
        assert (word.word, word.start, word.end) == (
            wanted.word, pytest.approx(wanted.start), pytest.approx(wanted.end),
        )  # fmt: skip


def joined_speech(overfit: Overfit, seconds: float) -> tuple[torch.Tensor, list[tuple[str, float, float]]]:
    """What the model knows in any order with one to three seconds of rest, and each word with where its sentence is."""
    dice, clips, words, at = random.Random(0), [], [], 0
    while at < seconds * 16000:
        number, rest = dice.randrange(len(overfit.texts)), torch.zeros(dice.randrange(16000, 48000))
        clips += [rest, torch.from_numpy(overfit.clip(number))]
        start, at = at + len(rest), at + len(rest) + len(clips[-1])
        words += [(word, start / 16000, at / 16000) for word in overfit.text(number).split()]
    return torch.cat(clips), words


def assert_said(found: Transcript, words: list[tuple[str, float, float]]) -> None:
    """All of the words, in order, each where its sentence is."""
    assert found.text.split() == [word.word for word in found.words] == [word for word, _, _ in words]
    for word, (_, start, end) in zip(found.words, words, strict=True):
        assert start - 0.1 <= word.start < word.end <= end + 0.1


def test_real_words_between_rests_are_heard_with_their_times(silero: Silero, overfit: Overfit) -> None:
    clip, words = joined_speech(overfit, 60.0)
    updates = run(Session(overfit.recogniser, vad=Vad(detector=silero)), clip, sizes=pieces(len(clip), 0))
    assert_said(transcript(updates), words)
    assert (
        len({update.segment for update in updates if update.text}) == sum(w[1] != v[1] for w, v in pairwise(words)) + 1
    )


def test_a_detector_for_another_rate_is_refused(model: Recogniser) -> None:
    with pytest.raises(ValueError, match="16000 Hz, but its detector is for 8000 Hz; leave it out, or pass a detector"):
        Session(model, vad=Vad(detector=Loud(sample_rate=8000)))
