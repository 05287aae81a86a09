"""Whole test episodes, rolled out to 1,000 steps where they are that long: do latents stay at home?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from worldline.data.cache import FrameCache
from worldline.evaluate.drift import Measurement, describe_region
from worldline.evaluate.ranking import nearest_multiple
from worldline.evaluate.windows import encode_frames, imagine
from worldline.model.foreign import AnyWorld, context_frames, frame_skip

_LONG = 1000
_AT_MOST = 64
"""Episodes."""
_MARKS = (1, 10, 25, 50, 100, 200, 300, 500, 700, 1000)


class LongRollouts(NamedTuple):
    """What was imagined of the first `steps` steps of each of these episodes."""

    episodes: list[int]
    steps: int
    imagined: Float32[np.ndarray, "n t1 d"]


def roll_out_long(world: AnyWorld, cache: FrameCache, episodes: Sequence[int]) -> LongRollouts:
    """Roll out those of the episodes that are long enough, from the first frames of each."""
    dataset, context = cache.dataset, context_frames(world)
    steps = min(_LONG, max(dataset.lengths[e] for e in episodes) - context)
    long = [e for e in episodes if dataset.lengths[e] - context >= steps][:_AT_MOST]
    z = np.stack([encode_frames(world, cache.frames(e, 0, context)) for e in long])
    actions = np.stack([dataset.actions(e)[: context - 1 + steps] for e in long])
    return LongRollouts(long, steps, imagine(world, z, actions[:, : context - 1], actions[:, context - 1 :]))


def describe_long(long: LongRollouts, world: AnyWorld, cache: FrameCache, ours: Measurement) -> dict[str, Any]:
    """Return how many are inside the real 99% region by step, and their median radius over that of real latents.

    Beside them stand the real latents of the same episodes at the same steps: how far so few stray by chance.
    """
    skip, before = frame_skip(world), context_frames(world) - 1
    inside, radius = describe_region(ours.whitening, ours.latents, long.imagined)
    frames = [cache.frames(e, before, long.steps + 1)[::skip] for e in long.episodes]
    real = np.stack([encode_frames(world, each) for each in frames])
    inside_real, radius_real = describe_region(ours.whitening, ours.latents, real)
    marks = sorted({h for h in (nearest_multiple(mark, skip) for mark in _MARKS) if h <= long.steps})
    return {
        "steps": long.steps,
        "wanted_steps": _LONG,
        "episodes": len(long.episodes),
        "at": marks,
        "inside": [round(float(inside[h]), 4) for h in marks],
        "median_radius": [round(float(radius[h]), 4) for h in marks],
        "inside_real": [round(float(inside_real[h // skip]), 4) for h in marks],
        "median_radius_real": [round(float(radius_real[h // skip]), 4) for h in marks],
        "every": skip,
        "inside_curve": [round(float(share), 4) for share in inside[::skip]],
        "median_radius_curve": [round(float(each), 4) for each in radius[::skip]],
        "inside_real_curve": [round(float(share), 4) for share in inside_real],
        "median_radius_real_curve": [round(float(each), 4) for each in radius_real],
    }
