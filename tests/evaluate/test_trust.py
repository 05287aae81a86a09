"""What the gauge is credited with: telling wrong windows at one horizon, and nothing for knowing the time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_dataset import world_at

from worldline.data.cache import FrameCache
from worldline.data.lerobot import Dataset
from worldline.evaluate.trust import auroc, judge, measure_trust, reliability_diagram
from worldline.evaluate.windows import choose_windows, encode_windows, past_actions, window_actions
from worldline.model.checkpoint import load_world
from worldline.model.estimator import ErrorEstimator

RNG = np.random.default_rng(0)
EPISODES = np.repeat(np.arange(40), 10)
AT = [5, 10, 15, 20]


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    reading, wrong = RNG.integers(0, 6, 60).astype(float), RNG.random(60) < 0.4
    weights = np.stack([np.ones(60), RNG.integers(0, 3, 60)]).astype(float)
    found = auroc(reading, wrong, weights)
    for row, weight in zip(found, weights, strict=True):
        won = pairs = 0.0
        for i in np.flatnonzero(wrong):
            for j in np.flatnonzero(~wrong):
                pairs += weight[i] * weight[j]
                won += weight[i] * weight[j] * ((reading[i] > reading[j]) + 0.5 * (reading[i] == reading[j]))
        assert row == pytest.approx(won / pairs)
    assert np.isnan(auroc(reading, np.zeros(60, bool), weights)).all()


def test_a_clock_earns_nothing_and_the_truth_everything() -> None:
    error = np.exp(RNG.normal(size=(400, 4)) + np.array([-1.5, -1.0, -0.7, 0.3]))
    clock = np.tile(np.array(AT, dtype=float), (400, 1))
    noise = RNG.random((400, 4))
    figures = judge(AT, error, {"clock": clock, "truth": error, "noise": noise}, None, EPISODES, draws=100)
    assert all(figures["counts"])
    assert figures["mean_auroc"]["clock"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert figures["mean_auroc"]["truth"]["value"] == 1.0
    assert figures["mean_auroc"]["noise"]["low"] < 0.5 < figures["mean_auroc"]["noise"]["high"]


def test_only_horizons_with_enough_of_both_count() -> None:
    error = np.zeros((400, 4))
    for column, share in enumerate((0.05, 0.1, 0.9, 0.95)):
        error[: round(400 * share), column] = 1.0
    good = np.array([0.0, 1.0, 1.0, 0.0]) * error  # right where it counts, deaf elsewhere
    figures = judge(AT, error, {"good": good}, None, EPISODES, draws=100)
    assert figures["counts"] == [False, True, True, False]
    assert figures["mean_auroc"]["good"]["value"] == 1.0
    assert judge(AT, 0 * error, {"good": good}, None, EPISODES, draws=100)["mean_auroc"]["good"] is None


def test_the_reliability_diagram_shows_overconfidence() -> None:
    chance = RNG.random((5000, 1))
    honest = reliability_diagram(chance, RNG.random((5000, 1)) < chance)
    assert sum(row["count"] for row in honest["bins"]) == 5000
    assert honest["mean_gap"] < 0.04
    bold = reliability_diagram(chance, RNG.random((5000, 1)) < 0.5 + 0.3 * (chance - 0.5))
    assert bold["mean_gap"] > 0.1


@pytest.mark.parametrize("fitted", [True, False])
def test_a_world_is_judged_with_and_without_an_estimator(dataset: Dataset, tmp_path: Path, fitted: bool) -> None:
    world = load_world(world_at(tmp_path / "world", dataset, 0))
    if fitted:
        torch.manual_seed(0)
        world.gauge.estimator = ErrorEstimator(24, 30).eval().requires_grad_(False)
    windows = choose_windows(dataset, context=4, horizon=20, count=200)
    context, real = encode_windows(world, FrameCache(dataset, 64), windows)
    past, actions = past_actions(dataset, windows), window_actions(dataset, windows)
    figures = measure_trust(world, context, past, actions, real, windows.episodes, draws=100)
    assert figures["at"] == AT
    assert set(figures["auroc"]) == {"region", "cycle"} | ({"estimator"} if fitted else set())
    assert ("reliability" in figures) == fitted
    with torch.inference_mode():
        seen, before = torch.from_numpy(context[:, -2:].copy()), torch.from_numpy(past[:, -1:].copy())
        state = world.begin(seen, before)
        z_hat = world.rollout(state, torch.from_numpy(actions))
        error = world.gauge.error(z_hat, torch.from_numpy(real[:, 1:].copy())).numpy()
    np.testing.assert_allclose(figures["share_wrong"], (error > 0.5).mean(axis=0)[4::5], atol=1e-5)
    if fitted:  # shares may be all alike, errors are not
        np.testing.assert_allclose(figures["error"], error.mean(axis=0)[4::5], rtol=1e-4, atol=1e-5)
        with torch.inference_mode():  # with the context's surprise
            _, told = world.rollout_with_error(state, torch.from_numpy(actions), world.track(seen, before))
        np.testing.assert_allclose(figures["expected_error"], told.error.mean(dim=0)[4::5], rtol=1e-3, atol=1e-5)
