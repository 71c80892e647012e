"""The command as a user meets it: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny import node, sound, tiny

import speechkit
from speechkit.app.cli import main
from speechkit.app.stream import _Clock, _Screen
from speechkit.config import catalogue
from speechkit.pretrained import save
from speechkit.session import Update

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a model and a test set of its own."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    save(tiny(), node(), folder / "model")
    source = {"_target_": "speechkit.data.Source", "path": str(manifest(folder / "data", 5))}
    (folder / "config.yaml").write_text(json.dumps({"name": "tiny", "data": {"test": {"own": source}}}))
    return folder


def manifest(folder: Path, count: int) -> Path:
    """Some recordings with texts, half of them in the split ``test``."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        file = folder / f"{number}.wav"
        soundfile.write(file, sound(0.6 + 0.3 * number, number).numpy(), 16000)
        lines.append({"audio": file.name, "text": "a bad cab", "split": "test" if number % 2 else "train"})
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "all.jsonl"


def output(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    try:
        status = main([str(word) for word in argv])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def assert_refused(found: tuple[int, str, str], sentence: str) -> None:
    status, out, err = found
    assert (status, out) == (1, "")
    assert re.search(sentence, err), err
    assert err.startswith("speechkit: ") and err.count("\n") == 1 and "Traceback" not in err


def test_help_names_every_verb_and_does_not_wait_for_torch() -> None:
    code = "import sys; from speechkit.app.cli import main; main(['--help'])"
    shown = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    for verb in ("prepare", "train", "evaluate", "transcribe", "stream"):
        assert re.search(rf"^    {verb}\b", shown.stdout, re.MULTILINE)
    assert " torch" not in shown.stderr


def test_the_installed_command_ends_without_a_trace(run: Path, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("speechkit"), "transcribe", run, tmp_path / "none.wav"]
    if not command[0].exists():
        pytest.skip("the command is not installed beside this Python")
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == ""
    assert (
        ended.stderr
        == f"speechkit: {tmp_path / 'none.wav'} must be an audio file, but does not exist; check the path.\n"
    )
    asked = subprocess.run([*command[:2], "nowhere", "a.wav", "--debug"], capture_output=True, text=True)
    assert "Traceback" in asked.stderr and "nowhere must be a model folder or a run" in asked.stderr


def test_a_wrong_command_exits_with_2_and_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, sentence in [
        ([], "required: VERB"),
        (["transcribe"], "required: MODEL, FILE"),
        (["transmogrify"], "invalid choice: 'transmogrify'"),
        (["stream", "m", "f", "--chunk-ms", "fast"], "must be a number of milliseconds above 0, but is fast"),
        (["stream", "m", "f", "--chunk-ms", "-40"], "must be a number of milliseconds above 0, but is -40"),
        (["transcribe", "m", "f", "--batch", "0"], "must be a whole number of at least 1, but is 0"),
        (["serve", "m", "--port", "65536"], "must be a whole number from 0 to 65535, but is 65536"),
        (["transcribe", "m", "f", "--out", "o", "--format", "doc"], "invalid choice: 'doc'"),
        (["stream", "m"], "one of the arguments FILE --mic --list-devices is required"),
        (["stream", "m", "f", "--mic"], "not allowed with argument"),
    ]:
        status, out, err = output(capsys, *argv)
        assert (status, out) == (2, "") and err.startswith("usage: speechkit") and sentence in err


def test_what_the_system_refuses_is_a_sentence_with_the_path(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    found = output(capsys, "transcribe", run, "a.wav", "--out", tmp_path / "file" / "texts")
    assert_refused(found, r"file/texts must be read or written, but cannot be \(Not a directory\); check the path")


def test_transcribe_prints_what_the_model_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((run / "data").glob("*.wav"))
    wanted = speechkit.load(run).transcribe(files)
    status, out, err = output(capsys, "transcribe", run, *files, "--batch", 2)
    assert (status, err) == (0, "")
    assert out.splitlines() == [f"{file}: {heard.text}" for file, heard in zip(files, wanted, strict=True)]
    assert output(capsys, "transcribe", run, files[0])[1] == wanted[0].text + "\n"
    first, *words = output(capsys, "transcribe", run, files[0], "--timestamps")[1].splitlines()
    assert first == wanted[0].text
    assert [line.split() for line in words] == [
        [f"{w.start:.2f}", f"{w.end:.2f}", f"{w.confidence:.2f}", w.word] for w in wanted[0].words
    ]


@pytest.mark.parametrize("options", [(), ("--stream",), ("--chunk-ms", 640)])
def test_transcribe_as_json_is_one_object_a_line(run: Path, capsys: pytest.CaptureFixture[str], options: tuple) -> None:
    files = sorted((run / "data").glob("*.wav"))
    status, out, _ = output(capsys, "transcribe", run, *files, "--json", *options)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [line["file"] for line in lines] == [str(file) for file in files]
    for number, line in enumerate(lines):
        assert list(line) == ["file", "text", "words", "seconds", "rtf"]
        assert line["text"] == " ".join(word["word"] for word in line["words"]) != ""
        assert all(list(word) == ["word", "start", "end", "confidence"] for word in line["words"])
        assert line["seconds"] == round(0.6 + 0.3 * number, 3) and 0 < line["rtf"] < 10


def test_streaming_with_another_chunk_hears_something_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((run / "data").glob("*.wav"))
    ways = ((), ("--stream",), ("--chunk-ms", 80))
    said = [output(capsys, "transcribe", run, *files, *options)[1] for options in ways]
    assert len(set(said)) == 3


def test_bad_files_are_reported_and_the_rest_is_transcribed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, whole = run / "data" / "0.wav", (run / "data" / "1.wav").read_bytes()
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("not audio at all")
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    broken = np.zeros(1000, np.float32)
    broken[10] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, 16000, subtype="FLOAT")
    bad = [tmp_path / name for name in ("empty.wav", "text.wav", "cut.wav", "nan.wav", "gone.wav")]
    status, out, err = output(capsys, "transcribe", run, bad[0], good, *bad[1:], tmp_path, good)
    text = speechkit.load(run).transcribe(good).text
    assert status == 1 and out == f"{good}: {text}\n" * 2
    assert len(err.splitlines()) == 6 and "Traceback" not in err
    for file, line in zip([*bad, tmp_path], err.splitlines(), strict=True):
        assert line.startswith(f"speechkit: {file} must ")


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (96000, 1), (48000, 6)])
def test_any_rate_and_number_of_channels_is_streamed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: int, channels: int
) -> None:
    soundfile.write(tmp_path / "a.flac", np.stack([sound(1.0, sample_rate=rate).numpy()] * channels, 1), rate)
    streamed = output(capsys, "stream", run, tmp_path / "a.flac")[1].splitlines()[-2]
    assert streamed == output(capsys, "transcribe", run, tmp_path / "a.flac", "--stream")[1].strip() != ""


