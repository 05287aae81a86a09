"""When a world's true state counts as the goal's, beside the simulators: the criterion that planning is judged by."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float

from worldline.core.errors import WorldlineError
from worldline.core.types import WorldSpec


def _chord(degrees: float) -> float:
    """Return how far apart on the unit circle, as sine and cosine hold them, two such angles are."""
    return 2 * math.sin(math.radians(degrees) / 2)


TOLERANCES: dict[str, dict[str, float]] = {
    "two_room": {"agent": 0.05},
    "pusht": {"agent": 20.0, "block_position": 20.0, "block_angle": _chord(20.0)},  # the table is 512 wide
    "reacher": {"shoulder": _chord(10.0), "wrist": _chord(10.0), "target": 0.01},  # the target never moves
    "point_mass": {"mass": 0.02},  # in a box of 0.6
    "vizdoom": {"position": 32.0, "angle": _chord(20.0)},  # a room is 160 wide
}
"""By world and factor: the goal is reached when no factor's error vector is longer than this, in the state's units."""


def goal_distance(
    spec: WorldSpec, state: Float[np.ndarray, "*b s"], goal: Float[np.ndarray, "*g s"]
) -> Float[np.ndarray, "*bg f"]:
    """Return each factor's distance from its goal in units of its tolerance; at most 1 everywhere is success.

    States and goals are broadcast against each other.

    Raises:
        WorldlineError: no criterion is declared for the world.
    """
    if spec.name not in TOLERANCES:
        raise WorldlineError(
            f"no criterion of success is declared for {spec.name!r}, there is one for {', '.join(TOLERANCES)}; "
            "declare its tolerances in worldline/data/goals.py"
        )
    offset = np.asarray(state, dtype=np.float64) - goal
    distances = [
        np.linalg.norm(offset[..., list(factor.columns)], axis=-1) / TOLERANCES[spec.name][factor.name]
        for factor in spec.factors
    ]
    return np.stack(np.broadcast_arrays(*distances), axis=-1)


def reached(
    spec: WorldSpec, state: Float[np.ndarray, "*b s"], goal: Float[np.ndarray, "*g s"]
) -> Bool[np.ndarray, "*bg"]:
    """Return whether every factor is within its tolerance of the goal."""
    return np.asarray((goal_distance(spec, state, goal) <= 1.0).all(axis=-1))
