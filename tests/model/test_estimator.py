"""The error estimator: what it says is what its distribution says, and it travels with the weights it was fitted on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from toy_world import SPEC, TINY
from worldline.core.errors import WorldlineError
from worldline.model import World, load_world, save_world
from worldline.model.checkpoint import ESTIMATOR, save_estimator, weights_sha256
from worldline.model.estimator import SURPRISE, TOLD, ErrorEstimator, Track


@pytest.fixture
def world() -> World:
    torch.manual_seed(2)
    made = World(TINY, SPEC).eval().requires_grad_(False)
    made.gauge.fit(made, torch.randn(500, 24))
    made.gauge.estimator = ErrorEstimator(24, 30).requires_grad_(False)
    made.gauge.estimator.real.copy_(torch.randn(30, 24))
    return made


def some_track(estimator: ErrorEstimator, count: int) -> Track:
    track = estimator.begin(torch.randn(count, 3, 4), torch.randn(count, 2, 4), 2)
    return estimator.follow(track, torch.randn(count, 4), torch.randn(count, 2))


def test_mean_and_chance_are_those_of_the_distribution() -> None:
    torch.manual_seed(0)
    estimator = ErrorEstimator(4, 20).requires_grad_(False)
    track = some_track(estimator, 5)
    estimator.out.bias[1] -= 1.5  # narrower: the mean of a wide log-normal distribution is slow to be drawn
    narrow = estimator.estimate(track)
    mu, log_sigma = estimator(estimator.normalise(estimator.features(track)))
    drawn = torch.exp(mu + log_sigma.exp() * torch.randn(100_000, 5))
    torch.testing.assert_close(narrow.error, drawn.mean(dim=0), rtol=5e-3, atol=0)
    assert (drawn.mean(dim=0) / mu.exp()).min() > 1.01
    estimator.out.bias[1] += 1.5
    wide = estimator.estimate(track)
    mu, log_sigma = estimator(estimator.normalise(estimator.features(track)))
    drawn = torch.exp(mu + log_sigma.exp() * torch.randn(400_000, 5))
    torch.testing.assert_close(wide.wrong, (drawn > 0.5).float().mean(dim=0), rtol=0, atol=3e-3)
    assert wide.wrong.std() > 0.01


def test_a_track_tells_what_happened() -> None:
    torch.manual_seed(0)
    estimator = ErrorEstimator(4, 20)
    estimator.real.copy_(torch.randn(20, 4))
    context, foreseen = torch.randn(3, 5, 4), torch.randn(3, 4, 4)
    steps, actions = torch.randn(3, 6, 4), torch.randn(3, 6, 2)
    track = estimator.begin(context, foreseen, 2)
    for step in range(6):
        track = estimator.follow(track, steps[:, step], actions[:, step])
    latents = torch.cat((context[:, -1:], steps), dim=1)

    def length(x: torch.Tensor) -> torch.Tensor:
        return x.square().mean(dim=-1).sqrt()

    near = ((steps[:, :, None] - estimator.real).square().mean(dim=-1).sqrt()).sort(dim=-1).values  # (b, t, m)
    path, off = length(latents[:, 1:] - latents[:, :-1]), length(foreseen - context[:, 1:])
    told = [
        torch.tensor(6.0).log().expand(3),
        near[:, :, 0].mean(dim=1).log(),
        path[:, -1].log(),
        length(steps[:, -1] - context[:, -1]).log(),
        path.mean(dim=1).log(),
        length(actions).mean(dim=1),
        length(actions.sum(dim=1)) / 6**0.5,
        length(steps[:, -1]),
        near[:, -1, 0].log(),
        near[:, -1, 7].log(),
        off.mean(dim=1).log(),
        off[:, -1].log(),
        length(context[:, 1:] - context[:, :-1]).mean(dim=1).log(),
    ]
    found = estimator.features(track)
    assert len(told) == TOLD
    torch.testing.assert_close(found[:, :TOLD], torch.stack(told, dim=1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[:, TOLD:], torch.cat((steps[:, -1], steps[:, -1].square()), dim=1))


def test_an_unknown_surprise_is_the_usual_one_and_a_diverged_rollout_is_not() -> None:
    torch.manual_seed(0)
    estimator = ErrorEstimator(4, 20).requires_grad_(False)
    estimator.mean.copy_(torch.randn_like(estimator.mean))
    track = estimator.follow(estimator.begin(torch.randn(2, 1, 4), None, 2), torch.randn(2, 4), torch.zeros(2, 2))
    usual = track._replace(surprise=estimator.mean[SURPRISE].expand(2, -1))
    assert torch.equal(estimator.estimate(track).error, estimator.estimate(usual).error)
    for left in (torch.inf, torch.nan):
        beyond = estimator.follow(track, torch.full((2, 4), left), torch.zeros(2, 2))
        assert not torch.isfinite(estimator.estimate(beyond).error).any()


def test_a_real_frame_has_no_error(world: World) -> None:
    estimate = world.gauge.estimate(world.track(torch.randn(3, 1, 24), torch.zeros(3, 0, 2)))
    assert torch.equal(estimate.error, torch.zeros(3))
    assert torch.equal(estimate.wrong, torch.zeros(3))


def test_the_rollout_is_the_same_and_can_be_continued(world: World) -> None:
    z, actions = torch.randn(3, 4, 24), 512 * torch.rand(3, 11, 2)
    state, track = world.begin(z, actions[:, :3]), world.track(z, actions[:, :3])
    plain = world.rollout(state, actions[:, 3:])
    imagined, whole = world.rollout_with_error(state, actions[:, 3:], track)
    assert torch.equal(plain, imagined)
    assert whole.error.shape == whole.wrong.shape == (3, 8)
    middle = state
    for step in range(3, 6):
        middle = world.step(middle, actions[:, step])
        track = world.gauge.follow(track, middle.z, world.normalise_actions(actions[:, step]))
    _, rest = world.rollout_with_error(middle, actions[:, 6:], track)
    assert torch.equal(rest.error, whole.error[:, 3:])
    _, forgetful = world.rollout_with_error(middle, actions[:, 6:])
    assert not torch.allclose(forgetful.error, whole.error[:, 3:])


def test_surprise_is_that_of_the_frames_it_was_given(world: World) -> None:
    z, actions = torch.randn(3, 4, 24), 512 * torch.rand(3, 3, 2)
    state = world.begin(z[:, :3], actions[:, :2])
    off = world.gauge.error(world.step(state, actions[:, 2]).z, z[:, 3]).sqrt()
    torch.testing.assert_close(world.track(z, actions).surprise[:, 1], off.log())
    assert world.track(z[:, :1], actions[:, :0]).surprise.isnan().all()


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
    save_estimator(path, ErrorEstimator(23, 30))
    with pytest.raises(WorldlineError, match="not an error estimator of this world"):
        load_world(path)


def test_one_of_another_version_is_left_unread(world: World, tmp_path: Path) -> None:
    path = save_world(tmp_path / "toy", world, training={})
    save_file({"mean": torch.zeros(3)}, path / ESTIMATOR, metadata={"weights_sha256": "of the first version"})
    with pytest.warns(UserWarning, match="another version"):
        assert load_world(path).gauge.estimator is None
