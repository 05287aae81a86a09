"""The nouns that every subpackage shares: worlds, factors, episodes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, UInt8

from worldline.core.errors import WorldlineError


@dataclass(frozen=True, kw_only=True)
class Factor:
    """One part of the true state that a model is scored on.

    `columns` index the state vector. A continuous factor is scored by squared error over its columns together; a
    discrete one has a single column that holds an integer class from 0.
    """

    name: str
    columns: tuple[int, ...]
    kind: Literal["continuous", "discrete"] = "continuous"


@dataclass(frozen=True, kw_only=True)
class WorldSpec:
    """What a world is, whoever simulates it: picture size, actions, state, time.

    `control` says how a person's hand becomes an action: a `target` world takes an absolute position (the pointer's
    own), a `velocity` world takes a direction, and `none` marks data whose actions nobody can steer by hand.
    """

    name: str
    image_size: int
    """Height and width of the square picture, pixels."""
    step_seconds: float
    """Simulated time that one action lasts."""
    action_names: tuple[str, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    control: Literal["target", "velocity", "none"] = "none"
    state_names: tuple[str, ...] = ()
    factors: tuple[Factor, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.action_names) == len(self.action_low) == len(self.action_high):
            raise WorldlineError(
                f"world {self.name!r}: action names, lows and highs must be equally many, got "
                f"{len(self.action_names)}, {len(self.action_low)}, {len(self.action_high)}"
            )

    @property
    def action_dim(self) -> int:
        return len(self.action_names)

    @property
    def state_dim(self) -> int:
        return len(self.state_names)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> WorldSpec:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "factors"}
        factors = tuple(
            Factor(name=f["name"], columns=tuple(f["columns"]), kind=f["kind"]) for f in data.get("factors", ())
        )
        return cls(**fields, factors=factors)


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One uninterrupted recording: `actions[i]` is applied after `frames[i]` and leads to `frames[i + 1]`.

    The last action is recorded, as LeRobot does, though nothing follows it. `state` is the simulator's true state, or
    None for data that has none.
    """

    index: int
    frames: UInt8[np.ndarray, "t h w 3"]
    actions: Float32[np.ndarray, "t a"]
    state: Float32[np.ndarray, "t s"] | None
    task: str = ""

    def __len__(self) -> int:
        return len(self.actions)
