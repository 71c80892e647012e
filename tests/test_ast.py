"""AST by itself: lengths, positions, sizes, patchout and the catalogue."""

from __future__ import annotations

import hydra
import pytest
import torch
from ast_cases import close, heard, original_rule, spectrogram, tiny
from tiny import sound
from torch import Tensor

from speechkit.config import build, catalogue
from speechkit.encoders import AST, AudioEncoder, StreamingEncoder
from speechkit.encoders.ast import Patchout, Positions, SeparatePositions, stretch
from speechkit.tagger import Tagger

# Lengths


@pytest.mark.parametrize("positions", [Positions, SeparatePositions])
@torch.no_grad()
def test_a_clip_gives_the_same_alone_and_beside_others_whatever_is_in_the_padding(positions: type) -> None:
    encoder = tiny(positions=positions)
    lengths = [150, 96, 95, 40, 16, 15, 1, 0]
    x = spectrogram(len(lengths), 150, 40)
    for row, length in enumerate(lengths):
        x[row, length:] = torch.nan
    frames, counts, summary = encoder(x, torch.tensor(lengths))
    assert counts.tolist() == [14, 9, 8, 3, 1, 1, 1, 0]
    for row, (length, count) in enumerate(zip(lengths, counts.tolist(), strict=True)):
        alone = encoder(x[row : row + 1, :length], torch.tensor([length]))
        close(summary[row], alone.summary[0])
        close(frames[row, :count], alone.frames[0, :count])


@torch.no_grad()
def test_clips_without_lengths_are_all_real() -> None:
    encoder, x = tiny(patchout=Patchout(columns=2, patches=3)), spectrogram(2, 120, 40)
    for training in (False, True):
        encoder.train(training)
        outs = []
        for lengths in (None, torch.tensor([120, 120])):
            torch.manual_seed(4)
            outs.append(encoder(x, lengths))
        for one, other in zip(*outs, strict=True):
            close(one, other)


def test_padding_gets_no_gradient_and_gives_none() -> None:
    encoder = tiny()
    x = spectrogram(2, 96, 40).requires_grad_()
    encoder(x, torch.tensor([96, 50])).summary.square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert x.grad[1, :46].abs().sum() > 0 and not x.grad[1, 46:].any()  # the last whole patch ends with frame 46
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("columns", "rows"), [(9, 4), (8, 3), (5, 4), (1, 1), (10, 4), (23, 9), (120, 2), (4, 7)])
@torch.no_grad()
def test_positions_are_cut_and_interpolated_by_the_rule_of_the_original(columns: int, rows: int) -> None:
    small, other = Positions(columns=9, rows=4, dim=6), Positions(columns=columns, rows=rows, dim=6)
    small.table.copy_(torch.randn(9, 4, 6))
    other.adopt(small)
    expected = original_rule(small.table.permute(2, 1, 0), columns, rows).permute(2, 1, 0)
    close(other.table, expected)
    close(
        small(torch.tensor([columns]), columns)[0],
        original_rule(small.table.permute(2, 1, 0), columns, 4).permute(2, 1, 0),
    )


def test_a_table_of_the_right_size_is_taken_as_it_is() -> None:
    assert torch.equal(stretch(torch.tensor([101]), 101, 101)[0], torch.eye(101, dtype=torch.float64))


@torch.no_grad()
def test_separate_positions_adopt_a_sum_of_time_and_frequency_exactly() -> None:
    one, two, table = (
        SeparatePositions(columns=7, rows=3, dim=4),
        SeparatePositions(columns=9, rows=5, dim=4),
        Positions,
    )
    for parameter in one.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    two.adopt(one)
    expected = table(columns=9, rows=5, dim=4)
    expected.adopt(one)
    close(two.grid(), expected.grid())


