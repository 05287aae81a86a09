"""Gate G3: does the forecast point at the true future, or at any other moment as well?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

from worldline.core.seeding import rng_for
from worldline.core.types import Factor
from worldline.evaluate.reliability import MOVED_RMSE, moved

QUERY_HORIZONS = (10, 25, 50, 75, 100)
NUM_DISTRACTORS = 8
_POOL = 4000


@dataclass(frozen=True)
class Whitening:
    """The ellipsoid of real latents: (z - mean) @ matrix has unit covariance; directions without variance drop out."""

    mean: Float[np.ndarray, " d"]
    matrix: Float[np.ndarray, "d r"]
    effective_rank: float
    """exp of the entropy of the covariance's normalised eigenvalues."""

    @classmethod
    def fit(cls, z: Float[np.ndarray, "n d"]) -> Whitening:
        """Fit on real training latents. Any invertible linear change of the latent gives the same distances."""
        z = z.astype(np.float64)
        mean = z.mean(axis=0)
        values, vectors = np.linalg.eigh(np.cov(z, rowvar=False).reshape(z.shape[1], z.shape[1]))
        # float32 encoders leave rounding noise in dead directions; whitening it would drown the others
        floor = max(1e-7 * values.max(), 1e-14 * float(np.square(mean).max()), 1e-300)
        kept = values > floor
        share = values[kept] / values[kept].sum() if kept.any() else np.ones(1)
        return cls(mean, vectors[:, kept] / np.sqrt(values[kept]), float(np.exp(-(share * np.log(share)).sum())))

    def __call__(self, z: Float[np.ndarray, "*b d"]) -> Float[np.ndarray, "*b r"]:
        white: np.ndarray = (z.astype(np.float64) - self.mean) @ self.matrix
        return white

    def radius(self, z: Float[np.ndarray, "*b d"]) -> Float[np.ndarray, "*b"]:
        """Return the Mahalanobis distance from the mean."""
        radius: np.ndarray = np.linalg.norm(self(z), axis=-1)
        return radius


def nearest_multiple(h: int, every: int) -> int:
    """Return the multiple of `every`, not 0, that lies nearest to h."""
    return max(round(h / every), 1) * every


def ranking_shares(
    factor: Factor,
    others: tuple[Factor, ...],
    z_hat: Float[np.ndarray, "n t d"],
    z: Float[np.ndarray, "n t d"],
    truth: dict[str, Shaped[np.ndarray, "n t _"]],
    episodes: Int[np.ndarray, " n"],
    whitening: Whitening,
    rmse: float | None,
    seed: int = 0,
    every: int = 1,
) -> Float[np.ndarray, " n"]:
    """Return per window the share of distractors that lie farther from z_hat_h than the true z_h does; ties count half.

    Asked at h = 10, 25, 50, 75, 100 (the nearest multiples of `every`) on windows where the factor moved. Distractors
    are real latents in which *this* factor differs from the truth by over 3 RMSE, and of those the ones whose *other*
    factors are most alike: 8 of the same window and 8 of other episodes. So a forecast that is right in the other
    factors only finds no help in them. NaN for windows without a query.
    """
    num_windows, steps = z.shape[:2]
    values = truth[factor.name].astype(np.float64)
    differs_by = 0.5 if factor.kind == "discrete" else MOVED_RMSE * float(rmse or 0.0)
    context = [truth[f.name].astype(np.float64) for f in others if f.name != factor.name]
    scaled = [c / max(float(np.sqrt(c.reshape(-1, c.shape[-1]).var(axis=0).sum())), 1e-12) for c in context]
    rest = np.concatenate([*scaled, np.zeros((num_windows, steps, 1))], axis=-1)
    asked = moved(factor, truth[factor.name], rmse)
    horizons = sorted({nearest_multiple(h, every) for h in QUERY_HORIZONS})
    white, white_hat = whitening(z), whitening(z_hat)

    rng = rng_for(seed, "distractors")
    drawn = rng.permutation(num_windows * steps)[:_POOL]
    pool = np.stack(np.divmod(drawn, steps), axis=-1)  # (window, h) of real latents
    wins, count = np.zeros(num_windows), np.zeros(num_windows)
    for window in range(num_windows):
        # in random order, since equally near ones (all of them, where there is no other factor) are taken in order
        own = np.stack([np.full(steps, window), rng.permutation(steps)], axis=-1)
        far = pool[episodes[pool[:, 0]] != episodes[window]]
        for h in (h for h in horizons if h < steps and asked[window, h]):
            for candidates in (own, far):
                at = candidates[:, 0], candidates[:, 1]
                differ = np.linalg.norm(values[at] - values[window, h], axis=-1) > differs_by
                near = np.square(rest[at] - rest[window, h]).sum(axis=-1)
                near = np.where(differ, near, np.inf)
                nearest = np.argsort(near, kind="stable")[:NUM_DISTRACTORS]
                nearest = nearest[np.isfinite(near[nearest])]
                chosen = candidates[nearest, 0], candidates[nearest, 1]
                to_truth = np.square(white_hat[window, h] - white[window, h]).sum()
                to_others = np.square(white_hat[window, h] - white[chosen]).sum(axis=-1)
                wins[window] += (to_others > to_truth).sum() + 0.5 * (to_others == to_truth).sum()
                count[window] += len(nearest)
    return np.where(count > 0, wins / np.maximum(count, 1), np.nan)
