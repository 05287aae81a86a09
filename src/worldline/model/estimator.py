"""How wrong a rollout is by now, told from what the predictor carries: no truth, no picture.

The error of an imagined latent z_hat is e = |W (z_hat - z)|^2 / d, W the gauge's whitening: the mean over directions,
each in units of the variance of real latents. Two real latents drawn at random have e = 2, the mean of all real latents
has e = 1 to each of them on average.

Shape legend: b batch, d latent, m values of the memory, f features, n rollouts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from worldline.core.errors import WorldlineError

HALF = 0.5
"""The error above which a latent is wrong: half the variance of real latents."""
_LOG_SPREAD = (-4.0, 2.0)  # of the spread of log e: a hundredth to seven


class Estimate(NamedTuple):
    """What is expected of the true error e."""

    error: Float[Tensor, "*b"]
    """Its mean."""
    wrong: Float[Tensor, "*b"]
    """The chance that e > 1/2."""


class ErrorEstimator(nn.Module):
    """log e ~ Normal(mu, sigma), both from one hidden layer over whitened latent, memory and steps since a real frame.

    The memory has seen everything that the rollout went through, so this needs none of its own.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int, memory_dim: int, hidden: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.latent_dim, self.memory_dim, self.num_hidden = latent_dim, memory_dim, hidden
        num_features = latent_dim + memory_dim + 2
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.hidden = nn.Linear(num_features, hidden)
        self.out = nn.Linear(hidden, 2)
        self.dropout = nn.Dropout(dropout)

    def features(
        self, white: Float[Tensor, "b d"], memory: tuple[Tensor, ...], steps: Int[Tensor, " b"]
    ) -> Float[Tensor, "b f"]:
        """Return what the error is told from. `steps` counts those imagined since the last real frame.

        Raises:
            WorldlineError: the memory has another size than the one this was fitted on.
        """
        parts = [part.flatten(1) for part in memory if part.is_floating_point()]
        if sum(part.shape[1] for part in parts) != self.memory_dim:
            raise WorldlineError(
                f"the error estimator was fitted on {self.memory_dim} values of memory, got "
                f"{[tuple(part.shape) for part in parts]}; fit it again for this predictor"
            )
        radius = torch.linalg.vector_norm(white, dim=1, keepdim=True) / math.sqrt(self.latent_dim)
        since = torch.log1p(steps.to(white.dtype))[:, None]
        return torch.cat((white, *parts, radius, since), dim=1)

    def forward(self, features: Float[Tensor, "b f"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Return mean and log standard deviation of log e."""
        x = self.dropout((features - self.mean) / self.scale)
        mu, log_sigma = self.out(self.dropout(torch.relu(self.hidden(x)))).unbind(1)
        return mu, log_sigma.clamp(*_LOG_SPREAD)

    def estimate(self, white: Float[Tensor, "b d"], memory: tuple[Tensor, ...], steps: Int[Tensor, " b"]) -> Estimate:
        """Return expected error and chance of e > 1/2; 0 both where no step was imagined."""
        mu, log_sigma = self(self.features(white, memory, steps))
        sigma = log_sigma.exp()
        imagined = steps > 0
        error = torch.exp(mu + sigma.square() / 2)
        wrong = torch.special.ndtr((mu - math.log(HALF)) / sigma)
        return Estimate(error * imagined, wrong * imagined)


def memory_size(memory: tuple[Tensor, ...]) -> int:
    """Return how many floating-point values of a predictor's memory each row of a batch has."""
    return sum(part[0].numel() for part in memory if part.is_floating_point())
