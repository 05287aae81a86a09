"""Masks: exact counts, blocks through all of time, and a sample's mask that hangs on nothing around it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldline.core.errors import WorldlineError
from worldline.train.masks import MaskConfig, masks, shade, visible_cells


@given(
    grid=st.tuples(st.integers(1, 4), st.integers(2, 9), st.integers(2, 9)),
    block=st.floats(0.01, 0.95),
    visible=st.floats(0.01, 0.95),
    step=st.integers(0, 1000),
)
def test_kept_and_hidden_tokens_share_the_clip(
    grid: tuple[int, int, int], block: float, visible: float, step: int
) -> None:
    config = MaskConfig(block=(block,), visible=(visible,))
    kept, hidden = masks(config, 0, grid, np.arange(3), step, seed=1)
    times, rows, cols = grid
    assert kept.shape == (3, times * visible_cells(rows, cols, visible))
    for clip in range(3):
        together = np.concatenate([kept[clip], hidden[clip]])
        assert np.array_equal(np.sort(together), np.arange(times * rows * cols))
        seen = np.zeros((times, rows * cols), dtype=bool)
        seen.flat[kept[clip]] = True
        assert (seen == seen[0]).all()  # a place is hidden at all times or at none


def test_a_mask_hangs_on_seed_step_kind_and_clip_alone() -> None:
    def of(ids: list[int], kind: int = 0, step: int = 5, seed: int = 1) -> np.ndarray:
        return masks(MaskConfig(), kind, (2, 8, 8), np.array(ids), step, seed)[0]

    assert np.array_equal(of([7, 3, 9])[1], of([3])[0])
    for other in (of([4]), of([3], step=6), of([3], seed=2)):
        assert not np.array_equal(other, of([3]))
    assert of([3], kind=1).shape != of([3]).shape


def test_large_blocks_leave_the_visible_part_in_one_piece_more_often() -> None:
    """What the two kinds are for: few large blocks hide whole regions, many small ones leave crumbs."""

    def crumbs(block: float) -> float:
        kept, _ = masks(MaskConfig(block=(block,), visible=(0.2,)), 0, (1, 14, 14), np.arange(50), 0, seed=0)
        seen = np.zeros((50, 14, 14), dtype=bool)
        np.put_along_axis(seen.reshape(50, -1), kept, True, axis=1)
        borders = (seen[:, 1:] != seen[:, :-1]).sum() + (seen[:, :, 1:] != seen[:, :, :-1]).sum()
        return float(borders)

    assert crumbs(0.7) < crumbs(0.05)


def test_shares_that_leave_nothing_are_refused() -> None:
    with pytest.raises(WorldlineError, match="shares between 0 and 1"):
        MaskConfig(block=(0.5,), visible=(1.0,))


def test_hidden_tubelets_are_dark_in_the_picture_and_others_are_not() -> None:
    grid = (2, 3, 4)
    _, hidden = masks(MaskConfig(), 0, grid, np.arange(1), step=0, seed=1)
    shown = shade(np.full((4, 24, 32, 3), 200, np.uint8), hidden[0], grid)
    tubelets = shown.reshape(2, 2, 3, 8, 4, 8, 3).transpose(0, 2, 4, 1, 3, 5, 6).reshape(24, -1)
    assert [set(row) for row in tubelets.tolist()] == [{50 if n in hidden[0] else 200} for n in range(24)]
