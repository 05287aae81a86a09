"""From latents to a verdict: fit the probe, read every forecast through it, score, and describe the latents.

Everything here takes arrays of latents, so that a constructed cheat is scored by the very code that scores a model.

Shape legend: n windows, h = 0 ... T horizons (t1 = T + 1 of them), c context, d latent, a action.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int

from worldline.core.seeding import rng_for
from worldline.core.types import Factor
from worldline.evaluate.probe import Probe, fit_probe
from worldline.evaluate.ranking import Whitening, ranking_shares
from worldline.evaluate.reliability import (
    DRAWS,
    FactorLimits,
    Forecasts,
    Reliability,
    moved,
    rank_correlation,
    score,
)
from worldline.model.factors import FactorHead, reading_quality, split_factors

_FAR = 1e6
"""Latents beyond this many times the largest real one are cut: a diverged rollout is a bad score and not a crash."""


class RealFrames(NamedTuple):
    """Encoded real frames of one split with the states they show."""

    z: Float32[np.ndarray, "m d"]
    state: Float32[np.ndarray, "m s"]


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """What one model makes of the windows."""

    context: Float32[np.ndarray, "n c d"]
    """Real latents up to h = 0 inclusive; at least two."""
    real: Float32[np.ndarray, "n t1 d"]
    imagined: Float32[np.ndarray, "n t1 d"]
    """Open loop from the context with the recorded actions; h = 0 is the real latent."""
    swapped: Float32[np.ndarray, "n t1 d"]
    """The same with the action sequences of other episodes."""


@dataclass(frozen=True, kw_only=True)
class LatentReport:
    """What the latents themselves say, without factors. Errors: root mean square, in whitened units per dimension."""

    effective_rank: float
    latent_dim: int
    error: Float[np.ndarray, " t1"]
    """Of imagined against real latents; two real latents drawn at random differ by about sqrt(2)."""
    error_persistence: Float[np.ndarray, " t1"]
    one_step: float
    """The error after one step of the model."""
    growth: float | None
    """e_100 / e_10; None where one of them is missing, or e_10 is 0."""
    inside: Float[np.ndarray, " t1"]
    """Share of imagined latents within the radius that holds 99% of real training latents."""
    radius99: float
    """The radius that holds 99% of real training latents."""
    median_radius_real: float
    inside_real: float
    """The same share for the real latents of these windows."""
    radius: Float[np.ndarray, " t1"]
    """Median Mahalanobis radius of imagined latents over that of real ones."""
    gauge_radius: Float[np.ndarray, " t1"]
    """Rank correlation, within each horizon, of the radius with the true latent error."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A model's verdict with all that is needed to draw it."""

    reliability: Reliability
    latents: LatentReport
    moved: dict[str, Bool[np.ndarray, "n t1"]]
    probe: Probe
    whitening: Whitening
    rollouts: Rollouts
    """As scored: cut where they diverged."""


def measure(
    *,
    factors: tuple[Factor, ...],
    train: RealFrames,
    validation: RealFrames,
    rollouts: Rollouts,
    state: Float32[np.ndarray, "n t1 s"],
    episodes: Int[np.ndarray, " n"],
    canonical: dict[str, tuple[float, float | None]],
    actions_only: dict[str, Float[np.ndarray, "n t1 _"]] | None = None,
    twin: dict[str, Float[np.ndarray, "n t1 _"]] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    every: int = 1,
) -> Measurement:
    """Score one model on windows of held-out episodes, at every `every`-th step.

    `canonical` holds (R^2, RMSE) of the canonical encoder by factor, `actions_only` factors forecast from actions
    alone, `twin` the readings of an action-free twin through its own probe.
    """
    head = FactorHead.fit(factors, train.state)
    probe = fit_probe(
        head, torch.from_numpy(train.z), train.state, torch.from_numpy(validation.z), validation.state, seed
    )
    whitening = Whitening.fit(train.z)
    truth = split_factors(state, factors)
    imagined, swapped = (bounded(z, train.z) for z in (rollouts.imagined, rollouts.swapped))
    real = probe(torch.from_numpy(rollouts.real))
    limits = {}
    for f in factors:
        r2, rmse = reading_quality(f, real[f.name], truth[f.name], head.mean[f.name])
        limits[f.name] = FactorLimits(
            probe_r2=r2, probe_rmse=rmse, canonical_r2=canonical[f.name][0], canonical_rmse=canonical[f.name][1]
        )
    naive = naive_forecasts(factors, probe(torch.from_numpy(rollouts.context)), state.shape[1])
    if actions_only is not None:
        naive["actions only"] = read_through_probe(factors, actions_only, real, truth)
    if twin is not None:
        naive["action-free twin"] = twin
    forecasts = Forecasts(
        episodes=episodes,
        truth=truth,
        real=real,
        model=probe(torch.from_numpy(imagined)),
        swapped=probe(torch.from_numpy(swapped)),
        naive=naive,
        mean=head.mean,
    )
    ranks = {
        f.name: ranking_shares(
            f,
            factors,
            imagined,
            rollouts.real,
            truth,
            episodes,
            whitening,
            limits[f.name].moving_rmse,
            seed,
            every,
        )
        for f in factors
    }
    return Measurement(
        reliability=score(forecasts, factors, limits, ranks, draws=draws, seed=seed, every=every),
        latents=describe_latents(whitening, train.z, rollouts.real, imagined, every),
        moved={f.name: moved(f, truth[f.name], limits[f.name].moving_rmse) for f in factors},
        probe=probe,
        whitening=whitening,
        rollouts=replace(rollouts, imagined=imagined, swapped=swapped),
    )


