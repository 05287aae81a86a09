"""What the engine runs: a frame loop over static buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8
from torch import Tensor

IDENTITY = ("workload", "weights", "config")
"""Fingerprint fields that say which world it is; the others describe the machine it runs on."""
PLACE = "checkpoint"
"""The fingerprint field that says where the weights lay, for who opens a recording; equal weights may lie anywhere."""


class Stage(NamedTuple):
    """A named part of a frame. `run` reads and writes the workload's static buffers only."""

    name: str
    run: Callable[[], None]
    writes: tuple[str, ...] = ()
    """The state tensors that it writes, and `frame` if it draws: who is to blame where a replay differs."""
    allocates: bool = True
    """It may make new tensors, as long as it lets them go. A captured stage promises that it makes none."""
    waits: bool = False
    """It may wait, for the device or for others."""


class Workload(Protocol):
    """A frame loop: the engine writes `action`, runs `stages` in order, and reads `frame`.

    Every buffer keeps its address for the workload's whole life. The engine enters inference mode and pins the
    number of threads around each call, so a workload may be driven from any thread, one at a time.
    """

    fps: float
    """The real-time pace, frames a second."""
    threads: int
    """CPU threads of torch that the arithmetic is pinned to; other counts may round differently."""
    stages: tuple[Stage, ...]
    action: Float32[np.ndarray, " a"]
    frame: UInt8[np.ndarray, "h w 3"]
    gauge: Float32[np.ndarray, " g"]
    """What the workload thinks of its own picture, one value a name of `gauge_names`; may be empty."""
    gauge_names: tuple[str, ...]

    def reset(self, seed: int, prompt: str = "") -> None:
        """Begin again: state, gauge and frame become those of the first frame."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the static, contiguous tensors that the next frame depends on.

        Copying them out and in again continues the same bits.
        """
        ...

    def fingerprint(self) -> dict[str, str]:
        """Return what the bits depend on: the `IDENTITY` fields, then versions, device and threads."""
        ...


@runtime_checkable
class Anchorable(Protocol):
    """A workload that a real frame can correct."""

    def anchor(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        """Correct the state with a real frame; gauge and frame follow."""
        ...
