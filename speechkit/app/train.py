"""``speechkit train CONFIG [key=value ...]``: compose, build, fit, keep the best; the same command continues."""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, open_dict
from rich.console import Console
from torch import Tensor, nn

from speechkit import checkpoints, pretrained
from speechkit import config as configs
from speechkit.app import show
from speechkit.autoencoder import MaskedAutoencoder
from speechkit.pretrained.state import StateIO, average
from speechkit.recogniser import Recogniser
from speechkit.tagger import Tagger

Model = Recogniser | Tagger | MaskedAutoencoder
NORM_BATCHES = 50  # of training data that the normalisation is measured on

# What changes nothing about the steps that were made, and may differ when a run is continued.
MAY_DIFFER = ("name:", "run:", "data.workers:", "checkpoint.", "trainer.max_", "trainer.log_every_n_steps:")


def train(config: str | Path, overrides: Sequence[str] = ()) -> None:
    """Train what a config describes, or continue where an earlier call with the same config was interrupted.

    The run folder holds the model from the first evaluation on: the best so far, and at the end the best of all.

    Args:
        config: for example ``recipes/digits/conf/demo.yaml``.
        overrides: ``key=value``, as for `speechkit.config.compose`.

    Raises:
        ValueError: for a wrong config, missing data, a run folder with another config, or a loss that is not finite.
    """
    settings = configs.compose(config, overrides)
    if settings.model.get("tuning") is not None and settings.init is None:
        raise ValueError(
            "model.tuning must have a model to change, but init is null; add init=MODEL to the command, or tuning=none."
        )
    _require_data(settings, Path(config))
    fit(settings)


def fit(settings: DictConfig) -> None:
    """`train` for a config that is composed already."""
    _quiet()
    run, console = Path(settings.run), Console(quiet=not _first(), highlight=False)
    state = prepare(settings, run)
    complete(settings)
    model, data = build(settings)
    if state is None:
        start(model, data, settings)
    configs.tune(model, settings.model.get("tuning"))
    _introduce(console, settings, model, data, state)
    task = task_of(model, settings)
    trainer = _trainer(settings, run, console, checkpoints.step_of(state) if state else 0)
    leave_cores(settings.data.workers)
    trainer.fit(task, data, ckpt_path=state)
    _finish(trainer, task, data, checkpoints.averaged(run, settings.checkpoint.get("best")), console)
    save(model, settings)
    console.print(f"The model is in [bold]{run}[/].")


def prepare(settings: DictConfig, run: Path) -> Path | None:
    """Make the run folder, or see that it holds the same training; the state to continue from, if there is one.

    Raises:
        ValueError: naming what differs.
    """
    written = run / "config.yaml"
    begun = checkpoints.latest(run) or (run / "model").exists()  # a run that failed before may be corrected
    if begun and written.exists():
        changed = configs.differences(configs.plain(configs.load(written)), configs.plain(settings))
        changed = [change for change in changed if not change.startswith(MAY_DIFFER)]
        if changed:
            raise ValueError(
                f"{run} must hold a training with the same config to be continued, but differs in "
                f"{'; '.join(changed[:5])}{' and more' if len(changed) > 5 else ''}; "
                f"choose another name=..., or delete {run} to start again."
            )
    run.mkdir(parents=True, exist_ok=True)
    configs.save(settings, written)
    return checkpoints.latest(run)


def complete(settings: DictConfig) -> None:
    """Write into a config what it refers to: a file of labels, and the front end and encoder of ``init``.

    Raises:
        ValueError: where the file is not there, or there is neither an encoder nor an ``init``.
    """
    node = settings.model
    if isinstance(node.get("labels"), str):
        node.labels = _lines(Path(node.labels))
    if node.get("encoder") is None:
        if settings.init is None:
            raise ValueError("model.encoder must be given where there is no init to take it from; choose encoder=NAME.")
        with open_dict(settings):
            node.update(pretrained.describe(settings.init))


def build(settings: DictConfig) -> tuple[Model, Any]:
    """The model with the fresh weights of its seed, not tuned yet, and the data, which are checked here."""
    torch.manual_seed(settings.seed)
    model = configs.build_model({key: value for key, value in settings.model.items() if key != "tuning"})
    data = configs.build(
        settings.data,
        "data",
        **_says(model),
        augment=configs.build(settings.augment, "augment"),
        sample_rate=model.sample_rate,
        seed=settings.seed,
    )
    data.setup("fit")
    return model, data


