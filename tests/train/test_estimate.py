"""The error estimator knows what it was shown: fitted on held-out episodes, worthless when the errors are shuffled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import tiny_config

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.data.cache import FrameCache
from worldline.data.collect import CollectConfig, collect
from worldline.data.lerobot import open_dataset
from worldline.evaluate.trust import auroc, reliability_diagram
from worldline.model.checkpoint import ESTIMATOR, load_world
from worldline.model.estimator import TOLD, ErrorEstimator
from worldline.train.estimate import Seen, fit_estimator, fit_to, rollout_steps
from worldline.train.loop import train

FLATTERY = 1.5
"""How much smaller the logarithm of an error is in an episode that the predictor was fitted to."""


def made_up(count: int, seed: int) -> Seen:
    """Return places whose log error is a function of their features, with noise of 0.4 on top."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, TOLD + 12, generator=generator)
    trained = torch.arange(count) % 200 >= 100
    features[:, 8] += 2.0 * trained  # which a fit that did not know of the flattery would take for a reason
    mu = features[:, 0] + torch.relu(features[:, 5]) - 1.2 - FLATTERY * trained
    error = torch.exp(mu + 0.4 * torch.randn(count, generator=generator))
    return Seen(features, error, torch.arange(count) // 100, trained)


def fit(seen: Seen) -> ErrorEstimator:
    return fit_to(ErrorEstimator(6, 20), seen, (seen.episode < 24) & ~seen.trained, seed=0)


def chances(fitted: ErrorEstimator, seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    held_out = ~seen.trained
    mu, log_sigma = fitted(fitted.normalise(seen.features[held_out]))
    return torch.special.ndtr((mu - np.log(0.5)) / log_sigma.exp()).numpy(), (seen.error[held_out] > 0.5).numpy()


def test_fitted_on_true_errors_it_tells_and_on_shuffled_ones_it_guesses() -> None:
    seen, unseen = made_up(6000, 1), made_up(6000, 2)
    chance, wrong = chances(fit(seen), unseen)
    area = auroc(chance, wrong, np.ones((1, len(wrong))))[0]
    assert area > 0.95
    assert reliability_diagram(chance[:, None], wrong[:, None])["mean_gap"] < 0.04
    order = torch.randperm(6000, generator=torch.Generator().manual_seed(3))
    chance, wrong = chances(fit(seen._replace(error=seen.error[order])), unseen)
    area = auroc(chance, wrong, np.ones((1, len(wrong))))[0]
    assert area == pytest.approx(0.5, abs=0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on enough episodes for an estimator."""
    folder = tmp_path_factory.mktemp("estimate")
    data = collect(CollectConfig(env="two_room", path=str(folder / "data"), episodes=60, steps=30, seed=3, workers=1))
    config = tiny_config(data, folder / "run")
    short = {"rollout": 10, "rollout_start": 4}
    joint, frozen = replace(config.joint, steps=4, **short), replace(config.frozen, steps=4, **short)
    return train(replace(config, joint=joint, frozen=frozen))


def test_training_ends_with_an_estimator_that_can_be_made_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(run.parent / "data")
    world = load_world(run)
    kept = world.gauge.estimator
    assert kept is not None
    assert (run / "best" / ESTIMATOR).exists()
    assert read_json(run / "result.json")["error_estimator"] is True
    read: set[int] = set()
    frames = FrameCache.frames

    def watched(cache: FrameCache, episode: int, start: int = 0, count: int | None = None) -> np.ndarray:
        read.add(episode)
        return frames(cache, episode, start, count)

    monkeypatch.setattr(FrameCache, "frames", watched)
    again = fit_estimator(world, FrameCache(dataset, world.config.image_size), tiny_config(run, run).seed)
    for name, tensor in kept.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert read & set(dataset.split("validation"))
    assert not read & set(dataset.split("test"))


def test_too_few_validation_episodes_are_refused(run: Path, finished_run: Path, tiny_data: Path) -> None:
    assert rollout_steps(open_dataset(run.parent / "data"), 4) == 30 - 4
    assert rollout_steps(open_dataset(tiny_data), 4) == 0
    world = load_world(finished_run)
    assert world.gauge.estimator is None
    assert read_json(finished_run / "result.json")["error_estimator"] is False
    with pytest.raises(WorldlineError, match="at least 5 validation episodes"):
        fit_estimator(world, FrameCache(open_dataset(tiny_data), world.config.image_size), 0)