@torch.no_grad()
def test_an_encoder_is_resized_to_other_mel_bands_and_keeps_what_it_had() -> None:
    encoder = tiny()
    before = encoder.positions.table.clone()
    with pytest.raises(ValueError, match=r"must be given features of 40 mel bands, but they have 64; compute as many"):
        encoder(spectrogram(1, 96, 64), torch.tensor([96]))
    encoder.resize(features=64, frames=200)
    assert encoder(spectrogram(1, 96, 64), torch.tensor([96])).frames.shape == (1, 9, 32)
    close(encoder.positions.table, original_rule(before.permute(2, 1, 0), 19, 5).permute(2, 1, 0))
    with pytest.raises(ValueError, match=r"must leave a patch of 16 bands and frames, but features is 12"):
        encoder.resize(features=12, frames=200)


def test_it_is_an_audio_encoder_that_refuses_to_stream() -> None:
    encoder = tiny()
    assert isinstance(encoder, AudioEncoder) and not isinstance(encoder, StreamingEncoder)
    with pytest.raises(ValueError, match=r"must hear whole utterances, .* but a stream was asked for; encode whole"):
        encoder.init_state(1)
    with pytest.raises(ValueError, match=r"AST.frames must be at least a patch, 16, but is 9"):
        AST(frames=9, dim=32, heads=4, layers=1)


# Sizes


@pytest.mark.parametrize(
    ("frames", "classes", "published"), [(1024, 527, 88.1), (512, 50, 87.3), (128, 35, 86.9)], ids=str
)
def test_parameters_are_as_many_as_published(frames: int, classes: int, published: float) -> None:
    """The paper's count has two classifiers of 1000 images in it, which its code makes and does not use."""
    with torch.device("meta"):
        encoder = AST(frames=frames, dim=768, heads=12, layers=12)
        tagger = Tagger(features=None, encoder=encoder, labels=["a"] * classes, frames=frames)
    count = sum(p.numel() for p in tagger.parameters())
    assert round((count + 2 * 1000 * (768 + 1)) / 1e6, 1) == published
    assert frames != 1024 or count == 86_594_063


# Patchout


@pytest.mark.parametrize(
    ("patchout", "left"),
    [
        (Patchout(columns=40, rows=4), 61 * 8),
        (Patchout(patches=400), 101 * 12 - 400),
        (Patchout(columns=40, rows=4, patches=100), 61 * 8 - 100),
    ],
)
def test_patchout_leaves_whole_columns_and_rows_or_any_patches_in_order(patchout: Patchout, left: int) -> None:
    kept = patchout.draw(101, 12, torch.device("cpu"))
    assert len(kept) == left == len(kept.unique()) and kept.tolist() == sorted(kept.tolist())
    column, row = kept // 12, kept % 12
    assert int(column.max()) < 101 and len(column.unique()) <= 101 - patchout.columns
    assert len(row.unique()) == 12 - patchout.rows
    if not patchout.patches:
        assert len(column.unique()) == 61 and (column[:, None] * 12 + row).shape[0] == 61 * 8
    assert not torch.equal(kept, patchout.draw(101, 12, torch.device("cpu")))


