"""The true world beside the imagined one: the same start, the same actions."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.types import WorldSpec
from worldline.data.simulators import NAMES, Simulator, make_simulator
from worldline.engine.workloads.latent import Starts


class TrueWorld:
    """A simulator that is led to a session's start and then follows its actions."""

    def __init__(self, simulator: Simulator, starts: Starts) -> None:
        self._simulator, self._starts = simulator, starts

    def begin(self, seed: int) -> UInt8[np.ndarray, "h w 3"]:
        """Return the true picture of the start that `seed` picks."""
        return self._starts.begin_truth(self._simulator, seed).frame

    def step(self, action: Float32[np.ndarray, " a"]) -> UInt8[np.ndarray, "h w 3"]:
        """Return the true picture after `action`."""
        return self._simulator.step(action).frame


def find_true_world(spec: WorldSpec, starts: Starts) -> tuple[TrueWorld | None, str]:
    """Return the true world of `spec`, or None and why there is none, in words for the page.

    It must show the pictures that the starts hold: a simulator of another version is not this world's truth.
    """
    if spec.name not in NAMES:
        return None, "This world comes from recorded episodes: nobody can simulate it."
    try:
        simulator = make_simulator(spec.name, starts.frames.shape[-2])
    except WorldlineError as error:
        return None, f"{str(error)[:1].upper()}{str(error)[1:]}"
    world = TrueWorld(simulator, starts)
    if not np.array_equal(world.begin(0), starts.frames[0, -1]):
        return None, "The simulator installed here does not show this checkpoint's start frames: another version."
    return world, ""


def picture_error(picture: UInt8[np.ndarray, "h w 3"], truth: UInt8[np.ndarray, "h w 3"]) -> float:
    """Return the root mean squared difference of two pictures, 0 to 1."""
    gap = picture.astype(np.float32) - truth
    return float(np.sqrt(np.mean(gap * gap))) / 255.0
