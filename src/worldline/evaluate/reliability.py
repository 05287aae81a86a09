"""How long, and in what, a world model can be trusted: R_f(h), credit, HRI, H* and the gates G1 to G3.

Works on arrays alone: no model, no dataset. A forecast is a mapping from a factor's name to an array
(n windows, h = 0 ... T, k): k values in native units for a continuous factor, k log probabilities for a discrete one.
Index 0 of every forecast is the present, read from the last real frame.

Decisions where the definition leaves room are listed in docs/evaluate.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from worldline.core.errors import WorldlineError
from worldline.core.seeding import rng_for
from worldline.core.types import Factor
from worldline.model.factors import cross_entropy, squared_error

Forecast = Mapping[str, Shaped[np.ndarray, "n t _"]]

DRAWS = 1000
MIN_MOVED_WINDOWS = 30
MOVED_RMSE = 3.0
VISIBLE_R2 = 0.8
ENCODER_SHARE = 0.8
NAIVE_MARGIN = 1.1
STILL_MARGIN = 1.0 - 1e-9
"""Standing still has to be beaten: to be as good as it earns nothing."""
BURDEN = 0.95
TRUSTED_CREDIT = 0.5
HORIZONS = (10, 50, 100)
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class FactorLimits:
    """What encoders can read of a factor on held-out real frames, the measured one and the canonical one.

    RMSE is the root of the mean squared norm of the error vector, in native units (None for discrete factors).
    """

    probe_r2: float
    probe_rmse: float | None
    canonical_r2: float
    canonical_rmse: float | None

    @property
    def visible(self) -> bool:
        """True where the factor can be seen at all, so that it is scored."""
        return self.canonical_r2 >= VISIBLE_R2

    @property
    def encoded(self) -> bool:
        """Gate G1: the encoder keeps this factor nearly as well as the canonical one."""
        return self.probe_r2 >= ENCODER_SHARE * self.canonical_r2

    @property
    def moving_rmse(self) -> float | None:
        """The RMSE that "really moved" is measured in: the probe's, or the canonical encoder's where G1 fails.

        An encoder that lost the factor reads it with a large RMSE; that must not spare it the windows that count.
        """
        return self.probe_rmse if self.encoded else self.canonical_rmse


@dataclass(frozen=True, kw_only=True)
class Forecasts:
    """All that is read off the same windows; every array has h = 0 ... T on its second axis."""

    episodes: Int[np.ndarray, " n"]
    truth: Forecast
    """True factors; a discrete factor holds its class."""
    real: Forecast
    """The probe's readings of the real latents: the encoder's own limit."""
    model: Forecast
    swapped: Forecast
    """The model again, given the action sequences of other episodes."""
    naive: Mapping[str, Forecast]
    """A naive forecast may leave a factor out."""
    mean: Mapping[str, Float[np.ndarray, " _"]]
    """Training mean of a continuous factor, log class frequencies of a discrete one."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its 95% bootstrap interval over episodes."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class FactorScore:
    """Curves of one factor over h = 0 ... T; NaN where no window moved. Credit at h = 0 is not defined and NaN."""

    name: str
    r: Float[np.ndarray, " t"]
    """Skill on the windows that moved; at h = 0, on all windows: the encoder's own limit."""
    r_low: Float[np.ndarray, " t"]
    r_high: Float[np.ndarray, " t"]
    r_all: Float[np.ndarray, " t"]
    """Skill on all windows, the still ones too. Never scored."""
    r_real: Float[np.ndarray, " t"]
    """Skill of the probe on the real latents of the same windows."""
    r_swapped: Float[np.ndarray, " t"]
    r_naive: Mapping[str, Float[np.ndarray, " t"]]
    credit: Float[np.ndarray, " t"]
    scored: Bool[np.ndarray, " t"]
    beats_naive: Bool[np.ndarray, " t"]
    num_moved: Int[np.ndarray, " t"]
    limits: FactorLimits
    actions: Interval | None
    """Gate G2: credit with the true actions minus credit with swapped ones, over scored h; None if nothing is."""
    ranking: Interval | None
    """Gate G3: share of distractors that lie farther from the forecast than the truth does; chance is 0.5."""

    @property
    def g1(self) -> bool:
        return self.limits.encoded

    @property
    def g2(self) -> bool:
        return self.actions is not None and self.actions.low > 0.0

    @property
    def g3(self) -> bool:
        return self.ranking is not None and self.ranking.low > 0.5


