"""``speechkit tag`` and ``speechkit evaluate`` of taggers, as a user meets them."""

from __future__ import annotations

import csv
import json
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from test_cli import assert_refused, output
from tiny import node as recogniser_node
from tiny import sound, tiny

import speechkit
from speechkit.config import build_model
from speechkit.metrics import Tagging
from speechkit.pretrained import save
from speechkit.tagger import Tagger

LABELS = ("dog", "Male speech, man speaking", "rain", "clock")
SECONDS = (0.4, 0.7, 0.5, 0.9, 0.3, 0.6)


def node(**changes: Any) -> dict[str, Any]:
    """A tagger of a few thousand weights that hears 0.96 s at once."""
    mel = {"_target_": "speechkit.features.LogMel", "bands": 20}
    encoder = {"features": 20, "frames": 96, "dim": 16, "heads": 2, "layers": 2, "patch": 8, "stride": 8}
    return {
        "features": {"_target_": "speechkit.features.FrontEnd", "mel": mel},
        "encoder": {"_target_": "speechkit.encoders.AST", **encoder, "band_stride": 4},
        "head": {"_target_": "speechkit.heads.Mean", "_partial_": True},
        "labels": list(LABELS),
        "frames": 96,
        "exclusive": True,
    } | changes


def varied() -> torch.Tensor:
    """4.5 s of sounds of other kinds, one after the other."""
    dice = torch.Generator().manual_seed(1)
    noise = torch.randn(16000, generator=dice)
    kinds = (0.3 * noise, sound(1.0, 5), 0.001 * noise, 0.3 * noise.cumsum(0) / 100, 0.5 * sound(0.5, 7))
    return torch.cat(kinds)


