"""The drift gauge reads 1 at the edge of what is real, and more beyond it."""

import numpy as np
import pytest
import torch

from toy_world import SPEC, TINY
from worldline.core.errors import WorldlineError
from worldline.model import World, filmstrip


@pytest.fixture
def fitted() -> tuple[World, torch.Tensor]:
    torch.manual_seed(0)
    world = World(TINY, SPEC).eval()
    mixing = torch.linalg.qr(torch.randn(24, 24))[0] * torch.logspace(-1, 0.5, 24)
    z = torch.randn(3000, 24) @ mixing + 5.0
    world.gauge.fit(world, z)
    return world, z


def test_region_is_the_mahalanobis_radius_over_its_99_percent_quantile(fitted: tuple[World, torch.Tensor]) -> None:
    world, z = fitted
    numbers = z.numpy().astype(np.float64)
    inverse = np.linalg.inv(np.cov(numbers.T))
    centred = numbers - numbers.mean(axis=0)
    radius = np.sqrt(np.einsum("nd,de,ne->n", centred, inverse, centred))
    np.testing.assert_allclose(world.gauge.region(z).numpy(), radius / np.quantile(radius, 0.99), rtol=2e-2)
    assert 0.985 < (world.gauge.region(z) <= 1).float().mean() < 0.995


def test_latents_far_from_the_real_ones_are_outside(fitted: tuple[World, torch.Tensor]) -> None:
    world, z = fitted
    assert (world.gauge.region(z.mean(dim=0) + 3 * (z - z.mean(dim=0))) > 1).float().mean() > 0.99


def test_cycle_is_relative_to_real_latents(fitted: tuple[World, torch.Tensor]) -> None:
    world, z = fitted
    assert 0.97 < (world.gauge.cycle(world, z[:1000]) <= 1).float().mean() <= 1
    assert world.gauge.cycle(world, z[:4] * 20).min() > 1


def test_an_unused_direction_does_not_blow_up() -> None:
    torch.manual_seed(0)
    world = World(TINY, SPEC).eval()
    z = torch.randn(500, 24)
    z[:, 3] = 2.0
    world.gauge.fit(world, z)
    nudged = z.clone()
    nudged[:, 3] += 1e-3
    assert (world.gauge.region(nudged) / world.gauge.region(z) - 1).abs().max() < 0.05


def test_without_a_fit_it_says_so() -> None:
    world = World(TINY, SPEC)
    with pytest.raises(WorldlineError, match="has not been fitted"):
        world.gauge.region(torch.zeros(1, 24))
    with pytest.raises(WorldlineError, match="at least 100"):
        world.gauge.fit(world, torch.zeros(10, 24))


def test_filmstrip_lays_films_in_rows() -> None:
    films = [np.full((21, 8, 8, 3), value, dtype=np.uint8) for value in (10, 200)]
    strip = np.asarray(filmstrip(films, every=10, scale=2, gap=1))
    assert strip.shape == ((8 + 1 + 8) * 2, (3 * 8 + 2) * 2, 3)
    assert (strip[:16, :16] == 10).all()
    assert (strip[-16:, -16:] == 200).all()
    assert (strip[16:18] == 255).all()
    with pytest.raises(WorldlineError, match="one shape"):
        filmstrip([films[0], films[1][:5]])
