"""Every loss against a plain reference written from its equation."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from worldline.train.losses import (
    foreground_weight,
    grounding,
    inverse_dynamics,
    motion_weight,
    one_step,
    own_rollout,
    scale_gradient,
    sigreg,
    warmup_cosine,
)


def naive_sigreg(z: np.ndarray, directions: np.ndarray, knots: int = 17, t_max: float = 3.0) -> float:
    """One group: loops over directions and knots, complex numbers, numpy's own trapezoid over [-t_max, t_max]."""
    n = len(z)
    t = np.linspace(-t_max, t_max, 2 * knots - 1)
    found = []
    for u in directions.T:
        y = z @ (u / np.linalg.norm(u))
        integrand = []
        for point in t:
            empirical = sum(np.exp(1j * point * value) for value in y) / n
            integrand.append(abs(empirical - np.exp(-(point**2) / 2)) ** 2 * np.exp(-(point**2) / 2))
        steps = (np.array(integrand[1:]) + np.array(integrand[:-1])) / 2
        found.append(n * steps.sum() * (t[1] - t[0]))
    return float(np.mean(found))


def test_sigreg_equals_the_naive_double_loop() -> None:
    z = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(1)) * 1.7 + 0.3
    found = sigreg(z, torch.Generator().manual_seed(9), projections=5)
    directions = torch.randn(6, 5, generator=torch.Generator().manual_seed(9)).numpy()
    expected = np.mean([naive_sigreg(group.numpy(), directions) for group in z])
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_sigreg_ranks_latents_by_how_gaussian_they_are() -> None:
    generator = torch.Generator().manual_seed(2)
    gaussian = torch.randn(1, 512, 16, generator=generator)
    thin = gaussian.clone()
    thin[..., 8:] = 0.0
    scores = {
        name: float(sigreg(z, torch.Generator().manual_seed(3), projections=64))
        for name, z in {
            "gaussian": gaussian,
            "half the directions": thin,
            "shrunk": 0.3 * gaussian,
            "collapsed": torch.zeros_like(gaussian),
        }.items()
    }
    assert scores["gaussian"] < 2
    assert list(scores.values()) == sorted(scores.values())
    assert scores["half the directions"] > 5 * scores["gaussian"]


def test_sigreg_descends_from_a_collapse_to_a_gaussian() -> None:
    generator = torch.Generator().manual_seed(4)
    z = (0.05 * torch.randn(1, 256, 4, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        sigreg(z, generator, projections=16).backward()
        optimizer.step()
    covariance = torch.cov(z.detach()[0].T)
    assert (covariance - torch.eye(4)).abs().max() < 0.25


def test_scaled_gradient_keeps_the_value_and_scales_only_the_gradient() -> None:
    z = torch.randn(3, 4)
    for share in (0.0, 0.03, 1.0):
        leaf = z.clone().requires_grad_()
        out = scale_gradient(leaf, share)
        assert torch.equal(out.detach(), z)
        if share:
            out.square().sum().backward()
            torch.testing.assert_close(leaf.grad, 2 * share * z)
        else:
            assert not out.requires_grad


def test_prediction_errors_are_mean_squares() -> None:
    rng = np.random.default_rng(0)
    z_hat, z = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 5))
    expected = sum((a - b) ** 2 for a, b in zip(z_hat.flat, z.flat, strict=True)) / 30
    for loss in (one_step, own_rollout, inverse_dynamics):
        assert float(loss(torch.from_numpy(z_hat), torch.from_numpy(z))) == pytest.approx(expected)


def test_grounding_weighs_the_foreground() -> None:
    background = torch.ones(4, 4, 3)
    pictures = background.repeat(2, 1, 1, 1)
    pictures[0, 1, 2] = 0.0  # one black pixel on white
    weight = foreground_weight(pictures, background, gain=9.0)
    assert weight.shape == (2, 4, 4, 1)
    assert float(weight[0, 1, 2]) == 10.0
    assert float(weight.sum()) == 31 + 10
    pictures_hat = background.repeat(2, 1, 1, 1)  # misses the pixel
    assert float(grounding(pictures_hat, pictures)) == pytest.approx(1 / 32)
    assert float(grounding(pictures_hat, pictures, weight)) == pytest.approx(10 / 32)


def test_learning_rate_rises_and_falls() -> None:
    rates = [warmup_cosine(step, steps=100, warmup=10, end=0.1) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_motion_weighs_a_pixel_by_its_larger_change_to_a_neighbour() -> None:
    frames = torch.zeros(1, 3, 1, 2, 3)
    frames[0, 1, 0, 0] = 0.5  # the left pixel lights up in the middle frame, and goes half dark again
    frames[0, 2, 0, 0] = 0.25
    weight = motion_weight(frames, gain=4.0)[0, :, 0, :, 0]
    assert torch.allclose(weight, torch.tensor([[2.0, 0.0], [2.0, 0.0], [1.0, 0.0]]))
