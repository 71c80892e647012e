"""Manifests, augmentation and batches: what is promised of them, and what they say when something is wrong."""

from __future__ import annotations

import gzip
import json
import logging
import multiprocessing
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from speechkit import audio, features
from speechkit.data import (
    Augment,
    Batches,
    Gain,
    Hiss,
    Microphone,
    Noise,
    Recorded,
    RecordedRoom,
    Room,
    Shift,
    Source,
    Telephone,
)
from speechkit.data.augment import chance, mix, power, reverberate
from speechkit.data.batching import Utterance, padding, plan
from speechkit.data.corpora import once, read_corpus, speaker_of, split_of, text_of, write_manifest
from speechkit.data.loading import load
from speechkit.data.targets import Transcripts, check_text
from speechkit.text import Characters, Words

RATE = 16000
LETTERS = Characters(symbols="abcdefghijklmnopqrstuvwxyz '")


def tone(path: Path, seconds: float = 0.5, rate: int = RATE, hertz: float = 440.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    audio.write(path, 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate), rate)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Twelve tones of four speakers in three splits."""
    records = []
    for number in range(12):
        seconds = 0.2 + 0.05 * number
        tone(tmp_path / "audio" / f"{number:02d}.flac", seconds, hertz=300 + 50 * number)
        split = "train" if number < 8 else ("dev" if number < 10 else "test")
        records.append(
            {"audio": f"audio/{number:02d}.flac", "text": "one two", "duration": seconds, "split": split}
            | {"speaker": "abcd"[number % 4], "extra": number}
        )
    write_manifest(tmp_path / "manifest.jsonl", records)
    return tmp_path / "manifest.jsonl"


def manifest(folder: Path, *lines: object) -> Path:
    tone(folder / "a.wav")
    path = folder / "m.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_manifest_becomes_cuts(corpus: Path) -> None:
    cut = list(read_corpus(corpus))[3]
    assert (cut.id, text_of(cut), speaker_of(cut), split_of(cut)) == ("audio/03", "one two", "d", "train")
    assert cut.duration == pytest.approx(0.35) and cut.custom["extra"] == 3
    assert np.array_equal(load(cut, RATE), audio.read(corpus.parent / "audio" / "03.flac")[0])


def test_cutset_gives_what_its_manifest_gives(corpus: Path, tmp_path: Path) -> None:
    cuts = read_corpus(corpus)
    for name in ("cuts.jsonl", "cuts.jsonl.gz"):
        cuts.to_file(tmp_path / name)
        again = read_corpus(tmp_path / name)
        assert [(c.id, text_of(c), split_of(c), c.duration) for c in again] == [
            (c.id, text_of(c), split_of(c), c.duration) for c in cuts
        ]


def test_cutset_may_name_files_beside_itself(corpus: Path) -> None:
    beside = corpus.parent / "beside.jsonl"
    cuts = read_corpus(corpus)
    for cut in cuts:
        cut.recording.sources[0].source = str(Path(cut.recording.sources[0].source).relative_to(corpus.parent))
    cuts.to_file(beside)
    assert len(load(next(iter(read_corpus(beside))), RATE)) == 3200


def test_segment_of_a_long_file_is_read_alone(tmp_path: Path) -> None:
    samples = np.arange(RATE, dtype=np.float32) / RATE
    audio.write(tmp_path / "long.wav", samples, RATE)
    lines = [{"audio": "long.wav", "start": s, "duration": 0.25, "text": "x"} for s in (0.0, 0.25, 0.5)]
    cuts = list(read_corpus(manifest(tmp_path, *lines)))
    assert [c.id for c in cuts] == ["long", "long@0.25", "long@0.5"]
    assert np.allclose(load(cuts[1], RATE), samples[4000:8000], atol=1e-4)


def test_other_rates_are_resampled_and_channels_folded(tmp_path: Path) -> None:
    import soundfile

    stereo = np.stack([np.full(8000, 0.5), np.zeros(8000)], axis=1)
    soundfile.write(tmp_path / "stereo.wav", stereo, 8000)
    (cut,) = read_corpus(manifest(tmp_path, {"audio": "stereo.wav", "text": ""}))
    samples = load(cut, RATE)
    assert len(samples) == RATE and np.allclose(samples[2000:-2000], 0.25, atol=1e-3)
    assert np.array_equal(samples, features.read(tmp_path / "stereo.wav", RATE))


def test_lhotse_renders_what_is_more_than_a_file(corpus: Path) -> None:
    first, second = list(read_corpus(corpus))[:2]
    mixed = first.mix(second, snr=10)
    assert np.allclose(load(mixed, RATE), mixed.load_audio()[0])
    assert np.array_equal(
        load(mixed, RATE, start=0.1, duration=0.1), mixed.truncate(offset=0.1, duration=0.1).load_audio()[0]
    )
    faster = first.perturb_speed(1.1)
    assert len(load(faster, RATE)) == faster.num_samples


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{'audio': 1}", "is not JSON"),
        ('["a.wav"]', "must be a JSON object, but is the list"),
        ({"text": "x"}, "the key 'audio' is missing"),
        ({"audio": "a.wav"}, "the key 'text' is missing; add the transcript"),
        ({"audio": "a.wav", "text": 5}, "'text' must be a string, but is the int 5"),
        ({"audio": "a.wav", "text": "x", "duration": "2"}, "'duration' must be a number, but is the str '2'"),
        ({"audio": "b.wav", "text": "x"}, "b.wav must be an audio file, but does not exist"),
        (
            {"audio": "a.wav", "text": "x", "duration": 3.0},
            "must be what the file lasts, 0.500 s, but is 3.0 s; correct",
        ),
        ({"audio": "a.wav", "text": "x", "duration": 0.3}, "or add 'start'"),
        ({"audio": "a.wav", "text": "x", "duration": 0.3, "start": 0.4}, "lasts after 0.4 s, 0.100 s"),
        ({"audio": "a.wav", "text": "x", "start": 0.6}, "start must lie in its file"),
        ({"audio": "a.wav", "text": "good"}, "the id 'a' must be its own"),
        ({"type": "MonoCut", "id": "c"}, "a lhotse cut must be complete"),
    ],
)
def test_faulty_line_is_named(tmp_path: Path, line: object, says: str) -> None:
    path = manifest(tmp_path, {"audio": "a.wav", "text": "good"}, line)
    with pytest.raises(ValueError) as error:
        read_corpus(path)
    assert f"{path}, line 2: " in str(error.value) and says in str(error.value)


def test_further_faults_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1: .* \(2 more lines have faults\.\)"):
        read_corpus(manifest(tmp_path, "{", "{", {"audio": "a.wav", "text": "x"}, "{"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b"\xff\xfe{}"), ("a.jsonl.gz", b"{}\n"), ("a.jsonl.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:-9])],
)
def test_manifests_that_are_no_text_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} must be text in UTF-8, or that compressed by gzip, but is not"):
        read_corpus(tmp_path / name)


def test_empty_and_absent_manifests_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold at least one utterance, but is empty"):
        read_corpus(manifest(tmp_path, ""))
    with pytest.raises(ValueError, match=r"there is no such file; prepare the corpus"):
        read_corpus(tmp_path / "absent.jsonl")


def test_source_takes_what_is_wanted(corpus: Path) -> None:
    def ids(**wanted: object) -> list[str]:
        return [cut.id[-2:] for cut in Source(path=str(corpus), **wanted).cuts()]

    assert ids(split="dev") == ["08", "09"]
    assert ids(speakers=["a", "b"], split="train") == ["00", "01", "04", "05"]
    assert ids(without_speakers=["a", "b", "c"]) == ["03", "07", "11"]
    assert ids(min_seconds=0.55, max_seconds=0.65) == ["07", "08", "09"]


def test_source_that_leaves_nothing_says_what_there_is(corpus: Path) -> None:
    with pytest.raises(
        ValueError, match=r"with split='valid', but none of its 12 .* train \(8\), dev \(2\), test \(2\)"
    ):
        Source(path=str(corpus), split="valid").cuts()
    with pytest.raises(ValueError, match="repeat of x must be more than 0, but is 0"):
        Source(path="x", repeat=0)


def test_what_is_outside_the_vocabulary_is_named_with_an_utterance(tmp_path: Path) -> None:
    lines = [{"audio": "a.wav", "id": f"u{n}", "text": t} for n, t in enumerate(["fine", "naïve", "naïve 3"])]
    cuts = read_corpus(manifest(tmp_path, *lines))
    with pytest.raises(
        ValueError, match=r"2 characters or words .*'3' in 1, for example u2; 'ï' in 2, for example u1\)"
    ):
        check_text(cuts, LETTERS)
    with pytest.raises(ValueError, match=r"1 characters or words .*'3' in 1"):
        check_text(cuts, Words(words=["fine", "naïve"]))
    with pytest.raises(ValueError, match=r"\(' ' in 1, for example u2\)"):
        check_text(cuts, Characters(symbols="aefinvï3"))
    check_text(cuts, Words(words=["fine", "naïve", "3"]))


def test_preparation_runs_once_for_its_settings_and_again_after_a_failure(tmp_path: Path) -> None:
    calls = []
    assert once(tmp_path / "x", {"size": 1}, lambda: calls.append(1))
    assert not once(tmp_path / "x", {"size": 1}, lambda: calls.append(2))
    with pytest.raises(ZeroDivisionError):
        once(tmp_path / "x", {"size": 2}, lambda: 1 / 0)
    assert once(tmp_path / "x", {"size": 1}, lambda: calls.append(3))
    assert calls == [1, 3]


# Augmentation


SPEECH = np.random.default_rng(0).standard_normal(RATE).astype(np.float32) * 0.1
EFFECTS = {
    "gain": Gain(),
    "microphone": Microphone(),
    "shift": Shift(),
    "telephone": Telephone(),
    "noise": Noise(source=Hiss()),
    "room": Room(),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_effects_keep_the_length_and_depend_on_the_dice_alone(name: str) -> None:
    first, again, other = (EFFECTS[name](SPEECH[:-1], RATE, chance(key)) for key in ("a", "a", "b"))
    assert first.shape == (RATE - 1,) and np.isfinite(first).all()
    assert np.array_equal(first, again)
    assert name == "telephone" or not np.array_equal(first, other)


def test_shifted_sound_is_the_same_sound_elsewhere() -> None:
    click = np.zeros(RATE, np.float32)
    click[RATE // 2] = 1.0
    places = [int(Shift(seconds=0.1)(click, RATE, chance(key)).argmax()) for key in range(200)]
    assert min(places) >= 0.4 * RATE and max(places) <= 0.6 * RATE and max(places) - min(places) > 0.15 * RATE


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 12.5, 30.0])
def test_mixed_noise_has_the_ratio_asked_for(snr_db: float, corpus: Path) -> None:
    for source in (Hiss(), Recorded(path=str(corpus), voices=[2, 4])):
        noisy = Noise(source=source, snr_db=(snr_db, snr_db))(SPEECH, RATE, chance("x"))
        assert 10 * np.log10(power(SPEECH) / power(noisy - SPEECH)) == pytest.approx(snr_db, abs=0.01)


def test_silence_stays_silent() -> None:
    silence = np.zeros(1000, np.float32)
    assert not mix(silence, SPEECH[:1000], 10.0).any() and np.array_equal(
        mix(SPEECH[:1000], silence, 0.0), SPEECH[:1000]
    )
    assert not reverberate(silence, SPEECH[:100]).any()


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_hiss_falls_with_its_slope(slope: float) -> None:
    noise = Hiss(slope=(slope, slope))(1 << 18, RATE, chance(slope))
    spectrum = np.abs(np.fft.rfft(noise)) ** 2
    octaves = [spectrum[1 << k : 2 << k].mean() for k in range(11, 17)]  # 125 Hz up
    assert np.diff(10 * np.log10(octaves)) == pytest.approx(np.full(5, -3.01 * slope), abs=0.35)


def test_room_decays_as_its_t60_says() -> None:
    response = Room(t60=(0.5, 0.5), direct_db=(6.0, 6.0)).response(RATE, chance("room"))
    assert 10 * np.log10(np.sum(response[1:] ** 2)) == pytest.approx(-6.0, abs=1e-3)
    backwards = 10 * np.log10(np.cumsum(response[1:][::-1] ** 2)[::-1])  # Schroeder's integral
    assert backwards[0] - backwards[RATE // 4] == pytest.approx(30.0, abs=2.0)


def test_reverberation_keeps_time_and_power() -> None:
    response = np.zeros(400, np.float32)
    response[30], response[130] = 1.0, 0.5
    click = np.zeros(1000, np.float32)
    click[100] = 1.0
    wet = reverberate(click, response)
    assert np.argmax(wet) == 100 and wet[200] == pytest.approx(wet[100] / 2, rel=1e-4)
    assert power(wet) == pytest.approx(power(click), rel=1e-4)


def test_telephone_leaves_nothing_above_four_kilohertz() -> None:
    heard = np.abs(np.fft.rfft(Telephone()(SPEECH, RATE, chance("x")))) ** 2
    assert heard[4200:].sum() < 0.01 * heard[:3800].sum()


def test_microphone_has_a_straight_response_in_every_octave_and_keeps_phase_and_power() -> None:
    click = np.zeros(RATE, np.float32)
    click[RATE // 2] = 1.0
    heard = Microphone(db=9.0)(click, RATE, chance("x"))
    assert np.argmax(np.abs(heard)) == RATE // 2 and power(heard) == pytest.approx(power(click), rel=1e-5)
    loudness = 20 * np.log10(np.abs(np.fft.rfft(heard)))
    corners = loudness[[63, 125, 250, 500, 1000, 2000, 4000, 8000]]
    assert 3 < np.ptp(corners) <= 18.1
    for low, high in ((250, 500), (1000, 2000), (4000, 8000)):
        middle = loudness[round((low * high) ** 0.5)]
        assert middle == pytest.approx((loudness[low] + loudness[high]) / 2, abs=0.02)
    assert np.allclose(Microphone(db=0.0)(SPEECH, RATE, chance("x")), SPEECH, atol=1e-6)


def test_speed_is_known_before_the_sound_is_read() -> None:
    augment = Augment(speeds=[0.9, 1.0, 1.1])
    speeds = {key: augment.speed(key) for key in map(str, range(300))}
    assert {s: sum(v == s for v in speeds.values()) > 70 for s in augment.speeds} == dict.fromkeys(augment.speeds, True)
    for key in ("0", "1", "2", "3", "4"):
        assert len(augment(SPEECH, RATE, key)) == pytest.approx(RATE / speeds[key], abs=1)


def test_speed_moves_the_pitch() -> None:
    sine = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    fast = Augment(speeds=[1.25])(sine, RATE, "x")
    assert np.argmax(np.abs(np.fft.rfft(fast))) * RATE / len(fast) == pytest.approx(1250, abs=2)


def test_probability_is_the_share_of_utterances_touched() -> None:
    augment = Augment(effects={"gain": Gain(db=(6.0, 6.0), probability=0.3)})
    touched = sum(not np.array_equal(augment(SPEECH[:10], RATE, str(n)), SPEECH[:10]) for n in range(1000))
    assert 240 < touched < 360


def test_recorded_noise_comes_from_folders_manifests_and_rooms(corpus: Path) -> None:
    for path in (corpus, corpus.parent / "audio"):
        noise = Recorded(path=str(path))(40000, RATE, chance("x"))
        assert noise.shape == (40000,) and power(noise) == pytest.approx(1.0, rel=0.05)
    assert RecordedRoom(path=str(corpus))(SPEECH, RATE, chance("x")).shape == SPEECH.shape
    (corpus.parent / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing must hold at least one audio file"):
        Recorded(path=str(corpus.parent / "nothing"))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Noise.snr_db must be two numbers, the smaller one first, but is \[20, 5\]"):
        Noise(source=Hiss(), snr_db=[20, 5])
    with pytest.raises(ValueError, match=r"Augment.speeds must be one or more factors above 0, but is \[0.0\]"):
        Augment(speeds=[0.0])


# Plans


DURATIONS = [random.Random(n).lognormvariate(1.0, 0.6) for n in range(1500)]


def drawn(epoch: int = 0, **options: object) -> list[list[int]]:
    return plan(DURATIONS, max_seconds=120.0, dice=chance(7, epoch), **options)


def test_plan_is_a_function_of_seed_and_epoch() -> None:
    assert drawn(3) == drawn(3) != drawn(4)


def test_every_utterance_is_in_an_epoch_once() -> None:
    assert sorted(i for batch in drawn() for i in batch) == list(range(1500))


def test_batches_stay_within_their_seconds() -> None:
    assert max(len(batch) * max(DURATIONS[i] for i in batch) for batch in drawn()) <= 120.0
    assert plan([200.0, 1.0], max_seconds=120.0, dice=chance(1)) in ([[0], [1]], [[1], [0]])


def test_little_is_padding() -> None:
    assert padding(DURATIONS, drawn()) < 0.08
    assert padding(DURATIONS, plan(DURATIONS, max_seconds=120.0)) < 0.05


def test_neighbours_change_from_epoch_to_epoch() -> None:
    def pairs(epoch: int) -> set[frozenset[int]]:
        return {frozenset((a, b)) for batch in drawn(epoch) for a in batch for b in batch if a < b}

    assert len(pairs(0) & pairs(1)) < 0.5 * len(pairs(0))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_an_epoch_evenly(world_size: int) -> None:
    shares = [drawn(world_size=world_size, rank=rank) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(1500))
    work = [[len(batch) * max(DURATIONS[i] for i in batch) for batch in step] for step in zip(*shares, strict=True)]
    assert sum(map(sum, work)) / (world_size * sum(map(max, work))) > 0.85  # so no rank waits long for another


def test_more_ranks_than_utterances_are_refused() -> None:
    with pytest.raises(ValueError, match="has 2 for 3 ranks; use fewer"):
        plan([1.0, 1.0], max_seconds=10.0, world_size=3)


# Batches


def epoch_of(corpus: Path, **options: object) -> Batches:
    utterances = [Utterance(cut, f"0/{cut.id}", cut.duration) for cut in read_corpus(corpus)]
    batches = plan([u.seconds for u in utterances], max_seconds=1.7, dice=chance(0))
    return Batches(
        batches=[[utterances[i] for i in batch] for batch in batches], targets=Transcripts(LETTERS), **options
    )


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        a.ids == b.ids and a.texts == b.texts and all(map(torch.equal, a[:4], b[:4]))
        for a, b in zip(one, other, strict=True)
    )


def test_batch_holds_samples_and_tokens_padded_with_zeros(corpus: Path) -> None:
    short, long = (list(read_corpus(corpus))[n] for n in (0, 5))
    short.supervisions[0].text = "a"
    utterances = [Utterance(cut, cut.id, cut.duration) for cut in (short, long)]
    batch = Transcripts(LETTERS).batch([load(short, RATE), load(long, RATE)], utterances)
    assert batch.samples.shape == (2, 7200) and batch.samples.dtype == torch.float32
    assert batch.sample_lengths.tolist() == [3200, 7200] and batch.sample_lengths.dtype == torch.int64
    assert not batch.samples[0, 3200:].any() and batch.samples[0, :3200].any()
    assert batch.tokens[1].tolist() == LETTERS.encode("one two") and batch.tokens[0].tolist()[1:] == [0] * 6
    assert batch.token_lengths.tolist() == [1, 7] and batch.texts == ("a", "one two")


def test_workers_and_restarts_change_nothing(corpus: Path) -> None:
    augment = Augment(speeds=[0.9, 1.1], effects=EFFECTS)
    alone = list(epoch_of(corpus, augment=augment))
    assert same(alone, list(epoch_of(corpus, augment=augment, workers=2)))
    assert same(alone[3:], list(epoch_of(corpus, augment=augment, workers=1, skip=3)))
    assert len(alone) == len(epoch_of(corpus)) and len(alone) - 3 == len(epoch_of(corpus, skip=3))


def test_workers_end_with_the_last_batch(corpus: Path) -> None:
    epoch = epoch_of(corpus, workers=2)
    batches = iter(epoch)
    heard = [next(batches) for _ in range(len(epoch) - 1)]
    assert len(multiprocessing.active_children()) == 2
    heard.append(next(batches))
    assert not multiprocessing.active_children() and same(heard, list(epoch_of(corpus)))


def test_reading_leaves_the_dice_of_torch_alone(corpus: Path) -> None:
    before = torch.get_rng_state()
    list(epoch_of(corpus, augment=Augment(speeds=[0.9, 1.1], effects=EFFECTS)))
    assert torch.equal(before, torch.get_rng_state())


def test_skipped_batches_are_not_read(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(
        "speechkit.data.batching.load", lambda cut, *rest, **more: read.append(cut.id) or load(cut, *rest, **more)
    )
    left = list(epoch_of(corpus, skip=4))
    assert sorted(read) == sorted(name for batch in left for name in batch.ids)


def test_skip_beyond_the_epoch_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"skip must be at most the \d batches of this epoch, but is 99"):
        epoch_of(corpus, skip=99)


@pytest.mark.parametrize("workers", [0, 1])
def test_file_lost_in_an_epoch_is_left_out_with_one_warning(corpus: Path, caplog, workers: int) -> None:
    epoch = epoch_of(corpus, workers=workers)
    (corpus.parent / "audio" / "05.flac").unlink()
    with caplog.at_level(logging.WARNING):
        names = [sorted(name for batch in epoch for name in batch.ids) for _ in range(2)]
    assert names[0] == names[1] == [f"audio/{n:02d}" for n in range(12) if n != 5]
    assert list(epoch.unread) == ["audio/05"]
    (warning,) = [record.getMessage() for record in caplog.records if "audio/05" in record.getMessage()]
    assert "audio/05 is left out" in warning and "does not exist" in warning


@pytest.mark.parametrize("spoil", [b"", b"RIFF not audio at all"])
def test_broken_files_are_left_out(corpus: Path, spoil: bytes) -> None:
    epoch = epoch_of(corpus)
    (corpus.parent / "audio" / "00.flac").write_bytes(spoil)
    assert "audio/00" not in [name for batch in epoch for name in batch.ids]


def test_batch_that_lost_all_is_replaced_so_that_ranks_stay_in_step(corpus: Path) -> None:
    utterances = [Utterance(cut, cut.id, cut.duration) for cut in list(read_corpus(corpus))[:3]]
    epoch = Batches(batches=[[u] for u in utterances], targets=Transcripts(LETTERS))
    (corpus.parent / "audio" / "01.flac").unlink()
    assert [batch.ids for batch in epoch] == [("audio/00",), ("audio/02",), ("audio/02",)]


def test_too_many_lost_files_stop_with_a_sentence(corpus: Path) -> None:
    epoch = epoch_of(corpus, max_unread=0.2)
    for number in range(3):
        (corpus.parent / "audio" / f"{number:02d}.flac").unlink()
    with pytest.raises(ValueError, match=r"At most 20% of the 12 utterances .* but 3 are already, the last one audio/"):
        list(epoch)


def test_corpus_that_is_all_lost_stops(corpus: Path) -> None:
    epoch = Batches(
        batches=[[Utterance(cut, "k", 1.0)] for cut in list(read_corpus(corpus))[:1]], targets=Transcripts(LETTERS)
    )
    (corpus.parent / "audio" / "00.flac").unlink()
    with pytest.raises(ValueError, match="but 1 are already"):
        list(epoch)


def test_lhotse_cut_that_cannot_load_is_named() -> None:
    recording = Recording("r", [], RATE, RATE, 1.0, channel_ids=[0], transforms=[])
    cut = MonoCut("lost", 0.0, 1.0, 0, [SupervisionSegment("s", "r", 0.0, 1.0, text="a")], recording=recording)
    with pytest.raises(ValueError, match="The cut lost must be one lhotse can load, but lhotse says"):
        load(cut, RATE)


def test_real_manifests_read(recordings: Path) -> None:
    cuts = list(read_corpus(recordings / "fsdd" / "manifest.jsonl"))
    assert len(cuts) == 1200 and {speaker_of(c) for c in cuts if split_of(c) == "test"} == {"theo"}
    opus = Source(path=str(recordings / "speechocean762_more" / "manifest.jsonl"), speakers=["0001"]).cuts()
    assert all(abs(len(load(cut, RATE)) / RATE - cut.duration) < 0.01 for cut in list(opus)[:5])


def test_gzipped_manifests_read(corpus: Path) -> None:
    zipped = corpus.with_name("zipped.jsonl.gz")
    zipped.write_bytes(gzip.compress(corpus.read_bytes()))
    assert list(CutSet(list(read_corpus(zipped))).ids) == list(read_corpus(corpus).ids)
