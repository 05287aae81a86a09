"""The metric against an independent plain loop, and its small pieces."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from worldline.core.errors import WorldlineError
from worldline.core.types import Factor
from worldline.evaluate.reliability import (
    Bootstrap,
    FactorLimits,
    Forecasts,
    Reliability,
    moved,
    paired_difference,
    rank_correlation,
    score,
)
from worldline.model.factors import cross_entropy

POINT = Factor(name="point", columns=(0, 1))
LIMITS = FactorLimits(probe_r2=0.99, probe_rmse=0.1, canonical_r2=0.99, canonical_rmse=0.1)


def walk(windows: int = 120, steps: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    episodes = np.repeat(np.arange(12), windows // 12)
    truth = rng.normal(0, 1, (windows, 1, 2)) + np.cumsum(rng.normal(0, 0.25, (windows, steps + 1, 2)), axis=1)
    return episodes, truth, rng


def forecasts(
    episodes: np.ndarray, truth: np.ndarray, model: np.ndarray, swapped: np.ndarray | None = None
) -> Forecasts:
    still = np.repeat(truth[:, :1], truth.shape[1], axis=1)
    return Forecasts(
        episodes=episodes,
        truth={"point": truth},
        real={"point": truth},
        model={"point": model},
        swapped={"point": still if swapped is None else swapped},
        naive={"persistence": {"point": still}},
        mean={"point": truth.reshape(-1, 2).mean(axis=0)},
    )


def judge(given: Forecasts, limits: FactorLimits = LIMITS, rank: float = 0.9, seed: int = 3) -> Reliability:
    return score(
        given, (POINT,), {"point": limits}, {"point": np.full(len(given.episodes), rank)}, draws=200, seed=seed
    )


def test_curves_and_draws_equal_a_plain_loop() -> None:
    episodes, truth, rng = walk()
    model = truth + rng.normal(0, 1, truth.shape) * np.linspace(0, 1.2, truth.shape[1])[:, None]
    given = forecasts(episodes, truth, model)
    result = judge(given).factors[0]
    weights = Bootstrap(episodes, 200, 3)._weights[1:]
    mean, told_apart = given.mean["point"], 0
    for h in range(1, truth.shape[1]):
        chosen = [w for w in range(len(truth)) if np.linalg.norm(truth[w, h] - truth[w, 0]) > 0.3]
        assert result.num_moved[h] == len(chosen)
        if not chosen:
            continue
        error = {w: sum((model[w, h] - truth[w, h]) ** 2) for w in chosen}
        naive = {w: sum((truth[w, 0] - truth[w, h]) ** 2) for w in chosen}
        base = {w: sum((mean - truth[w, h]) ** 2) for w in chosen}
        assert result.r[h] == pytest.approx(1 - sum(error.values()) / sum(base.values()))
        assert result.r_naive["persistence"][h] == pytest.approx(1 - sum(naive.values()) / sum(base.values()))
        start, end = np.array([[truth[w, 0] - mean, truth[w, h] - mean] for w in chosen]).swapaxes(0, 1)
        share = np.linalg.lstsq(start.reshape(-1, 1), end.ravel(), rcond=None)[0][0]  # standing still at its best
        still = {w: sum((mean + share * (truth[w, 0] - mean) - truth[w, h]) ** 2) for w in chosen}
        assert result.r_naive["standing still"][h] == pytest.approx(1 - sum(still.values()) / sum(base.values()))
        held, better, drawn = 0, 0, []
        for weight in weights:
            total = [sum(weight[episodes[w]] * kind[w] for w in chosen) for kind in (error, naive, base, still)]
            held += total[0] <= 1.1 * min(total[1], total[2])
            better += total[0] < total[3]
            drawn.append(1 - total[0] / total[2])
        assert result.beats_naive[h] == (min(held, better) >= 0.95 * len(weights))
        told_apart += held >= 0.95 * len(weights) > better
        assert (result.r_low[h], result.r_high[h]) == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))))
        if result.scored[h]:
            assert result.credit[h] == pytest.approx(max(0, result.r[h]) * result.beats_naive[h])
        else:
            assert len(chosen) < 30
            assert np.isnan(result.credit[h])
    assert result.beats_naive.any()
    assert not result.beats_naive.all()
    assert told_apart, "some steps must lose to standing still alone"


def test_hri_and_trust_horizon_follow_the_credit_curve() -> None:
    episodes, truth, rng = walk()
    model = truth + rng.normal(0, 1, truth.shape) * np.where(np.arange(21) > 12, 1.5, 0.01)[:, None]
    result = judge(forecasts(episodes, truth, model))
    curve = result.factors[0].credit
    assert result.hri[10] is not None
    assert result.hri[10].value == pytest.approx(np.nanmean(curve[1:11]))
    assert result.hri[10].low <= result.hri[10].value <= result.hri[10].high
    assert 100 not in result.hri
    assert (result.horizon.steps, result.horizon.ended_by, result.horizon.censored) == (12, "point", False)
    whole = judge(forecasts(episodes, truth, truth)).horizon
    assert (whole.steps, whole.ended_by, whole.censored) == (20, None, True)


def test_a_factor_the_encoder_lost_earns_nothing_and_cannot_hide() -> None:
    episodes, truth, _ = walk()
    lost = FactorLimits(probe_r2=0.2, probe_rmse=50.0, canonical_r2=0.99, canonical_rmse=0.1)
    result = judge(forecasts(episodes, truth, truth), lost)
    assert result.factors[0].scored.any()
    assert result.hri[10] is not None
    assert result.hri[10].value == 0.0
    assert (result.horizon.steps, result.horizon.ended_by) == (0, "point")
    assert result.invalid is not None


def test_a_lost_factor_that_stands_still_counts_too() -> None:
    """A target that never moves is no step's question, but who forgets it has forgotten it."""
    episodes, truth, rng = walk()
    still = np.repeat(rng.normal(size=(len(truth), 1, 2)), truth.shape[1], axis=1)
    given, mark = forecasts(episodes, truth, truth), Factor(name="mark", columns=(2, 3))
    parts = {key: {**getattr(given, key), "mark": still} for key in ("truth", "real", "model", "swapped")}
    both = replace(
        given,
        **parts,
        naive={"persistence": {**given.naive["persistence"], "mark": still}},
        mean={**given.mean, "mark": np.zeros(2)},
    )
    ranks = {name: np.full(len(episodes), 0.9) for name in ("point", "mark")}

    def judged(limits: FactorLimits) -> Reliability:
        return score(both, (POINT, mark), {"point": LIMITS, "mark": limits}, ranks, draws=200, seed=3)

    kept, lost = judged(LIMITS), judged(replace(LIMITS, probe_r2=0.47))
    assert kept.hri[10] is not None
    assert lost.hri[10] is not None
    assert lost.hri[10].value == pytest.approx(kept.hri[10].value / 2)
    assert kept.horizon.censored
    assert (lost.horizon.steps, lost.horizon.ended_by) == (0, "mark")


