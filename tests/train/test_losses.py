"""Every loss against a plain reference written from its equation."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from worldline.train.geometry import measure_geometry
from worldline.train.losses import (
    covariance,
    excess_growth,
    foreground_weight,
    grounding,
    inverse_dynamics,
    motion_weight,
    one_step,
    own_rollout,
    scale_gradient,
    sigreg,
    straightening,
    time_similarity,
    variance,
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
    expected = sum(abs(a - b) for a, b in zip(z_hat.flat, z.flat, strict=True)) / 30
    for loss in (one_step, own_rollout):
        assert float(loss(torch.from_numpy(z_hat), torch.from_numpy(z), "l1")) == pytest.approx(expected)


def test_logarithmic_errors_count_every_step_by_its_own_scale() -> None:
    generator = torch.Generator().manual_seed(4)
    z_hat = torch.randn(5, 3, 4, generator=generator) * torch.tensor([0.01, 1.0, 100.0])[:, None]
    z_hat.requires_grad_(True)
    z = torch.zeros(5, 3, 4)
    log_e = [math.log(z_hat.detach()[:, t].square().mean()) for t in range(3)]
    found = own_rollout(z_hat, z, "log")
    assert found.item() == pytest.approx((log_e[0] + log_e[1] / 2 + log_e[2] / 3) / (11 / 6), abs=1e-5)
    assert one_step(z_hat, z, "log").item() == pytest.approx(sum(log_e) / 3, abs=1e-5)
    (gradient,) = torch.autograd.grad(found, z_hat)
    pull = (gradient * z_hat).sum(dim=(0, 2))  # how the loss falls as a step's error shrinks by its own length
    assert torch.allclose(pull / pull[0], torch.tensor([1, 1 / 2, 1 / 3]), atol=1e-4)


def test_excess_growth_counts_only_what_exceeds_the_allowance() -> None:
    z = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    whitening = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    z_hat = z.clone()
    for k, length in enumerate((1.0, 3.0, 3.0, 12.0)):
        z_hat[:, k, 0] += length  # squared lengths grow by 9, 1 and 16
    z_hat.requires_grad_()
    allowed = torch.tensor([2.0, 2.0, 4.0]).log()
    found = excess_growth(z_hat, z, whitening, allowed)
    assert float(found.detach()) == pytest.approx((math.log(9 / 2) + 0 + math.log(16 / 4)) / 3, rel=1e-5)
    found.backward()
    moves = z_hat.grad.abs().sum(dim=(0, 2))
    assert moves[0] == moves[2] == 0  # the earlier error is no way out: making it larger earns nothing
    assert moves[1] > 0
    assert moves[3] > 0
    assert float(excess_growth(z_hat.detach(), z, whitening, torch.full((3,), 5.0))) == 0.0


def test_neighbours_part_as_fast_as_the_world_expands() -> None:
    """z_{t+1} = 1.3 R z_t in two dimensions (squared distances by 1.69), from starts that are close in pairs."""
    rng = np.random.default_rng(0)
    turn = 1.3 * np.array([[math.cos(0.4), -math.sin(0.4)], [math.sin(0.4), math.cos(0.4)]])
    episodes: dict[int, torch.Tensor] = {}
    for number in range(40):
        z = [rng.normal(size=2)]
        for _ in range(8):
            z.append(turn @ z[-1])
        episodes[number] = torch.tensor(np.array(z), dtype=torch.float32)
    found = measure_geometry(episodes, 8, seed=1)
    assert found.log_growth.shape == (8,)
    torch.testing.assert_close(found.log_growth, torch.full((8,), math.log(1.69)), atol=0.02, rtol=0)
    pooled = (torch.cat(list(episodes.values())) - found.mean) @ found.whitening
    torch.testing.assert_close(torch.cov(pooled.T), torch.eye(2), atol=1e-3, rtol=0)
    shrinking = {number: z.flip(0) for number, z in episodes.items()}  # 1 / 1.69: contraction is not asked for
    assert float(measure_geometry(shrinking, 8, seed=1).log_growth.max()) == 0.0


def test_geometry_terms_equal_their_equations() -> None:
    rng = np.random.default_rng(1)
    z = 0.6 * rng.normal(size=(5, 6, 3))
    torch_z = torch.from_numpy(z)
    turns = []
    for window in z:
        for before, here, after in zip(window, window[1:], window[2:], strict=False):
            a, b = here - before, after - here
            turns.append(1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    assert float(straightening(torch_z)) == pytest.approx(np.mean(turns), rel=1e-6)
    line = torch.arange(5.0)[None, :, None] * torch.tensor([1.0, -2.0, 0.5])
    assert float(straightening(line)) == pytest.approx(0.0, abs=1e-6)
    steps = [np.square(b - a) for window in z for a, b in pairwise(window)]
    assert float(time_similarity(torch_z)) == pytest.approx(np.mean(steps))
    flat = z.reshape(-1, 3)
    short = [max(0.0, 1 - math.sqrt(column.var(ddof=1) + 1e-4)) for column in flat.T]
    assert min(short) > 0
    assert float(variance(torch.from_numpy(flat))) == pytest.approx(np.mean(short))
    assert float(variance(torch.from_numpy(10 * flat))) == 0.0
    c = np.cov(flat.T)
    expected = sum(c[i, j] ** 2 for i in range(3) for j in range(3) if i != j) / 3
    assert float(covariance(torch.from_numpy(flat))) == pytest.approx(expected)


def _sigreg_on_a_rank(rank: int, folder: str, ranks: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    z = torch.randn(2, 24, 6, generator=torch.Generator().manual_seed(1)) * 1.7 + 0.3
    part = z.chunk(ranks, dim=1)[rank].clone().requires_grad_()
    loss = sigreg(part, torch.Generator().manual_seed(9), projections=5)
    loss.backward()
    torch.save((loss.detach(), part.grad / ranks), f"{folder}/rank{rank}.pt")  # averaged, as data parallelism does
    torch.distributed.destroy_process_group()


def test_sigreg_on_two_ranks_is_sigreg_of_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_sigreg_on_a_rank, (str(tmp_path), 2), nprocs=2)
    z = (torch.randn(2, 24, 6, generator=torch.Generator().manual_seed(1)) * 1.7 + 0.3).requires_grad_()
    loss = sigreg(z, torch.Generator().manual_seed(9), projections=5)
    loss.backward()
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for value, _ in found:
        torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(torch.cat([gradient for _, gradient in found], dim=1), z.grad)


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
