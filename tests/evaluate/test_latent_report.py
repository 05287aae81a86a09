"""What the latents themselves say, on rollouts that are made to drift in known ways."""

from __future__ import annotations

import numpy as np
import pytest

from worldline.evaluate.drift import LatentReport, describe_latents, describe_region, growth
from worldline.evaluate.ranking import Whitening

RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(6, 6))
"""Latents are mixed and stretched, so that only whitened units can give the figures below."""


def latents(*shape: int) -> np.ndarray:
    return (RNG.normal(size=(*shape, 6)) @ MIX + 3.0).astype(np.float32)


@pytest.fixture(autouse=True)
def _same_noise_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(1))


TRAIN = latents(20_000)
WHITENING = Whitening.fit(TRAIN)


def report(imagined: np.ndarray, real: np.ndarray, every: int = 1) -> LatentReport:
    return describe_latents(WHITENING, TRAIN, real, imagined.astype(np.float32), every)


def noise(size: np.ndarray, windows: int = 400) -> np.ndarray:
    """Return errors of a root mean square of `size[h]` whitened units a dimension."""
    return (RNG.normal(size=(windows, len(size), 6)) * size[:, None]) @ MIX


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_growth_is_that_of_the_error(power: float) -> None:
    real = latents(400, 101)
    size = 0.01 * np.arange(101) ** power
    found = report(real + noise(size), real)
    assert found.growth == pytest.approx(10**power, rel=0.1)
    np.testing.assert_allclose(found.error[1:], size[1:], rtol=0.15)
    assert found.one_step == found.error[1]


def test_growth_is_not_told_where_it_is_not_known() -> None:
    flat = np.ones(101)
    assert growth(flat) == 1.0
    assert growth(flat[:100]) is None
    assert growth(np.where(np.arange(101) == 10, 0.0, flat)) is None
    assert growth(np.where(np.arange(101) % 7 == 0, flat, np.nan)) is None, "10 is no multiple of 7"


def test_steps_between_those_of_the_model_say_nothing() -> None:
    real = latents(50, 21)
    found, whole = report(real + 0.1, real, every=5), report(real + 0.1, real)
    asked = np.arange(21) % 5 == 0
    for name in ("error", "inside", "radius"):
        values = getattr(found, name)
        np.testing.assert_array_equal(values[asked], getattr(whole, name)[asked])
        assert np.isnan(values[~asked]).all()
    assert found.one_step == found.error[5]


@pytest.mark.parametrize(
    ("change", "inside", "radius"),
    [
        ("none", 0.99, 1.0),
        ("shrinks to half", 1.0, 0.5),
        ("grows to three", 0.05, 3.0),
        ("forgets to the mean", 1.0, 0.0),
        ("one in four diverges", 0.745, 1.15),
        ("three in four are undefined", 0.2475, np.inf),
    ],
)
def test_region_share_and_radius_over_a_thousand_steps(change: str, inside: float, radius: float) -> None:
    real = latents(40, 11)
    found = report(real, real)
    imagined = latents(200, 1001)
    middle = TRAIN.mean(axis=0)
    scale = {"shrinks to half": 0.5, "grows to three": 3.0, "forgets to the mean": 0.0}.get(change, 1.0)
    imagined = (middle + (imagined - middle) * np.linspace(1, scale, 1001)[:, None]).astype(np.float32)
    if change == "one in four diverges":
        imagined[:50, 500:] = np.inf
    if change == "three in four are undefined":
        imagined[:150, 500:] = np.nan
    share, median = describe_region(WHITENING, found, imagined)
    assert share.shape == median.shape == (1001,)
    assert share[0] == pytest.approx(0.99, abs=0.03)
    assert median[0] == pytest.approx(1.0, abs=0.1)
    assert share[-1] == pytest.approx(inside, abs=0.05)
    if np.isfinite(radius):
        assert median[-1] == pytest.approx(radius, abs=0.15 * max(1.0, radius))  # a median of 200
    else:
        assert median[-1] > 1e6


def test_a_frozen_rollout_is_inside_and_says_so_by_its_error() -> None:
    real = latents(400, 101)
    frozen = np.repeat(real[:, :1], 101, axis=1)
    found = report(frozen, real)
    assert found.inside.min() > 0.97
    np.testing.assert_allclose(found.error[1:], np.sqrt(2), rtol=0.1)
    np.testing.assert_allclose(found.error, found.error_persistence)