def test_an_invisible_factor_is_excluded_with_the_reason() -> None:
    episodes, truth, _ = walk()
    unseen = FactorLimits(probe_r2=0.5, probe_rmse=0.1, canonical_r2=0.5, canonical_rmse=0.1)
    result = judge(forecasts(episodes, truth, truth), unseen)
    assert not result.factors
    assert "0.50" in result.excluded["point"]
    assert result.hri[10] is None


def test_gates_need_an_interval_above_chance() -> None:
    episodes, truth, _ = walk()
    good = judge(forecasts(episodes, truth, truth))
    assert good.invalid is None
    deaf = judge(forecasts(episodes, truth, truth, swapped=truth))
    assert deaf.invalid is not None
    assert deaf.invalid.startswith("G2")
    lost = judge(forecasts(episodes, truth, truth), rank=0.5)
    assert lost.invalid is not None
    assert lost.invalid.startswith("G3")


def test_paired_difference_is_narrower_than_either_interval() -> None:
    episodes, truth, rng = walk()
    hard = rng.normal(0, 0.4, (12, 1, 2))[episodes]  # episodes differ in difficulty, for both models alike
    noise = rng.normal(0, 1, truth.shape) * np.abs(hard)
    ours, other = (judge(forecasts(episodes, truth, truth + k * noise)) for k in (1.0, 1.1))
    difference = paired_difference(ours, other, 10)
    assert ours.hri[10] is not None
    assert other.hri[10] is not None
    assert difference.value == pytest.approx(ours.hri[10].value - other.hri[10].value)
    assert 0 < difference.low <= difference.value <= difference.high
    assert difference.high - difference.low < ours.hri[10].high - ours.hri[10].low
    few = episodes < 6
    with pytest.raises(WorldlineError, match="same windows"):
        paired_difference(ours, judge(forecasts(episodes[few], truth[few], truth[few])), 10)