def test_stream_shows_the_text_as_it_comes_and_then_all_of_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = output(capsys, "stream", run, run / "data" / "4.wav", "--chunk-ms", 320)
    *partial, final, report = out.splitlines()
    assert (status, err) == (0, "")
    heard = [float(line.split()[0]) for line in partial]  # a line where a chunk has changed the text
    assert len(heard) > 2 and heard == sorted(set(heard)) and set(heard) <= {0.32, 0.64, 0.96, 1.28, 1.6, 1.8}
    texts = [line.split(" s  ")[1] for line in partial]
    assert texts[-1] == final and all(final.startswith(text) for text in texts)  # greedy never takes back
    assert re.fullmatch(
        r"1.80 s of audio; latency: a chunk of 320 ms and \d+ ms to hear it \(median; 95 %: \d+ ms\); "
        r"real-time factor \d.\d{3}",
        report,
    )


def test_realtime_is_no_faster_than_speech(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("speechkit.app.stream.time.sleep", slept.append)
    assert output(capsys, "stream", run, run / "data" / "0.wav", "--realtime")[0] == 0
    assert len(slept) == 6 and slept[0] <= 0.1 and slept[-1] > slept[0]


def test_a_terminal_shows_the_stable_text_bright_and_the_rest_dim() -> None:
    from rich.console import Console

    console = Console(force_terminal=True, record=True, file=open(os.devnull, "w"), color_system="standard")  # noqa: SIM115
    words = ("one two", "one", ())
    clock = _Clock(heard=0.4, level_db=-30.0, latencies=[0.041])
    with _Screen(console) as show:
        show(Update(0, 0, *words, final=False, ended=False, seconds=0.32), clock)
        console.print(show.live.renderable)
        show(Update(0, 0, "one too", "one too", (), final=True, ended=True, seconds=0.64), clock)
    drawn = console.export_text(styles=True)
    assert "0.40 s  █████       -30 dB  41 ms" in drawn
    assert "\x1b[1mone\x1b[0m\x1b[2m two\x1b[0m" in drawn
    assert "0.64 s" in drawn and "one too" in drawn


def test_a_chunk_that_is_no_multiple_of_a_frame_is_refused_with_what_is_possible(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("stream", "transcribe", "evaluate"):
        file = run / "data" / ("all.jsonl" if verb == "evaluate" else "0.wav")
        found = output(capsys, verb, run, file, "--chunk-ms", 330)
        assert_refused(found, "must be a multiple of 40 ms, but is 330 ms; the nearest is 320 ms")


def test_wrong_models_and_searches_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "data" / "0.wav"
    for verb in ("stream", "transcribe"):
        assert_refused(
            output(capsys, verb, "runs/nothing", file), "runs/nothing must be a model folder or a run, but does"
        )
        assert_refused(output(capsys, verb, run, file, "--search", "gready"), "but is gready; did you mean greedy")
    assert_refused(output(capsys, "stream", run, "none.wav"), "none.wav must be an audio file, but does not exist")


def rows(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_evaluate_measures_the_test_sets_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = output(capsys, "evaluate", run, "--json")
    (row,) = rows(out)
    assert status == 0
    assert {key: row[key] for key in ("run", "set", "search", "heard", "utterances", "words", "seconds")} == {
        "run": str(run), "set": "own", "search": "greedy", "heard": "whole",
        "utterances": 5, "words": 15, "seconds": 6.0,
    }  # fmt: skip
    assert row["wer_interval"][0] <= row["wer"] <= row["wer_interval"][1]
    assert row == json.loads((run / "evaluate" / "own-greedy-whole.json").read_text())
    lines = rows((run / "evaluate" / "own-greedy-whole.jsonl").read_text())
    heard = speechkit.load(run).transcribe(sorted((run / "data").glob("*.wav")))
    assert [line["text"] for line in lines] == [transcript.text for transcript in heard]
    assert [line["id"] for line in lines] == ["0", "1", "2", "3", "4"]
    assert sum(line["errors"] for line in lines) == pytest.approx(15 * row["wer"])
    assert lines[4]["words"][0]["word"] == heard[4].words[0].word and lines[4]["reference"] == "a bad cab"


def test_evaluate_leaves_out_a_set_that_was_not_prepared(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.yaml").read_text())
    absent = {**config["data"]["test"]["own"], "path": str(tmp_path / "absent.jsonl")}
    config["data"]["test"]["absent"] = absent
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config))
    status, out, err = output(capsys, "evaluate", tmp_path / "run", "--json")
    assert status == 0 and [row["set"] for row in rows(out)] == ["own"]
    assert re.search(r"absent.jsonl is not there, so .*run is not evaluated on absent", err)
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"name": "tiny", "data": {"test": {"absent": absent}}}))
    assert_refused(output(capsys, "evaluate", tmp_path / "run"), "absent.jsonl must be a manifest, but there is no")