def made(folder: Path, **changes: Any) -> Tagger:
    """A tagger whose labels differ from clip to clip, saved."""
    torch.manual_seed(0)
    tagger = build_model(node(**changes)).eval()
    with torch.no_grad():
        for parameter in tagger.encoder.parameters():
            parameter.mul_(4.0)
        tagger.head.linear.weight.mul_(4.0)
        heard = torch.stack([tagger.head(piece.encoded)[0] for piece in tagger.pieces(varied())])
        tagger.head.linear.bias.sub_(heard.mean(0))
    save(tagger, node(**changes), folder)
    return speechkit.load(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that are tested on different clips, clips, and a long recording."""
    folder = tmp_path_factory.mktemp("tags")
    tagger = made(folder / "one" / "model")
    made(folder / "two" / "model")
    lines = []
    for number, seconds in enumerate(SECONDS):
        clip = sound(seconds, number)
        soundfile.write(folder / f"{number}.wav", clip.numpy(), 16000, subtype="FLOAT")
        heard = tagger.tag(clip)[number % 2].label  # every other clip has a label that is only second
        lines.append({"audio": f"{number}.wav", "label": heard, "fold": number // 3})
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for fold, run in enumerate(("one", "two")):
        source = {"_target_": "speechkit.data.Source", "path": str(folder / "all.jsonl"), "folds": [fold]}
        (folder / run / "config.yaml").write_text(json.dumps({"name": run, "data": {"test": {"own": source}}}))
    soundfile.write(folder / "long.wav", varied().numpy(), 16000, subtype="FLOAT")
    save(tiny(), recogniser_node(), folder / "recogniser")
    return folder


def clips(home: Path) -> list[Path]:
    return [home / f"{number}.wav" for number in range(len(SECONDS))]


# speechkit tag


def test_tag_prints_what_the_tagger_says(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tagger = speechkit.load(home / "one")
    status, out, err = output(capsys, "tag", home / "one", *clips(home), "--top", 2)
    assert (status, err) == (0, "")
    for line, file, seconds in zip(out.splitlines(), clips(home), SECONDS, strict=True):
        said = "; ".join(f"{score:.2f} {label}" for label, score in tagger.tag(file, top=2))
        assert line == f"{file}:     0.00 - {seconds:.2f} s  {said}"
    assert output(capsys, "tag", home / "one", clips(home)[0])[1].startswith("    0.00 - 0.40 s  ")


def test_a_long_recording_has_a_line_for_each_stretch_of_the_same_label(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tagger = speechkit.load(home / "one")
    status, out, _ = output(capsys, "tag", home / "one", home / "long.wav", "--json", "--top", 4)
    record = json.loads(out)
    assert status == 0 and record["seconds"] == 4.5
    stretches = record["stretches"]
    assert 1 < len(stretches) < 5
    assert stretches[0]["start"] == 0 and stretches[-1]["end"] == 4.5
    for before, after in pairwise(stretches):
        assert before["end"] == after["start"]
        assert before["tags"][0]["label"] != after["tags"][0]["label"]
    tops = [LABELS[int(tagger.score(piece).argmax())] for piece in tagger.pieces(home / "long.wav")]
    assert [stretch["tags"][0]["label"] for stretch in stretches] == [label for label, _ in groupby(tops)]
    wanted = tagger.tag(home / "long.wav", top=4)
    assert [(tag["label"], tag["score"]) for tag in record["tags"]] == [(t.label, round(t.score, 5)) for t in wanted]


def test_a_threshold_leaves_out_what_is_not_sure(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = speechkit.load(home / "one").tag(clips(home)[0])
    between = (scores[0].score + scores[1].score) / 2
    _, out, _ = output(capsys, "tag", home / "one", clips(home)[0], "--threshold", between)
    assert out == f"    0.00 - 0.40 s  {scores[0].score:.2f} {scores[0].label}\n"
    assert output(capsys, "tag", home / "one", clips(home)[0], "--threshold", 0.9999)[1].endswith("nothing that sure\n")


def test_events_have_their_times(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = speechkit.load(home / "one").events(home / "long.wav", threshold=0.28)
    assert len(wanted) > 1
    status, out, _ = output(capsys, "tag", home / "one", home / "long.wav", "--events", "--threshold", 0.28)
    assert status == 0
    assert out.splitlines() == [f"{e.start:8.2f} - {e.end:.2f} s  {e.score:.2f} {e.label}" for e in wanted]
    _, out, _ = output(capsys, "tag", home / "one", home / "long.wav", "--events", "--threshold", 0.28, "--json")
    assert [event["label"] for event in json.loads(out)["events"]] == [event.label for event in wanted]
    assert output(capsys, "tag", home / "one", clips(home)[0], "--events", "--threshold", 0.9999)[1] == "no event\n"


def test_a_picture_explains_each_file(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [clips(home)[0], home / "long.wav"]
    status, _, err = output(capsys, "tag", home / "one", *files, "--explain", tmp_path / "why")
    assert (status, err) == (0, "")
    made_ = sorted((tmp_path / "why").iterdir())
    assert [path.name for path in made_] == ["0.png", "long.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made_)
    (tmp_path / "0.wav").write_bytes(files[0].read_bytes())
    again = ("tag", home / "one", files[0], tmp_path / "0.wav", "--explain", tmp_path / "other")
    assert_refused(output(capsys, *again), r"must have different names, but \S+ and \S+ would both be \S+/0\.png")


def test_files_that_cannot_be_tagged_are_reported_and_the_rest_is(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.wav").write_text("not audio at all")
    soundfile.write(tmp_path / "short.wav", np.zeros(50), 16000)
    bad = [tmp_path / "none.wav", tmp_path / "text.wav", tmp_path / "short.wav"]
    status, out, err = output(capsys, "tag", home / "one", bad[0], clips(home)[0], *bad[1:], clips(home)[1])
    assert status == 1 and [line.split(":")[0] for line in out.splitlines()] == [str(file) for file in clips(home)[:2]]
    assert err.count("\n") == 3 and all(line.startswith("speechkit: ") for line in err.splitlines())
    assert "none.wav" in err and "text.wav" in err and "one feature frame" in err


def test_only_taggers_tag(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = output(capsys, "tag", home / "recogniser", clips(home)[0])
    assert_refused(found, r"recogniser must hold a tagger, but holds a Recogniser, which has no labels; name another")
    for wrong in ("0", "1", "high"):
        status, _, err = output(capsys, "tag", "m", "f", "--threshold", wrong)
        assert status == 2 and f"must be a number above 0 and below 1, but is {wrong}" in err


# speechkit evaluate


def alone(home: Path, rows: range) -> Tagging:
    """The scores of each clip by itself."""
    tagger = speechkit.load(home / "one")
    lines = [json.loads(line) for line in (home / "all.jsonl").read_text().splitlines()]
    targets = np.array([[label == lines[row]["label"] for label in LABELS] for row in rows])
    return Tagging(LABELS, targets, np.stack([tagger.scores(clips(home)[row]).double() for row in rows]), True)


def test_evaluate_measures_what_the_tagger_says_of_each_clip_alone(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = output(capsys, "evaluate", home / "one", home / "all.jsonl", "--json", "--batch", 4)
    (row,), wanted = map(json.loads, out.splitlines()), alone(home, range(6))
    assert (status, err) == (0, "") and row["accuracy"] == pytest.approx(0.5) and row["clips"] == 6
    assert row["mean_average_precision"] == pytest.approx(wanted.mean_average_precision(), abs=1e-6)
    assert row["mean_auc"] == pytest.approx(wanted.mean_auc(), abs=1e-6)
    assert row["accuracy_interval"][0] < 0.5 < row["accuracy_interval"][1]
    assert row["absent"] == wanted.absent and row["seconds"] == pytest.approx(sum(SECONDS), abs=1e-3)
    folder = home / "one" / "evaluate"
    name = f"{home.name}-all"
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [str(n) for n in range(6)]
    assert np.array([line["scores"] for line in lines]) == pytest.approx(wanted.scores, abs=2e-6)
    assert json.loads((folder / f"{name}.json").read_text())["labels"] == list(LABELS)
    with open(folder / f"{name}-classes.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["label"] for line in table] == list(LABELS) and sum(int(line["clips"]) for line in table) == 6
    report = (folder / f"{name}-report.md").read_text()
    assert "| 50.0 |" in report and all(f"| {label} |" in report for label in LABELS)
    assert (folder / f"{name}-confusion.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_classes_mistakes_and_the_measures(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = output(capsys, "evaluate", home / "one", home / "all.jsonl", "--worst", 2)
    assert (status, err) == (0, "")
    for word in ("recall %", "Least heard of", "accuracy %", "mAUC %", "d'", *LABELS):
        assert word in out, out
    assert out.count("highest is") == 2


def test_runs_tested_on_different_folds_have_a_row_of_their_mean(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = output(capsys, "evaluate", home / "one", home / "two", "--json")
    first, second, mean = map(json.loads, out.splitlines())
    assert mean["run"] == "mean of 2" and mean["clips"] == 6 == first["clips"] + second["clips"]
    for measure in ("accuracy", "mean_average_precision"):
        assert mean[measure] == pytest.approx((first[measure] + second[measure]) / 2)
        assert mean[f"{measure}_interval"][0] <= mean[measure] <= mean[f"{measure}_interval"][1]
    assert first["accuracy"] == pytest.approx(alone(home, range(3)).accuracy())
    _, out, _ = output(capsys, "evaluate", home / "one", home / "two", home / "all.jsonl", "--json")
    assert [json.loads(line)["run"] for line in out.splitlines()] == [str(home / "one"), str(home / "two")]


def test_long_clips_are_heard_by_windows_beside_short_ones(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tagger = speechkit.load(home / "one")
    lines = [{"audio": str(home / name), "label": "dog"} for name in ("long.wav", "0.wav")]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert output(capsys, "evaluate", home / "one", tmp_path / "both.jsonl")[0] == 0
    (written,) = (home / "one" / "evaluate").glob("*both.jsonl")
    for line, name in zip(written.read_text().splitlines(), ("long.wav", "0.wav"), strict=True):
        assert json.loads(line)["scores"] == pytest.approx(tagger.scores(home / name).tolist(), abs=2e-6)


def test_clips_of_several_labels_or_none_are_measured_without_accuracy(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tagger = made(tmp_path / "model", exclusive=False)
    labels = [["dog", "rain"], [], ["rain"], ["clock", "dog"], ["clock"], ["dog"]]
    lines = [{"audio": str(file), "labels": names} for file, names in zip(clips(home), labels, strict=True)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, out, _ = output(capsys, "evaluate", tmp_path / "model", tmp_path / "some.jsonl")
    assert status == 0 and "accuracy" not in out and "3 of 4" in out
    targets = np.array([[label in names for label in LABELS] for names in labels])
    wanted = Tagging(LABELS, targets, np.stack([tagger.scores(file).double() for file in clips(home)]))
    (row,) = (json.loads(path.read_text()) for path in (tmp_path / "evaluate").glob("*.json"))
    assert row["mean_average_precision"] == pytest.approx(wanted.mean_average_precision(), abs=1e-6)
    assert row["accuracy"] is None and not list((tmp_path / "evaluate").glob("*.png"))


def test_what_cannot_be_evaluated_is_said_before_anything_is(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"audio": str(home / "0.wav"), "label": "dgo"}, {"audio": str(home / "1.wav"), "label": "rain"}]
    (tmp_path / "typo.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = output(capsys, "evaluate", home / "one", tmp_path / "typo.jsonl")
    assert_refused(
        found, r"cannot be evaluated on \S+typo: Every label must be one of the 4 .*dgo \(1\); did you mean dog"
    )
    found = output(capsys, "evaluate", home / "one", home / "all.jsonl", "--search", "greedy")
    assert_refused(found, "holds a tagger, which searches nothing")
    found = output(capsys, "evaluate", home / "one", home / "recogniser", home / "all.jsonl")
    assert_refused(found, "recogniser must hold a tagger, but holds a Recogniser")


def test_a_clip_that_cannot_be_read_is_reported_and_the_rest_is_measured(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from speechkit.app import evaluate_tags

    load = evaluate_tags.load_samples

    def faulty(cut: Any, rate: int) -> np.ndarray:
        if cut.id == "2":
            raise ValueError("2.wav must be whole, but ends early; copy it again.")
        return load(cut, rate)

    monkeypatch.setattr(evaluate_tags, "load_samples", faulty)
    status, out, err = output(capsys, "evaluate", home / "one", home / "all.jsonl", "--json")
    assert status == 1 and err == "speechkit: 2.wav must be whole, but ends early; copy it again.\n"
    assert json.loads(out)["clips"] == 5


def test_a_clip_shorter_than_a_frame_is_reported_too(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "click.wav", np.zeros(50), 16000)
    lines = [{"audio": str(tmp_path / "click.wav"), "label": "dog"}, {"audio": str(home / "0.wav"), "label": "dog"}]
    (tmp_path / "click.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, out, err = output(capsys, "evaluate", home / "one", tmp_path / "click.jsonl", "--json")
    assert status == 1 and json.loads(out)["clips"] == 1
    assert err.startswith("speechkit: ") and err.endswith(
        "must have at least 400 samples, one feature frame, but has 50; leave it out.\n"
    )
