"""The preparations of tagging corpora: what they write of each official layout, and what they say of a wrong one."""

from __future__ import annotations

import csv
import json
import runpy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speechkit import audio, config
from speechkit.app.train import complete
from speechkit.data import tagged
from speechkit.data.corpora import Source, fold_of, labels_of, read_corpus, speaker_of, write_manifest
from speechkit.datamodule import TagData

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = ("audioset", "donateacry", "esc10", "esc50", "ravdess", "speechcommands", "urbansound8k", "wakewords")
RECORDED = {"esc10": 180, "wakewords": 276, "ravdess": 180, "donateacry": 55, "urbansound8k": 79}
PREPARE = {name: runpy.run_path(str(RECIPES / name / "prepare.py"))["prepare"] for name in NAMES}


def record(path: Path, seconds: float = 0.2) -> None:
    audio.write(path, np.full(round(8000 * seconds), 0.1, np.float32), 8000)


def write_table(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def classes(out: Path) -> list[str]:
    return (out / "labels.txt").read_text(encoding="utf-8").splitlines()


# ESC-50


ESC = ("filename", "fold", "target", "category", "esc10", "src_file", "take")


def esc50(home: Path, *, without: tuple[str, int] | None = None) -> Path:
    """Two recordings of each of three classes in each fold; "rain" and "dog" belong to ESC-10."""
    rows = []
    for fold in range(1, 6):
        for target, name in ((10, "rain"), (0, "dog"), (7, "frog")):
            for take in "AB" if (name, fold) != without else "":
                file = f"{fold}-{1000 + fold}-{take}-{target}.wav"
                record(home / "audio" / file)
                rows.append((file, fold, target, name, name != "frog", 1000 + fold, take))
    write_table(home / "meta" / "esc50.csv", ESC, rows)
    return home


def test_esc50_keeps_the_folds_and_the_order_of_its_authors(tmp_path: Path) -> None:
    PREPARE["esc50"](esc50(tmp_path / "in"), tmp_path / "out")
    cuts = list(read_corpus(tmp_path / "out" / "clips.jsonl", transcribed=False))
    assert classes(tmp_path / "out") == ["dog", "frog", "rain"]
    assert len(cuts) == 30 and {fold_of(cut) for cut in cuts} == {1, 2, 3, 4, 5}
    assert all(cut.id.startswith(f"{fold_of(cut)}-") for cut in cuts)


def test_held_out_recordings_of_esc50_are_not_trained_on(tmp_path: Path) -> None:
    PREPARE["esc50"](esc50(tmp_path / "in"), tmp_path / "out")
    clips = str(tmp_path / "out" / "clips.jsonl")
    trained, held_out = (
        {cut.custom["recording"] for cut in Source(path=clips, **chosen).cuts(transcribed=False)}
        for chosen in ({"without_folds": [3]}, {"folds": [3]})
    )
    assert held_out == {"1003"} and trained == {"1001", "1002", "1004", "1005"}


def test_a_fold_that_is_not_there_cannot_be_held_out(tmp_path: Path) -> None:
    PREPARE["esc50"](esc50(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"must have the folds .*, but has no 6 among folds 1 \(6\), .*; correct"):
        Source(path=str(tmp_path / "out" / "clips.jsonl"), without_folds=[6]).cuts(transcribed=False)


def test_esc10_of_esc50_is_what_its_column_says(tmp_path: Path) -> None:
    PREPARE["esc50"](esc50(tmp_path / "in"), tmp_path / "out")
    ten = lines(tmp_path / "out" / "esc10" / "clips.jsonl")
    assert classes(tmp_path / "out" / "esc10") == ["dog", "rain"]
    assert len(ten) == 20 and {line["label"] for line in ten} == {"dog", "rain"}


def test_a_class_without_an_example_in_a_fold_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    PREPARE["esc50"](esc50(tmp_path / "in", without=("frog", 2)), tmp_path / "out")
    said = capsys.readouterr().out
    assert said.count("no example") == 1
    assert "fold 2 has no example of frog: of that it can teach and measure nothing." in said
    assert len(lines(tmp_path / "out" / "clips.jsonl")) == 28  # and nothing is lost


def test_a_corpus_that_is_not_given_is_asked_for(tmp_path: Path) -> None:
    for name, part in (("esc50", "meta/esc50.csv"), ("speechcommands", "testing_list.txt"), ("audioset", "audio")):
        with pytest.raises(ValueError, match=rf"{name} recipe must be given its corpus, .* add --corpus .*{part}"):
            PREPARE[name](None, tmp_path)


def test_a_folder_of_another_layout_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    missing = {
        "esc50": "meta/esc50.csv",
        "speechcommands": "validation_list.txt",
        "audioset": "balanced_train_segments.csv",
        "urbansound8k": "metadata/UrbanSound8K.csv",
    }
    for name, part in missing.items():
        with pytest.raises(ValueError, match=f"must hold .*, but has no {part}; give the folder as it was unpacked"):
            PREPARE[name](tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    home = esc50(tmp_path / "in")
    write_table(home / "meta" / "esc50.csv", ("filename", "fold", "category"), [("a.wav", 1, "dog")])
    with pytest.raises(ValueError, match="has no target among filename, fold, category; take the file"):
        PREPARE["esc50"](home, tmp_path / "out")


def test_files_that_are_missing_or_broken_are_counted_and_one_is_named(tmp_path: Path) -> None:
    home = esc50(tmp_path / "in")
    (home / "audio" / "1-1001-A-0.wav").unlink()
    (home / "audio" / "2-1002-B-7.wav").write_bytes(b"not a sound")
    with pytest.raises(ValueError, match=r"1-1001-A-0.wav.*\(1 more files have faults.\)"):
        PREPARE["esc50"](home, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# UrbanSound8K


def urbansound8k(home: Path, folds: int = 10) -> Path:
    head = ("slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class")
    rows = []
    for fold in range(1, folds + 1):
        for number, name in ((3, "dog_bark"), (0, "air_conditioner")):
            file = f"{100 + fold}-{number}-0-0.wav"
            record(home / "audio" / f"fold{fold}" / file, 0.1 * fold)
            rows.append((file, 100 + fold, 0, 0.1 * fold, 1, fold, number, name))
    write_table(home / "metadata" / "UrbanSound8K.csv", head, rows)
    return home


def test_urbansound8k_has_ten_folds_and_its_own_class_numbers(tmp_path: Path) -> None:
    PREPARE["urbansound8k"](urbansound8k(tmp_path / "in"), tmp_path / "out")
    written = lines(tmp_path / "out" / "clips.jsonl")
    assert classes(tmp_path / "out") == ["air_conditioner", "dog_bark"]
    assert sorted({line["fold"] for line in written}) == list(range(1, 11)) and len(written) == 20
    assert all(line["duration"] == pytest.approx(0.1 * line["fold"]) for line in written)


# Speech Commands


def speechcommands(home: Path, testing: str = "bed/bb_nohash_0.wav\nup/bb_nohash_0.wav\n") -> Path:
    for word in ("up", "bed"):
        for name in ("aa_nohash_0", "aa_nohash_1", "bb_nohash_0", "cc_nohash_0"):
            record(home / word / f"{name}.wav")
    record(home / "_background_noise_" / "running_tap.wav", 1.0)
    (home / "validation_list.txt").write_text("bed/cc_nohash_0.wav\nup/cc_nohash_0.wav\n")
    (home / "testing_list.txt").write_text(testing)
    return home


def test_speech_commands_are_split_by_the_lists_and_noise_is_no_word(tmp_path: Path) -> None:
    PREPARE["speechcommands"](speechcommands(tmp_path / "in"), tmp_path / "out")
    cuts = {s: list(read_corpus(tmp_path / "out" / f"{s}.jsonl", transcribed=False)) for s in ("train", "dev", "test")}
    assert classes(tmp_path / "out") == ["bed", "up"]
    assert {split: len(found) for split, found in cuts.items()} == {"train": 4, "dev": 2, "test": 2}
    assert {split: {speaker_of(cut) for cut in found} for split, found in cuts.items()} == {
        "train": {"aa"},
        "dev": {"cc"},
        "test": {"bb"},
    }
    assert [line["id"] for line in lines(tmp_path / "out" / "noise.jsonl")] == ["running_tap"]


def test_a_list_that_names_a_clip_which_is_not_there_is_refused(tmp_path: Path) -> None:
    home = speechcommands(tmp_path / "in", testing="bed/bb_nohash_0.wav\nbed/zz_nohash_0.wav\nno/zz_nohash_0.wav\n")
    with pytest.raises(ValueError, match=r"testing_list.txt must be .*, but 2 are not, such as bed/zz_nohash_0.wav"):
        PREPARE["speechcommands"](home, tmp_path / "out")


# AudioSet


NAMED = {"/m/09x0r": "Speech", "/m/05zppz": "Male speech, man speaking", "/m/0bt9lr": "Dog"}
CLIPS = {
    "balanced_train_segments.csv": {"aaaaaaaaaaa": ("/m/09x0r", "/m/05zppz"), "gone-gone-g": ("/m/0bt9lr",)},
    "unbalanced_train_segments.csv": {"Yyyyyyyyy_1": ("/m/0bt9lr",)},
    "eval_segments.csv": {"-_ccccccccc": ("/m/0bt9lr", "/m/09x0r"), "ddddddddddd": ("/m/05zppz",)},
}


def name_classes(home: Path, named: dict[str, str]) -> None:
    rows = [(number, mid, name) for number, (mid, name) in enumerate(named.items())]
    write_table(home / "class_labels_indices.csv", ("index", "mid", "display_name"), rows)


def audioset(home: Path, *files: str) -> Path:
    for name, clips in CLIPS.items():
        rows = [f'{video}, 30.000, 40.000, "{",".join(mids)}"' for video, mids in clips.items()]
        home.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("# Segments csv\n# num_ytids\n# YTID, start_seconds, ...\n" + "\n".join(rows) + "\n")
    name_classes(home, NAMED)
    for file in files:
        record(home / "audio" / file)
    return home


def test_audioset_has_the_clips_that_are_there_by_whatever_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    home = audioset(tmp_path / "in", "Yaaaaaaaaaaa.wav", "train/Yyyyyyyyy_1_30.000.flac", "-_ccccccccc.wav", "x.wav")
    PREPARE["audioset"](home, tmp_path / "out")
    heard = {
        name: {cut.id: [*labels_of(cut)] for cut in read_corpus(tmp_path / "out" / f"{name}.jsonl", transcribed=False)}
        for name in ("balanced", "full", "eval")
    }
    speech = {"aaaaaaaaaaa": ["Speech", "Male speech, man speaking"]}
    assert heard == {
        "balanced": speech,
        "full": {**speech, "Yyyyyyyyy_1": ["Dog"]},
        "eval": {"-_ccccccccc": ["Dog", "Speech"]},
    }
    assert classes(tmp_path / "out") == list(NAMED.values())
    assert "eval_segments.csv: 1 of 2 clips are there." in capsys.readouterr().out


def test_clips_of_audioset_that_cannot_be_read_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    home = audioset(tmp_path / "in", "aaaaaaaaaaa.wav", "Yyyyyyyyy_1.wav", "-_ccccccccc.wav")
    (home / "audio" / "ddddddddddd.wav").write_bytes(b"")
    PREPARE["audioset"](home, tmp_path / "out")
    assert [line["id"] for line in lines(tmp_path / "out" / "eval.jsonl")] == ["-_ccccccccc"]
    assert "1 of 2 clips are there, 1 cannot be read: " in capsys.readouterr().out


def test_audioset_with_a_label_that_is_no_class_or_a_torn_line_is_refused(tmp_path: Path) -> None:
    home = audioset(tmp_path / "in", "aaaaaaaaaaa.wav", "-_ccccccccc.wav")
    name_classes(home, {"/m/09x0r": "Speech"})
    with pytest.raises(ValueError, match=r"balanced_train_segments.csv must be in .*, but /m/05zppz is not"):
        PREPARE["audioset"](home, tmp_path / "out")
    (home / "eval_segments.csv").write_text("ccccccccccc, 30.000\n")
    name_classes(home, NAMED)
    with pytest.raises(
        ValueError, match=r"A line of .*eval_segments.csv must be a video, .* \['ccccccccccc', '30.000'\]"
    ):
        PREPARE["audioset"](home, tmp_path / "out")


def test_audioset_without_any_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"balanced.jsonl must have at least one clip, but none was found"):
        PREPARE["audioset"](audioset(tmp_path / "in", "x.wav"), tmp_path / "out")


# What lies beside the project


@pytest.fixture(scope="module")
def prepared(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    homes = {name: tmp_path_factory.mktemp(name) for name in RECORDED}
    for name, out in homes.items():
        PREPARE[name](recordings, out)
    return homes


def manifests(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.stem: lines(path) for path in sorted(out.glob("*.jsonl"))}


@pytest.mark.parametrize("name", RECORDED)
def test_recordings_beside_the_project_are_all_there_under_their_labels(prepared: dict[str, Path], name: str) -> None:
    found = manifests(prepared[name])
    every = [line for clips in found.values() for line in clips]
    assert len({line["id"] for line in every}) == len(every) == RECORDED[name]
    assert {line["label"] for line in every} == set(classes(prepared[name]))
    assert found.keys() == ({"clips"} if "fold" in every[0] else {"train", "dev", "test"})


@pytest.mark.parametrize("name", RECORDED)
def test_prepared_twice_is_the_same(recordings: Path, prepared: dict[str, Path], name: str) -> None:
    before = {path.name: path.read_bytes() for path in prepared[name].iterdir()}
    PREPARE[name](recordings, prepared[name])
    assert {path.name: path.read_bytes() for path in prepared[name].iterdir()} == before


@pytest.mark.parametrize("name", ["ravdess", "donateacry"])
def test_nobody_is_heard_in_two_splits(prepared: dict[str, Path], name: str) -> None:
    speakers = [{line["speaker"] for line in clips} for clips in manifests(prepared[name]).values()]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) > 15


@pytest.mark.parametrize("name", ["esc10", "urbansound8k"])
def test_no_recording_is_in_two_folds(prepared: dict[str, Path], name: str) -> None:
    folds: dict[str, set[int]] = {}
    for line in lines(prepared[name] / "clips.jsonl"):
        folds.setdefault(line["recording"], set()).add(line["fold"])
    assert all(len(found) == 1 for found in folds.values())


@pytest.mark.parametrize("name", ["esc10", "wakewords", "ravdess", "donateacry"])
def test_config_reads_what_its_preparation_wrote(
    name: str, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    PREPARE[name](recordings, Path("data", name))
    data = read_by(RECIPES / name / "conf" / f"{name}.yaml")
    tested = [cut for batch in data.test_batches("clips").batches for cut in batch]
    assert len(data.train_cuts["clips"]) + len(data.dev_cuts) + len(tested) == RECORDED[name]


def test_folds_of_a_config_are_all_but_one_and_that_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PREPARE["esc50"](esc50(tmp_path / "in"), Path("data/esc50"))
    PREPARE["urbansound8k"](urbansound8k(tmp_path / "us"), Path("data/urbansound8k"))
    configs = {"esc50/conf/esc50": (5, 6), "esc50/conf/esc10": (5, 4), "urbansound8k/conf/urbansound8k": (10, 2)}
    for path, (folds, clips) in configs.items():
        data = read_by(RECIPES / f"{path}.yaml", "fold=4")
        assert {fold_of(cut) for cut in data.train_cuts["clips"]} == set(range(1, folds + 1)) - {4}
        assert [fold_of(cut.cut) for batch in data.test_batches("clips").batches for cut in batch] == [4] * clips
    assert not data.dev_cuts  # nothing is chosen by what is reported


def read_by(path: Path, *overrides: str) -> TagData:
    """The data of a config, checked against its classes."""
    settings = config.compose(path, overrides)
    complete(settings)
    labels, exclusive = list(settings.model.labels), settings.model.exclusive
    data = config.build(settings.data, "data", labels=labels, exclusive=exclusive)
    data.setup("fit")
    return data


def test_absent_recordings_are_named(tmp_path: Path) -> None:
    for name in ("esc10", "wakewords", "ravdess", "donateacry"):
        with pytest.raises(ValueError, match=r"must hold \w+/manifest.jsonl, but does not; name the folder that does"):
            PREPARE[name](tmp_path, tmp_path / "out")


def test_an_empty_manifest_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path / "esc10" / "manifest.jsonl", [])
    with pytest.raises(ValueError, match=r"clips.jsonl must have at least one clip, but none was found"):
        PREPARE["esc10"](tmp_path, tmp_path / "out")


def test_a_label_that_is_no_class_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    clips = [{"audio": "a.wav", "label": "dog"}, {"audio": "b.wav", "labels": ["dog", "dgo"]}]
    with pytest.raises(ValueError, match=r"labels of the 2 classes, but 'dgo' is none of them"):
        tagged.write(tmp_path / "out", {"clips": clips}, ["cat", "dog"])
    assert not (tmp_path / "out").exists()
