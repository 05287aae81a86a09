"""What real latents look like, for the terms that hold rollouts to it.

Shape legend: n windows, t steps, d latent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from worldline.core.errors import WorldlineError
from worldline.core.seeding import rng_for
from worldline.model.gauge import whiten

_WINDOWS = 1024


class Geometry(NamedTuple):
    """Of the encoded training episodes."""

    mean: Float[Tensor, " d"]
    whitening: Float[Tensor, "d d"]
    """(z - mean) @ whitening has unit covariance."""
    log_growth: Float[Tensor, " t"]
    """Entry k: how much the log of neighbours' squared distance grows from step k to the next; never below 0."""


def measure_geometry(z: dict[int, Float[Tensor, "t d"]], horizon: int, seed: int) -> Geometry:
    """Measure the latents of some episodes: their whitening, and how fast neighbours part over `horizon` steps.

    Neighbours are windows of different episodes that start nearest to each other, so they part by their actions too:
    the allowance is generous. Means are over windows drawn by `seed`.

    Raises:
        WorldlineError: fewer than two episodes are long enough.
    """
    mean, whitening = whiten(torch.cat(list(z.values())))
    long = [episode for episode, latents in z.items() if len(latents) > horizon]
    if len(long) < 2:
        raise WorldlineError(f"to see neighbouring latents part takes two episodes of over {horizon} frames")
    rng = rng_for(seed, "geometry")
    episodes = torch.from_numpy(rng.choice(long, _WINDOWS))
    starts = [int(rng.integers(len(z[e]) - horizon)) for e in episodes.tolist()]
    windows = torch.stack([z[e][s : s + horizon + 1] for e, s in zip(episodes.tolist(), starts, strict=True)])
    windows = (windows - mean) @ whitening  # (n, t + 1, d)
    apart = torch.cdist(windows[:, 0], windows[:, 0])
    apart[episodes[:, None] == episodes[None]] = torch.inf
    distance = (windows - windows[apart.argmin(dim=1)]).square().mean(dim=(0, 2))  # (t + 1,)
    return Geometry(mean, whitening, distance.log().diff().clamp(min=0.0))