def test_discrete_factors_are_scored_by_cross_entropy_where_the_class_changed() -> None:
    rng = np.random.default_rng(1)
    classes = np.cumsum(rng.random((90, 15, 1)) < 0.3, axis=1) % 3
    right = np.log(np.where(np.eye(3)[classes[..., 0]] > 0, 0.98, 0.01))
    still = np.repeat(right[:, :1], 15, axis=1)
    factor = Factor(name="door", columns=(0,), kind="discrete")
    prior = np.log(np.bincount(classes.ravel(), minlength=3) / classes.size)
    limits = FactorLimits(probe_r2=0.95, probe_rmse=None, canonical_r2=0.95, canonical_rmse=None)
    given = Forecasts(
        episodes=np.repeat(np.arange(9), 10),
        truth={"door": classes.astype(np.float64)},
        real={"door": right},
        model={"door": right},
        swapped={"door": still},
        naive={"persistence": {"door": still}},
        mean={"door": prior},
    )
    result = score(given, (factor,), {"door": limits}, {"door": np.full(90, 0.8)}, draws=100).factors[0]
    h = 8
    assert result.num_moved[h] == sum(classes[w, h, 0] != classes[w, 0, 0] for w in range(90))
    expected = [(-np.log(0.98), -prior[classes[w, h, 0]]) for w in range(90) if classes[w, h, 0] != classes[w, 0, 0]]
    assert result.r[h] == pytest.approx(1 - sum(e for e, _ in expected) / sum(b for _, b in expected))
    assert result.credit[h] > 0.9
    assert cross_entropy(right[:1, :1], classes[:1, :1]) == pytest.approx(-np.log(0.98))


def test_moved_means_over_three_rmse() -> None:
    truth = np.array([[[0.0, 0.0], [0.2, 0.2], [0.3, 0.3]]])
    assert moved(POINT, truth, 0.1).tolist() == [[False, False, True]]


def test_rank_correlation_is_within_horizon() -> None:
    rng = np.random.default_rng(0)
    error = rng.random((50, 4)) + np.arange(4) * 10
    clock = np.repeat(np.arange(4.0)[None], 50, axis=0)
    assert np.isnan(rank_correlation(clock, error)).all()
    signal = (error + rng.normal(0, 0.2, error.shape)).round(1)  # with ties

    def rank(values: np.ndarray) -> list[float]:
        return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]

    expected = [np.corrcoef(rank(signal[:, h]), rank(error[:, h]))[0, 1] for h in range(4)]
    assert rank_correlation(signal, error) == pytest.approx(expected)


def test_steps_that_nobody_could_score_are_no_evidence() -> None:
    """What first moves at h = 8 and is wrong from then on was trusted at no step, and not up to h = 7."""
    episodes, truth, rng = walk()
    late = np.where(np.arange(21) < 8, 0.0, 1.0)[:, None] * truth
    result = judge(forecasts(episodes, late, late + rng.normal(0, 1.5, truth.shape)))
    assert np.flatnonzero(result.factors[0].scored)[0] == 8
    assert (result.horizon.steps, result.horizon.ended_by, result.horizon.censored) == (0, "point", False)
    assert judge(forecasts(episodes, late, late)).horizon.steps == 20