@pytest.mark.parametrize("patchout", [Patchout(columns=4, rows=2), Patchout(patches=20)])
def test_training_sees_the_patches_that_stay_and_no_other(patchout: Patchout) -> None:
    """Frames of which a batch saw nothing have no gradient, and masking them by hand gives the same."""
    encoder = tiny(patchout=patchout, stride=16, band_stride=16, features=64, frames=160).train()
    x = spectrogram(2, 160, 64).requires_grad_()
    torch.manual_seed(4)
    kept = patchout.draw(10, 4, torch.device("cpu"))
    torch.manual_seed(4)
    patches: list[Tensor] = []
    encoder.norm.register_forward_hook(lambda part, inputs, out: patches.append(out[:, 2:]))
    out = encoder(x, torch.tensor([160, 160]))
    out.summary.square().sum().backward()
    for column in (kept // 4).unique():
        close(out.frames[:, column], patches[0][:, kept // 4 == column].mean(1))
    seen = x.grad[0].unflatten(0, (10, 16)).unflatten(2, (4, 16)).abs().sum((1, 3)) > 0  # [columns, rows]
    assert seen.flatten().nonzero()[:, 0].tolist() == kept.tolist()
    dropped = sorted(set(range(10)) - set((kept // 4).tolist()))
    assert not out.frames[:, dropped].any() and out.lengths.tolist() == [10, 10]


def test_patchout_changes_nothing_outside_of_training() -> None:
    one, other = tiny(), tiny(patchout=Patchout(columns=3, rows=1, patches=2))
    x, lengths = spectrogram(2, 96, 40), torch.tensor([96, 70])
    assert torch.equal(one(x, lengths).summary, other(x, lengths).summary)
    assert not torch.equal(one(x, lengths).summary, other.train()(x, lengths).summary)


class Fixed(Patchout):
    """Leaves the same patches out of every batch, by their numbers, so far as a clip has them."""

    def draw(self, columns: int, rows: int, device: torch.device) -> Tensor:
        return torch.tensor([n for n in range(columns * rows) if n % 5 and n // rows != 2])


def test_patchout_of_a_clip_is_the_same_alone_and_beside_longer_ones() -> None:
    encoder = tiny(patchout=Fixed()).train()
    x, lengths = spectrogram(3, 96, 40), torch.tensor([96, 50, 16])
    for row, length in enumerate(lengths.tolist()):
        x[row, length:] = torch.nan
    together = encoder(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = encoder(x[row : row + 1, :length], lengths[row : row + 1])
        close(together.summary[row], alone.summary[0])
        close(together.frames[row, : alone.frames.shape[1]], alone.frames[0])


def test_patchout_that_leaves_nothing_is_refused() -> None:
    encoder = tiny(patchout=Patchout(columns=9)).train()
    with pytest.raises(ValueError, match=r"Patchout.columns must be .* less than the 9 there are, but is 9; lower it"):
        encoder(spectrogram(1, 96, 40), torch.tensor([96]))


def test_training_reaches_every_parameter() -> None:
    for positions in (Positions, SeparatePositions):
        encoder = tiny(positions=positions, patchout=Patchout(columns=1, patches=2), dropout=0.1).train()
        encoder(spectrogram(2, 96, 40), torch.tensor([96, 80])).summary.square().sum().backward()
        assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


# The catalogue


@pytest.mark.parametrize(("size", "millions"), [("tiny", 5.6), ("small", 21.9), ("base", 86.2)])
def test_the_catalogue_has_the_sizes_of_deit(size: str, millions: float) -> None:
    with hydra.initialize_config_dir(str(catalogue()), version_base="1.3"):
        node = hydra.compose(overrides=[f"+encoder=ast_{size}", "+features=ast128"]).model
    with torch.device("meta"):
        encoder = build(node.encoder, "model.encoder")
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == millions


def test_the_features_of_the_catalogue_are_those_of_the_checkpoints() -> None:
    with hydra.initialize_config_dir(str(catalogue()), version_base="1.3"):
        front = build(hydra.compose(overrides=["+features=ast128"]).model.features, "model.features")
    clip = sound(1.0)
    close(front(clip[None], torch.tensor([16000])).frames[0], heard(clip.numpy())[:98])


def test_the_options_that_the_catalogue_names_can_be_given() -> None:
    options = [
        "+model.encoder.positions={_target_: speechkit.encoders.ast.SeparatePositions, _partial_: true}",
        "+model.encoder.patchout={_target_: speechkit.encoders.ast.Patchout, columns: 40, rows: 4}",
    ]
    with hydra.initialize_config_dir(str(catalogue()), version_base="1.3"):
        node = hydra.compose(overrides=["+encoder=ast_tiny", "+features=ast128", "model.encoder.layers=1", *options])
    encoder = build(node.model.encoder, "model.encoder")
    assert isinstance(encoder.positions, SeparatePositions) and encoder.patchout == Patchout(columns=40, rows=4)
