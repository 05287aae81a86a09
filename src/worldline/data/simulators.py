"""Worlds that can be simulated here, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.types import WorldSpec

NAMES = ("two_room", "pusht")


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


def make_simulator(name: str, image_size: int | None = None) -> Simulator:
    """Return the simulator called `name`, one of `NAMES`, its pictures `image_size` pixels square or its own size.

    Raises:
        WorldlineError: unknown name, or its package is not installed.
    """
    if name == "two_room":
        from worldline.data.two_room import TwoRoom

        return TwoRoom(image_size)
    if name == "pusht":
        from worldline.data.pusht import PushT

        return PushT(image_size)
    raise WorldlineError(f"no simulator called {name!r}; there are {', '.join(NAMES)}")
