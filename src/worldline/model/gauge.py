"""How far to trust a latent when nobody knows the truth.

Shape legend: n fitted latents, d latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from worldline.core.errors import WorldlineError
from worldline.model.estimator import ErrorEstimator, Estimate

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
        radius: Tensor = torch.linalg.vector_norm((z - self.mean) @ self.whitening, dim=-1)
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

    def estimate(
        self, z_hat: Float[Tensor, "b d"], memory: tuple[Tensor, ...], steps: int | Int[Tensor, " b"]
    ) -> Estimate:
        """Return what is expected of the true error of an imagined state, `steps` steps after its last real frame.

        Raises:
            WorldlineError: no estimator was fitted for this world.
        """
        if self.estimator is None:
            raise WorldlineError(
                "this world has no error estimator; scripts/fit_gauge fits one on the dataset it was trained on"
            )
        if isinstance(steps, int):
            steps = torch.full(z_hat.shape[:1], steps, device=z_hat.device)
        return self.estimator.estimate((z_hat - self.mean) @ self.whitening, memory, steps)

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