def task_of(model: Model, settings: DictConfig) -> Any:
    """What trains a model as a config says."""
    context = settings.get("context")
    return configs.build(
        settings.task,
        "task",
        model=model,
        optim=configs.build(settings.optim, "optim"),
        seed=settings.seed,
        **({} if context is None else {"context": configs.build(context, "context")}),
    )


def _says(model: Model) -> dict[str, Any]:
    """What data must know of the model they are for."""
    if isinstance(model, Recogniser):
        return {"tokenizer": model.tokenizer}
    if isinstance(model, MaskedAutoencoder):
        return {}
    return {"labels": model.labels, "exclusive": model.exclusive}


def start(model: Model, data: Any, settings: DictConfig) -> None:
    """What a training begins with: the weights of another model, or a normalisation measured on the training data."""
    if settings.init is None:
        taken: Collection[str] = ()
    elif pretrained.of_images(settings.init):
        pretrained.ast.initialise(model.encoder, settings.init)
        taken = ("encoder",)
    else:
        other = pretrained.load(settings.init)
        if (tuning := getattr(other, "tuning", None)) is not None:
            tuning.merge(other)
        taken = warm_start(model, other, settings.init, settings.fresh)
    if "features" not in taken:
        batches = itertools.islice(data.train_batches(0), NORM_BATCHES)
        measure(model.features, ((batch.samples, batch.sample_lengths) for batch in batches))


def measure(features: Any, heard: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Measure the normalisation of a front end, if it has one to be measured."""
    if hasattr(getattr(features, "norm", None), "fit"):
        features.norm.fit(features.mel(samples, lengths) for samples, lengths in heard)


def warm_start(model: nn.Module, other: nn.Module, name: str, fresh: Sequence[str]) -> Collection[str]:
    """Take over the weights of ``other``, apart from the parts that start anew by name; the parts that were taken over.

    From a model of the same kind all of them are taken; from another kind, or a tagger of other classes, front end and
    encoder; from an encoder alone that.

    Raises:
        ValueError: naming weights that are in one of the models only, or of another shape, and not in a fresh part.
    """
    alone = not hasattr(other, "encoder")
    wanted_kind, kind = (type(encoder).__name__ for encoder in (model.encoder, other if alone else other.encoder))
    if kind != wanted_kind and "encoder" not in fresh:
        raise ValueError(
            f"init must have the encoder of the config, {wanted_kind}, but {name} has {kind}; take its own with "
            f"model.features=null model.encoder=null."
        )
    given = {f"encoder.{k}": v for k, v in other.state_dict().items()} if alone else other.state_dict()
    same = type(other) is type(model) and getattr(other, "labels", None) == getattr(model, "labels", None)
    parts = {k.split(".")[0] for k in given if same or k.startswith(("features.", "encoder."))}
    kept = {part for part in parts if part not in fresh}
    wanted = kept | {k.split(".")[0] for k in model.state_dict() if same}
    ours = {k: v for k, v in model.state_dict().items() if _in(k, wanted) and not _in(k, fresh)}
    theirs = {k: v for k, v in given.items() if _in(k, kept) and not _in(k, fresh)}
    lacking = [k for k in ours if k not in theirs or theirs[k].shape != ours[k].shape]
    unused = [k for k in theirs if k not in ours]
    if lacking or unused:
        anew = sorted({".".join(k.split(".")[:2]) for k in (*lacking, *unused)})
        raise ValueError(
            f"init must be a model with the same weights, but {name} lacks or has others for "
            f"{', '.join(lacking[:4]) or 'nothing'} ({len(lacking)}) and has {', '.join(unused[:4]) or 'nothing'} "
            f"({len(unused)}) to spare; to start such parts anew add 'fresh=[{','.join(anew)}]'."
        )
    model.load_state_dict(theirs, strict=False)
    return kept


def save(model: Model, settings: DictConfig) -> None:
    """Write the model of the run."""
    if _first():
        node = configs.plain(settings.model)
        node.pop("attention", None)  # the encoder holds it, its references being filled in
        pretrained.save(model, node, Path(settings.run, "model"))


class SaveBest(Callback):
    """Keeps the best model so far usable while the training goes on. It comes after `Checkpoints`."""

    def __init__(self, settings: DictConfig) -> None:
        self.settings = settings

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        kept = checkpoints.best(Path(self.settings.run))
        if trainer.state.fn == "fit" and kept and checkpoints.step_of(kept[0]) == module.position.step:
            save(module.model, self.settings)


def _first() -> bool:
    """Whether this is the process that writes and speaks, or the only one."""
    return getattr(rank_zero_only, "rank", 0) == 0


def leave_cores(workers: int) -> None:
    """Fewer threads for the model where workers read beside it.

    An operator ends with its slowest thread, so two threads that share two cores with a worker are slower than one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - workers)))


