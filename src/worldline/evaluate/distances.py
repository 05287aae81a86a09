"""Which distance a world plans by, and whether it orders real states as their true distance to the goal does.

Shape legend: n moments, h, w the dataset's picture, s the world's, d latent, r directions that count.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from worldline.core.errors import WorldlineError
from worldline.core.seeding import rng_for
from worldline.data.cache import FrameCache, resize
from worldline.data.goals import goal_distance
from worldline.evaluate.reliability import rank_correlation
from worldline.evaluate.starts import Starts
from worldline.evaluate.windows import states_of
from worldline.model.world import World
from worldline.planning.distance import Distance, change_matrix

_MOMENTS = 2048
"""Of training episodes, to tell how latents change."""
_AT_ONCE = 64
_ORDERED = 64
"""Frames of a goal's episode that are put in order."""


def encode(world: World, frames: UInt8[np.ndarray, "*b h w 3"]) -> Float[Tensor, "*b d"]:
    """Return the latents of pictures of any size."""
    size = world.config.image_size
    small = resize(frames.reshape(-1, *frames.shape[-3:]), size)
    return world.encode(torch.from_numpy(small.reshape(*frames.shape[:-3], size, size, 3).copy()))


@torch.no_grad()
def distance_matrix(world: World, distance: Distance, cache: FrameCache, hold: int) -> Float[Tensor, "d r"] | None:
    """Return what `GoalCost` measures by; None where every latent value counts as it is.

    Args:
        cache: frames of a dataset, whose training episodes tell what latents change in `hold` steps.

    Raises:
        WorldlineError: latents are to be whitened, and the world's gauge, which knows how, is not fitted.
    """
    if distance == "plain":
        return None
    if distance == "white":
        if not world.gauge.fitted:
            raise WorldlineError(
                "this world's drift gauge is not fitted, so its latents cannot be whitened; give loop.distance=change"
            )
        return world.gauge.whitening
    dataset, rng = cache.dataset, rng_for(0, "changes")
    long = [e for e in dataset.split("train") if dataset.lengths[e] > hold]
    latents = []
    for _ in range(_MOMENTS // _AT_ONCE):
        moments = [(e, int(rng.integers(dataset.lengths[e] - hold))) for e in rng.choice(long, _AT_ONCE).tolist()]
        latents.append(encode(world, np.stack([cache.frames(e, t, hold + 1)[[0, hold]] for e, t in moments])))
    return change_matrix(*torch.cat(latents).unbind(1))


@torch.no_grad()
def goal_order(
    world: World, cache: FrameCache, chosen: list[Starts], matrices: Mapping[Distance, Float[Tensor, "d r"] | None]
) -> dict[str, float]:
    """Return, for each distance, how well it orders states: the rank correlation, over frames of a goal's episode, of
    a latent's distance to the goal's with that of the true states in units of the tolerances; the mean over goals.

    1 would lead a planner home from anywhere, if only it knew what actions do.
    """
    found: dict[str, list[float]] = {name: [] for name in matrices}
    dataset = cache.dataset
    for starts in chosen:
        for episode, start in starts.index.tolist():
            at = np.linspace(0, dataset.lengths[episode] - 1, _ORDERED).round().astype(int)
            z = encode(world, cache.frames(episode)[np.append(at, start + starts.offset)])
            states = states_of(dataset, episode)
            true = np.linalg.norm(goal_distance(dataset.spec, states[at], states[start + starts.offset]), axis=-1)
            offset = z[:-1] - z[-1]
            for name, matrix in matrices.items():
                measured = torch.linalg.vector_norm(offset if matrix is None else offset @ matrix, dim=-1).numpy()
                found[name].append(float(rank_correlation(measured[:, None], true[:, None])[0]))
    return {name: round(float(np.nanmean(values)), 4) for name, values in found.items()}