def test_evaluate_crosses_runs_sets_searches_and_chunks(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tiny(), node(), tmp_path / "other")
    options = ["--split", "test", "--search", "greedy", "rescored", "--chunk-ms", 320, 640]
    status, out, _ = output(capsys, "evaluate", run, tmp_path / "other", run / "data" / "all.jsonl", *options, "--json")
    found = rows(out)
    assert status == 0 and len(found) == 2 * 2 * 3
    assert {row["set"] for row in found} == {"data/all:test"} and {row["utterances"] for row in found} == {2}
    assert [(row["search"], row["heard"]) for row in found[:6]] == [
        (search, heard) for search in ("greedy", "rescored") for heard in ("whole", "320 ms", "640 ms")
    ]
    assert [row["wer"] for row in found[:6]] == [row["wer"] for row in found[6:]]
    assert len([*(tmp_path / "other" / "evaluate").glob("*.jsonl")]) == 6


def test_evaluate_prints_a_table_and_the_worst_utterances(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = output(capsys, "evaluate", run, "--stream", "--worst", 2)[1]
    for column in ("run", "set", "search", "heard", "WER %", "CER %", "95 %", "utterances", "words", "RTF"):
        assert column in out
    assert out.count("REF: ") == out.count("HYP: ") == 2 and "│ whole" in out and "│ 320 ms" in out


def test_evaluate_compares_texts_as_they_are_scored(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = speechkit.load(run).transcribe(run / "data" / "0.wav").text
    line = {"audio": str(run / "data" / "0.wav"), "text": said.upper().replace(" ", ",  ") + "!"}
    (tmp_path / "loud.jsonl").write_text(json.dumps(line))
    (row,) = rows(output(capsys, "evaluate", run, tmp_path / "loud.jsonl", "--json")[1])
    assert row["wer"] == row["cer"] == 0.0


def test_evaluate_leaves_out_what_it_cannot_read_and_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = manifest(tmp_path / "set", 3)
    flac = sound(2.0).numpy()
    soundfile.write(tmp_path / "set" / "cut.flac", flac, 16000)
    whole = (tmp_path / "set" / "cut.flac").read_bytes()
    (tmp_path / "set" / "cut.flac").write_bytes(whole[: len(whole) // 2])
    with open(corpus, "a") as file:
        file.write(json.dumps({"audio": "cut.flac", "text": "a"}) + "\n")
    status, out, err = output(capsys, "evaluate", run, corpus, "--json")
    assert status == 1 and rows(out)[0]["utterances"] == 3
    assert re.match(r"speechkit: .*cut.flac must hold the 2.00 s", err)


def test_evaluate_refuses_what_it_cannot_use_before_it_begins(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, head = run / "data" / "all.jsonl", {"_target_": "speechkit.objectives.CTC", "_partial_": True}
    save(tiny(objective=head), node(objective=head), tmp_path / "ctc")
    for argv, sentence in [
        ([tmp_path / "nothing"], "nothing must be a model folder or a run, but does not exist"),
        ([corpus], "A run must be among .*all.jsonl, but none of them holds a model"),
        ([run, tmp_path / "none.jsonl"], "none.jsonl must be a manifest, but there is no such file"),
        ([run, corpus, "--split", "tset"], "tset"),
        ([tmp_path / "ctc"], "must name test sets in .*config.yaml, but has none; name a manifest"),
        (
            [tmp_path / "ctc", corpus, "--search", "greedy", "rescored"],
            "Rescored needs an objective with a head 'attention'",
        ),
    ]:
        assert_refused(output(capsys, "evaluate", *argv), sentence)
    assert not (tmp_path / "ctc" / "evaluate").exists()


def test_prepare_runs_a_recipe_with_the_options_it_declares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "recipes" / "cows").mkdir(parents=True)
    (tmp_path / "recipes" / "cows" / "prepare.py").write_text(
        '"""Cows in a field."""\n'
        "def arguments(parser):\n    parser.add_argument('--herd', type=int, default=3, help='cows')\n"
        "def prepare(corpus, out, *, herd):\n"
        "    if herd > 9:\n        raise RuntimeError('The field holds 9 cows.')\n"
        "    print(corpus, out, herd)\n"
    )
    monkeypatch.setattr("speechkit.app.prepare.catalogue", lambda: tmp_path / "conf")
    assert output(capsys, "prepare", "cows") == (0, "None data/cows 3\n", "")
    assert output(capsys, "prepare", "cows", "--herd", 5, "--corpus", "c", "--out", "o") == (0, "c o 5\n", "")
    shown = output(capsys, "prepare", "cows", "--help")
    assert shown[0] == 0 and "Cows in a field." in shown[1] and "cows (default: 3)" in shown[1]
    assert_refused(output(capsys, "prepare", "cows", "--herd", 10), r"The field holds 9 cows\.")
    assert_refused(output(capsys, "prepare", "cow"), "A recipe must be one of cows, but is cow; did you mean cows")
    status, _, err = output(capsys, "prepare", "cows", "--flock", 1)
    assert status == 2 and "usage: speechkit prepare cows" in err


def test_train_hands_over_its_config_and_overrides(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from speechkit.app import train

    seen = []
    monkeypatch.setattr(train, "train", lambda config, overrides: seen.append((config, overrides)))
    assert output(capsys, "train", "a.yaml", "x.y=1", "+z=2") == (0, "", "")
    assert seen == [("a.yaml", ["x.y=1", "+z=2"])]


def test_train_refuses_a_misspelt_key_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    config = catalogue().parent / "recipes" / "digits" / "conf" / "demo.yaml"
    assert_refused(output(capsys, "train", config, "model.encoder.detph=3"), "detph")


def test_a_pipe_that_closes_early_is_no_error(run: Path) -> None:
    files = " ".join(str(file) for file in (run / "data").glob("*.wav"))
    code = (
        f"import sys; from speechkit.app.cli import main; sys.exit(main('transcribe {run} {files} --batch 1'.split()))"
    )
    ended = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | true', sys.executable, code], capture_output=True, text=True, cwd=ROOT
    )
    assert ended.stderr == ""