def _in(name: str, parts: Collection[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _trainer(settings: DictConfig, run: Path, console: Console, step: int) -> Trainer:
    board = TensorBoardLogger(run, name="", version="tensorboard", purge_step=step + 1)
    keep = configs.build(settings.checkpoint, "checkpoint", folder=run)
    try:
        return configs.build(
            settings.trainer,
            "trainer",
            callbacks=[keep, SaveBest(settings), show.Bar(console), show.Samples(run, console)],
            logger=[board, checkpoints.CSVLog(run)],
            plugins=[StateIO()],
            default_root_dir=run,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        message = " ".join(str(error).split()).rstrip(".!")
        raise ValueError(f"trainer must fit this machine, but: {message}; trainer=cpu runs anywhere.") from error


def _finish(trainer: Trainer, task: Any, data: Any, kept: Sequence[Path], console: Console) -> None:
    """Leave the better of two in the model: the best single one on dev, or the mean of the best ones."""
    tried: list[tuple[float, str, Mapping[str, Tensor]]] = []
    for name, paths in (("the best one", kept[:1]), (f"the mean of the best {len(kept)}", kept)):
        if paths and len(paths) > len(tried):
            weights = average(paths)
            task.load_state_dict(weights)
            trainer.validate(task, datamodule=data, verbose=False)
            tried.append((task.error_rate(), name, weights))
            console.print(f"{name}: {show.values(task.latest)}")
    if tried:
        task.load_state_dict(min(tried, key=lambda one: one[0])[2])


def _require_data(settings: DictConfig, path: Path) -> None:
    """Say how to prepare a corpus that a recipe comes with, before anything else is built."""
    recipe = path.resolve().parents[1]
    for name in ("train", "dev"):
        for source in (settings.data.get(name) or {}).values():
            file = source.get("path")
            if file is not None and not Path(file).exists() and (recipe / "prepare.py").exists():
                raise ValueError(
                    f"data.{name} must be prepared before training, but {file} is not there; "
                    f"run: speechkit prepare {recipe.name}"
                )


def _introduce(console: Console, settings: DictConfig, model: Model, data: Any, state: Path | None) -> None:
    cuts = [cut for source in data.train_cuts.values() for cut in source]
    hours = sum(cut.duration for cut in cuts) / 3600
    rows = {
        "run": f"{settings.run}" + (f", continued from step {checkpoints.step_of(state):,}" if state else ""),
        "model": f"{type(model.encoder).__name__}, {_weights(model)}",
        **_particulars(model),
        "data": f"{len(cuts):,} utterances, {hours:.2f} h; dev {len(data.dev_cuts):,}",
    }
    console.print(show.summary(rows))


def _weights(model: Model) -> str:
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    every, trained = sum(n for n, _ in counts), sum(n for n, learns in counts if learns)
    return f"{every / 1e6:.1f} M weights" + (f", {trained / 1e6:.3g} M of them trained" if trained < every else "")


def _particulars(model: Model) -> dict[str, str]:
    if isinstance(model, Recogniser):
        context, unit = model.context, 1000 * model.frame_seconds
        latency = f"streams at {context.latency() * unit:.0f} ms" if context.streams else "whole utterances"
        return {"hears": latency, "heads": f"{type(model.objective).__name__}, {model.tokenizer.size} tokens"}
    if isinstance(model, MaskedAutoencoder):
        return {"decoder": type(model.decoder).__name__, "mask": str(model.mask)}
    kind = "one a clip" if model.exclusive else "any number a clip"
    return {"head": type(model.head).__name__, "classes": f"{len(model.labels)}, {kind}"}


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(
            f"model.labels must be a list or a text file with a class a line, but {path} is not there; prepare the "
            f"dataset, or correct the path."
        )
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _quiet() -> None:
    """Lightning's advice is about things that are settled here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*many workers.*", ".*not resumable.*", ".*LeafSpec.*", ".*across ranks is zero.*"):
        warnings.filterwarnings("ignore", message)
