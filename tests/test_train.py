"""`speechkit train` from end to end: what a run leaves, and that an interrupted one continues as if it had not been."""

from __future__ import annotations

import csv
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import recipe
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from speechkit import checkpoints, tasks
from speechkit.app.train import leave_cores, train, warm_start
from speechkit.pretrained import load
from speechkit.pretrained.state import average, read_state, write_state

Rows = list[dict[str, str]]
COMMAND = [str(Path(sys.executable).with_name("speechkit")), "train"]


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe.write(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def finished(tones: Path) -> Path:
    """A run of twelve steps, dev after 6 and 12."""
    return run(tones, "finished")


def run(config: Path, name: str, *overrides: str) -> Path:
    train(config, [f"name={name}", *overrides])
    return home(config, name)


def home(config: Path, name: str) -> Path:
    return config.parents[3] / "runs" / name


def rows(folder: Path, log: str = "train.csv") -> Rows:
    """A log without the column that depends on the clock."""
    if not (folder / log).exists():
        return []
    with open(folder / log, newline="") as file:
        return [{k: v for k, v in row.items() if k != "frames_per_second"} for row in csv.DictReader(file)]


def refusal(call: Callable, *arguments: Any) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Crash(BaseException):
    """The process is gone: nothing may be tidied up."""


@contextmanager
def crashing(where: str, number: int) -> Iterator[None]:
    """Crash in a training or dev step once ``number`` batches are done."""
    with pytest.MonkeyPatch.context() as patch:
        keep = getattr(tasks.Transcribe, where)

        def step(self: tasks.Transcribe, batch: Any, index: int) -> Any:
            if self.position.number == number and self.trainer.state.fn == "fit":
                raise Crash
            return keep(self, batch, index)

        patch.setattr(tasks.Transcribe, where, step)
        yield


def same(one: Path, other: Path) -> bool:
    """Whether two runs logged the same and ended with the same weights."""
    logs = all(rows(one, log) == rows(other, log) for log in ("train.csv", "dev.csv"))
    kept = [[path.name for path in checkpoints.best(folder)] for folder in (one, other)]
    states = [read_state(checkpoints.latest(folder) or "none")["state_dict"] for folder in (one, other)]
    return logs and kept[0] == kept[1] and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_run_leaves_a_model_logs_and_pictures(finished: Path) -> None:
    heard = load(finished).transcribe(finished.parents[1] / "dev0.wav")
    assert set(heard.text) <= set("abcd ")
    assert [row["step"] for row in rows(finished)] == [str(step) for step in range(1, 13)]
    assert {"loss", "lr", "grad_norm", "batch"} <= rows(finished)[0].keys()
    assert float(rows(finished)[0]["lr"]) == pytest.approx(1e-3 / 6)  # the first of five steps of warm-up
    assert [row["step"] for row in rows(finished, "dev.csv")] == ["6", "12"]
    assert {"loss", "wer", "wer_stream"} <= rows(finished, "dev.csv")[0].keys()
    for name in ("heard.png", "curve.png", "config.yaml"):
        assert (finished / name).stat().st_size > 500


def test_tensorboard_has_curves_transcripts_and_pictures(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    assert [event.step for event in events.Images("dev/heard")] == [6, 12]
    assert any("dev/heard" in tag for tag in events.Tags()["tensors"])


def test_finished_run_has_the_better_of_the_best_and_the_mean(finished: Path) -> None:
    kept = checkpoints.best(finished)
    assert checkpoints.averaged(finished, 2) == kept and checkpoints.averaged(finished, None) == kept[:1]
    candidates = [average(kept[:1]), average(kept)]
    ours = {f"model.{name}": weight for name, weight in load(finished).state_dict().items()}
    assert any(all(torch.equal(ours[k], one[k]) for k in ours) for one in candidates)


def test_finished_run_is_not_trained_again(tones: Path, finished: Path) -> None:
    before = rows(finished)
    state = checkpoints.latest(finished)
    assert state is not None
    written = state.stat().st_mtime_ns
    run(tones, "finished")
    assert rows(finished) == before and state.stat().st_mtime_ns == written


def test_nothing_in_a_run_is_a_pickle(finished: Path) -> None:
    kinds = {path.suffix for path in finished.rglob("*") if path.is_file() and "tfevents" not in path.name}
    assert kinds <= {".safetensors", ".json", ".yaml", ".csv", ".png"}


# Steps of 3 batches, 8 or so batches an epoch, a state every 2 steps, dev every 7 batches: inside an epoch, at its
# borders, inside an accumulation, and in an evaluation.
@pytest.mark.parametrize(
    ("where", "number"),
    [("training_step", 2), ("training_step", 7), ("training_step", 14), ("validation_step", 14), ("training_step", 18)],
)
def test_crashed_run_continues_exactly(tones: Path, accumulated: Path, where: str, number: int) -> None:
    name = f"{where}{number}"
    with pytest.raises(Crash), crashing(where, number):
        run(tones, name, *ACCUMULATED)
    assert same(run(tones, name, *ACCUMULATED), accumulated)


ACCUMULATED = (
    "trainer.accumulate_grad_batches=3",
    "trainer.val_check_interval=7",
    "trainer.max_steps=9",
    "checkpoint.every=2",
    "data.max_seconds=3",
)


@pytest.fixture(scope="module")
def accumulated(tones: Path) -> Path:
    return run(tones, "accumulated", *ACCUMULATED)


def launch(config: Path, name: str, *overrides: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [*COMMAND, str(config), f"name={name}", *overrides],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen, folder: Path, steps: int) -> None:
    """Until the log has so many rows."""
    deadline = time.monotonic() + 120
    while len(rows(folder)) < steps and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def kill_after(process: subprocess.Popen, folder: Path, steps: int) -> None:
    wait_for(process, folder, steps)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"


def test_killed_run_continues_exactly(tones: Path) -> None:
    long = ("trainer.max_steps=400", "trainer.val_check_interval=200", "checkpoint.every=5", "data.workers=1")
    kill_after(launch(tones, "killed", *long), home(tones, "killed"), 23)
    states = [read_state(path)["position"] for path in (home(tones, "killed") / "states").glob("*.safetensors")]
    assert states and all(position[3] < 400 for position in states)
    short = [long[0].replace("400", "40"), *long[1:]]
    folder = run(tones, "killed", *short, "optim.schedule.steps=400")
    assert same(folder, run(tones, "unharmed", *short, "optim.schedule.steps=400"))


@pytest.mark.slow
def test_run_killed_again_and_again_continues_exactly(tones: Path) -> None:
    settings = (ACCUMULATED[0], "trainer.val_check_interval=40", "trainer.max_steps=60", "checkpoint.every=2")
    for steps in (0, 1, 5, 6, 29, 47):
        process = launch(tones, "again", *settings)
        kill_after(process, home(tones, "again"), steps)
    assert same(run(tones, "again", *settings), run(tones, "once", *settings))


def test_longer_run_continues_a_finished_one_exactly(tones: Path) -> None:
    steady = ("optim=constant", "trainer.val_check_interval=6")
    run(tones, "extended", *steady, "trainer.max_steps=7")
    assert same(
        run(tones, "extended", *steady, "trainer.max_steps=13"), run(tones, "long", *steady, "trainer.max_steps=13")
    )


def test_other_config_in_the_same_folder_is_refused(tones: Path, finished: Path) -> None:
    sentence = refusal(train, tones, ["name=finished", "model.encoder.dim=24", "seed=3"])
    assert "model.encoder.dim: 16 -> 24" in sentence and "seed: 0 -> 3" in sentence and "another name=" in sentence
    assert load(finished)


def test_config_of_a_run_that_never_began_can_be_corrected(tones: Path) -> None:
    refusal(train, tones, ["name=corrected", "data.train.tones.min_seconds=100"])
    assert load(run(tones, "corrected", "trainer.max_steps=6"))


def test_run_that_was_moved_continues_with_other_workers_and_logs(tones: Path) -> None:
    before = run(tones, "before", "trainer.max_steps=6", "optim=constant")
    shutil.move(before, home(tones, "after"))
    after = run(tones, "after", "trainer.max_steps=8", "optim=constant", "data.workers=1", "checkpoint.every=1")
    assert len(rows(after)) == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_trainer_for_an_absent_gpu_is_one_sentence(tones: Path) -> None:
    assert "trainer=cpu" in refusal(train, tones, ["name=gpu", "trainer=gpu"])


def test_missing_data_says_how_to_prepare_it(tones: Path, tmp_path: Path) -> None:
    config = tmp_path / "recipes" / "digits" / "conf" / "demo.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(tones.read_text().replace("train.jsonl", "absent.jsonl"))
    (config.parents[1] / "prepare.py").touch()
    sentence = refusal(train, config)
    assert "absent.jsonl is not there" in sentence and sentence.endswith("run: speechkit prepare digits")


def test_full_disk_is_one_sentence_and_leaves_the_earlier_state(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    write_state(path, {"state_dict": {"weight": torch.ones(3)}})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        sentence = refusal(write_state, path, {"state_dict": {"weight": torch.ones(30_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in sentence and "make room" in sentence
    assert read_state(path)["state_dict"]["weight"].sum() == 3 and list(tmp_path.iterdir()) == [path]


def test_state_reads_back_as_it_was(tmp_path: Path) -> None:
    tied = torch.arange(4.0)
    state = {
        "a": {0: (tied, tied[1:3]), "b": [None, True, 1, 2.5, "x"]},
        "c": float("inf"),
        "$d": {},
        "e": torch.tensor(3),
    }
    write_state(tmp_path / "state", state)
    back = read_state(tmp_path / "state")
    assert torch.equal(back["a"][0][1], tied[1:3]) and isinstance(back["a"][0], tuple)
    assert back["a"]["b"] == state["a"]["b"] and back["c"] == float("inf") and back["$d"] == {} and back["e"] == 3


def test_damaged_state_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    write_state(path, {"weight": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-50])
    assert str(path) in refusal(read_state, path) and "delete it" in refusal(read_state, path)
    path.write_bytes(b"\x80\x04}q\x00.")
    assert "must be a training state" in refusal(read_state, path)


def test_what_cannot_be_written_without_a_pickle_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"/callbacks/thing is a set"):
        write_state(tmp_path / "state", {"callbacks": {"thing": {1, 2}}})


def test_average_is_the_mean_of_the_weights(tmp_path: Path) -> None:
    for number, value in enumerate((1.0, 2.0, 6.0)):
        write_state(tmp_path / str(number), {"state_dict": {"w": torch.full((2,), value), "n": torch.tensor(number)}})
    mean = average([tmp_path / str(number) for number in range(3)])
    assert torch.equal(mean["w"], torch.full((2,), 3.0)) and mean["n"] == 0


@pytest.mark.parametrize(
    ("evaluations", "asked", "count"),
    [(1, None, 1), (3, None, 1), (6, None, 3), (8, None, 4), (10, None, 5), (40, None, 5), (5, 5, 5), (4, 2, 2)],
)
def test_models_from_the_first_half_of_a_short_run_are_not_averaged(
    tmp_path: Path, evaluations: int, asked: int | None, count: int
) -> None:
    (tmp_path / "best").mkdir()
    steps = [100 * (1 + number) for number in range(evaluations)]
    for step in steps:  # a model that gets better and better
        (tmp_path / "best" / f"error-{900 / step:06.2f}-step-{step:08d}.safetensors").touch()
    (tmp_path / "dev.csv").write_text("\n".join(["step,batch,wer", *(f"{step},{step},0" for step in steps)]) + "\n")
    chosen = [checkpoints.step_of(path) for path in checkpoints.averaged(tmp_path, asked)]
    assert chosen == steps[::-1][:count]


def test_a_run_that_was_never_evaluated_has_nothing_to_average(tmp_path: Path) -> None:
    assert checkpoints.averaged(tmp_path, None) == checkpoints.averaged(tmp_path, 5) == []


@pytest.mark.parametrize(("workers", "threads"), [(0, 4), (1, 3), (6, 1)])
def test_workers_have_their_cores(workers: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    try:
        torch.set_num_threads(4)
        leave_cores(workers)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def went_on_from(start: Any, end: Any, steps: int) -> set[str]:
    """The weights that training at a learning rate of 0 did not take over; running statistics count their steps on."""
    theirs, ours = start.state_dict(), end.state_dict()
    counts = [name for name in theirs if name.endswith("num_batches_tracked")]
    assert counts and all(ours[name] == theirs[name] + steps for name in counts)
    return {name for name, _ in start.named_parameters() if not torch.equal(ours[name], theirs[name])}


def test_start_from_another_model_takes_all_of_its_weights(tones: Path, finished: Path) -> None:
    folder = run(tones, "warm", f"init={finished}", "optim.optimizer.lr=0", "trainer.max_steps=6")
    assert went_on_from(load(finished), load(folder), 6) == set()


def test_part_with_other_symbols_starts_anew_by_name(tones: Path, finished: Path) -> None:
    changed = ["name=more", f"init={finished}", "model.text.symbols='abcdef '", "trainer.max_steps=6"]
    sentence = refusal(train, tones, changed)
    assert "objective.head.weight" in sentence and "'fresh=[objective.head]'" in sentence
    shutil.rmtree(home(tones, "more"))
    train(tones, [*changed, "fresh=[objective.head]", "optim.optimizer.lr=0"])
    anew = went_on_from(load(finished), load(home(tones, "more")), 6)
    assert anew == {"objective.head.weight", "objective.head.bias"}


def test_a_start_from_another_kind_of_encoder_is_refused(tones: Path, finished: Path) -> None:
    other = [f"init={finished}", "encoder=squeezeformer_tiny", "model.encoder.layers=3"]
    sentence = refusal(train, tones, ["name=kinds", *other])
    assert "encoder of the config, Squeezeformer, but" in sentence and "has Conformer; take its own with" in sentence


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tuning=bitfit", "model.tuning must have a model to change, but init is null; add init=MODEL"),
        ("optim.optimizer.lr=-1", "optim.optimizer must be given what it takes, but: Invalid learning rate: -1"),
    ],
)
def test_what_only_shows_when_it_is_built_is_refused_in_a_sentence(tones: Path, override: str, words: str) -> None:
    assert words in refusal(train, tones, ["name=wrong", override])


def test_weights_that_only_the_other_model_has_are_named(finished: Path) -> None:
    model, other = load(finished), load(finished)
    other.surplus = torch.nn.Linear(2, 2)
    assert "surplus" in refusal(warm_start, model, other, "other", [])
    warm_start(model, other, "other", ["surplus"])


def test_loss_that_is_not_finite_stops_with_the_utterances(tones: Path) -> None:
    wild = ["name=wild", "optim.optimizer.lr=1e30", "trainer.gradient_clip_val=null", "optim=constant"]
    sentence = refusal(train, tones, wild)
    assert "must be finite" in sentence and "train" in sentence and "lower optim.optimizer.lr" in sentence


def test_run_without_dev_keeps_its_last_weights(tones: Path) -> None:
    folder = run(tones, "nodev", "~data.dev.tones", "trainer.max_steps=6")
    last = read_state(checkpoints.latest(folder) or "none")["state_dict"]
    assert all(torch.equal(last[f"model.{k}"], v) for k, v in load(folder).state_dict().items())


def test_time_ends_a_run_and_more_time_continues_it(tones: Path) -> None:
    folder = run(tones, "timed", "optim=constant", "trainer.max_time=00:00:00:01", "trainer.max_steps=100000")
    steps = len(rows(folder))
    assert 0 < steps < 100_000 and load(folder)
    run(tones, "timed", "optim=constant", "trainer.max_time=00:00:10:00", f"trainer.max_steps={steps + 2}")
    assert [int(row["step"]) for row in rows(folder)] == list(range(1, steps + 3))


def test_half_precision_trains(tones: Path) -> None:
    folder = run(tones, "half", "trainer.precision=bf16-mixed", "trainer.max_steps=6")
    assert all(float(row["loss"]) < 20 for row in rows(folder))


@pytest.mark.slow
def test_interrupted_run_says_that_it_can_be_continued(tones: Path) -> None:
    process = launch(tones, "interrupted", "trainer.max_steps=100000", "trainer.val_check_interval=100000")
    wait_for(process, home(tones, "interrupted"), 3)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode and "the same command continues" in said and "Traceback" not in said


@pytest.mark.slow
def test_two_processes_train_as_one_run(tones: Path) -> None:
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
    process = launch(
        tones, "two", *two, "trainer.max_steps=12", "trainer.val_check_interval=6", "trainer.log_every_n_steps=1"
    )
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    folder = home(tones, "two")
    assert [row["step"] for row in rows(folder)] == [str(step) for step in range(1, 13)]
    assert len(rows(folder, "dev.csv")) == 2 and load(folder)
