"""``speechkit evaluate`` of clips with events, against sed_eval, and by a tagger that hears just what is there."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import hearing
import numpy as np
import pytest
from hearing import LABELS
from lhotse import CutSet
from test_cli import assert_refused, output

import speechkit
from speechkit import pictures
from speechkit.app.tag_events import Finder, Timed
from speechkit.data.corpora import events_of, labels_of, read_corpus
from speechkit.encoders import AST
from speechkit.metrics import event_hits
from speechkit.types import Event

SCENES = {
    "short": (3.0, [Event("low", 0.6, 1.4), Event("high", 1.1, 2.4)]),
    "long": (9.0, [Event("high", 0.6, 2.9), Event("low", 3.2, 3.8), Event("low", 5.1, 5.7), Event("high", 6.6, 8.4)]),
    "quiet": (2.0, []),
}


def listed(events: Any, shift: float = 0.0) -> list[dict[str, Any]]:
    return [{"label": e.label, "start": round(e.start + shift, 3), "end": round(e.end + shift, 3)} for e in events]


def manifest(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("events")
    hearing.made(folder / "one" / "model")
    for number, (name, (seconds, events)) in enumerate(SCENES.items()):
        hearing.sounds(folder / f"{name}.wav", events, seconds, number)
    manifest(folder / "true.jsonl", [{"audio": f"{name}.wav", "events": listed(e)} for name, (_, e) in SCENES.items()])
    return folder


def row(capsys: pytest.CaptureFixture[str], *command: Any) -> dict[str, Any]:
    status, out, err = output(capsys, "evaluate", *command, "--json")
    assert (status, err) == (0, "")
    return json.loads(out.splitlines()[-1])


def theirs(kind: str, path: Path, found: dict[str, list[Event]]) -> Any:
    sed_eval = pytest.importorskip("sed_eval").sound_event
    measured = (
        sed_eval.SegmentBasedMetrics([*LABELS], time_resolution=1.0)
        if kind == "segment"
        else sed_eval.EventBasedMetrics([*LABELS], t_collar=0.2, percentage_of_length=0.2)
    )
    for cut in read_corpus(path, transcribed=False):
        sides = [
            [{"event_label": e.label, "onset": e.start, "offset": e.end} for e in side]
            for side in (events_of(cut) or (), found[cut.id])
        ]
        measured.evaluate(reference_event_list=sides[0], estimated_event_list=sides[1])
    micro, macro = measured.results_overall_metrics(), measured.results_class_wise_average_metrics()
    return micro["f_measure"]["f_measure"], macro["f_measure"]["f_measure"]


def written(home: Path, name: str) -> dict[str, list[Event]]:
    """What the evaluation wrote that it found."""
    (path,) = (home / "one" / "evaluate").glob(f"*-{name}.jsonl")
    lines = map(json.loads, path.read_text().splitlines())
    return {line["id"]: [Event(**event) for event in line["events"]] for line in lines}


# speechkit evaluate


def test_events_that_are_found_where_they_are_have_an_f1_of_one(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = row(capsys, home / "one", home / "true.jsonl")["events"]
    assert found["recordings"] == 3 and (found["threshold"], found["median"]) == (0.5, 0.3)
    for measure in ("segment_micro", "segment_macro", "event_micro", "event_macro"):
        assert found[measure] == 1.0 and found[f"{measure}_interval"] == [1.0, 1.0]
    heard = written(home, "true")
    assert heard["quiet"] == [] and [e.label for e in heard["long"]] == ["high", "low", "low", "high"]


def test_events_half_a_second_late_count_by_segment_and_not_by_event(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"audio": str(home / f"{name}.wav"), "events": listed(e, 0.5)} for name, (_, e) in SCENES.items()]
    late = manifest(tmp_path / "late.jsonl", lines)
    found = row(capsys, home / "one", late)["events"]
    # Seconds in which each event is heard, and those in which the manifest says it is, half a second later.
    heard = [{0, 1}, {1, 2}, {0, 1, 2}, {3}, {5}, {6, 7, 8}]
    said = [{1}, {1, 2}, {1, 2, 3}, {3, 4}, {5, 6}, {7, 8}]
    common = sum(len(a & b) for a, b in zip(heard, said, strict=True))
    wanted = 2 * common / (sum(map(len, heard)) + sum(map(len, said)))
    assert found["event_micro"] == found["event_macro"] == 0
    assert found["segment_micro"] == pytest.approx(wanted) == 0.75
    for kind in ("segment", "event"):
        micro, macro = theirs(kind, late, written(home, "late"))
        assert (found[f"{kind}_micro"], found[f"{kind}_macro"]) == pytest.approx((micro, macro))


def test_measures_of_events_are_those_of_sed_eval_in_every_file_that_is_written(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"short": [Event("low", 0.7, 1.5), Event("low", 2.0, 2.4)], "long": SCENES["long"][1][1:], "quiet": []}
    other["quiet"] = [Event("high", 0.2, 0.4)]
    lines = [{"audio": str(home / f"{name}.wav"), "events": listed(e)} for name, e in other.items()]
    some = manifest(tmp_path / "some.jsonl", lines)
    status, out, _ = output(capsys, "evaluate", home / "one", some, "--worst", 2)
    (path,) = (home / "one" / "evaluate").glob("*-some.json")
    found = json.loads(path.read_text())["events"]
    assert status == 0 and all(words in out for words in ("segment F1 %", "event F1 %", "3 of 3"))
    for kind in ("segment", "event"):
        micro, macro = theirs(kind, some, written(home, "some"))
        assert 0.2 < micro < 0.95
        assert (found[f"{kind}_micro"], found[f"{kind}_macro"]) == pytest.approx((micro, macro))
        low, high = found[f"{kind}_micro_interval"]
        assert low <= micro <= high and low < high
    with open(path.with_name(path.stem + "-classes.csv"), newline="") as file:
        classes = {line["label"]: line for line in csv.DictReader(file)}
    assert [int(classes[label]["events"]) for label in LABELS] == [4, 2]
    each = [float(classes[label]["event_f1"]) for label in LABELS]
    assert np.mean(each) == pytest.approx(found["event_macro"])
    report = path.with_name(path.stem + "-report.md").read_text()
    assert f"| {100 * found['event_micro']:.1f} |" in report and f"| {100 * each[0]:.1f} |" in report
    assert path.with_name(path.stem + "-events.png").read_bytes().startswith(b"\x89PNG")


def test_scores_of_clips_and_events_are_those_of_the_tagger_and_each_piece_is_heard_once(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tagger, heard = speechkit.load(home / "one"), []
    forward = type(tagger.encoder).forward
    monkeypatch.setattr(type(tagger.encoder), "forward", lambda *args: heard.append(1) or forward(*args))
    row(capsys, home / "one", home / "true.jsonl")
    assert len(heard) == 2 + 5 + 1  # pieces of 2 s, of 3, 9 and 2 s
    (path,) = (home / "one" / "evaluate").glob("*-true.jsonl")
    for line in map(json.loads, path.read_text().splitlines()):
        file = home / f"{line['id']}.wav"
        assert line["scores"] == pytest.approx(tagger.scores(file).tolist(), abs=2e-6)
        for said, event in zip(line["events"], tagger.events(file), strict=True):
            assert said["label"] == event.label and said["start"] == pytest.approx(event.start, abs=1e-3)
            assert said["end"] == pytest.approx(event.end, abs=1e-3)


def test_short_clips_with_events_are_heard_together_whether_their_events_are_known_or_not(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []
    for number, events in enumerate([[Event("low", 0.2, 0.8)], [], [Event("high", 0.5, 1.3), Event("low", 1.0, 1.4)]]):
        hearing.sounds(tmp_path / f"{number}.wav", events, 1.5 + 0.2 * number, number)
        lines += [{"audio": f"{number}.wav", "events": listed(events)}]
        lines += [{"audio": f"{number}.wav", "id": f"again{number}", "labels": sorted({e.label for e in events})}]
    clips, heard, forward = manifest(tmp_path / "clips.jsonl", lines), [], AST.forward
    monkeypatch.setattr(AST, "forward", lambda self, x, *rest: heard.append(len(x)) or forward(self, x, *rest))
    found = row(capsys, home / "one", clips, "--batch", "4")
    assert heard == [4, 2] and found["mean_average_precision"] == 1 and found["events"]["event_micro"] == 1
    assert found["clips"] == 6 and found["events"]["recordings"] == 3


def test_a_set_is_measured_on_the_clips_that_have_events(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"audio": str(home / "short.wav"), "events": listed(SCENES["short"][1])},
        {"audio": str(home / "long.wav"), "labels": ["low", "high"]},
        {"audio": str(home / "quiet.wav"), "labels": []},
    ]
    part = manifest(tmp_path / "part.jsonl", lines)
    found = row(capsys, home / "one", part)
    assert found["clips"] == 3 and found["events"]["recordings"] == 1 and found["events"]["event_micro"] == 1
    assert "1 of 3" in output(capsys, "evaluate", home / "one", part)[1]
    assert row(capsys, home / "one", manifest(tmp_path / "none.jsonl", lines[1:]))["events"] is None


def test_threshold_and_median_say_how_events_are_found(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hearing.sounds(tmp_path / "click.wav", [Event("low", 0.5, 0.6), Event("low", 1.0, 1.6)], 2.0)
    lines = [{"audio": "click.wav", "events": listed([Event("low", 0.5, 0.6), Event("low", 1.0, 1.6)])}]
    clicks = manifest(tmp_path / "clicks.jsonl", lines)
    assert row(capsys, home / "one", clicks)["events"]["event_micro"] == pytest.approx(2 / 3)
    found = row(capsys, home / "one", clicks, "--median", 0.06, "--threshold", 0.4)["events"]
    assert found["event_micro"] == 1 and (found["threshold"], found["median"]) == (0.4, 0.06)
    status, out, _ = output(capsys, "tag", home / "one", tmp_path / "click.wav", "--events", "--median", 0.06)
    assert status == 0 and len(out.splitlines()) == 2


def test_classes_that_exclude_each_other_at_any_moment_are_measured_in_scenes_of_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["low", "high", "neither"]
    hearing.made(tmp_path / "two" / "model", exclusive=True, labels=labels)
    events = [Event("low", 0.5, 1.5), Event("high", 2.0, 3.0)]
    hearing.sounds(tmp_path / "scene.wav", events, 3.5)
    events += [Event("neither", *times) for times in ((0.0, 0.5), (1.5, 2.0), (3.0, 3.5))]
    scene = manifest(tmp_path / "scene.jsonl", [{"audio": "scene.wav", "events": listed(events)}])
    found = row(capsys, tmp_path / "two", scene)
    assert found["accuracy"] is None and found["events"]["event_micro"] == 1
    one = manifest(tmp_path / "single.jsonl", [{"audio": "scene.wav", "events": listed(events[:1])}])
    assert row(capsys, tmp_path / "two", one)["accuracy"] is not None
    lines = [{"audio": "scene.wav", "labels": ["low", "high"]}]
    found = output(capsys, "evaluate", tmp_path / "two", manifest(tmp_path / "both.jsonl", lines))
    assert_refused(found, "must have one label where classes exclude each other, but scene has low, high")


def test_runs_tested_on_different_recordings_have_the_mean_of_their_f1(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = []
    for fold, lines in enumerate(([SCENES["short"][1]], [[SCENES["long"][1][0]]])):
        name = ("short", "long")[fold]
        path = manifest(tmp_path / f"{fold}.jsonl", [{"audio": str(home / f"{name}.wav"), "events": listed(lines[0])}])
        hearing.made(tmp_path / str(fold) / "model")
        source = {"_target_": "speechkit.data.Source", "path": str(path)}
        (tmp_path / str(fold) / "config.yaml").write_text(json.dumps({"name": "x", "data": {"test": {"own": source}}}))
        runs.append(tmp_path / str(fold))
    _, out, _ = output(capsys, "evaluate", *runs, "--json")
    first, second, mean = map(json.loads, out.splitlines())
    assert first["events"]["event_micro"] == 1 and second["events"]["event_micro"] == pytest.approx(2 / 5)
    assert mean["events"]["event_micro"] == pytest.approx(0.7) and mean["events"]["recordings"] == 2


def test_ways_to_find_events_are_refused_where_there_are_none(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = manifest(tmp_path / "plain.jsonl", [{"audio": str(home / "short.wav"), "label": "low"}])
    found = output(capsys, "evaluate", home / "one", plain, "--median", 1)
    assert_refused(found, "--threshold and --median must be given for clips with events, but no clip has any")
    assert_refused(
        output(capsys, "tag", home / "one", home / "short.wav", "--median", 1), "--median must be given with --events"
    )
    for wrong in ("-1", "nan", "x"):
        status, _, err = output(capsys, "evaluate", "m", f"--median={wrong}")
        assert status == 2 and f"must be a number of seconds, 0 or more, but is {wrong}" in err
    typo = [{"audio": str(home / "short.wav"), "events": [{"label": "hgih", "start": 0, "end": 1}]}]
    found = output(capsys, "evaluate", home / "one", manifest(tmp_path / "typo.jsonl", typo))
    assert_refused(
        found, r"cannot be evaluated on \S+typo: Every label must be one of the 2 .*hgih \(1\); did you mean"
    )


# The worst recordings


def timed(home: Path, found: dict[str, list[Event]], path: Path) -> Timed:
    cuts = tuple(read_corpus(path, transcribed=False))
    return Timed(LABELS, cuts, tuple(tuple(found[cut.id]) for cut in cuts), Finder(0.5, 0.3))


def test_recordings_of_lowest_f1_are_the_worst_and_of_equal_ones_those_with_more_faults(home: Path) -> None:
    true = {name: events for name, (_, events) in SCENES.items()}
    one = Event("low", 0.1, 0.4)
    assert timed(home, true | {"quiet": [one]}, home / "true.jsonl").worst(2) == [2, 0]
    assert timed(home, {"short": [], "long": [], "quiet": [one]}, home / "true.jsonl").worst(3) == [1, 0, 2]


def test_a_long_recording_is_shown_where_most_of_it_was_mistaken(tmp_path: Path) -> None:
    from speechkit.app.tag_events import _worst_start

    there = [Event("low", start, start + 1.0) for start in (2.0, 10.0, 71.0, 74.0, 88.0, 118.0)]
    hearing.sounds(tmp_path / "a.wav", there, 120.0)
    manifest(tmp_path / "a.jsonl", [{"audio": "a.wav", "events": listed(there)}])
    found = [there[0], there[1], there[5], Event("high", 80.0, 81.0)]
    assert _worst_start(timed(tmp_path, {"a": found}, tmp_path / "a.jsonl"), 0) == 60.0


def test_the_picture_has_a_bar_for_each_event_of_either_side() -> None:
    there, found = [Event("low", 0.0, 1.0), Event("high", 2.0, 3.0)], [Event("low", 0.1, 1.2), Event("rain", 2, 2.5)]
    scene = pictures.Scene("a", np.random.default_rng(0).random((300, 20)), (0.0, 3.0), there, found)
    later = pictures.Scene("b", scene.features, (5.0, 8.0), there, [Event("low", 7.0, 7.5)])
    figure = pictures.scenes([scene, later], "both")
    above, below, _, last = figure.axes
    assert above.get_xlim() == below.get_xlim() == (0.0, 3.0) and last.get_xlim() == (5.0, 8.0)
    assert [text.get_text() for text in below.get_yticklabels()] == ["low", "high", "rain"]
    assert [text.get_text() for text in last.get_yticklabels()] == ["low"]
    spans = sorted(
        (round(path.get_extents().x0, 3), round(path.get_extents().x1, 3))
        for bars in below.collections
        for path in bars.get_paths()
    )
    assert spans == [(0.0, 1.0), (0.1, 1.2), (2.0, 2.5), (2.0, 3.0)]


# Manifests


def test_labels_of_a_clip_are_those_of_its_events_and_times_count_from_where_it_begins(
    home: Path, tmp_path: Path
) -> None:
    events = [Event("low", 0.2, 0.8), Event("low", 2.1, 2.7)]
    line = {"audio": str(home / "long.wav"), "start": 3.0, "duration": 3.5, "events": listed(events)}
    (cut,) = read_corpus(manifest(tmp_path / "part.jsonl", [line]), transcribed=False)
    assert events_of(cut) == tuple(events) and labels_of(cut) == ("low",)
    for suffix in ("jsonl", "jsonl.gz"):
        CutSet([cut]).to_file(tmp_path / f"cuts.{suffix}")
        (again,) = read_corpus(tmp_path / f"cuts.{suffix}", transcribed=False)
        assert events_of(again) == tuple(events) and again.start == 3.0
    (silent,) = read_corpus(manifest(tmp_path / "a.jsonl", [line | {"events": []}]), transcribed=False)
    (unknown,) = read_corpus(manifest(tmp_path / "b.jsonl", [line | {"events": None}]), transcribed=False)
    assert (events_of(silent), events_of(unknown)) == ((), None)


def test_events_of_a_section_of_a_file_are_found_where_its_manifest_says(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [Event("low", 0.2, 0.8), Event("low", 2.1, 2.7)]
    line = {"audio": str(home / "long.wav"), "start": 3.0, "duration": 3.5, "events": listed(events)}
    assert row(capsys, home / "one", manifest(tmp_path / "part.jsonl", [line]))["events"]["event_micro"] == 1


def one(label: Any = "low", start: Any = 0.0, end: Any = 1.0) -> dict[str, Any]:
    return {"events": [{"label": label, "start": start, "end": end}]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"events": {"low": [0, 1]}}, r"the events of \S+short must be a list, but are the dict"),
        ({"events": [["low", 0, 1]]}, r"an event of \S+short must be \{'label': NAME, 'start': SECOND.*but is \['low'"),
        ({"events": [{"label": "low", "onset": 0, "end": 1}]}, "must be {'label': NAME.*but is .*'onset'"),
        (one(label=3), "must be {'label': NAME"),
        (one(end="1"), "must be {'label': NAME"),
        (one(end=True), "must be {'label': NAME"),
        (
            one(start=2.0),
            "must begin before it ends and lie within the clip, 0 to 3.000 s, but low lasts from 2.0 to 1.0",
        ),
        (one(start=1.0), "must begin before it ends"),
        (one(start=-0.1), "but low lasts from -0.1 to 1.0 s; correct it, counting from the beginning of the clip"),
        (one(end=3.2), "but low lasts from 0.0 to 3.2 s"),
        (one(end=float("nan")), "but low lasts from 0.0 to nan s"),
        (one() | {"label": "high"}, "must be those of its events, but are high where its events are of low; correct"),
        (one() | {"labels": []}, "but are none where its events are of low"),
        ({"events": [], "label": "low"}, "but are low where its events are of nothing"),
    ],
)
def test_a_fault_in_events_is_one_sentence_with_its_line(
    home: Path, tmp_path: Path, line: dict[str, Any], words: str
) -> None:
    lines = [{"audio": str(home / "quiet.wav"), "events": []}, {"audio": str(home / "short.wav"), **line}]
    with pytest.raises(ValueError, match=f"faulty.jsonl, line 2: .*{words}"):
        read_corpus(manifest(tmp_path / "faulty.jsonl", lines), transcribed=False)


def test_an_event_may_end_a_rounding_after_its_clip_and_labels_may_say_the_same_again(
    home: Path, tmp_path: Path
) -> None:
    lines = [{"audio": str(home / "short.wav"), **one(end=3.04), "label": "low"}]
    (cut,) = read_corpus(manifest(tmp_path / "late.jsonl", lines), transcribed=False)
    assert events_of(cut) == (Event("low", 0.0, 3.0),)


# Intervals


def test_drawing_recordings_anew_sums_the_counts_of_those_drawn() -> None:
    dice = np.random.default_rng(3)
    there = [[Event("low", t, t + 0.5) for t in dice.uniform(0, 9, 4)] for _ in range(12)]
    found = [[e._replace(start=e.start + dice.choice([0.0, 1.0])) for e in one_] for one_ in there]
    found = [[e for e in one_ if e.end > e.start] for one_ in found]
    both = event_hits(there, found, LABELS)
    draws = list(both.drawn(samples=300, seed=1))
    assert all(draw.there.sum() == 48 for draw in draws)
    assert np.mean([draw.micro for draw in draws]) == pytest.approx(both.micro, abs=0.02)
    # The deviation of a mean of n recordings is that of one over the root of n.
    one_by_one = [event_hits([t], [f], LABELS).hits.sum() for t, f in zip(there, found, strict=True)]
    sums = np.std([draw.hits.sum() for draw in draws])
    assert sums == pytest.approx(np.sqrt(12) * np.std(one_by_one), rel=0.15)


# docs/tagging.md


def test_the_manifest_and_the_commands_of_the_documentation_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[1] / "docs" / "tagging.md").read_text()
    section = text.split("## Clips that say when")[1].split("\n## ")[0]
    line, commands = (block.removeprefix("json").strip() for block in section.split("```")[1::2])
    record, tones = json.loads(line), dict(zip(("dog", "siren"), LABELS, strict=True))
    assert {event["label"] for event in record["events"]} == tones.keys()
    monkeypatch.chdir(tmp_path)
    hearing.sounds(Path(record["audio"]), [Event(**e | {"label": tones[e["label"]]}) for e in record["events"]], 3.0)
    hearing.made(Path("runs/a/model"), labels=list(tones))
    Path("street.jsonl").write_text(line + "\n")
    assert commands.count("\n") == 2
    for command in commands.splitlines():
        verb, *words = shlex.split(command, comments=True)
        status, out, err = output(capsys, *words)
        assert (verb, status, err) == ("speechkit", 0, "") and out.count("100.0 - 100.0") in (0, 5), out
    assert out.splitlines() == ["    0.60 - 1.42 s  1.00 dog", "    1.10 - 2.42 s  1.00 siren"]
    (found,) = (json.loads(path.read_text())["events"] for path in Path("runs/a/evaluate").glob("*street.json"))
    assert found["event_micro"] == 1 and (found["threshold"], found["median"]) == (0.4, 0.1)
