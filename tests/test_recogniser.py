"""A recogniser of random weights: what it says may depend on nothing but the recording."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import node, sound, tiny

from speechkit import audio, features, recogniser
from speechkit.config import build_model
from speechkit.cut import clips as cut
from speechkit.recogniser import Recogniser, batches, evaluating
from speechkit.search import PrefixBeam
from speechkit.session import Session, transcribe
from speechkit.stream import Context
from speechkit.types import Transcript


@pytest.fixture(scope="module")
def model() -> Recogniser:
    return tiny()


def texts(transcripts: list[Transcript]) -> list[str]:
    return [transcript.text for transcript in transcripts]


def test_padding_batch_size_and_order_change_no_transcript(model: Recogniser) -> None:
    clips = [sound(seconds, seed) for seed, seconds in enumerate([1.3, 0.2, 3.0, 0.005, 2.1, 0.9])]
    alone = [model.transcribe(clip) for clip in clips]
    assert len(set(texts(alone))) == 6
    for batch in (1, 4, 16):
        for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]):
            together = model.transcribe([clips[i] for i in order], batch=batch)
            assert texts(together) == [alone[i].text for i in order]
            assert [t.seconds for t in together] == [alone[i].seconds for i in order]


def utterances(recordings: Path, count: int) -> list[np.ndarray]:
    """Recordings of up to three seconds, drawn from every set."""
    lines = [
        (manifest.parent, json.loads(line))
        for manifest in sorted(recordings.glob("*/manifest.jsonl"))
        for line in manifest.read_text().splitlines()
    ]
    short = [folder / line["audio"] for folder, line in lines if line.get("duration", 9) < 3 and "start" not in line]
    return [features.read(path, 16000) for path in random.Random(0).sample(short, count)]


def test_padding_batch_and_chunk_division_change_no_transcript_of_real_speech(
    model: Recogniser, recordings: Path
) -> None:
    clips = utterances(recordings, 200)
    alone = model.transcribe(clips, batch=1)
    assert texts(model.transcribe(clips, batch=32)) == texts(alone)
    chunked = texts(model.transcribe(clips, context=model.context, batch=32))
    assert texts(transcribe(Session(model, slots=32, endpoint=None), clips)) == chunked != texts(alone)
    for clip, text in zip(clips[:20], chunked, strict=False):
        session, dice = Session(model, endpoint=None), random.Random(len(clip))
        slot = session.join()
        for piece in np.split(clip, sorted(dice.choices(range(len(clip)), k=9))):
            session.push(slot, piece)
        session.finish(slot)
        assert [*session.drain()][-1].text == text


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (96000, 1), (16000, 6), (44100, 2)])
def test_files_of_any_rate_and_number_of_channels_are_heard(
    model: Recogniser, tmp_path: Path, rate: int, channels: int
) -> None:
    import soundfile

    one = sound(1.2, sample_rate=rate).numpy()
    soundfile.write(tmp_path / "a.wav", np.stack([one] * channels, axis=1), rate, subtype="FLOAT")
    heard = model.transcribe(tmp_path / "a.wav")
    assert heard == model.transcribe(str(tmp_path / "a.wav"))
    assert heard == model.transcribe([tmp_path / "a.wav"])[0]
    assert heard.seconds == 1.2
    assert heard.text == model.transcribe(features.read(tmp_path / "a.wav", 16000)).text != ""


def test_a_search_other_than_its_own_can_be_used(model: Recogniser) -> None:
    clip = sound(2.0)
    heard = model.transcribe(clip, search=PrefixBeam(model.objective, beam=50))
    best = model.search(model.encode(clip[None], torch.tensor([len(clip)]), context=Context()))[0][0]
    assert heard.text != model.tokenizer.decode(best.tokens)


def test_words_are_in_order_and_inside_the_recording(model: Recogniser) -> None:
    heard = model.transcribe(sound(5.0))
    assert " ".join(word.word for word in heard.words) == heard.text
    times = [time for word in heard.words for time in (word.start, word.end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 5.0 + model.frame_seconds
    assert all(0 < word.confidence <= 1 for word in heard.words)


def test_aligning_what_greedy_search_heard_gives_its_words_back(model: Recogniser) -> None:
    compared = 0
    for clip in (sound(0.6, seed) for seed in range(60)):
        heard = model.transcribe(clip)
        encoded = model.encode(clip[None], torch.tensor([len(clip)]), context=Context())
        tokens = model.search(encoded)[0][0].tokens
        if len(heard.words) > 1 and tuple(model.tokenizer.encode(heard.text)) == tokens:  # no space too many
            assert model.align(clip, heard.text) == heard
            compared += 1
    assert compared > 5


def test_aligned_words_are_those_of_the_text_in_order(model: Recogniser) -> None:
    aligned = model.align(sound(2.0), "abc  de f")
    assert [word.word for word in aligned.words] == ["abc", "de", "f"]
    times = [time for word in aligned.words for time in (word.start, word.end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 2.0
    assert model.align(sound(2.0), "").words == ()


def test_a_text_that_cannot_be_aligned_is_refused(model: Recogniser) -> None:
    with pytest.raises(ValueError, match=r"a frame for each of the 9 tokens of its text .* but has 3 frames"):
        model.align(sound(0.1), "abcdefabc")
    with pytest.raises(ValueError, match="needs a CTC head"):
        search = {"_target_": "speechkit.search.AttentionBeam", "_partial_": True}
        build_model(node(objective=node()["objective"]["attention"], search=search)).align(sound(1.0), "abc")


@pytest.mark.parametrize("context", [Context(), Context(left=16, chunk=8)])
def test_a_long_recording_is_heard_in_clips_and_its_words_have_their_times(
    model: Recogniser, monkeypatch: pytest.MonkeyPatch, context: Context
) -> None:
    monkeypatch.setattr(recogniser, "BATCH_SECONDS", 25.0)
    recordings = [sound(61.3), sound(0.5, 1), sound(24.9, 2), sound(40.0, 3)]
    heard = model.transcribe(recordings, context=context)
    for recording, found in zip(recordings, heard, strict=True):
        assert found.seconds == len(recording) / 16000
        if len(recording) <= 25 * 16000:
            assert found.text == model.transcribe(recording, context=context).text
        else:
            parts = [(part.start / 16000, part.samples) for part in cut([recording], 16000)]
            alone = [(start, model.transcribe(samples, context=context)) for start, samples in parts]
            assert len(parts) >= 3 and found.text == " ".join(part.text for _, part in alone)
            wanted = [(w.word, start + w.start, start + w.end) for start, part in alone for w in part.words]
            assert [(w.word, w.start, w.end) for w in found.words] == wanted


def test_batches_hold_similar_lengths_and_no_more_than_they_may() -> None:
    dice = random.Random(0)
    lengths = [dice.randrange(1, 1000) for _ in range(200)]
    groups = list(batches(lengths, 16, 5000))
    assert sorted(row for group in groups for row in group) == list(range(200))
    assert all(len(group) <= 16 and len(group) * max(lengths[row] for row in group) <= 5000 for group in groups)
    assert list(batches([10, 99999, 20], 16, 5000)) == [[0, 2], [1]]
    assert list(batches([], 16, 5000)) == []


def test_transcribing_changes_neither_the_mode_nor_the_gradients() -> None:
    model = tiny().train()
    model.encoder.blocks[0].eval()
    dropped = model.transcribe(sound(1.0))
    assert model.training and model.encoder.training and not model.encoder.blocks[0].training
    assert dropped == model.eval().transcribe(sound(1.0))
    with pytest.raises(RuntimeError), evaluating(model.train()):
        assert not model.training
        raise RuntimeError
    assert model.training


def test_nothing_is_heard_in_nothing(model: Recogniser) -> None:
    assert model.transcribe([]) == []
    assert model.transcribe(torch.zeros(0)) == Transcript("", (), 0.0)
    assert model.transcribe([torch.zeros(0), torch.zeros(10)])[1] == Transcript("", (), 10 / 16000)


def test_the_clock_of_an_encoder_frame(model: Recogniser) -> None:
    assert (model.sample_rate, model.frame_samples, model.frame_seconds) == (16000, 640, 0.04)
    assert model.context == Context(left=16, chunk=8)
    slower = {"_target_": "speechkit.layers.Subsampling", "_partial_": True, "stages": 3}
    wide = tiny(encoder=node()["encoder"] | {"subsampling": slower})
    assert wide.frame_seconds == 0.08


def test_recordings_that_cannot_be_heard_are_named(model: Recogniser, tmp_path: Path) -> None:
    audio.write(tmp_path / "good.wav", sound(1.0).numpy(), 16000)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "cut.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:9000])
    good, nan = torch.zeros(100), torch.zeros(100)
    nan[7] = torch.nan
    refused = [
        ([tmp_path / "good.wav", tmp_path / "empty.wav"], r"empty.wav must be .* but is empty"),
        (tmp_path / "cut.wav", r"cut.wav must hold the 1.00 s .* but is cut short .* 0.28 s"),
        (tmp_path / "none.wav", r"none.wav must be .* but does not exist"),
        ([good, nan], r"Recording 1 must hold finite samples, but sample 7 is nan; decode it again"),
        (np.zeros((100, 2), np.float32), r"Recording 0 must be one channel .* shape \[100, 2\]; fold"),
        (np.zeros(100, np.int16), r"Recording 0 must be floating point .* is of type torch.int16; divide"),
    ]
    for recording, sentence in refused:
        with pytest.raises(ValueError, match=sentence):
            model.transcribe(recording)
