"""How well a world's gauge tells, while it imagines, which latents have gone wrong.

Wrong means an error e = |W (z_hat - z)|^2 / d above half the variance of real latents. A reading is judged among
windows at the *same* horizon: errors grow with h, and a clock alone would look wise.

Shape legend: n windows, q horizons that are asked, c context, d latent, a action.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from worldline.evaluate.reliability import DRAWS, Bootstrap, interval
from worldline.model.estimator import HALF
from worldline.model.world import World

EVERY = 5
"""Horizons asked: this one and its multiples."""
SHARES = 0.1, 0.9
"""A horizon counts where the share of wrong windows lies between these, both included."""
_BINS = 10
_DIGITS = 5


@torch.inference_mode()
def measure_trust(
    world: World,
    context: Float32[np.ndarray, "n c d"],
    past: Float32[np.ndarray, "n cm1 a"],
    actions: Float32[np.ndarray, "n t a"],
    real: Float32[np.ndarray, "n t1 d"],
    episodes: Int[np.ndarray, " n"],
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge the gauge's readings, and its estimator where it has one, on windows of test episodes."""
    at = list(range(EVERY, actions.shape[1] + 1, EVERY))
    rows = [h - 1 for h in at]
    kept = world.config.context
    before = torch.from_numpy(past[:, past.shape[1] - kept + 1 :].copy())
    seen = torch.from_numpy(context[:, context.shape[1] - kept :].copy())
    state = world.begin(seen, before)
    readings: dict[str, Float[np.ndarray, "n q"]] = {}
    expected = None
    if world.gauge.estimator is None:
        z_hat = world.rollout(state, torch.from_numpy(actions))[:, rows]
    else:
        imagined, estimate = world.rollout_with_error(state, torch.from_numpy(actions), world.track(seen, before))
        z_hat, expected = imagined[:, rows], _numbers(estimate.error[:, rows])
        readings["estimator"] = _numbers(estimate.wrong[:, rows])
    readings["region"] = _numbers(world.gauge.region(z_hat))
    readings["cycle"] = _numbers(torch.cat([world.gauge.cycle(world, part) for part in torch.split(z_hat, 64)]))
    error = _numbers(world.gauge.error(z_hat, torch.from_numpy(real[:, at].copy())))
    return judge(at, error, readings, expected, episodes, draws, seed)


def judge(
    at: list[int],
    error: Float[np.ndarray, "n q"],
    readings: dict[str, Float[np.ndarray, "n q"]],
    expected: Float[np.ndarray, "n q"] | None,
    episodes: Int[np.ndarray, " n"],
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Return AUROC by horizon with its mean, and the estimator's reliability diagram, as JSON.

    `readings` grow with doubt; `estimator` among them is a chance, and `expected` its error.
    """
    wrong = error > HALF
    share = wrong.mean(axis=0)
    counts = (share >= SHARES[0]) & (share <= SHARES[1])
    # which window counts how often in each draw; row 0 is the sample
    weights = Bootstrap(episodes, draws, seed).sums(np.eye(len(episodes)))
    areas, means = {}, {}
    for name, reading in readings.items():
        by_horizon = [auroc(reading[:, q], wrong[:, q], weights) for q in range(len(at))]
        areas[name] = [_rounded(area[0]) for area in by_horizon]
        asked = [area for area, counted in zip(by_horizon, counts, strict=True) if counted]
        mean = None
        if asked:  # a draw without right or without wrong windows at a horizon passes over it
            rows = np.nanmean(np.where(np.isfinite(asked), asked, np.nan), axis=0)
            mean = {key: _rounded(value) for key, value in asdict(interval(rows)).items()}
        means[name] = mean
    figures: dict[str, Any] = {
        "at": at,
        "share_wrong": [_rounded(value) for value in share],
        "counts": counts.tolist(),
        "auroc": areas,
        "mean_auroc": means,
    }
    if expected is not None:
        figures["error"] = [_rounded(value) for value in np.minimum(error, 1e6).mean(axis=0)]
        figures["expected_error"] = [_rounded(value) for value in np.minimum(expected, 1e6).mean(axis=0)]
        figures["reliability"] = reliability_diagram(readings["estimator"], wrong)
    return figures


def auroc(
    reading: Float[np.ndarray, " n"], wrong: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, " b"]:
    """Return the chance that a wrong window reads higher than a right one, ties counting half, for each row of weights.

    NaN where a row has none of either.
    """
    above, below = reading[wrong], reading[~wrong]
    wins = (above[:, None] > below) + 0.5 * (above[:, None] == below)  # (wrong, right)
    of_wrong, of_right = weights[:, wrong], weights[:, ~wrong]
    pairs = of_wrong.sum(axis=1) * of_right.sum(axis=1)
    won = ((of_wrong @ wins) * of_right).sum(axis=1)
    area: np.ndarray = np.where(pairs > 0, won / np.maximum(pairs, 1e-300), np.nan)
    return area


def reliability_diagram(chance: Float[np.ndarray, "n q"], wrong: Bool[np.ndarray, "n q"]) -> dict[str, Any]:
    """Return by tenths of the chance given: its mean, the share that was wrong, how many; and the mean gap between."""
    place = np.minimum((chance * _BINS).astype(int), _BINS - 1)
    rows, gap = [], 0.0
    for tenth in range(_BINS):
        inside = place == tenth
        if count := int(inside.sum()):
            said, found = float(chance[inside].mean()), float(wrong[inside].mean())
            rows.append({"said": _rounded(said), "found": _rounded(found), "count": count})
            gap += abs(said - found) * count / chance.size
    return {"bins": rows, "mean_gap": _rounded(gap)}


def _numbers(values: Tensor) -> Float[np.ndarray, "n q"]:
    """Return a reading of each window; where a rollout left for infinity, the largest there is."""
    numbers: np.ndarray = np.nan_to_num(values.double().numpy(), nan=1e300, posinf=1e300)
    return numbers


def _rounded(value: float) -> float | None:
    return round(float(value), _DIGITS) if np.isfinite(value) else None
