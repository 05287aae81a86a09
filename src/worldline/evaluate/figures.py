"""The figures of a measurement as JSON, and the sentence that sums them up."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from worldline.core.types import WorldSpec
from worldline.evaluate.drift import LatentReport, Measurement
from worldline.evaluate.reliability import FactorScore, Interval, TrustHorizon

_DIGITS = 5


def to_figures(measurement: Measurement, spec: WorldSpec) -> dict[str, Any]:
    """Return verdict, factors and latents as JSON; curves hold h = 0 ... T, None where nothing is defined."""
    result = measurement.reliability
    return {
        "verdict": {
            "valid": result.invalid is None,
            "invalid": result.invalid,
            "hri": {str(t): _interval(value) for t, value in result.hri.items()},
            "h_star": _horizon(result.horizon, spec),
            "num_windows": result.num_windows,
            "num_episodes": result.num_episodes,
            "excluded": dict(result.excluded),
        },
        "factors": {score.name: _factor(score) for score in result.factors},
        "latents": _latents(measurement.latents),
    }


def headline(figures: dict[str, Any]) -> str:
    """Return one sentence: is the verdict valid, how much is the model worth, how long, and what ends it."""
    verdict = figures["verdict"]
    longest = max(verdict["hri"], key=int, default=None)
    hri = verdict["hri"].get(longest) if longest is not None else None
    star = verdict["h_star"]
    worth = "HRI not defined" if hri is None else f"HRI_{longest} {_with_interval(hri, '.2f')}"
    steps = f"{star['steps']} steps ({star['seconds']:.1f} s), 95% interval {star['low']} to {star['high']}"
    if star["censored"]:
        reach = f"H* at least {steps}: no factor ended it"
    elif star["ended_by"] is None:
        reach = "H* 0 steps: nothing could be scored"
    else:
        reach = f"H* {steps}, ended by {star['ended_by']}"
    sentence = f"{worth}; {reach}."
    return sentence if verdict["valid"] else f"Invalid: {verdict['invalid']}. {sentence}"


def _with_interval(interval: dict[str, float], digits: str) -> str:
    return f"{interval['value']:{digits}} [{interval['low']:{digits}}, {interval['high']:{digits}}]"


def _number(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), _DIGITS)


def _curve(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _interval(interval: Interval | None) -> dict[str, float | None] | None:
    return None if interval is None else {name: _number(value) for name, value in asdict(interval).items()}


def _horizon(horizon: TrustHorizon, spec: WorldSpec) -> dict[str, Any]:
    # horizons count steps of the environment, whatever a model's frame skip
    told = {key: value for key, value in asdict(horizon).items() if key != "draws"}
    return told | {
        "environment_steps": horizon.steps,
        "seconds": round(horizon.steps * spec.step_seconds, 4),
    }


def _factor(score: FactorScore) -> dict[str, Any]:
    limits = score.limits
    return {
        "mean_credit": _number(float(np.mean(score.credit[score.scored]))) if score.scored.any() else None,
        "gates": {
            "g1": {
                "passed": score.g1,
                "probe_r2": _number(limits.probe_r2),
                "canonical_r2": _number(limits.canonical_r2),
            },
            "g2": {"passed": score.g2, "credit_of_true_actions": _interval(score.actions)},
            "g3": {"passed": score.g3, "ranks_above": _interval(score.ranking)},
        },
        "probe_rmse": _number(limits.probe_rmse),
        "canonical_rmse": _number(limits.canonical_rmse),
        "r": _curve(score.r),
        "r_low": _curve(score.r_low),
        "r_high": _curve(score.r_high),
        "r_all_windows": _curve(score.r_all),
        "r_real_latents": _curve(score.r_real),
        "r_swapped_actions": _curve(score.r_swapped),
        "r_naive": {kind: _curve(values) for kind, values in score.r_naive.items()},
        "credit": _curve(score.credit),
        "scored": score.scored.tolist(),
        "within_naive_margin": score.beats_naive.tolist(),
        "num_moved": score.num_moved.tolist(),
    }


def _latents(report: LatentReport) -> dict[str, Any]:
    return {
        "effective_rank": _number(report.effective_rank),
        "dimensions": report.latent_dim,
        "error": _curve(report.error),
        "error_persistence": _curve(report.error_persistence),
        "error_one_step": _number(report.one_step),
        "growth_e100_e10": _number(report.growth),
        "share_inside": _curve(report.inside),
        "share_inside_real": _number(report.inside_real),
        "median_radius_over_real": _curve(report.radius),
        "radius_rank_correlation": _curve(report.gauge_radius),
    }