@dataclass(frozen=True, kw_only=True)
class TrustHorizon:
    """H*: the last step up to which every factor keeps a credit of 0.5, in steps."""

    steps: int
    low: int
    high: int
    ended_by: str | None
    """The factor that ends it; None when censored or not defined."""
    censored: bool
    """True when no factor ended it within T: H* is at least T."""
    draws: Int[np.ndarray, " b"]
    """`steps` of the sample, then of every draw."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """The verdict over all factors."""

    factors: tuple[FactorScore, ...]
    excluded: Mapping[str, str]
    """Factors left out, with the reason."""
    hri: Mapping[int, Interval | None]
    """HRI_T by T; None where nothing is scored up to T."""
    horizon: TrustHorizon
    invalid: str | None
    """Why the headline is invalid; None when it is valid."""
    num_windows: int
    num_episodes: int
    hri_draws: Mapping[int, Float[np.ndarray, " b"]]


def moved(factor: Factor, truth: Shaped[np.ndarray, "n t k"], rmse: float | None) -> Bool[np.ndarray, "n t"]:
    """Return where a factor has really left its value at h = 0: by over 3 RMSE, or to another class."""
    if factor.kind == "discrete":
        changed: np.ndarray = (truth != truth[:, :1]).any(axis=-1)
        return changed
    if rmse is None:
        raise WorldlineError(f"factor {factor.name!r} is continuous: an RMSE was expected, got None")
    left: np.ndarray = np.linalg.norm(truth - truth[:, :1], axis=-1) > MOVED_RMSE * rmse
    return left


class Bootstrap:
    """Sums over windows, for the sample as it is and for draws of whole episodes with replacement.

    The draws depend on the seed and on the number of episodes only, so that two models scored on the same windows are
    paired draw by draw.
    """

    def __init__(self, episodes: Int[np.ndarray, " n"], draws: int = DRAWS, seed: int = 0) -> None:
        names, self._group = np.unique(episodes, return_inverse=True)
        self.num_episodes = len(names)
        rng = rng_for(seed, "bootstrap-over-episodes")
        uniform = np.full(self.num_episodes, 1 / self.num_episodes)
        drawn = rng.multinomial(self.num_episodes, uniform, size=draws)
        # row 0 is the sample itself, so that one matrix product gives the value and its draws
        self._weights = np.concatenate([np.ones((1, self.num_episodes)), drawn])

    def sums(self, values: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "b ..."]:
        """Return sums over windows: row 0 of the sample, then of each draw."""
        per_episode = np.zeros((self.num_episodes, *values.shape[1:]))
        np.add.at(per_episode, self._group, values)
        return np.tensordot(self._weights, per_episode, axes=1)


def interval(rows: Float[np.ndarray, " draws"]) -> Interval:
    """Return row 0 with the 2.5 and 97.5 percentiles of the others."""
    low, high = np.percentile(rows[1:], (2.5, 97.5))
    return Interval(value=float(rows[0]), low=float(low), high=float(high))


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Return top / bottom, NaN where there is nothing to divide by."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(bottom > _TINY, top / np.where(bottom > _TINY, bottom, 1.0), np.nan)


def _holds_against(
    naive: Float[np.ndarray, "draws t"], error: Float[np.ndarray, "draws t"], margin: float
) -> Bool[np.ndarray, "draws t"]:
    """Return, for the sample and each draw, whether the model holds against a naive forecast.

    For the sample: error <= margin x naive error in 95% of the draws. A draw has no draws of its own: there the 95th
    percentile of the ratio is taken to lie as far above the draw's ratio as it lies above the sample's.
    """
    # at the limit where the naive forecast has no error at all, any error of the model loses
    ratio = np.where(naive > _TINY, error / np.maximum(naive, _TINY), np.where(error > _TINY, np.inf, 1.0))
    upper = np.quantile(ratio[1:], BURDEN, axis=0, method="inverted_cdf")
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.where(ratio[0] > _TINY, upper / np.maximum(ratio[0], _TINY), 1.0)
        held = ratio * spread <= margin
    held[0] = upper <= margin
    return held


def _standing_still(
    persistence: Float[np.ndarray, "n t k"],
    truth: Float[np.ndarray, "n t k"],
    mean: Float[np.ndarray, " k"],
    counted: Bool[np.ndarray, "n t"],
) -> Float[np.ndarray, "n t k"]:
    """Return the best that a factor which is held can do: its present value, at each h drawn towards the training mean
    by the share that fits these very windows best."""
    present, later = persistence - mean, truth - mean
    top = ((present * later).sum(-1) * counted).sum(axis=0)
    bottom = (np.square(present).sum(-1) * counted).sum(axis=0)
    share = np.where(bottom > _TINY, top / np.maximum(bottom, _TINY), 0.0)
    still: np.ndarray = mean + present * share[:, None]
    return still


class _FactorDraws:
    """One factor's curves, for the sample (row 0) and every draw."""

    def __init__(
        self, factor: Factor, forecasts: Forecasts, limits: FactorLimits, bootstrap: Bootstrap, every: int
    ) -> None:
        name, truth = factor.name, forecasts.truth[factor.name]
        loss = cross_entropy if factor.kind == "discrete" else squared_error
        self.moved = moved(factor, truth, limits.moving_rmse)
        counted = self.moved.copy()
        counted[:, 0] = True  # R_f(0) is the encoder's own limit, on all windows
        asked = np.arange(truth.shape[1]) % every == 0
        counted[:, ~asked] = False
        self.num_moved = self.moved.sum(axis=0)
        self.scored = asked & (self.num_moved >= MIN_MOVED_WINDOWS)
        if not limits.encoded:  # G1: what the encoder lost counts with 0 whether it moved or not
            self.scored = asked & (np.arange(len(asked)) > 0)

        def sums(forecast: Forecast) -> np.ndarray:
            return bootstrap.sums(loss(forecast[name], truth) * counted)

        mean_loss = loss(np.broadcast_to(forecasts.mean[name], (*truth.shape[:2], len(forecasts.mean[name]))), truth)
        baseline = bootstrap.sums(mean_loss * counted)
        error, swapped = sums(forecasts.model), sums(forecasts.swapped)
        naive = {kind: sums(forecast) for kind, forecast in forecasts.naive.items() if name in forecast}
        naive["mean"] = baseline
        best = np.minimum.reduce(list(naive.values()))
        still = None
        # drawing log probabilities towards the mean's cannot help where the class changed: the mean is all there is
        if factor.kind == "continuous" and name in forecasts.naive.get("persistence", {}):
            held_at = forecasts.naive["persistence"][name]
            still = naive["standing still"] = sums(
                {name: _standing_still(held_at, truth, forecasts.mean[name], counted)}
            )
        self.r = 1.0 - _ratio(error, baseline)
        self.r_swapped = 1.0 - _ratio(swapped, baseline)
        self.r_real = 1.0 - _ratio(sums(forecasts.real)[0], baseline[0])
        self.r_naive = {kind: 1.0 - _ratio(rows[0], baseline[0]) for kind, rows in naive.items()}
        self.r_all = 1.0 - _ratio(loss(forecasts.model[name], truth).sum(0), mean_loss.sum(0) * asked)

        def holds(error: np.ndarray) -> np.ndarray:
            held = _holds_against(best, error, NAIVE_MARGIN)
            return held if still is None else held & _holds_against(still, error, STILL_MARGIN)

        held = holds(error)
        self.beats_naive = held[0]
        encoded = float(limits.encoded)
        self.credit = np.nan_to_num(np.clip(self.r, 0.0, 1.0)) * held * encoded
        self.credit_swapped = np.nan_to_num(np.clip(self.r_swapped, 0.0, 1.0)) * holds(swapped) * encoded

    def mean_credit(self, horizon: int) -> np.ndarray | None:
        """Return the mean credit over scored h <= horizon, (draws,); None where nothing is scored."""
        chosen = np.flatnonzero(self.scored[: horizon + 1])
        return self.credit[:, chosen].mean(axis=1) if len(chosen) else None

    def actions(self) -> Interval | None:
        """Return what the true actions are worth, in credit over scored h."""
        if not self.scored.any():
            return None
        return interval((self.credit - self.credit_swapped)[:, self.scored].mean(axis=1))


