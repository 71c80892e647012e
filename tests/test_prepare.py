"""The recipes' preparations: what they write, that it is the same every time, and what they say when it cannot be."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

from speechkit import audio
from speechkit.data.augment import chance, power
from speechkit.data.corpora import read_corpus, speaker_of, split_of, text_of, write_manifest

RECIPES = Path(__file__).parents[1] / "recipes"
DIGITS, FSDD, MANIFEST = (runpy.run_path(str(RECIPES / name / "prepare.py")) for name in ("digits", "fsdd", "manifest"))
SPLITS = ("train", "dev", "test")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    DIGITS["prepare"](None, out, train=12, dev=5, test=8)
    return out


def test_digits_have_their_splits_and_texts(digits: Path) -> None:
    for split, size in zip(SPLITS, (12, 5, 8), strict=True):
        cuts = list(read_corpus(digits / f"{split}.jsonl"))
        assert len(cuts) == size and {split_of(cut) for cut in cuts} == {split}
        for number, cut in enumerate(cuts):
            assert text_of(cut).lower().split() == list(DIGITS["utterance"](split, number, 0).words)
            assert 0.15 * len(text_of(cut).split()) < cut.duration < 1.2 * len(text_of(cut).split()) + 0.9
            assert cut.sampling_rate == 16000


def test_digits_are_the_same_every_time_whatever_the_size_of_train(digits: Path, tmp_path: Path) -> None:
    DIGITS["prepare"](None, tmp_path, train=7, dev=5, test=8)
    for split, size in zip(SPLITS, (7, 5, 8), strict=True):
        assert lines(tmp_path / f"{split}.jsonl") == lines(digits / f"{split}.jsonl")[:size]
        for record in lines(tmp_path / f"{split}.jsonl"):
            assert (tmp_path / record["audio"]).read_bytes() == (digits / record["audio"]).read_bytes()


def test_digits_depend_on_the_seed() -> None:
    assert DIGITS["utterance"]("train", 0, 0) != DIGITS["utterance"]("train", 0, 1)


def test_second_preparation_returns_at_once_and_another_one_starts_again(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(digits, out)
    spoken = next((out / "audio" / "train").iterdir())
    spoken.unlink()
    DIGITS["prepare"](None, out, train=12, dev=5, test=8)
    assert not spoken.exists()
    DIGITS["prepare"](None, out, train=12, dev=5, test=9)
    assert spoken.exists() and len(lines(out / "test.jsonl")) == 9


def test_no_voice_is_in_two_splits() -> None:
    voices = DIGITS["VOICES"]
    assert len({voice for split in SPLITS for voice in voices[split]}) == sum(map(len, voices.values()))
    drawn = {split: {DIGITS["utterance"](split, n, 0).voice.split("+")[1] for n in range(500)} for split in SPLITS}
    assert all(drawn[split] == set(voices[split]) for split in SPLITS)


def test_every_voice_exists() -> None:
    def speak_all() -> None:
        espeak, plain = DIGITS["Espeak"](), DIGITS["utterance"]("train", 0, 0)
        for accent in DIGITS["ACCENTS"]:
            for voice in (voice for split in SPLITS for voice in DIGITS["VOICES"][split]):
                assert power(espeak.say(plain._replace(voice=f"{accent}+{voice}", spoken="one"))) > 1e-4

    # In a process of its own: what this one says would change what later tests hear.
    process = multiprocessing.get_context("fork").Process(target=speak_all)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_dev_and_test_carry_noise_and_train_does_not(digits: Path) -> None:
    def quietest(split: str) -> list[float]:
        heads = [audio.read(digits / record["audio"], duration=0.02)[0] for record in lines(digits / f"{split}.jsonl")]
        return [power(head) for head in heads]

    assert not any(quietest("train"))
    assert sum(level > 0 for level in quietest("test")) > 3


def test_real_digits_are_named_where_there_are_recordings(recordings: Path, tmp_path: Path) -> None:
    DIGITS["prepare"](recordings, tmp_path / "digits", train=1, dev=1, test=1)
    real = list(read_corpus(tmp_path / "digits" / "real.jsonl"))
    assert len(real) == 1200 and {text_of(cut).lower() for cut in real} == set(DIGITS["WORDS"])
    with pytest.raises(ValueError, match=r"must have real digits in fsdd/manifest.jsonl, but has not; leave --corpus"):
        DIGITS["prepare"](tmp_path, tmp_path / "x", train=1, dev=1, test=1)


def test_speech_without_espeak_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "espeakng_loader", None)
    with pytest.raises(ValueError, match=r"install it with: pip install 'speechkit\[digits\]'"):
        DIGITS["prepare"](None, tmp_path / "x", train=1, dev=1, test=1)


def test_place_that_cannot_be_written_is_named(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "audio").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match=f"must be written to {tmp_path}, but that failed for the reason above"):
        DIGITS["prepare"](None, tmp_path, train=1, dev=1, test=1)
    assert "train-00000.flac must be written in full, but the disk refused" in capfd.readouterr().err
    assert not (tmp_path / ".complete").exists()


# FSDD


def test_joined_clips_last_as_long_as_their_parts() -> None:
    parts = [np.random.default_rng(n).standard_normal(1600 * (n + 1)).astype(np.float32) for n in range(3)]
    pauses = [0.1, 0.2, 0.05, 0.3]
    joined = FSDD["join"](parts, [0.0, 20.0, -20.0], pauses, 0.0, chance("x"))
    assert len(joined) == sum(map(len, parts)) + round(16000 * sum(pauses))
    assert power(joined[1600 + 1600 + 3200 :][:3200]) == pytest.approx(100 * power(parts[1]), rel=0.05)


def test_pauses_are_as_quiet_as_the_room_and_not_silent() -> None:
    clip = np.random.default_rng(0).standard_normal(8000).astype(np.float32) * 0.1
    joined = FSDD["join"]([clip], [0.0], [0.5, 0.5], 1e-3, chance("x"))
    assert power(joined[:8000]) == pytest.approx(1e-5, rel=0.3) and power(joined[16000:]) == pytest.approx(
        1e-5, rel=0.3
    )


def test_a_room_is_measured_on_clips_that_have_a_pause() -> None:
    noise = np.random.default_rng(0).standard_normal((20, 8000)).astype(np.float32) * 0.1
    close, loose = noise, noise[:5] * np.repeat(np.float32([1.0, 0.01]), 4000)
    assert FSDD["_room"]([*close, *loose]) == pytest.approx(2e-4, rel=0.5)
    assert FSDD["_room"](close) > 0.5


@pytest.fixture(scope="module")
def fsdd(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fsdd")
    FSDD["prepare"](recordings, out, train=20, dev=5, test=5, synthetic=2)
    return out


def test_fsdd_strings_keep_speakers_apart(fsdd: Path) -> None:
    speakers = {split: {speaker_of(cut) for cut in read_corpus(fsdd / f"{split}.jsonl")} for split in SPLITS}
    assert speakers == {"train": {"george", "jackson"}, "dev": {"nicolas"}, "test": {"theo"}}


def test_fsdd_strings_say_their_text(fsdd: Path) -> None:
    for cut in read_corpus(fsdd / "train.jsonl"):
        words = text_of(cut).lower().split()
        assert 1 <= len(words) <= 7 and set(words) <= set(DIGITS["WORDS"])
        assert 0.1 * len(words) < cut.duration < 1.4 * len(words) + 0.7


def test_voices_are_cut_words_of_the_speakers_of_the_real_strings(fsdd: Path) -> None:
    real = {cut.id: cut for cut in read_corpus(fsdd / "real.jsonl")}
    for line in lines(RECIPES / "fsdd" / "words.jsonl"):
        cut, ends = real[line["id"]], [0.0]
        for word, start, end in line["words"]:
            assert word in text_of(cut).split() and ends[-1] - 0.06 < start < end <= cut.duration + 0.01
            ends.append(end)
    voices = {speaker_of(cut) for cut in read_corpus(fsdd / "voices.jsonl")}
    assert len(voices) > 10 and voices <= {speaker_of(cut) for cut in real.values()}


def test_real_strings_are_digits_of_many_speakers(fsdd: Path) -> None:
    cuts = list(read_corpus(fsdd / "real.jsonl"))
    assert len(cuts) >= 145 and len({speaker_of(cut) for cut in cuts}) >= 51
    assert {word for cut in cuts for word in text_of(cut).lower().split()} <= set(DIGITS["WORDS"])


def test_english_for_pretraining_keeps_speakers_apart(fsdd: Path) -> None:
    records = {split: lines(fsdd / "english" / f"{split}.jsonl") for split in SPLITS}
    speakers = {split: {record["speaker"] for record in records[split]} for split in SPLITS}
    assert not speakers["train"] & speakers["dev"] and not (speakers["train"] | speakers["dev"]) & speakers["test"]
    assert len(records["train"]) > 4000 and all(Path(record["audio"]).is_file() for record in records["test"])


def test_absent_recordings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="but has no fsdd; name the folder that does with --corpus"):
        FSDD["prepare"](tmp_path, tmp_path / "out")


# Manifest


def own(folder: Path, speakers: list[str | None], splits: list[str | None] | None = None) -> Path:
    records = []
    for number, speaker in enumerate(speakers):
        audio.write(folder / f"{number}.wav", np.ones(1600 * (1 + number % 3), np.float32) * 0.1, 16000)
        split = splits[number] if splits else None
        record = {"audio": f"{number}.wav", "text": f"It's nº {number}!", "speaker": speaker, "split": split}
        records.append({key: value for key, value in record.items() if value is not None})
    write_manifest(folder / "manifest.jsonl", records)
    return folder


def prepared(corpus: Path, **options: object) -> dict[str, list]:
    MANIFEST["prepare"](corpus, corpus / "out", **options)
    return {split: list(read_corpus(corpus / "out" / f"{split}.jsonl")) for split in SPLITS}


def test_manifest_keeps_the_splits_it_has(tmp_path: Path) -> None:
    splits = prepared(own(tmp_path, ["a"] * 6, ["test", "dev", "train", "train", "dev", "train"]))
    assert {name: [cut.id for cut in cuts] for name, cuts in splits.items()} == {
        "train": ["2", "3", "5"],
        "dev": ["1", "4"],
        "test": ["0"],
    }


def test_manifest_without_splits_is_divided_by_whole_speakers(tmp_path: Path) -> None:
    splits = prepared(own(tmp_path, [f"s{n % 10}" for n in range(40)]), dev=0.2, test=0.1)
    speakers = {name: {speaker_of(cut) for cut in cuts} for name, cuts in splits.items()}
    assert sum(map(len, splits.values())) == 40 and sum(map(len, speakers.values())) == 10
    assert 2 <= len(speakers["dev"]) <= 3 and 1 <= len(speakers["test"]) <= 2


def test_manifest_without_speakers_is_divided_by_utterances(tmp_path: Path) -> None:
    splits = prepared(own(tmp_path, [None] * 20))
    assert len(splits["train"]) >= 13 and sum(map(len, splits.values())) == 20


def test_manifest_normalises_texts_and_lists_their_characters(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    splits = prepared(own(tmp_path, [None] * 10))
    texts = {text_of(cut) for cuts in splits.values() for cut in cuts}
    assert texts == {f"IT'S NO {number}" for number in range(10)}
    assert (tmp_path / "out" / "characters.txt").read_text() == " '0123456789INOST\n"
    report = capsys.readouterr().out
    assert """17 characters; to train with them add: "model.text.symbols=' \\'0123456789INOST'\"""" in report
    assert "Rarely seen" in report and "Shortest: " in report


def test_manifest_can_keep_texts_and_train_subwords(tmp_path: Path) -> None:
    splits = prepared(own(tmp_path, [None] * 10), verbatim=True, subwords=17)
    assert all(text_of(cut).startswith("It's nº") for cut in splits["train"])
    assert (tmp_path / "out" / "subwords.model").stat().st_size > 0


def test_texts_too_long_for_their_sound_are_pointed_at(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    records = lines(own(tmp_path, [None] * 10) / "manifest.jsonl")
    records[4]["text"] = "far too much for two tenths of a second"
    write_manifest(tmp_path / "manifest.jsonl", records)
    prepared(tmp_path)
    assert "4 has 195 characters a second: is its text that of another recording?" in capsys.readouterr().out


def test_manifest_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add --corpus path/to/manifest"):
        MANIFEST["prepare"](None, tmp_path / "out")
    with pytest.raises(ValueError, match=r"train has none of the 2; give more of them"):
        prepared(own(tmp_path, [None] * 2))
