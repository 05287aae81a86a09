"""Worlds that can be simulated here, by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.types import WorldSpec

_WORLDS = {
    "two_room": "two_room:TwoRoom",
    "pusht": "pusht:PushT",
    "reacher": "control_suite:Reacher",
    "point_mass": "control_suite:PointMass",
    "vizdoom": "vizdoom:MyWayHome",
}
"""Module and class by name; a module is imported when its world is made, so that nobody needs all the packages."""
NAMES = tuple(_WORLDS)


class Observation(NamedTuple):
    """What a simulator shows: the picture, and the truth behind it."""

    frame: UInt8[np.ndarray, "h w 3"]
    state: Float32[np.ndarray, " s"]


Policy = Callable[[Observation], Float32[np.ndarray, " a"]]


@runtime_checkable
class Simulator(Protocol):
    """A world with a true state. The same seed and actions give the same observations, bit for bit."""

    spec: WorldSpec

    def reset(self, seed: int) -> Observation: ...

    def step(self, action: Float32[np.ndarray, " a"]) -> Observation:
        """Advance by one action in native units; it is clipped to the spec's range."""
        ...

    def policy(self, seed: int) -> Policy:
        """Return a policy for one episode that explores well; its choices depend on `seed` and what it observes."""
        ...

    def save(self) -> Any:
        """Return this moment, for `load`: numbers and arrays, which can be pickled."""
        ...

    def load(self, moment: Any) -> Observation:
        """Go back to a moment that a simulator of the same world saved, and observe it.

        From there the same actions give the same observations, bit for bit, as on the way on from `save`: two futures
        of one moment differ by their actions only. A world whose state cannot be set exactly is led there again, from
        its seed by its actions.
        """
        ...


def make_simulator(name: str, image_size: int | None = None) -> Simulator:
    """Return the simulator called `name`, one of `NAMES`, its pictures `image_size` pixels square or its own size.

    Raises:
        WorldlineError: unknown name, or its package is not installed.
    """
    if name not in _WORLDS:
        raise WorldlineError(f"no simulator called {name!r}; there are {', '.join(NAMES)}")
    module, kind = _WORLDS[name].split(":")
    simulator: Simulator = getattr(import_module(f"worldline.data.{module}"), kind)(image_size)
    return simulator
