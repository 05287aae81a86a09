"""How fast the world itself forgets where it began: two simulators, almost the same, the same actions ever after.

No model can know better than this: where twins part, an error that grows as they do is the world's and not the model's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from worldline.core.seeding import rng_for
from worldline.data.lerobot import Dataset
from worldline.evaluate.starts import Stage, Starts
from worldline.evaluate.windows import states_of

NUDGE = 1e-3
"""By how many standard deviations the twin's first action differs."""
_LATEST = 60
"""Twins begin at this frame of their episode at the latest: simulators are led there."""


def twin_divergence(
    dataset: Dataset, *, horizon: int, count: int, seed: int = 0, episodes: Sequence[int] | None = None
) -> Float[np.ndarray, "n t"]:
    """Return how far a recorded future and its twin's lie apart after h = 1 ... `horizon` steps.

    A twin begins at a frame of a test episode (or of one of `episodes`), does the recorded actions, and only its first
    one is another by `NUDGE` standard deviations, within the action's range: a state can be nudged so in any simulator.
    The distance is the root mean square over the state's columns of the factors, each in standard deviations over
    these episodes.

    Raises:
        WorldlineError: the dataset does not say how it was collected, its simulator is not installed, or does not
            repeat it.
    """
    rng = rng_for(seed, "twins")
    long = [e for e in (dataset.split("test") if episodes is None else episodes) if dataset.lengths[e] > horizon]
    chosen = sorted(rng.choice(long, min(count, len(long)), replace=False).tolist())
    latest = [min(_LATEST, dataset.lengths[e] - 1 - horizon) for e in chosen]
    index = np.array([(e, int(rng.integers(last + 1))) for e, last in zip(chosen, latest, strict=True)])
    simulators = Stage(dataset).at(Starts(index=index, offset=horizon, num_solved=0))
    columns = [column for factor in dataset.spec.factors for column in factor.columns]
    scale = np.concatenate([states_of(dataset, e)[:, columns] for e in long]).std(axis=0)
    low, high = np.array(dataset.spec.action_low), np.array(dataset.spec.action_high)
    rows = []
    for simulator, (episode, start) in zip(simulators, index.tolist(), strict=True):
        actions = dataset.actions(episode)
        done = actions[start : start + horizon].copy()
        nudge = NUDGE * actions.std(axis=0)
        done[0] = np.where(done[0] + nudge <= high, done[0] + nudge, np.maximum(done[0] - nudge, low))
        twin = np.stack([simulator.step(action).state for action in done])
        apart = (twin - states_of(dataset, episode)[start + 1 : start + 1 + horizon])[:, columns]
        rows.append(np.sqrt(np.square(apart[:, scale > 0] / scale[scale > 0]).mean(axis=1)))
    return np.stack(rows)
