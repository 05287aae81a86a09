"""True factors as targets and readings: what probes, reference encoders and forecasters of factors have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from worldline.core.errors import WorldlineError
from worldline.core.types import Factor


def split_factors(
    state: Shaped[np.ndarray, "*b s"], factors: tuple[Factor, ...]
) -> dict[str, Float[np.ndarray, "*b _"]]:
    """Split true states into factors: native units, or the class of a discrete factor."""
    return {f.name: state[..., list(f.columns)].astype(np.float64) for f in factors}


def squared_error(reading: Float[np.ndarray, "*b k"], truth: Float[np.ndarray, "*b k"]) -> Float[np.ndarray, "*b"]:
    """Return the squared norm of the error vector."""
    error: np.ndarray = np.square(reading - truth).sum(axis=-1)
    return error


def cross_entropy(log_probs: Float[np.ndarray, "*b k"], truth: Shaped[np.ndarray, "*b 1"]) -> Float[np.ndarray, "*b"]:
    """Return minus the log probability given to the true class, in nats."""
    index = np.broadcast_to(truth.astype(np.int64), (*log_probs.shape[:-1], 1))
    return -np.take_along_axis(log_probs, index, axis=-1)[..., 0]


def reading_quality(
    factor: Factor,
    reading: Float[np.ndarray, "*b k"],
    truth: Shaped[np.ndarray, "*b m"],
    mean: Float[np.ndarray, " k"],
) -> tuple[float, float | None]:
    """Return (R^2, RMSE): skill over the training mean, and the root mean squared norm of the error in native units.

    A discrete factor's skill is 1 - cross-entropy over that of the class frequencies, and it has no RMSE. A factor that
    does not vary has R^2 = 0: there is nothing to see.
    """
    loss = cross_entropy if factor.kind == "discrete" else squared_error
    error = float(loss(reading, truth).mean())
    baseline = float(loss(np.broadcast_to(mean, (*truth.shape[:-1], len(mean))), truth).mean())
    varies = bool(np.ptp(truth.reshape(-1, truth.shape[-1]), axis=0).any())
    r2 = 1.0 - error / baseline if varies and baseline > 0 else 0.0
    return r2, None if factor.kind == "discrete" else float(np.sqrt(error))


@dataclass(frozen=True)
class FactorHead:
    """Turns true states into regression and class targets, and a network's outputs into readings.

    Continuous columns are standardised one by one; a discrete factor has one logit a class.
    """

    factors: tuple[Factor, ...]
    mean: dict[str, Float[np.ndarray, " _"]]
    """Training mean of a continuous factor, log class frequencies of a discrete one."""
    scale: dict[str, Float[np.ndarray, " _"]]
    """Standard deviation by column of a continuous factor."""

    @classmethod
    def fit(cls, factors: tuple[Factor, ...], state: Float[np.ndarray, "n s"]) -> FactorHead:
        """Fit means and scales on true states of training episodes.

        Raises:
            WorldlineError: there are no factors.
        """
        if not factors:
            raise WorldlineError(
                "the dataset names no factors of a true state, which are what a model is scored on; use a dataset that "
                "`worldline collect` made"
            )
        mean, scale = {}, {}
        for f in factors:
            values = state[:, list(f.columns)].astype(np.float64)
            if f.kind == "discrete":
                counts = np.bincount(values[:, 0].astype(np.int64)) + 1.0  # no class is impossible
                mean[f.name] = np.log(counts / counts.sum())
            else:
                std = values.std(axis=0)
                mean[f.name] = values.mean(axis=0)
                scale[f.name] = np.where(std > 1e-9 * np.abs(values).max(initial=1e-9), std, 1.0)
        return cls(factors, mean, scale)

    @property
    def size(self) -> int:
        """Outputs that a network needs."""
        return sum(len(m) for m in self.mean.values())

    def targets(self, state: Float[np.ndarray, "*b s"]) -> Float[Tensor, "*b k"]:
        """Return one row of targets a state; a discrete factor's is one-hot."""
        parts = []
        for f in self.factors:
            values = state[..., list(f.columns)].astype(np.float64)
            if f.kind == "discrete":
                known = len(self.mean[f.name])
                classes = values[..., 0].astype(np.int64)
                if classes.size and not 0 <= classes.min() <= classes.max() < known:
                    raise WorldlineError(
                        f"factor {f.name!r}: expected classes 0 to {known - 1} as in training episodes, "
                        f"got {classes.min()} to {classes.max()}"
                    )
                parts.append(np.eye(known)[classes])
            else:
                parts.append((values - self.mean[f.name]) / self.scale[f.name])
        return torch.from_numpy(np.concatenate(parts, axis=-1).astype(np.float32))

    def loss(self, output: Float[Tensor, "*b k"], targets: Float[Tensor, "*b k"]) -> Float[Tensor, ""]:
        """Return the mean over factors of squared error (in units of the variance) or cross-entropy."""
        total, start = output.new_zeros(()), 0
        for f in self.factors:
            part = slice(start, start := start + len(self.mean[f.name]))
            if f.kind == "discrete":
                total = total - (output[..., part].log_softmax(-1) * targets[..., part]).sum(-1).mean()
            else:
                total = total + (output[..., part] - targets[..., part]).square().mean()
        return total / len(self.factors)

    def read(self, output: Float[Tensor, "*b k"]) -> dict[str, Float[np.ndarray, "*b _"]]:
        """Return readings by factor: native units, or log probabilities."""
        readings, start = {}, 0
        for f in self.factors:
            part = output[..., start : (start := start + len(self.mean[f.name]))]
            if f.kind == "discrete":
                readings[f.name] = part.log_softmax(-1).double().numpy()
            else:
                readings[f.name] = part.double().numpy() * self.scale[f.name] + self.mean[f.name]
        return readings

    def to_json(self) -> dict[str, Any]:
        return {
            "mean": {name: values.tolist() for name, values in self.mean.items()},
            "scale": {name: values.tolist() for name, values in self.scale.items()},
        }

    @classmethod
    def from_json(cls, factors: tuple[Factor, ...], data: dict[str, Any]) -> FactorHead:
        parts = ({name: np.array(values) for name, values in data[key].items()} for key in ("mean", "scale"))
        return cls(factors, *parts)