def score(
    forecasts: Forecasts,
    factors: tuple[Factor, ...],
    limits: Mapping[str, FactorLimits],
    ranks: Mapping[str, Float[np.ndarray, " n"]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    every: int = 1,
) -> Reliability:
    """Score a model on windows of held-out episodes, at every `every`-th h: where it has a forecast at all.

    `ranks` holds per window the share of distractors that lie farther from the forecast than the truth (see
    `ranking.py`), NaN for windows without a query.
    """
    bootstrap = Bootstrap(forecasts.episodes, draws, seed)
    excluded = {
        f.name: f"canonical R^2 {limits[f.name].canonical_r2:.2f} is under {VISIBLE_R2}: not to be seen, or constant"
        for f in factors
        if not limits[f.name].visible
    }
    included = [f for f in factors if f.name not in excluded]
    rows = {f.name: _FactorDraws(f, forecasts, limits[f.name], bootstrap, every) for f in included}
    scores = tuple(
        _factor_score(name, draw, limits[name], _ranking(ranks[name], bootstrap)) for name, draw in rows.items()
    )
    num_windows, steps = next(iter(forecasts.truth.values())).shape[:2]
    hri_rows = {t: _hri(list(rows.values()), t) for t in HORIZONS if t < steps}
    return Reliability(
        factors=scores,
        excluded=excluded,
        hri={t: None if values is None else interval(values) for t, values in hri_rows.items()},
        horizon=_trust_horizon(rows, steps - 1),
        invalid=_invalid(scores),
        num_windows=num_windows,
        num_episodes=bootstrap.num_episodes,
        hri_draws={t: values for t, values in hri_rows.items() if values is not None},
    )


def paired_difference(ours: Reliability, other: Reliability, horizon: int) -> Interval:
    """Return HRI_T of `ours` minus that of `other`, scored on the same windows with the same seed, paired by draw.

    Raises:
        WorldlineError: the two were not scored on equally many windows, or one has no HRI_T.
    """
    if (ours.num_windows, ours.num_episodes) != (other.num_windows, other.num_episodes):
        raise WorldlineError(
            f"a paired comparison needs the same windows, got {ours.num_windows} of {ours.num_episodes} episodes and "
            f"{other.num_windows} of {other.num_episodes}"
        )
    if horizon not in ours.hri_draws or horizon not in other.hri_draws:
        raise WorldlineError(f"HRI_{horizon} is not defined for both models; compare at a shorter horizon")
    return interval(ours.hri_draws[horizon] - other.hri_draws[horizon])


def rank_correlation(signal: Float[np.ndarray, "n t"], error: Float[np.ndarray, "n t"]) -> Float[np.ndarray, " t"]:
    """Return Spearman's correlation over windows, within each horizon; NaN where either does not vary.

    This is what tells a gauge from a clock: both a gauge and the true error grow with h, so only the comparison among
    windows at the same h shows that the gauge knows which of them went wrong.
    """
    a, b = _ranks(signal), _ranks(error)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    scale = np.sqrt(np.square(a).sum(axis=0) * np.square(b).sum(axis=0))
    return _ratio((a * b).sum(axis=0), scale)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks along axis 0, ties sharing their mean."""
    ranks = np.empty(values.shape)
    for column in range(values.shape[1]):
        _, inverse, counts = np.unique(values[:, column], return_inverse=True, return_counts=True)
        ranks[:, column] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def _factor_score(name: str, draw: _FactorDraws, limits: FactorLimits, ranking: Interval | None) -> FactorScore:
    some = draw.num_moved > 0
    some[0] = True  # where nothing is asked R is NaN, which the next lines pass over
    # a draw may hold no window that moved: its NaN says nothing about the sample
    low, high = np.full(len(some), np.nan), np.full(len(some), np.nan)
    for h in np.flatnonzero(some & np.isfinite(draw.r[0])):
        low[h], high[h] = np.nanpercentile(draw.r[1:, h], (2.5, 97.5))
    credit = np.where(draw.scored, draw.credit[0], np.nan)
    return FactorScore(
        name=name,
        r=draw.r[0],
        r_low=low,
        r_high=high,
        r_all=draw.r_all,
        r_real=draw.r_real,
        r_swapped=draw.r_swapped[0],
        r_naive=draw.r_naive,
        credit=credit,
        scored=draw.scored,
        beats_naive=draw.beats_naive,
        num_moved=draw.num_moved,
        limits=limits,
        actions=draw.actions(),
        ranking=ranking,
    )


def _ranking(ranks: Float[np.ndarray, " n"], bootstrap: Bootstrap) -> Interval | None:
    known = np.isfinite(ranks)
    if known.sum() < MIN_MOVED_WINDOWS:
        return None
    total = bootstrap.sums(np.where(known, ranks, 0.0))
    mean = _ratio(total, bootstrap.sums(known.astype(np.float64)))
    return interval(np.concatenate([mean[:1], mean[1:][np.isfinite(mean[1:])]]))


def _hri(rows: list[_FactorDraws], horizon: int) -> np.ndarray | None:
    means = [mean for row in rows if (mean := row.mean_credit(horizon)) is not None]
    return np.mean(means, axis=0) if means else None


def _trust_horizon(rows: Mapping[str, _FactorDraws], horizon: int) -> TrustHorizon:
    if not any(row.scored.any() for row in rows.values()):
        return TrustHorizon(steps=0, low=0, high=0, ended_by=None, censored=False, draws=np.zeros(1, dtype=int))
    first = {
        name: _first_failure(row.scored & (row.credit < TRUSTED_CREDIT), horizon) for name, row in rows.items()
    }  # (draws,) by factor
    # a step at which nothing is scored is no evidence: the last that was
    scored = np.logical_or.reduce([row.scored[: horizon + 1] for row in rows.values()])
    last = np.maximum.accumulate(np.where(scored, np.arange(horizon + 1), 0))
    steps = last[np.minimum.reduce(list(first.values())) - 1]
    low, high = np.percentile(steps[1:], (2.5, 97.5), method="inverted_cdf")
    censored = bool(steps[0] == last[-1] > 0)
    ended_by = None if censored else min(first, key=lambda name: first[name][0])
    return TrustHorizon(
        steps=int(steps[0]), low=int(low), high=int(high), ended_by=ended_by, censored=censored, draws=steps
    )


def _first_failure(failed: Bool[np.ndarray, "draws t"], horizon: int) -> Int[np.ndarray, " draws"]:
    return np.where(failed.any(axis=1), failed.argmax(axis=1), horizon + 1)


def _invalid(scores: tuple[FactorScore, ...]) -> str | None:
    if not any(s.scored.any() for s in scores):
        return "no factor moved far enough in enough windows to be scored"
    if not any(s.g2 for s in scores):
        return "G2 fails for every factor: the true actions earn no more credit than those of other episodes"
    if not any(s.g3 for s in scores):
        return "G3 fails for every factor: the true future ranks no better than chance among distractors"
    return None
