"""How far to trust a latent when nobody knows the truth.

Shape legend: n fitted latents, d latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldline.core.errors import WorldlineError
from worldline.model.estimator import ErrorEstimator, Estimate, Track

if TYPE_CHECKING:
    from worldline.model.world import World

_QUANTILE = 0.99
_FLOOR = 1e-4  # of the largest variance: directions that real latents do not use must not blow the radius up


class Gauge(nn.Module):
    """The region of real latents, kept as buffers, so that it travels with the weights.

    Both readings are relative: 1.0 is the 99% quantile over real frames, and beyond it a latent is out of the ordinary.
    Where an `estimator` was fitted, `estimate` says how wrong an imagined state is expected to be.
    """

    mean: Tensor
    whitening: Tensor
    radius99: Tensor
    cycle99: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("whitening", torch.eye(latent_dim))
        self.register_buffer("radius99", torch.tensor(0.0))
        self.register_buffer("cycle99", torch.tensor(0.0))
        self.estimator: ErrorEstimator | None = None

    @property
    def fitted(self) -> bool:
        return bool(self.radius99 > 0)

    @torch.no_grad()
    def fit(self, world: World, z: Float[Tensor, "n d"]) -> None:
        """Fit to encoded real frames: mean, whitening, and the 99% quantiles of radius and cycle distance.

        Raises:
            WorldlineError: too few latents, or some are not finite.
        """
        if len(z) < 100 or not torch.isfinite(z).all():
            raise WorldlineError(f"the drift gauge wants at least 100 finite latents, got {len(z)}")
        mean, whitening = whiten(z)
        self.mean.copy_(mean)
        self.whitening.copy_(whitening)
        self.radius99.copy_(_quantile(self.radius(z)))
        self.cycle99.copy_(
            _quantile(torch.cat([self.cycle_distance(world, part) for part in torch.split(z[:2000], 250)]))
        )

    def radius(self, z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
        """Return the Mahalanobis distance from the mean of real latents."""
        radius: Tensor = torch.linalg.vector_norm(self.white(z), dim=-1)
        return radius

    def region(self, z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
        """Return the radius over the real 99% radius: at most 1 is inside."""
        return self.radius(z) / self._checked(self.radius99)

    def cycle_distance(self, world: World, z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
        """Return |E(D(z)) - z| in whitened units: what is lost by drawing a latent and looking at it again."""
        offset = world.encode(world.decode(z)) - z
        distance: Tensor = torch.linalg.vector_norm(offset @ self.whitening, dim=-1)
        return distance

    def cycle(self, world: World, z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
        """Return the cycle distance over its 99% quantile on real frames."""
        return self.cycle_distance(world, z) / self._checked(self.cycle99)

    def error(self, z_hat: Float[Tensor, "*b d"], z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
        """Return the true error of imagined latents: e = |W (z_hat - z)|^2 / d."""
        return ((z_hat - z) @ self.whitening).square().mean(dim=-1)

    def begin(
        self, context: Float[Tensor, "b c d"], foreseen: Float[Tensor, "b cm1 d"] | None, action_dim: int
    ) -> Track:
        """Return the track of a rollout that starts from the last of some real latents; see `World.track`.

        Raises:
            WorldlineError: no estimator was fitted for this world.
        """
        white = None if foreseen is None else self.white(foreseen)
        return self._knowing().begin(self.white(context), white, action_dim)

    def follow(self, track: Track, z_hat: Float[Tensor, "b d"], action: Float[Tensor, "b a"]) -> Track:
        """Return the track one imagined step later; the action is normalised.

        Raises:
            WorldlineError: no estimator was fitted for this world.
        """
        return self._knowing().follow(track, self.white(z_hat), action)

    def estimate(self, track: Track) -> Estimate:
        """Return what is expected of the true error of the latent that a rollout has come to.

        Raises:
            WorldlineError: no estimator was fitted for this world.
        """
        return self._knowing().estimate(track)

    def white(self, z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Return latents in units in which real ones have variance 1 in every direction."""
        white: Tensor = (z - self.mean) @ self.whitening
        return white

    def _knowing(self) -> ErrorEstimator:
        if self.estimator is None:
            raise WorldlineError(
                "this world has no error estimator; scripts/fit_gauge fits one on the dataset it was trained on"
            )
        return self.estimator

    def _checked(self, scale: Tensor) -> Tensor:
        if scale <= 0:
            raise WorldlineError("this world's drift gauge has not been fitted; finish its training, or call gauge.fit")
        return scale


def whiten(z: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Return mean m and matrix W, such that (z - m) @ W has unit covariance in every direction that latents use."""
    values, vectors = torch.linalg.eigh(torch.cov(z.T.double()))
    values = values.clamp(min=_FLOOR * float(values.max()) + 1e-12)
    return z.mean(dim=0), (vectors * values.rsqrt()).to(z.dtype)


def _quantile(values: Float[Tensor, " n"]) -> Tensor:
    return torch.quantile(values.float(), _QUANTILE).clamp(min=1e-6)
