"""``speechkit transcribe`` of long recordings: in constant memory, to files, through stops at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from overfit import Overfit
from test_cli import assert_refused, output
from test_vad import LOUD, assert_said, joined_speech, need_silero, with_rests
from tiny import node, sound, tiny

import speechkit
from speechkit.app import formats, progress, transcribe
from speechkit.app.cli import main
from speechkit.cut import clips
from speechkit.pretrained import save
from speechkit.types import Transcript, Word

SECONDS = 150.3
OUT = ("--out", "out", "--format", "text", "json", "srt", "vtt", "--batch", 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a long recording and a short one."""
    folder = tmp_path_factory.mktemp("long")
    save(tiny(), node(), folder / "model")
    soundfile.write(folder / "long.wav", sound(SECONDS).numpy(), 16000)
    soundfile.write(folder / "short.wav", sound(2.0, 1).numpy(), 16000)
    return folder


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recordings, to work in."""
    for name in ("long.wav", "short.wav", "model"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_long_file_is_printed_as_the_model_transcribes_its_samples(here: Path, capsys: pytest.CaptureFixture) -> None:
    samples, _ = soundfile.read("long.wav", dtype="float32")
    wanted = speechkit.load("model").transcribe([torch.from_numpy(samples), "short.wav"])
    status, out, err = output(capsys, "transcribe", "model", "long.wav", "short.wav", "--json")
    assert (status, err) == (0, "")
    for line, heard in zip(map(json.loads, out.splitlines()), wanted, strict=True):
        assert line["text"] == heard.text and line["seconds"] == heard.seconds and line["rtf"] > 0
        assert [(w["word"], w["start"], w["end"]) for w in line["words"]] == [
            (w.word, round(w.start, 3), round(w.end, 3)) for w in heard.words
        ]
    assert max(word["end"] for word in json.loads(out.splitlines()[0])["words"]) > 140


def test_a_long_file_is_never_whole_in_memory(here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held, most = [], []

    def watched(blocks: object, rate: int, **options: object) -> object:
        for clip in clips(blocks, rate, **options):
            held.append(len(clip.samples))
            most.append(sum(held[-2:]))
            yield clip

    monkeypatch.setattr(transcribe, "clips", watched)
    monkeypatch.setattr("speechkit.features.read", None)
    monkeypatch.setattr("speechkit.audio.read", None)
    assert output(capsys, "transcribe", "model", "long.wav", "--batch", 2)[0] == 0
    assert sum(held) == round(SECONDS * 16000) and max(most) <= 2 * 20 * 16000


def test_files_are_written_to_a_folder_and_skipped_when_they_are_there(here: Path, capsys: Any) -> None:
    status, out, err = output(capsys, "transcribe", "model", "long.wav", "short.wav", *OUT)
    assert (status, err) == (0, "")
    assert out == "".join(
        f"{name}.wav: out/{name}.txt, out/{name}.json, out/{name}.srt, out/{name}.vtt\n" for name in ("long", "short")
    )
    made = files(here / "out")
    assert sorted(made) == sorted(f"{n}.{end}" for n in ("long", "short") for end in ("txt", "json", "srt", "vtt"))
    told = json.loads(made["long.json"])
    assert list(told) == ["file", "text", "words", "seconds"]
    assert made["long.txt"].decode() == told["text"] + "\n"
    assert told["text"] == json.loads(output(capsys, "transcribe", "model", "long.wav", "--json")[1])["text"]
    (here / "out" / "short.srt").unlink()
    status, out, err = output(capsys, "transcribe", "model", "long.wav", "short.wav", *OUT)
    assert status == 0 and out.startswith("short.wav: ") and out.count("\n") == 1
    assert err.startswith("speechkit: long.wav is done, out/long.txt, ") and err.endswith(
        "; remove it to hear it again.\n"
    )
    assert files(here / "out") == made


def test_a_stopped_run_continues_from_any_byte_and_writes_the_same(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert output(capsys, "transcribe", "model", "long.wav", *OUT)[0] == 0
    wanted = files(here / "out")
    part, groups, unlink = here / "out" / "long.part.jsonl", [], Path.unlink
    whole = transcribe._Ears.whole
    monkeypatch.setattr(transcribe._Ears, "whole", lambda ears, clips_: groups.append(1) or whole(ears, clips_))
    monkeypatch.setattr(
        Path, "unlink", lambda path, **options: None if path == part.relative_to(here) else unlink(path)
    )
    for file in (here / "out").iterdir():
        unlink(file)
    assert output(capsys, "transcribe", "model", "long.wav", *OUT)[0] == 0
    monkeypatch.setattr(Path, "unlink", unlink)
    record = part.read_bytes()
    ends = [at + 1 for at, byte in enumerate(record) if byte == 10]
    heard = len(ends) - 1
    assert heard >= 4 and len(groups) == heard + 1  # and one of no short files
    torn = [0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[1] - 1, ends[1], ends[2] + 100, ends[-1] - 1, ends[-1]]
    for stop in torn:
        for name in wanted:
            (here / "out" / name).unlink(missing_ok=True)
        garbage = b"\0" * 100 if stop == ends[1] else b""  # a disk that grew a file and did not fill it
        part.write_bytes(record[:stop] + garbage)
        groups.clear()
        assert output(capsys, "transcribe", "model", "long.wav", *OUT)[0] == 0
        assert files(here / "out") == wanted
        known = max(0, sum(end <= stop for end in ends) - 1)
        assert len(groups) == heard - known + 1


def test_what_was_heard_of_another_recording_or_with_another_search_is_forgotten(here: Path, capsys: Any) -> None:
    assert output(capsys, "transcribe", "model", "long.wav", *OUT)[0] == 0
    wanted = files(here / "out")
    for change in ({"bytes": 1}, {"weights": 1}, {"search": "rescored"}, {"batch": 3}, {"version": "0"}):
        for file in (here / "out").iterdir():
            file.unlink()
        made = {"version": speechkit.__version__, **transcribe._made("long.wav", speechkit.load("model"))}
        made |= {"search": None, "vad": False, "batch": 2} | change
        lie = {"group": 1, "heard": [{"text": "not said", "words": [], "seconds": 1.0}]}
        (here / "out" / "long.part.jsonl").write_text(json.dumps({"made": made}) + "\n" + json.dumps(lie) + "\n")
        assert output(capsys, "transcribe", "model", "long.wav", *OUT)[0] == 0
        assert files(here / "out") == wanted


def test_a_killed_run_continues_and_writes_the_same(here: Path, capsys: Any) -> None:
    options = ["model", "long.wav", "--out", "out", "--format", "json", "--batch", "1"]
    assert output(capsys, "transcribe", *options)[0] == 0
    wanted = files(here / "out")
    (here / "out" / "long.json").unlink()
    code = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from speechkit.app import outputs; from speechkit.app.cli import main\n"
        "add = outputs.Part.add\n"
        "outputs.Part.add = lambda part, heard: (add(part, heard), time.sleep(0.2 if len(part.groups) > 2 else 0))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, "transcribe", *options], env=os.environ | {"PYTHONPATH": paths()}
    )
    part, deadline = here / "out" / "long.part.jsonl", time.monotonic() + 60
    while not (part.exists() and part.read_bytes().count(b"\n") >= 4):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and list(files(here / "out")) == ["long.part.jsonl"]
    assert output(capsys, "transcribe", *options)[0] == 0
    assert files(here / "out") == wanted


def paths() -> str:
    return os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)


def test_a_file_that_is_damaged_far_inside_is_reported_and_the_rest_goes_on(here: Path, capsys: Any) -> None:
    soundfile.write("hurt.flac", sound(SECONDS).numpy(), 16000)
    whole = Path("hurt.flac").read_bytes()
    Path("hurt.flac").write_bytes(whole[: len(whole) * 9 // 10])
    status, out, err = output(capsys, "transcribe", "model", "hurt.flac", "short.wav", *OUT)
    assert status == 1 and out.startswith("short.wav: ") and out.count("\n") == 1
    assert err.startswith("speechkit: hurt.flac must hold the 150.30 s") and err.count("\n") == 1
    assert not (here / "out" / "hurt.txt").exists()


def test_behind_voice_activity_only_speech_is_heard(here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcribe, "Vad", lambda: LOUD)
    rests = with_rests(2)
    soundfile.write("rests.wav", rests.numpy(), 16000, subtype="FLOAT")
    model = speechkit.load("model")
    found = [(c.start / 16000, model.transcribe(c.samples)) for c in clips([rests], 16000, vad=LOUD)]
    line = json.loads(output(capsys, "transcribe", "model", "rests.wav", "--vad", "--json")[1])
    assert len(found) >= 2 and line["text"] == " ".join(heard.text for _, heard in found)
    assert [w["start"] for w in line["words"]] == [round(at + w.start, 3) for at, heard in found for w in heard.words]
    streamed = output(capsys, "transcribe", "model", "rests.wav", "--vad", "--stream")[1]
    assert streamed.strip() and streamed != output(capsys, "transcribe", "model", "rests.wav", "--stream")[1]


@pytest.mark.parametrize("vad", [False, True])
def test_real_words_of_a_long_file_are_neither_lost_nor_doubled_and_have_their_times(
    overfit: Overfit, tmp_path: Path, capsys: Any, vad: bool
) -> None:
    if vad:
        need_silero()
    clip, words = joined_speech(overfit, 200.0)
    soundfile.write(tmp_path / "long.wav", clip.numpy(), 16000)
    options = ["--json", *["--vad"] * vad]
    line = json.loads(output(capsys, "transcribe", overfit.folder, tmp_path / "long.wav", *options)[1])
    found = tuple(Word(w["word"], w["start"], w["end"], w["confidence"]) for w in line["words"])
    assert_said(Transcript(line["text"], found, line["seconds"]), words)


def test_wrong_options_of_files_are_refused(here: Path, capsys: Any) -> None:
    (here / "other").mkdir()
    for options, sentence in [
        (
            ["long.wav", "other/long.flac", "--out", "out"],
            "long.wav and other/long.flac would both be out/long.txt; give",
        ),
        (["long.wav", "--format", "srt"], "but there is none; add --out FOLDER"),
        (["long.wav", "--out", "out", "--json"], "but --out writes files; add --format json"),
    ]:
        assert_refused(output(capsys, "transcribe", "model", *options), sentence)
    assert main(["transcribe", "model", "gone.wav", "--out", "out"]) == 1
    assert "gone.wav must be an audio file, but does not exist" in capsys.readouterr().err


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    lines = output(capsys, "transcribe", "model", "long.wav", "--batch", 4)[2].splitlines()
    assert len(lines) >= 2 and lines[-1] == "speechkit: long.wav: heard 0:02:30 of 0:02:30"


def test_progress_is_a_bar_on_a_terminal(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.Progress("talks/[one].wav", 7200.0) as bar:
        bar(3600.0)
        assert bar.bar
        bar.bar.refresh()
    assert "[one].wav" in (drawn := capsys.readouterr().err) and "1:00:00 of 2:00:00" in drawn and "50%" in drawn


WORDS = [(1.0, 1.5), (1.6, 2.0), (2.9, 3.2), (3.3, 4.0), (4.1, 5.0), (5.1, 6.5), (6.6, 9.5), (9.6, 3661.5)]


def test_subtitles_break_at_pauses_and_before_they_are_too_long() -> None:
    words = tuple(Word(f"<w{i}>", start, end, 1.0) for i, (start, end) in enumerate(WORDS))
    transcript = Transcript(" ".join(word.word for word in words), words, 3662.0)
    assert list(formats.cues(transcript)) == [
        (1.0, 2.0, "<w0> <w1>"),
        (2.9, 9.5, "<w2> <w3> <w4> <w5> <w6>"),
        (9.6, 3661.5, "<w7>"),
    ]
    assert formats.srt(transcript).split("\n\n")[2] == "3\n00:00:09,600 --> 01:01:01,500\n<w7>\n"
    assert formats.vtt(transcript).startswith("WEBVTT\n\n00:00:01.000 --> 00:00:02.000\n&lt;w0&gt; &lt;w1&gt;\n\n00:")
    long = Transcript("", tuple(Word("word" * 5, 0.1 * i, 0.1 * i + 0.1, 1.0) for i in range(9)), 1.0)
    assert [len(text) for _, _, text in formats.cues(long)] == [83, 83, 20]
    assert formats.srt(Transcript("", (), 1.0)) == ""


def test_subtitles_without_times_are_refused() -> None:
    with pytest.raises(ValueError, match="need the times of the words, but this search gives none; take another"):
        formats.srt(Transcript("said", (), 1.0))
