"""What a pretraining hides: how much, in which shapes, and never the padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from speechkit import masking
from speechkit.masking import Anywhere, Clusters, Mask, Stripes, visible

MASKS = [Anywhere(), Stripes(), Stripes(columns=0.78, rows=0.0), Stripes(columns=0.0, rows=0.5), Clusters()]
COLUMNS = torch.tensor([31, 64, 10, 1, 0])
ROWS = 8
masks = pytest.mark.parametrize("mask", MASKS, ids=str)


@masks
def test_padding_is_never_seen_and_every_clip_with_sound_is_seen_in_part(mask: Mask) -> None:
    seen = mask(COLUMNS, ROWS)
    assert seen.shape == (5, 64 * ROWS) and seen.dtype == torch.bool
    for row, patches in enumerate((COLUMNS * ROWS).tolist()):
        assert not seen[row, patches:].any()
        assert 0 < int(seen[row].sum()) < patches or patches <= ROWS  # one column may be seen whole
        assert seen[row].any() == (patches > 0)


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        (Anywhere(), [49, 102, 16, 1, 0]),  # Audio-MAE leaves 102 of 512
        (Anywhere(share=0.75), [62, 128, 20, 2, 0]),
        (Stripes(), [12 * 4, 25 * 4, 4 * 4, 1 * 4, 0]),
        (Clusters(share=400 / 512), [54, 112, 17, 1, 0]),  # SSAST hides 400 of 512
    ],
    ids=str,
)
def test_the_same_share_of_each_clip_is_seen_whatever_is_beside_it(mask: Mask, counts: list[int]) -> None:
    assert mask(COLUMNS, ROWS).sum(1).tolist() == counts
    for row, count in enumerate(counts[:-1]):
        assert int(mask(COLUMNS[row : row + 1], ROWS).sum()) == count


@masks
def test_every_clip_and_every_batch_draws_for_itself(mask: Mask) -> None:
    columns = torch.full((6,), 64)
    one, two = mask(columns, ROWS), mask(columns, ROWS)
    if isinstance(mask, Stripes) and not mask.columns:
        return  # 70 ways to choose four rows of eight: clips meet
    assert len({tuple(row) for row in torch.cat([one, two]).tolist()}) == 12
    torch.manual_seed(3)
    again = mask(columns, ROWS)
    torch.manual_seed(3)
    assert torch.equal(again, mask(columns, ROWS))


def test_anywhere_is_as_likely_anywhere() -> None:
    seen = Anywhere()(torch.full((4000,), 5), 4).double().mean(0)
    assert (seen - 0.2).abs().max() < 5 * (0.2 * 0.8 / 4000) ** 0.5


def test_stripes_are_whole_columns_and_whole_rows() -> None:
    for seen in Stripes()(COLUMNS, ROWS)[:4].unflatten(1, (-1, ROWS)):
        column, row = seen.any(1), seen.any(0)
        assert torch.equal(seen, column[:, None] & row)
    frames = Stripes(columns=0.78, rows=0.0)(COLUMNS, ROWS)[:4].unflatten(1, (-1, ROWS))
    assert torch.equal(frames.any(2), frames.all(2))


def one_by_one(begins: Tensor, side: int, hidden: int) -> tuple[set, set]:
    """Squares hidden in the order of ``begins [U, Q]``: the patches surely hidden, and with the last square's."""
    columns, rows = begins.shape
    covered: set[tuple[int, int]] = set()
    for place in begins.flatten().argsort().tolist():
        column, row = divmod(place, rows)
        square = {(c, r) for c in range(column, column + side) for r in range(row, row + side)}
        more = covered | {(c, r) for c, r in square if c < columns and r < rows}
        if len(more) >= hidden:
            return covered, more
        covered = more
    raise AssertionError


def test_clusters_are_squares_hidden_one_after_the_other_until_enough_are() -> None:
    columns = torch.tensor([31, 64, 10, 3])
    for seed in range(5):
        torch.manual_seed(seed)
        begins, sides = masking._noise(columns * ROWS), torch.randint(3, 6, columns.shape)
        torch.manual_seed(seed)
        seen = Clusters()(columns, ROWS)
        for row, count in enumerate(columns.tolist()):
            real = slice(0, count * ROWS)
            found = {divmod(n, ROWS) for n in (~seen[row, real]).nonzero()[:, 0].tolist()}
            least, most = one_by_one(begins[row, real].reshape(count, ROWS), int(sides[row]), len(found))
            assert least <= found <= most


def test_visible_numbers_the_patches_that_are_seen_in_order() -> None:
    seen = Clusters()(COLUMNS, ROWS)
    index, counts = visible(seen)
    assert index.shape == (5, int(seen.sum(1).max()))
    for row, count in enumerate(counts.tolist()):
        assert index[row, :count].tolist() == seen[row].nonzero()[:, 0].tolist()
        assert len(index[row].unique()) == index.shape[1]  # what fills up is hidden, each once


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Anywhere(share=1.0), r"Anywhere.share must be more than 0 and less than 1, but is 1.0"),
        (lambda: Stripes(columns=-0.1), r"Stripes.columns must be at least 0 and less than 1, but is -0.1"),
        (
            lambda: Stripes(columns=0.0, rows=0.0),
            r"Stripes must hide columns or rows, but both shares are 0; raise one",
        ),
        (lambda: Clusters(sides=(5, 3)), r"Clusters.sides must be at least 1 and in order, but are \(5, 3\)"),
    ],
)
def test_shares_that_hide_nothing_or_all_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
