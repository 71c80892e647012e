"""What a run keeps: the state to continue from, the best models, and a log that a restart cuts back to the state.

::

    runs/demo/states/step-00001500.safetensors        all of the training, to continue from
    runs/demo/best/error-004.32-step-00001000.safetensors   weights, named by their error rate on dev in percent
    runs/demo/train.csv, dev.csv                      a row a step, a row an evaluation
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from speechkit.files import replacing

KEPT = 5


class Checkpoints(Callback):
    """Saves the state every so many steps and at the end, and the models that are best on dev.

    A state is saved at the beginning of the next batch: by then an evaluation that was due has been made, so none is
    lost or made twice whenever the run is killed.

    Args:
        folder: of the run.
        every: optimizer steps between states.
        best: models kept by their error rate on dev, see `speechkit.tasks.Task.error_rate`; five unless given.
    """

    def __init__(self, *, folder: str | Path, every: int = 500, best: int | None = None) -> None:
        kept = KEPT if best is None else best
        for name, value in (("every", every), ("best", kept)):
            if value < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, but is {value}.")
        self.folder, self.every, self.best = Path(folder), every, kept
        self._saved = 0

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self._saved = module.position.step
        self._forget(module.position)

    @rank_zero_only
    def _forget(self, position: Any) -> None:
        """Drop what a killed process did after the state that is continued from: it is about to happen again."""
        later = (path for path in self.folder.glob("*/*step-*.safetensors") if step_of(path) > position.step)
        for path in (*later, *self.folder.glob("*/.*step-*.part")):
            path.unlink()
        for path in self.folder.glob("*.csv"):
            cut(path, position.number)

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        if module.position.step % self.every == 0:
            self._save(trainer, module)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        self._save(trainer, module)

    def _save(self, trainer: Trainer, module: Any) -> None:
        step = module.position.step
        if step > self._saved and module.between_steps:
            path = self.folder / "states" / f"step-{step:08d}.safetensors"
            trainer.save_checkpoint(path)
            self._keep(path.parent, [path])
            self._saved = step

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        rate = module.error_rate()
        if trainer.state.fn == "fit" and rate is not None:
            name = f"error-{min(999.99, 100 * rate):06.2f}-step-{module.position.step:08d}.safetensors"
            trainer.save_checkpoint(self.folder / "best" / name, weights_only=True)
            self._keep(self.folder / "best", best(self.folder)[: self.best])

    @rank_zero_only
    def _keep(self, folder: Path, kept: list[Path]) -> None:
        for path in set(folder.glob("*.safetensors")) - set(kept):
            path.unlink()


def step_of(path: Path) -> int:
    """The optimizer step a file was saved at."""
    return int(path.stem.rpartition("-")[2])


def latest(folder: Path) -> Path | None:
    """The state a run can continue from."""
    return max(Path(folder, "states").glob("step-*.safetensors"), key=step_of, default=None)


def best(folder: Path) -> list[Path]:
    """The models kept, the one with the lowest error rate first, of equal ones the one trained longer."""
    return sorted(Path(folder, "best").glob("error-*.safetensors"), key=lambda p: (p.stem[:12], -step_of(p)))


def averaged(folder: Path, count: int | None) -> list[Path]:
    """The models of which the mean is tried: the best ``count``.

    Unless that is given they are five, but at most half of all that were evaluated: of a short run the other half is
    from before it had learned, and makes the mean worse than the best one. (Averages want models from the end of a long
    way: 1803.05407 begins after three quarters of the steps, ESPnet and WeNet take the best of many epochs.)
    """
    kept = best(folder)
    evaluations = len((folder / "dev.csv").read_text().splitlines()) - 1 if kept else 0
    return kept[: max(1, min(KEPT, evaluations // 2)) if count is None else count]


def cut(path: Path, number: int) -> None:
    """Keep the rows of a log up to batch ``number``, its second column; a torn last row goes too."""
    head, *rows = path.read_text().splitlines(keepends=True)
    kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[1]) <= number]
    with replacing(path) as draft:
        draft.write_text("".join([head, *kept]))


class CSVLog(Logger):
    """``train/loss`` goes to the column ``loss`` of ``train.csv``, and so on, at once."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The config has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for kind in dict.fromkeys(name.partition("/")[0] for name in metrics):
            values = {
                name.partition("/")[2]: f"{value:.9g}" for name, value in metrics.items() if name.startswith(kind)
            }
            self._append(self.folder / f"{kind}.csv", {"step": step, **values})

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, row, lineterminator="\n")
        if not path.exists():
            writer.writeheader()
        writer.writerow(row)
        with open(path, "a") as file:
            file.write(text.getvalue())
