"""Streams through a `Session` against the whole recording, alone and together."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from test_graphs import recorded
from tiny import node, sound, tiny

from speechkit.features import Resampler
from speechkit.recogniser import Recogniser
from speechkit.search import Endpoint, Greedy, JointBeam, PrefixBeam, Rescored
from speechkit.session import Session, Update, live_context, transcribe, transcript
from speechkit.steps import GraphRows
from speechkit.stream import Context
from speechkit.types import Transcript

CONTEXT = Context(left=16, chunk=8)
CHUNK = 8 * 4 * 160  # samples


@pytest.fixture(scope="module")
def model() -> Recogniser:
    return tiny()


@pytest.fixture(scope="module")
def squeezeformer() -> Recogniser:
    encoder = node()["encoder"] | {"_target_": "speechkit.encoders.Squeezeformer", "layers": 4}
    return tiny(encoder=encoder)


def run(
    session: Session, clip: torch.Tensor, *, sizes: list[int] | None = None, rate: int | None = None
) -> list[Update]:
    """All updates of one stream, pushed in pieces of ``sizes``."""
    slot, updates = session.join(sample_rate=rate), []
    for piece in clip.split(sizes or max(1, len(clip))):
        session.push(slot, piece)
        updates += session.drain()
    session.finish(slot)
    return [*updates, *session.drain()]


def pieces(total: int, seed: int) -> list[int]:
    """A random division of ``total`` samples: nothing, single samples, and up to two chunks."""
    dice, sizes = random.Random(seed), []
    while sum(sizes) < total:
        sizes.append(min(dice.choice([0, 1, 7, 160, 1000, CHUNK, dice.randrange(2 * CHUNK)]), total - sum(sizes)))
    return sizes


def assert_same(one: list[Update], other: list[Update]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        exact = ("segment", "text", "stable", "final", "ended", "seconds")
        assert [getattr(a, name) for name in exact] == [getattr(b, name) for name in exact]
        assert_same_words(a, b)


def assert_same_words(a: Update | Transcript, b: Update | Transcript) -> None:
    assert [(w.word, w.start, w.end) for w in a.words] == [(w.word, w.start, w.end) for w in b.words]
    assert [w.confidence for w in a.words] == pytest.approx([w.confidence for w in b.words], abs=1e-4)


@pytest.mark.parametrize(
    "search", [Greedy, partial(PrefixBeam, beam=4), partial(Rescored, beam=4), partial(JointBeam, beam=4)]
)
@pytest.mark.parametrize("samples", [5 * CHUNK, 5 * CHUNK + 1, 5 * CHUNK - 1, 6 * CHUNK - 160, 4 * CHUNK + 641])
def test_stream_says_what_the_whole_says_in_the_same_context(model: Recogniser, search: partial, samples: int) -> None:
    clip = sound(samples / 16000, seed=samples)
    assert len(clip) == samples
    whole = model.transcribe(clip, context=CONTEXT, search=search(model.objective))
    assert isinstance(whole, Transcript) and whole.text
    streamed = transcript(run(Session(model, search=search, endpoint=None), clip, sizes=pieces(samples, samples)))
    assert streamed.text == whole.text
    assert streamed.seconds == whole.seconds
    assert_same_words(streamed, whole)


def test_two_clocks_stream_what_the_whole_says(squeezeformer: Recogniser) -> None:
    clip = sound(4.13)
    for context in (CONTEXT, Context(left=8, chunk=2), Context(left=0, chunk=12)):
        whole = squeezeformer.transcribe(clip, context=context)
        streamed = transcript(run(Session(squeezeformer, context=context, endpoint=None), clip))
        assert streamed.text == whole.text != ""
        assert_same_words(streamed, whole)


@pytest.mark.parametrize("rate", [16000, 8000, 44100, 96000])
def test_any_division_of_the_audio_gives_the_same_updates(model: Recogniser, rate: int) -> None:
    clip = sound(2.5, seed=rate, sample_rate=rate)
    wanted = run(Session(model), clip, rate=rate)
    assert len(wanted) == 8 and wanted[-1].ended and wanted[-1].seconds == 2.5
    for seed in range(3):
        assert_same(run(Session(model), clip, rate=rate, sizes=pieces(len(clip), seed)), wanted)


def test_other_rates_say_what_a_resampled_file_says(model: Recogniser) -> None:
    clip = sound(2.0, sample_rate=48000)
    resampled = Resampler(source_hz=48000, target_hz=16000)(clip[None], torch.tensor([len(clip)])).samples[0]
    whole = model.transcribe(resampled, context=CONTEXT)
    assert transcript(run(Session(model, endpoint=None), clip, rate=48000)).text == whole.text != ""


def test_streams_that_join_pause_and_leave_do_not_disturb_each_other(model: Recogniser) -> None:
    dice, session = random.Random(1), Session(model, slots=3)
    clips = [sound(dice.uniform(0.1, 4.0), seed) for seed in range(9)]
    todo, left, open_, heard = list(range(9)), {}, {}, {number: [] for number in range(9)}
    while todo or open_:
        if todo and session.free and dice.random() < 0.5:
            number = todo.pop(0)
            open_[session.join()] = number
            left[number] = clips[number]
        for slot, number in list(open_.items()):
            if dice.random() < 0.4 and left[number] is not None:  # the others pause
                size = dice.randrange(2 * CHUNK)
                session.push(slot, left[number][:size])
                left[number] = left[number][size:] if size < len(left[number]) else None
                if left[number] is None:
                    session.finish(slot)
        if dice.random() < 0.1 and 4 in open_.values():  # one hangs up half way
            slot = next(slot for slot, number in open_.items() if number == 4)
            session.leave(slot)
            del open_[slot]
        for update in session.step():
            heard[open_[update.slot]].append(update)
            if update.ended:
                del open_[update.slot]
    for number, updates in heard.items():
        alone = run(Session(model), clips[number])
        assert_same(updates, alone[: len(updates)] if number == 4 else alone)


def test_more_recordings_than_slots_are_streamed_in_order(model: Recogniser) -> None:
    clips = [sound(seconds, seed) for seed, seconds in enumerate([2.0, 0.01, 3.1, 0.5, 1.7])]
    streamed = transcribe(Session(model, slots=2, endpoint=None), clips)
    assert [t.text for t in streamed] == [model.transcribe(clip, context=CONTEXT).text for clip in clips]
    assert [t.seconds for t in streamed] == [2.0, 0.01, 3.1, 0.5, 1.7]


@pytest.mark.parametrize("search", [Greedy, partial(PrefixBeam, beam=6), partial(Rescored, beam=6)])
def test_what_is_called_stable_never_changes(model: Recogniser, search: partial) -> None:
    updates = run(Session(model, search=search, endpoint=Endpoint(longest=2.0)), sound(12.0))
    segments = {update.segment: [u for u in updates if u.segment == update.segment] for update in updates}
    assert len(segments) >= 3
    for said in segments.values():
        assert [update.final for update in said] == [False] * (len(said) - 1) + [True]
        for i, update in enumerate(said):
            assert all(later.text.startswith(update.stable) for later in said[i:])
    assert any(len(update.stable) > 0 for update in updates if not update.final)


def test_an_endpoint_begins_a_new_segment_and_time_goes_on(model: Recogniser) -> None:
    clip = sound(12.0)
    updates = run(Session(model, endpoint=Endpoint(longest=2.0)), clip)
    finals = [update for update in updates if update.final]
    ends = [update.seconds for update in finals]
    starts = [0.0, *ends[:-1]]
    assert len(finals) >= 3 and ends[-1] == pytest.approx(12.0)
    assert all(2.0 <= end - start <= 4.16 for start, end in zip(starts[:-1], ends[:-1], strict=True))
    assert [update.segment for update in finals] == list(range(len(finals)))
    encoded = model.encode(clip[None], torch.tensor([len(clip)]), context=CONTEXT)
    counts = [round((end - start) / 0.04) for start, end in zip(starts, ends, strict=True)]
    for update, start, frames in zip(finals, starts, encoded.frames.split(counts, dim=1), strict=True):
        piece = encoded._replace(frames=frames, lengths=torch.tensor([frames.shape[1]]))
        oracle = model.transcript(model.search(piece)[0][0], 0.0)
        assert update.text == oracle.text
        shifted = [(w.word, w.start + start, w.end + start) for w in oracle.words]
        for word, (text, start, end) in zip(update.words, shifted, strict=True):
            assert (word.word, word.start, word.end) == (text, pytest.approx(start), pytest.approx(end))


def test_nothing_ends_at_200_seconds(model: Recogniser) -> None:
    clip = sound(21.0).repeat(10)  # 5,250 encoder frames
    context = Context(left=32, chunk=32)
    encoded = model.encode(clip[None], torch.tensor([len(clip)]), context=context)
    whole = model.transcript(model.search(encoded)[0][0], 210.0)
    streamed = transcript(run(Session(model, context=context, endpoint=None), clip, sizes=100_000))
    assert streamed.text == whole.text
    assert_same_words(streamed, whole)


def test_an_hour_costs_the_memory_of_a_minute() -> None:
    session = Session(tiny(encoder=node()["encoder"] | {"layers": 1}), context=Context(left=64, chunk=250))
    slot, minute = session.join(sample_rate=16000), sound(60.0)

    def hear(minutes: int) -> tuple[int, int, float]:
        for _ in range(minutes):
            session.push(slot, minute)
            for update in session.drain():
                assert len(update.text) < 600
        gc.collect()
        return session.state_bytes, len(gc.get_objects()), update.seconds

    after_minute, after_hour = hear(1), hear(59)
    assert after_hour[0] == after_minute[0]
    assert after_hour[1] < after_minute[1] + 500
    assert after_hour[2] == 3600
    assert session.waiting(slot) == 0


def test_a_stream_without_audio_ends_with_nothing(model: Recogniser) -> None:
    session = Session(model)
    for clip in (torch.zeros(0), torch.zeros(50)):
        (update,) = run(session, clip)
        assert update == Update(0, 0, "", "", (), True, True, len(clip) / 16000)
    assert session.free == 1 and session.step() == []


def test_a_caller_may_reuse_its_buffer(model: Recogniser) -> None:
    clip, session = sound(1.5), Session(model)
    slot, buffer, updates = session.join(), np.zeros(1000, dtype=np.float32), []
    for piece in clip.split(1000):
        buffer[: len(piece)] = piece.numpy()
        session.push(slot, buffer[: len(piece)])
    session.finish(slot)
    updates += session.drain()
    assert_same(updates, run(Session(model), clip))


def test_bad_samples_are_refused_and_the_stream_goes_on(model: Recogniser) -> None:
    clip, session = sound(2.0), Session(model)
    broken = torch.full((500,), 0.1)
    broken[123] = torch.nan
    refused = [
        (broken, "slot 0 must hold finite samples, but sample 123 is nan"),
        (torch.zeros(2, 500), r"slot 0 must be one channel of samples \[N\], but has shape \[2, 500\]; fold"),
        (np.zeros(500, dtype=np.int16), "slot 0 must be floating point samples .* but is of type torch.int16; divide"),
    ]
    slot = session.join()
    session.push(slot, clip[:9000])
    for samples, sentence in refused:
        with pytest.raises(ValueError, match=sentence):
            session.push(slot, samples)
    session.push(slot, clip[9000:])
    session.finish(slot)
    assert_same(list(session.drain()), run(Session(model), clip))


def test_slots_are_checked(model: Recogniser) -> None:
    session = Session(model, slots=2)
    with pytest.raises(ValueError, match="Slot 0 must be one that join"):
        session.push(0, torch.zeros(5))
    with pytest.raises(ValueError, match="Slot -1 must be one that join"):
        session.finish(-1)
    assert [session.join(), session.join()] == [0, 1]
    with pytest.raises(ValueError, match="all 2 are taken; finish one, or build the Session with more slots"):
        session.join()
    session.finish(1)
    with pytest.raises(ValueError, match="Slot 1 was finished and takes no more samples"):
        session.push(1, torch.zeros(5))
    with pytest.raises(ValueError, match="all slots of a session, but 2 hold streams"):
        transcribe(session, [torch.zeros(5)])
    session.leave(1)
    assert session.join() == 1
    with pytest.raises(ValueError, match=r"Session.slots must be at least 1 stream, but is 0\."):
        Session(model, slots=0)


def test_the_chunk_of_a_live_context_is_a_whole_number_of_frames(model: Recogniser, squeezeformer: Recogniser) -> None:
    assert live_context(model) == CONTEXT
    assert live_context(model, 0.64) == Context(left=16, chunk=16)
    assert live_context(squeezeformer, 0.08) == Context(left=16, chunk=2)
    with pytest.raises(ValueError, match="multiple of 40 ms, but is 330 ms; the nearest is 320 ms"):
        live_context(model, 0.33)
    with pytest.raises(ValueError, match="multiple of 80 ms, but is 40 ms; the nearest is 80 ms"):
        live_context(squeezeformer, 0.04)
    with pytest.raises(ValueError, match="multiple of 40 ms, but is -40 ms; the nearest is 40 ms"):
        live_context(model, -0.04)


def test_what_a_whole_utterance_model_leaves_open_has_a_default() -> None:
    whole = {key: value for key, value in node()["encoder"].items() if key != "context"}
    assert live_context(tiny(encoder=whole)) == Context(left=64, chunk=16)


def test_an_encoder_that_cannot_stream_says_so(model: Recogniser) -> None:
    centred = {"_target_": "speechkit.layers.Convolution", "_partial_": True, "causal": False}
    offline = tiny(encoder=node()["encoder"] | {"convolution": centred})
    with pytest.raises(ValueError, match="cannot stream"):
        Session(offline)
    with pytest.raises(ValueError, match=r"Context.left must be finite to stream"):
        Session(model, context=Context(chunk=4))


def traced(session: Session) -> None:
    session.trace(most=4)  # steps of 5 and 6 streams go the ordinary way


def graphed(session: Session) -> None:
    """As on a GPU, where a recording of the operators stands for the graph."""
    chunk = torch.zeros(session.chunk)
    session._rows = GraphRows(session.recogniser, session.context, session._rows.slots, chunk=chunk, record=recorded)


@pytest.mark.parametrize("way", [traced, graphed])
@pytest.mark.parametrize("encoder", ["Conformer", "Squeezeformer"])
def test_steps_prepared_beforehand_say_the_same_while_streams_come_pause_and_go(
    encoder: str, way: Callable[[Session], None]
) -> None:
    model = tiny(encoder=node()["encoder"] | {"_target_": f"speechkit.encoders.{encoder}"})
    clips = [sound(1.0 + 0.37 * seed, seed=seed) for seed in range(12)]

    def said(session: Session) -> dict[int, list[Update]]:
        dice, waiting = random.Random(3), list(range(12))
        number_in, left, updates = dict[int, int](), dict[int, torch.Tensor](), dict[int, list[Update]]()
        while waiting or number_in:
            if waiting and session.free and dice.random() < 0.5:
                slot = session.join()
                number_in[slot] = waiting.pop(0)
                left[slot] = clips[number_in[slot]]
            for slot in list(left):
                now, left[slot] = left[slot].tensor_split([dice.choice([0, 0, 3000, CHUNK])])
                session.push(slot, now)
                if not len(left[slot]):
                    session.finish(slot)
                    del left[slot]
            for update in session.step():
                updates.setdefault(number_in[update.slot], []).append(update)
                if update.ended:
                    del number_in[update.slot]
        return updates

    plain, prepared = Session(model, slots=6, endpoint=None), Session(model, slots=6, endpoint=None)
    way(prepared)
    expected, found = said(plain), said(prepared)
    assert expected.keys() == found.keys() == set(range(12))
    for number, updates in expected.items():
        assert updates[-1].text
        assert_same(updates, found[number])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
def test_a_session_on_a_gpu_says_the_same_through_cuda_graphs() -> None:
    plain, prepared = (Session(tiny().cuda(), slots=3, endpoint=None) for _ in range(2))
    prepared.trace()
    assert isinstance(prepared._rows, GraphRows)
    for seed in range(3):
        assert_same(run(plain, sound(2.0, seed=seed)), run(prepared, sound(2.0, seed=seed)))
