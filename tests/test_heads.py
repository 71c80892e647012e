"""Every head against its paper's formula in float64, and against what may not change its answer."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_tagging import batch, tagger, task
from torch import Tensor

from speechkit.config import build, catalogue
from speechkit.config import load as load_yaml
from speechkit.heads import Attention, Branches, Gated, Head, LinearSoftmax, Mean, Statistics, Summary
from speechkit.types import EncoderOutput

DIM, CLASSES, LENGTHS = 12, 5, (9, 4, 1, 7)
HEADS = sorted(file.stem for file in (catalogue() / "head").glob("*.yaml"))


def made(name: str) -> Head:
    """A head of the catalogue, away from its neutral start."""
    head = build(load_yaml(catalogue() / "head" / f"{name}.yaml"), "model.head")(dim=DIM, classes=CLASSES)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head.eval()


def encoded(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> EncoderOutput:
    dice = torch.Generator().manual_seed(seed)
    frames = torch.randn(len(lengths), max(9, *lengths), DIM, generator=dice)
    return EncoderOutput(frames, torch.tensor(lengths), torch.randn(len(lengths), DIM, generator=dice))


def clip(batch: EncoderOutput, row: int) -> EncoderOutput:
    length, summary = int(batch.lengths[row]), batch.summary
    assert summary is not None
    return EncoderOutput(batch.frames[row : row + 1, :length], batch.lengths[row : row + 1], summary[row : row + 1])


@pytest.mark.parametrize("name", HEADS)
def test_a_clip_is_classified_the_same_alone_and_beside_longer_ones(name: str) -> None:
    head, batch = made(name), encoded()
    together = head(batch)
    assert together.shape == (len(LENGTHS), CLASSES)
    for row in range(len(LENGTHS)):
        torch.testing.assert_close(head(clip(batch, row)), together[row : row + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("worth", [math.nan, math.inf, 1e4])
def test_what_is_in_the_padding_changes_neither_logits_nor_loss_nor_gradients(name: str, worth: float) -> None:
    head, batch = made(name).train(), encoded()
    padding = torch.arange(9)[None, :, None] >= batch.lengths[:, None, None]
    target = torch.tensor([0, 1, 2, 3])

    def learned(frames: Tensor) -> list[Tensor]:
        torch.manual_seed(3)
        head.zero_grad()
        frames = frames.clone().requires_grad_()
        parts = head.learn(batch._replace(frames=frames), lambda logits: F.cross_entropy(logits, target))
        parts["loss"].backward()
        return [parts["loss"].detach(), *(p.grad for p in head.parameters() if p.grad is not None)]

    clean = learned(batch.frames.masked_fill(padding, 0.0))
    assert all(torch.isfinite(tensor).all() for tensor in clean)
    torch.testing.assert_close(learned(batch.frames.masked_fill(padding, worth)), clean)


@pytest.mark.parametrize("name", [name for name in HEADS if name != "summary"])
def test_the_logits_of_a_frame_are_those_of_a_clip_of_this_frame_alone(name: str) -> None:
    head, batch = made(name), encoded((6,))
    frames = head.frames(batch)
    assert frames.shape == (1, 9, CLASSES)
    alone = [head(EncoderOutput(batch.frames[:, n : n + 1], torch.tensor([1]))) for n in range(6)]
    torch.testing.assert_close(torch.stack(alone, 1), frames[:, :6], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_a_clip_without_frames_has_finite_logits(name: str) -> None:
    assert torch.isfinite(made(name)(encoded((0, 3)))).all()


def doubled(head: Head) -> tuple[Head, EncoderOutput]:
    batch = encoded((7,))
    return head.double().eval(), batch._replace(frames=batch.frames.double()[:, :7])


def test_statistics_are_mean_and_deviation() -> None:
    head, batch = doubled(Statistics(dim=DIM, classes=CLASSES))
    x = batch.frames[0].numpy()
    torch.testing.assert_close(head.pooled(batch)[0], torch.from_numpy(np.r_[x.mean(0), x.std(0)]))


def test_linear_softmax_is_the_sum_of_squares_over_the_sum_of_probabilities() -> None:
    head, batch = doubled(LinearSoftmax(dim=DIM, classes=CLASSES))
    p = head.frames(batch)[0].sigmoid()
    torch.testing.assert_close(head(batch)[0].sigmoid().double(), p.square().sum(0) / p.sum(0), rtol=1e-5, atol=1e-6)


def test_attention_is_the_weighted_mean_of_probabilities() -> None:
    head, batch = doubled(Attention(dim=DIM, classes=CLASSES))
    assert isinstance(head, Attention)
    weights = head.attention(head.norm(batch.frames))[0].softmax(0)
    wanted = (weights * head.frames(batch)[0].sigmoid()).sum(0)
    torch.testing.assert_close(head(batch)[0].sigmoid().double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [LinearSoftmax, Attention])
@pytest.mark.parametrize("sure", [-60.0, 60.0])
def test_frames_that_are_entirely_sure_have_finite_logits_and_gradients(kind: type, sure: float) -> None:
    head = kind(dim=DIM, classes=CLASSES)
    torch.nn.init.constant_(head.linear.bias, sure)
    logits = head(encoded())
    logits.sum().backward()
    torch.testing.assert_close(logits, torch.full_like(logits, sure), atol=3.0, rtol=0)
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)


def gated(attention: torch.nn.Module, x: Tensor) -> Tensor:
    """Equation 9 of 1802.04712, frame by frame."""
    rows = []
    for h in attention.norm(x):
        rows.append(attention.score(torch.tanh(attention.value(h)) * torch.sigmoid(attention.gate(h))))
    return torch.stack(rows).softmax(0)


def test_gated_attention_is_that_of_its_paper_and_aem_adds_the_negative_entropy() -> None:
    head, batch = doubled(Gated(dim=DIM, classes=CLASSES, entropy=0.1))
    assert isinstance(head, Gated)
    weights = gated(head.attention, batch.frames[0])
    vector = (weights * batch.frames[0]).sum(0)
    torch.testing.assert_close(head(batch)[0], head.classified(vector))
    parts = head.learn(batch, lambda logits: logits.square().mean())
    torch.testing.assert_close(parts["entropy"], -(weights * weights.log()).sum())
    torch.testing.assert_close(parts["loss"], head(batch).square().mean() - 0.1 * parts["entropy"])


def test_aem_spreads_attention() -> None:
    weights = {}
    for entropy in (0.0, 0.5):
        torch.manual_seed(0)
        head, batch = Gated(dim=DIM, classes=2, hidden=16, entropy=entropy), encoded((9,) * 16)
        target = batch.frames[:, 0, 0].gt(0).long()
        optimiser = torch.optim.Adam(head.parameters(), 0.02)
        for _ in range(60):
            optimiser.zero_grad()
            head.learn(batch, lambda logits, target=target: F.cross_entropy(logits, target))["loss"].backward()
            optimiser.step()
        weights[entropy] = float(head._attended(batch)[1].detach().max(1).values.mean())
    assert weights[0.5] < 0.7 * weights[0.0]


def test_branches_are_classified_by_their_mean_weights_and_learn_apart() -> None:
    head, batch = doubled(Branches(dim=DIM, classes=CLASSES, branches=3))
    assert isinstance(head, Branches)
    weights, x = gated(head.attention, batch.frames[0]), batch.frames[0]
    torch.testing.assert_close(head(batch)[0], head.classified(weights.mean(1) @ x))
    parts = head.learn(batch, lambda logits: logits.square().mean())
    own = [linear(head.norm(weights[:, m] @ x)).square().mean() for m, linear in enumerate(head.own)]
    torch.testing.assert_close(parts["branches"], torch.stack(own).mean())
    like = [F.cosine_similarity(weights[:, a], weights[:, b], dim=0) for a, b in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(parts["likeness"], torch.stack(like).mean())
    torch.testing.assert_close(parts["loss"], parts["fit"] + parts["branches"] + parts["likeness"])


def test_only_frames_of_most_weight_are_hidden_in_training_as_often_as_asked_and_never_all() -> None:
    torch.manual_seed(0)
    head = Branches(dim=DIM, classes=CLASSES, branches=2, top=3, masked=0.6).train()
    batch, hidden, rounds = encoded((9, 2, 1)), torch.zeros(3, 9, 2), 400
    seen = head.eval()._attended(batch)[1]
    head.train()
    for _ in range(rounds):
        weights = head._attended(batch)[1]
        torch.testing.assert_close(weights.sum(1), torch.ones(3, 2))
        hidden += weights == 0
    most = seen[0].topk(3, dim=0).indices
    for branch in range(2):
        assert hidden[0, most[:, branch], branch] / rounds == pytest.approx([0.6] * 3, abs=0.08)
        assert hidden[0, :, branch].sum() == hidden[0, most[:, branch], branch].sum()
    assert hidden[1, :2].sum(0).tolist() == pytest.approx([0.6 * rounds] * 2, abs=40)
    assert hidden[2, 0].sum() == 0


def test_a_training_step_has_the_parts_of_a_head_beside_the_loss() -> None:
    model = tagger(head=partial(Branches, branches=2))
    losses = task(model=model.train()).losses(batch([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), 0)
    assert losses.keys() == {"loss", "fit", "branches", "likeness"}
    losses["loss"].backward()
    assert all(linear.weight.grad.abs().sum() > 0 for linear in model.head.own)


@pytest.mark.parametrize("kind", [LinearSoftmax, Attention])
def test_frames_are_found_although_only_clips_had_labels(kind: type) -> None:
    """A clip has the class where one to three of its twelve frames point one way."""
    torch.manual_seed(0)
    dice = torch.Generator().manual_seed(4)
    where = torch.zeros(160, 12, dtype=torch.bool)
    for row in range(0, 160, 2):
        start = int(torch.randint(9, (), generator=dice))
        where[row, start : start + 1 + row % 3] = True
    frames = 0.5 * torch.randn(160, 12, DIM, generator=dice)
    frames[..., 0] += 3.0 * where
    batch, target = EncoderOutput(frames, torch.full((160,), 12)), where.any(1).float()[:, None]
    head = kind(dim=DIM, classes=1)
    optimiser = torch.optim.Adam(head.parameters(), 0.03)
    for _ in range(150):
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(head(batch), target).backward()
        optimiser.step()
    found = head.frames(batch)[..., 0] > 0
    assert (found == where).float().mean() > 0.97


def test_a_summary_is_asked_of_an_encoder_that_gives_one() -> None:
    head = Summary(dim=DIM, classes=CLASSES)
    with pytest.raises(ValueError, match=r"heads\.Summary must be given an encoder with a summary"):
        head(encoded()._replace(summary=None))
    with pytest.raises(ValueError, match=r"at least 2, but is 1; a single one is heads\.Gated"):
        Branches(dim=DIM, classes=CLASSES, branches=1)


def test_a_mean_is_of_the_real_frames_alone() -> None:
    head, batch = Mean(dim=DIM, classes=CLASSES), encoded()
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(head.pooled(batch)[row], batch.frames[row, :length].mean(0))