def naive_forecasts(
    factors: tuple[Factor, ...], context: dict[str, Float[np.ndarray, "n c _"]], num_steps: int
) -> dict[str, dict[str, Float[np.ndarray, "n t1 _"]]]:
    """Return persistence and constant velocity, from the probe's readings of the context.

    Constant velocity extrapolates the *readings*: a latent pushed far along a straight line leaves the region where the
    probe means anything, which would make this forecast needlessly weak. The velocity is the mean over the context.
    """
    steps = np.arange(num_steps)[:, None]
    persistence, velocity = {}, {}
    for f in factors:
        reading = context[f.name]
        persistence[f.name] = np.repeat(reading[:, -1:], num_steps, axis=1)
        if f.kind == "continuous":
            slope = (reading[:, -1] - reading[:, 0]) / (reading.shape[1] - 1)
            velocity[f.name] = persistence[f.name] + slope[:, None] * steps
    return {"persistence": persistence, "constant velocity": velocity}


def read_through_probe(
    factors: tuple[Factor, ...],
    forecast: dict[str, Float[np.ndarray, "n t1 _"]],
    real: dict[str, Float[np.ndarray, "n t1 _"]],
    truth: dict[str, Float[np.ndarray, "n t1 _"]],
) -> dict[str, Float[np.ndarray, "n t1 _"]]:
    """Give a forecast of factors the error that the probe makes on the true frame of the same window and step.

    To first order this is what g would read off an encoded frame that shows what the forecaster says. Without it this
    forecast alone would be free of the encoder's error, which every other forecast carries. A discrete factor's log
    probabilities are taken as they are.
    """
    return {
        f.name: forecast[f.name] + (real[f.name] - truth[f.name]) if f.kind == "continuous" else forecast[f.name]
        for f in factors
    }


def describe_latents(
    whitening: Whitening,
    train: Float32[np.ndarray, "m d"],
    real: Float32[np.ndarray, "n t1 d"],
    imagined: Float32[np.ndarray, "n t1 d"],
    every: int = 1,
) -> LatentReport:
    """Describe imagined latents against real ones in whitened units; NaN at steps that are no multiple of `every`."""
    white, white_hat = whitening(real), whitening(imagined)
    rank = max(white.shape[-1], 1)
    distance = np.linalg.norm(white_hat - white, axis=-1) / np.sqrt(rank)  # (n, t1)
    error = np.sqrt(np.square(distance).mean(axis=0))
    still = np.sqrt((np.square(white - white[:, :1]).sum(-1) / rank).mean(axis=0))
    radius, radius_real = np.linalg.norm(white_hat, axis=-1), np.linalg.norm(white, axis=-1)
    limit = np.quantile(whitening.radius(train), 0.99)
    median_real = max(float(np.median(radius_real)), 1e-300)
    asked = np.where(np.arange(real.shape[1]) % every == 0, 1.0, np.nan)
    error = error * asked
    return LatentReport(
        effective_rank=whitening.effective_rank,
        latent_dim=train.shape[1],
        error=error,
        error_persistence=still,
        one_step=float(error[every]),
        growth=growth(error),
        inside=(radius <= limit).mean(axis=0) * asked,
        radius99=float(limit),
        median_radius_real=median_real,
        inside_real=float((radius_real <= limit).mean()),
        radius=np.median(radius, axis=0) / median_real * asked,
        gauge_radius=rank_correlation(radius, distance) * asked,
    )


def describe_region(
    whitening: Whitening, report: LatentReport, imagined: Float32[np.ndarray, "n t1 d"]
) -> tuple[Float[np.ndarray, " t1"], Float[np.ndarray, " t1"]]:
    """Return by step how many of these imagined latents lie inside the real 99% region, and their median radius.

    The share is of all rollouts, those that left for infinity or are not defined count as outside; the radius is over
    the median of real latents, as in `report`.
    """
    radius = whitening.radius(np.nan_to_num(imagined, nan=1e30, posinf=1e30, neginf=-1e30))
    return (radius <= report.radius99).mean(axis=0), np.median(radius, axis=0) / report.median_radius_real


def growth(error: Float[np.ndarray, " t1"]) -> float | None:
    """Return e_100 / e_10, None where the horizon is shorter, one of the two is not known, or e_10 is 0."""
    if len(error) <= 100 or not np.isfinite(error[[10, 100]]).all() or error[10] <= 0:
        return None
    return float(error[100] / error[10])


def swap_across_episodes(episodes: Int[np.ndarray, " n"], seed: int = 0) -> Int[np.ndarray, " n"]:
    """Return for each window another window whose action sequence it is given, never one of its own episode.

    Episodes are put in a random ring and each takes the sequences of the next, window by window.
    """
    names = rng_for(seed, "swap").permutation(np.unique(episodes))
    windows = {e: np.flatnonzero(episodes == e) for e in names}
    donor = np.empty(len(episodes), dtype=np.int64)
    for e, following in zip(names, np.roll(names, -1), strict=True):
        donor[windows[e]] = np.resize(windows[following], len(windows[e]))
    return donor


def bounded(z: Float32[np.ndarray, "n t1 d"], real: Float32[np.ndarray, "m d"]) -> Float32[np.ndarray, "n t1 d"]:
    """Cut imagined latents far outside the real ones, infinite and undefined ones too, so that squares stay finite."""
    reach = _FAR * max(float(np.abs(real).max()), 1e-30)
    cut: np.ndarray = np.nan_to_num(np.clip(z, -reach, reach), nan=reach).astype(np.float32)
    return cut
