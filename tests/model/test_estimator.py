"""The error estimator: what it says is what its distribution says, and it travels with the weights it was fitted on."""

from pathlib import Path

import pytest
import torch
from toy_world import SPEC, TINY

from worldline.core.errors import WorldlineError
from worldline.model import World, load_world, save_world
from worldline.model.checkpoint import ESTIMATOR, save_estimator, weights_sha256
from worldline.model.estimator import ErrorEstimator, memory_size


@pytest.fixture
def world() -> World:
    torch.manual_seed(2)
    made = World(TINY, SPEC).eval().requires_grad_(False)
    made.gauge.fit(made, torch.randn(500, 24))
    made.gauge.estimator = ErrorEstimator(24, memory_size(made.predictor.initial(1))).requires_grad_(False)
    return made


def test_mean_and_chance_are_those_of_the_distribution() -> None:
    torch.manual_seed(0)
    estimator = ErrorEstimator(4, 3).requires_grad_(False)
    white, memory, steps = torch.randn(5, 4), (torch.randn(5, 3),), torch.arange(1, 6)
    estimator.out.bias[1] -= 1.5  # narrower: the mean of a wide log-normal distribution is slow to be drawn
    narrow = estimator.estimate(white, memory, steps)
    mu, log_sigma = estimator(estimator.features(white, memory, steps))
    drawn = torch.exp(mu + log_sigma.exp() * torch.randn(100_000, 5))
    torch.testing.assert_close(narrow.error, drawn.mean(dim=0), rtol=5e-3, atol=0)
    assert (drawn.mean(dim=0) / mu.exp()).min() > 1.01
    estimator.out.bias[1] += 1.5
    wide = estimator.estimate(white, memory, steps)
    mu, log_sigma = estimator(estimator.features(white, memory, steps))
    drawn = torch.exp(mu + log_sigma.exp() * torch.randn(400_000, 5))
    torch.testing.assert_close(wide.wrong, (drawn > 0.5).float().mean(dim=0), rtol=0, atol=3e-3)
    assert wide.wrong.std() > 0.01


def test_a_real_frame_has_no_error(world: World) -> None:
    estimate = world.gauge.estimate(torch.randn(3, 24), world.predictor.initial(3), 0)
    assert torch.equal(estimate.error, torch.zeros(3))
    assert torch.equal(estimate.wrong, torch.zeros(3))


def test_the_rollout_is_the_same_and_can_be_continued(world: World) -> None:
    z, actions = torch.randn(3, 4, 24), 512 * torch.rand(3, 11, 2)
    state = world.begin(z, actions[:, :3])
    plain, (imagined, whole) = world.rollout(state, actions[:, 3:]), world.rollout_with_error(state, actions[:, 3:])
    assert torch.equal(plain, imagined)
    assert whole.error.shape == whole.wrong.shape == (3, 8)
    middle = state
    for step in range(3, 6):
        middle = world.step(middle, actions[:, step])
    _, rest = world.rollout_with_error(middle, actions[:, 6:], since=3)
    assert torch.equal(rest.error, whole.error[:, 3:])
    _, forgetful = world.rollout_with_error(middle, actions[:, 6:])
    assert not torch.allclose(forgetful.error, whole.error[:, 3:])


def test_it_travels_with_the_weights_and_leaves_their_hash(world: World, tmp_path: Path) -> None:
    path = save_world(tmp_path / "toy", world, training={}, half=True)
    loaded = load_world(path)
    assert loaded.gauge.estimator is not None
    for name, tensor in world.gauge.estimator.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, loaded.gauge.estimator.state_dict()[name])
    with_it = weights_sha256(loaded)
    (path / ESTIMATOR).unlink()
    assert weights_sha256(load_world(path)) == with_it


def test_a_world_without_one_says_so(world: World, tmp_path: Path) -> None:
    world.gauge.estimator = None
    loaded = load_world(save_world(tmp_path / "toy", world, training={}))
    with pytest.raises(WorldlineError, match="has no error estimator"):
        loaded.rollout_with_error(loaded.begin(torch.zeros(1, 1, 24), torch.zeros(1, 0, 2)), torch.zeros(1, 3, 2))


def test_a_stranger_is_refused(world: World, tmp_path: Path) -> None:
    path = save_world(tmp_path / "toy", world, training={})
    world.action_mean += 1.0
    other = save_world(tmp_path / "other", world, training={})
    whole = (path / ESTIMATOR).read_bytes()
    (path / ESTIMATOR).write_bytes((other / ESTIMATOR).read_bytes())
    with pytest.raises(WorldlineError, match="fitted on other weights"):
        load_world(path)
    (path / ESTIMATOR).write_bytes(whole[:-7])
    with pytest.raises(WorldlineError, match="not an error estimator of this world"):
        load_world(path)
    save_estimator(path, ErrorEstimator(24, 7))
    with pytest.raises(WorldlineError, match="not an error estimator of this world"):
        load_world(path)


def test_another_memory_is_refused(world: World) -> None:
    with pytest.raises(WorldlineError, match="48 values of memory"):
        world.gauge.estimate(torch.zeros(2, 24), (torch.zeros(2, 40),), 1)
