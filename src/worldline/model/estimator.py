"""How wrong a rollout is by now, told from what it went through: no truth, no picture.

The error of an imagined latent z_hat is e = |W (z_hat - z)|^2 / d, W the gauge's whitening: the mean over directions,
each in units of the variance of real latents. Two real latents drawn at random have e = 2, the mean of all real latents
has e = 1 to each of them on average.

Shape legend: b batch, c context, d latent, a action, m real latents, f features,
e hidden. Lengths are root mean squares over d.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

HALF = 0.5
"""The error above which a latent is wrong: half the variance of real latents."""
_LOG_SPREAD = (-4.0, 2.0)  # of the spread of log e: a hundredth to seven
_NEIGHBOURS = 8
_SHORTEST = 1e-3  # shorter lengths are all alike, and their logarithms are not
TOLD, SURPRISE = 13, slice(10, 13)
"""The first features are of the rollout as a whole, the last of these of its context; others are one a direction."""


class Estimate(NamedTuple):
    """What is expected of the true error e."""

    error: Float[Tensor, "*b"]
    """Its mean."""
    wrong: Float[Tensor, "*b"]
    """The chance that e > 1/2."""


class Track(NamedTuple):
    """What a rollout went through since its last real frame. Latents are whitened, actions normalised."""

    start: Float[Tensor, "b d"]
    """The last real frame's latent."""
    now: Float[Tensor, "b d"]
    steps: Int[Tensor, " b"]
    """Imagined so far."""
    near: Float[Tensor, "b 2"]
    """Distance to the nearest of the kept real latents, and to the eighth."""
    strange: Float[Tensor, " b"]
    """Sum of the distances to the nearest."""
    last: Float[Tensor, " b"]
    """Length of the last step."""
    path: Float[Tensor, " b"]
    """Length of all steps."""
    effort: Float[Tensor, " b"]
    """Sum of the actions' lengths."""
    push: Float[Tensor, "b a"]
    """Sum of the actions."""
    surprise: Float[Tensor, "b 3"]
    """Of the context: error of the one-step predictions of its frames, of that of the last, and how far these moved,
    all as logarithms; NaN where no context was given."""


class ErrorEstimator(nn.Module):
    """log e ~ Normal(mu, sigma), both from one hidden layer over what a `Track` tells.

    It keeps some `real` latents (whitened): what a predictor makes of a moment it is unsure of lies between them.
    """

    mean: Tensor
    scale: Tensor
    real: Tensor

    def __init__(self, latent_dim: int, num_real: int, hidden: int = 64) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("mean", torch.zeros(TOLD + 2 * latent_dim))
        self.register_buffer("scale", torch.ones(TOLD + 2 * latent_dim))
        self.register_buffer("real", torch.zeros(num_real, latent_dim))
        self.hidden = nn.Linear(TOLD + 2 * latent_dim, hidden)
        self.out = nn.Linear(hidden, 2)

    def begin(
        self, context: Float[Tensor, "b c d"], foreseen: Float[Tensor, "b cm1 d"] | None, action_dim: int
    ) -> Track:
        """Return the track of a rollout that starts from the last of some real latents.

        `foreseen` holds the one-step predictions of all but the first of them.
        """
        start, zero = context[:, -1], context.new_zeros(len(context))
        surprise = context.new_full((len(context), 3), torch.nan)
        if foreseen is not None and foreseen.shape[1] > 0:
            off = _length(foreseen - context[:, 1:])  # (b, c - 1)
            moved = _length(context[:, 1:] - context[:, :-1])
            surprise = _log(torch.stack((off.mean(dim=1), off[:, -1], moved.mean(dim=1)), dim=1))
        near, push = context.new_zeros(len(context), 2), context.new_zeros(len(context), action_dim)
        return Track(start, start, zero.long(), near, zero, zero, zero, zero, push, surprise)

    def follow(self, track: Track, now: Float[Tensor, "b d"], action: Float[Tensor, "b a"]) -> Track:
        """Return the track after one more imagined step, which `action` led to."""
        near, last = self._distances(now), _length(now - track.now)
        return Track(
            start=track.start,
            now=now,
            steps=track.steps + 1,
            near=near,
            strange=track.strange + near[:, 0],
            last=last,
            path=track.path + last,
            effort=track.effort + _length(action),
            push=track.push + action,
            surprise=track.surprise,
        )

    def features(self, track: Track) -> Float[Tensor, "b f"]:
        """Return what the error is told from. Surprise stays NaN where it is unknown."""
        steps = track.steps.clamp(min=1).to(track.now.dtype)
        told = torch.stack(
            (
                steps.log(),
                _log(track.strange / steps),
                _log(track.last),
                _log(_length(track.now - track.start)),
                _log(track.path / steps),
                track.effort / steps,
                _length(track.push) / steps.sqrt(),
                _length(track.now),
            ),
            dim=1,
        )
        # as long as predictions are means of what may come, their squares lack the variance of it
        return torch.cat((told, _log(track.near), track.surprise, track.now, track.now.square()), dim=1)

    def normalise(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        """Return standardised features; an unknown surprise is taken for the usual one."""
        x: Tensor = (features - self.mean) / self.scale
        x[:, SURPRISE] = torch.nan_to_num(x[:, SURPRISE], nan=0.0)  # of nothing else: what diverged must not look usual
        return x

    def forward(self, x: Float[Tensor, "b f"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Return mean and log standard deviation of log e from standardised features."""
        return self.read_out(torch.relu(self.hidden(x)))

    def read_out(self, hidden: Float[Tensor, "b e"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Return mean and log standard deviation of log e from the hidden layer."""
        mu, log_sigma = self.out(hidden).unbind(1)
        return mu, log_sigma.clamp(*_LOG_SPREAD)

    def estimate(self, track: Track) -> Estimate:
        """Return expected error and chance of e > 1/2; 0 both where no step was imagined."""
        mu, log_sigma = self(self.normalise(self.features(track)))
        sigma = log_sigma.exp()
        imagined = track.steps > 0
        error = torch.exp(mu + sigma.square() / 2)
        wrong = torch.special.ndtr((mu - math.log(HALF)) / sigma)
        return Estimate(error * imagined, wrong * imagined)

    def _distances(self, now: Float[Tensor, "b d"]) -> Float[Tensor, "b 2"]:
        squares = torch.addmm(self.real.square().sum(dim=1), now, self.real.T, alpha=-2)  # (b, m), less |now|^2
        nearest = torch.topk(squares, _NEIGHBOURS, largest=False).values[:, [0, -1]]
        nearest = (nearest + now.square().sum(dim=1, keepdim=True)).clamp(min=0.0)
        return (nearest / self.latent_dim).sqrt()


def _length(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    return x.square().mean(dim=-1).sqrt()


def _log(length: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    return length.clamp(min=_SHORTEST).log()
