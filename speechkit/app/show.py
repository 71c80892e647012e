"""What a training shows while it runs: a line on the terminal, transcripts and pictures in TensorBoard."""

from __future__ import annotations

import time
from functools import singledispatch
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from speechkit import pictures
from speechkit.stream import Context
from speechkit.tasks import Tag, Task, Transcribe
from speechkit.types import Batch, Seconds, TagBatch

RATES = ("wer", "accuracy", "mAP")  # shown in percent
QUIET: Seconds = 60.0  # between lines where there is no terminal to draw a bar on


class Bar(Callback):
    """One bar for the whole run, and a line for each evaluation; where there is no terminal, a line now and then."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.console, self.said = console, 0.0
        self.bar = Progress(*columns, console=console, transient=True, refresh_per_second=4)
        self.row = self.bar.add_task("starting", total=1.0)

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.said = time.monotonic()
        if self.console.is_terminal:
            self.bar.start()

    @rank_zero_only
    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if self.console.is_terminal:
            self.bar.update(self.row, completed=done(trainer, module), description=_state(module))
        elif time.monotonic() - self.said > QUIET:
            self.console.print(f"{_state(module)}  {done(trainer, module):4.0%}")
            self.said = time.monotonic()

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.state.fn == "fit":
            self.console.print(f"step {module.position.step:>6,}  {values(module.latest)}")

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        if self.bar.live.is_started:
            self.bar.stop()

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, module)
        if isinstance(exception, KeyboardInterrupt):
            self.console.print(f"Stopped after step {module.position.step:,}; the same command continues.")


def done(trainer: Trainer, module: Task) -> float:
    """The share of the run that is behind it, by whichever limit is nearest."""
    shares = [module.position.step / trainer.max_steps if trainer.max_steps > 0 else 0.0]
    if trainer.max_epochs and trainer.max_epochs > 0:
        shares.append(module.position.epoch / trainer.max_epochs)
    for timer in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(timer, Timer) and (left := timer.time_remaining()) is not None:
            shares.append(timer.time_elapsed() / (timer.time_elapsed() + max(left, 0.0) + 1e-9))
    return min(1.0, max(shares))


def _state(module: Task) -> str:
    loss = module.latest.get("train/loss")
    return f"step {module.position.step:>6,}" + ("" if loss is None else f"  loss {loss:.3f}")


def values(latest: dict[str, float]) -> str:
    """For example ``dev loss 0.412  wer 4.32 %``."""
    named = {name.removeprefix("dev/").replace("_", " "): value for name, value in latest.items()}
    return "dev " + "  ".join(f"{n} {v:.2%}" if n.startswith(RATES) else f"{n} {v:.3f}" for n, v in named.items())


class Samples(Callback):
    """Four utterances of dev with what was heard in them, a picture of one, and the curves so far.

    The pictures go to TensorBoard, and the newest ones into the run folder, as ``curve.png`` and what `shown` names.
    """

    def __init__(self, folder: Any, console: Console) -> None:
        self.folder, self.console = folder, console

    @rank_zero_only
    def on_validation_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self.batch, self.outputs = batch, outputs

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.state.fn != "fit":
            return
        texts, figures = shown(module, self.batch, self.outputs)
        figures["curve"] = pictures.curve(self.folder)
        for said, read in list(zip(self.batch.texts, texts, strict=True))[-1:]:
            self.console.print(f"             [dim]{escape(said)}[/]  heard as  [bold]{escape(read)}[/]")
        for name, figure in figures.items():
            figure.savefig(self.folder / f"{name}.png", dpi=110)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                step, board = module.position.step, logger.experiment
                pairs = list(zip(self.batch.ids, self.batch.texts, texts, strict=True))[-4:]
                rows = "".join(f"|{name}|{said}|{read}|\n" for name, said, read in pairs)
                board.add_text("dev/heard", f"|utterance|said|heard|\n|---|---|---|\n{rows}", step)
                for name in figures.keys() - {"curve"}:
                    board.add_figure(f"dev/{name}", figures[name], step)


@singledispatch
def shown(task: Any, batch: Any, outputs: Any) -> tuple[list[str], dict[str, pictures.Figure]]:
    """What was heard in each utterance of a batch, and pictures by their names.

    Args:
        outputs: of ``task.validation_step``.
    """
    raise NotImplementedError(type(task).__name__)


@shown.register
def _(task: Transcribe, batch: Batch, outputs: list[str]) -> tuple[list[str], dict[str, pictures.Figure]]:
    return outputs, {"heard": heard(task, batch, outputs[-1])} if task.model.objective.ctc is not None else {}


@shown.register
def _(task: Tag, batch: TagBatch, outputs: Tensor) -> tuple[list[str], dict[str, pictures.Figure]]:
    best = outputs.topk(min(3, outputs.shape[1]))
    rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [", ".join(f"{task.model.labels[i]} {s:.2f}" for s, i in zip(*row, strict=True)) for row in rows], {}


def heard(module: Transcribe, batch: Batch, read: str) -> pictures.Figure:
    """The picture of the last utterance of a batch, by the CTC head."""
    model, one = module.model, slice(-1, None)
    ctc: Any = model.objective.ctc
    samples, lengths = batch.samples[one, : int(batch.sample_lengths[-1])], batch.sample_lengths[one]
    frames, heard_lengths = model.features(samples, lengths)
    encoded = model.encoder(frames, heard_lengths, context=Context())
    posteriors = ctc.log_probs(encoded.frames)[0, : int(encoded.lengths[0])].exp()
    symbols = ["", *(model.tokenizer.decode([token]) for token in range(1, model.tokenizer.size))]
    seconds = samples.shape[1] / model.sample_rate
    shown = getattr(model.features, "mel", model.features)(samples, lengths).frames  # louder is brighter
    title = f"{batch.ids[-1]}: {batch.texts[-1]!r} heard as {read!r}"
    return pictures.heard(shown[0].float().cpu().numpy(), posteriors.cpu().numpy(), symbols, seconds, title)


def summary(rows: dict[str, str]) -> Table:
    """What is about to be trained, at a glance."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[dim]{name}[/]", value)
    return table
