"""The distance by what changes: what it is in known cases, and that it is of the states, not of their coordinates."""

from __future__ import annotations

import pytest
import torch

from worldline.planning.distance import change_matrix


def moments(n: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Three directions of unit variance: a slow one, a fast one, and one that never changes."""
    generator = torch.Generator().manual_seed(0)
    before, noise = torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
    correlation = torch.tensor([0.9, 0.0, 1.0], dtype=torch.float64)
    return before, correlation * before + (1 - correlation**2).sqrt() * noise


def test_slow_directions_are_long_and_still_ones_longest_but_bounded() -> None:
    matrix = change_matrix(*moments())
    squares = (torch.eye(3, dtype=torch.float64) @ matrix).square().sum(dim=1)
    # E[dz^2] = 2 (1 - correlation), and the ridge of 0.05
    assert squares.tolist() == pytest.approx([1 / 0.25**2, 1 / 2.05**2, 1 / 0.05**2], rel=0.1)


def test_an_invertible_map_of_the_latents_leaves_distances_as_they_are() -> None:
    before, after = moments()
    mix = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.1, 2.0], [1.0, 0.0, 0.5]], dtype=torch.float64)
    offset = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    plain, mixed = change_matrix(before, after), change_matrix(before @ mix, after @ mix)
    assert torch.allclose((offset @ plain).norm(), (offset @ mix @ mixed).norm(), rtol=1e-9)


def test_a_direction_without_variance_counts_nothing() -> None:
    before, after = (torch.cat((part, torch.full_like(part[:, :1], 7.0)), dim=1).float() for part in moments())
    matrix = change_matrix(before, after)
    assert torch.isfinite(matrix).all()
    assert matrix[3].abs().max() < 1e-3 * matrix[0].abs().max()
