"""Training steps: schedules, parameter groups, chance by number, and what happens to a loss that is not finite."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from tiny import sound, tiny
from torch import nn
from torch.utils.data import DataLoader

from speechkit.features import SpecAugment
from speechkit.pretrained.state import StateIO
from speechkit.stream import ContextSampler
from speechkit.tasks import Constant, Noam, Optim, Stairs, Transcribe, WarmupCosine, chance
from speechkit.types import Batch


class Utterances(LightningDataModule):
    """Twelve batches of two utterances, those of an epoch beginning where `resume` says."""

    def __init__(self) -> None:
        super().__init__()
        self.start = 0

    def resume(self, *, epoch: int, batch: int) -> None:
        self.start = batch

    def train_dataloader(self) -> DataLoader:
        first, self.start = self.start, 0
        return loader([batch(seed) for seed in range(first, 12)])

    def val_dataloader(self) -> DataLoader:
        return loader([batch(100)])


def loader(batches: list[Batch]) -> DataLoader:
    return DataLoader(batches, batch_size=None, collate_fn=lambda one: one)


def batch(seed: int) -> Batch:
    samples = torch.stack([sound(1.2, seed=2 * seed), sound(1.2, seed=2 * seed + 1)])
    tokens = torch.tensor([[2, 3, 4], [5, 6, 0]])
    names = (f"left{seed}", f"right{seed}")
    return Batch(samples, torch.tensor([19200, 16000]), tokens, torch.tensor([3, 2]), names, ("abc", "de"))


def task(kind: type[Transcribe] = Transcribe, **changes: Any) -> Transcribe:
    torch.manual_seed(1)
    optim = Optim(optimizer=functools.partial(torch.optim.AdamW, lr=1e-3), schedule=Constant())
    return kind(**{"model": tiny().train(), "optim": optim, "context": ContextSampler((4, 8), (8,)), **changes})


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def trainer(folder: Any, **changes: Any) -> Trainer:
    quiet = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    settings = {
        "max_steps": 4,
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "logger": False,
    }
    return Trainer(
        default_root_dir=folder, plugins=[StateIO()], **dict.fromkeys(quiet, False), **{**settings, **changes}
    )


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_cosine_rises_in_a_line_and_ends_at_its_floor() -> None:
    rate = WarmupCosine(warmup=4, steps=10, floor=0.1)
    assert [rate(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rate(7) == pytest.approx(0.55) and rate(10) == pytest.approx(0.1) and rate(99) == pytest.approx(0.1)


def test_noam_has_its_peak_of_one_at_the_end_of_the_warmup() -> None:
    rate = Noam(warmup=100)
    assert max(range(1000), key=rate) == 99 and rate(99) == 1.0
    assert rate(399) == pytest.approx(0.5)  # four times as far, half the rate


def test_constant_stays_after_its_warmup() -> None:
    rate = Constant(warmup=3)
    assert [rate(step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_stairs_fall_as_those_of_torch_do_by_epochs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    epochs = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(range(10, 1000, 5)), gamma=0.5)
    rate = Stairs(first=10 * 7, every=5 * 7, factor=0.5)  # seven steps an epoch
    for epoch in range(25):
        assert [rate(7 * epoch + step) for step in range(7)] == pytest.approx([optimizer.param_groups[0]["lr"]] * 7)
        optimizer.step()
        epochs.step()


def test_stairs_begin_with_their_warmup() -> None:
    rate = Stairs(first=6, every=2, warmup=3)
    assert [rate(step) for step in range(9)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.5, 0.25])
    with pytest.raises(ValueError, match=r"Stairs.every must be at least one step, but is 0"):
        Stairs(first=1, every=0)


def test_cosine_shorter_than_its_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match=r"WarmupCosine.steps .* 500, but is 100; set trainer.max_steps"):
        WarmupCosine(warmup=500, steps=100)


def test_weight_decay_leaves_vectors_alone() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optim = Optim(optimizer=functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.5), schedule=Constant())
    decayed, kept = optim(module)[0].param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 3)] and decayed["weight_decay"] == 0.5
    assert {p.dim() for p in kept["params"]} == {1} and kept["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(kept["params"]) == len(list(module.parameters()))


def test_frozen_weights_are_not_optimised() -> None:
    module = nn.Linear(3, 4, bias=False).requires_grad_(False)
    with_one = nn.Sequential(module, nn.Linear(4, 4, bias=False))
    optimizer, _ = Optim(optimizer=functools.partial(torch.optim.SGD, lr=1.0), schedule=Constant())(with_one)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1


def test_chance_of_neighbours_is_unlike_and_of_the_same_key_the_same() -> None:
    seeds = {chance(seed, number) for seed in range(30) for number in range(30)}
    assert len(seeds) == 900 and chance(3, 4) == chance(3, 4) and chance(3, 4) != chance(4, 3)
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_losses_depend_on_seed_and_number_alone(tmp_path: Any) -> None:
    def losses(seed: int, disturbance: int) -> list[float]:
        class Watched(Transcribe):
            def losses(self, batch: Batch, dice: int) -> dict[str, torch.Tensor]:
                parts = super().losses(batch, dice)
                seen.append(float(parts["loss"].detach()))
                torch.rand(disturbance)
                return parts

        seen: list[float] = []
        trainer(tmp_path).fit(task(Watched, seed=seed, spec_augment=SpecAugment()), Utterances())
        return seen

    assert losses(0, 0) == losses(0, 17)
    assert losses(0, 0) != losses(1, 0)


def test_accumulated_step_reports_the_mean_of_its_batches(tmp_path: Any) -> None:
    model = task()
    reports: list[dict[str, Any]] = []
    model.report = lambda kind, values: reports.append({"kind": kind, **values})  # type: ignore[method-assign]
    trainer(tmp_path, max_steps=5, accumulate_grad_batches=5, log_every_n_steps=1).fit(model, Utterances())
    # 12 batches an epoch: steps of 5, 5 and 2, then 5 and 5 of the next epoch.
    assert tuple(model.position) == (1, 10, 22, 5)
    assert len(reports) == 5 and all(torch.isfinite(torch.as_tensor(r["loss"])) for r in reports)
    assert {"loss", "ctc", "attention", "lr", "grad_norm", "frames_per_second"} <= reports[0].keys()
    assert model.between_steps


def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path: Any) -> None:
    class Watched(Transcribe):
        def optimizer_step(self, *arguments: Any, **named: Any) -> None:
            super().optimizer_step(*arguments, **named)
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            norms.append(float(nn.utils.get_total_norm(grads)))

    norms: list[float] = []
    trainer(tmp_path, gradient_clip_val=0.1).fit(task(Watched), Utterances())
    assert norms == pytest.approx([0.1] * 4, rel=1e-3)


def test_loss_that_is_not_finite_names_its_utterances_and_spares_the_weights(tmp_path: Any) -> None:
    model = task()

    class Poisoned(Utterances):
        def train_dataloader(self) -> DataLoader:
            good, bad = batch(0), batch(1)
            return loader([good, bad._replace(samples=torch.full_like(bad.samples, torch.nan)), good])

    with pytest.raises(
        ValueError, match=r"after step 1 .*left1, right1; look at .* lower optim.optimizer.lr, which is"
    ):
        trainer(tmp_path).fit(model, Poisoned())
    assert torch.isfinite(weights(model)).all()


def test_dev_is_heard_whole_and_as_a_stream(tmp_path: Any) -> None:
    model = task()
    trainer(tmp_path, limit_val_batches=1.0, val_check_interval=2).fit(model, Utterances())
    assert {"dev/loss", "dev/wer", "dev/wer_stream"} == model.latest.keys()
    assert model.error_rate() == (model.latest["dev/wer"] + model.latest["dev/wer_stream"]) / 2


def test_state_holds_the_position_and_nothing_of_lightnings_loops(tmp_path: Any) -> None:
    model = task()
    running = trainer(tmp_path)
    running.fit(model, Utterances())
    running.save_checkpoint(tmp_path / "state.safetensors")
    state = StateIO().load_checkpoint(tmp_path / "state.safetensors")
    assert state["position"] == [0, 4, 4, 4] and "loops" not in state


@pytest.mark.parametrize(("accumulated", "first"), [(1, 3), (1, 12), (3, 2), (5, 3)])
def test_continued_training_ends_with_the_same_weights(tmp_path: Any, accumulated: int, first: int) -> None:
    settings = {"accumulate_grad_batches": accumulated, "reload_dataloaders_every_n_epochs": 1}
    whole, half, rest = task(), task(), task()
    trainer(tmp_path, max_steps=first + 4, **settings).fit(whole, Utterances())
    running = trainer(tmp_path, max_steps=first, **settings)
    running.fit(half, Utterances())
    running.save_checkpoint(tmp_path / "state.safetensors")
    continuing = trainer(tmp_path, max_steps=first + 4, **settings)
    continuing.fit(rest, Utterances(), ckpt_path=tmp_path / "state.safetensors")
    assert torch.equal(weights(whole), weights(rest)) and whole.position == rest.position
