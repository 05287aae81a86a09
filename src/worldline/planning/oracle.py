"""Planning with the true dynamics: how well the same planner does when nothing has to be learned.

Shape legend: p problems, n candidates of each, t planned actions, a action, s state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from worldline.core.types import WorldSpec
from worldline.data import two_room
from worldline.data.goals import goal_distance
from worldline.data.simulators import Simulator, make_simulator
from worldline.planning.goal import Over


@runtime_checkable
class Futures(Protocol):
    """Several futures of one moment; the simulator itself stays where it is."""

    def __call__(self, simulator: Any, actions: Float32[np.ndarray, "n t a"]) -> Float[np.ndarray, "n t s"]:
        """Return the true states that each row of native actions would lead through."""
        ...


class OracleCost:
    """Distance of the true factors to the goal's, in units of the tolerance that decides success: squared, over the
    factors' mean, over time as in `GoalCost`. It cannot be differentiated."""

    def __init__(
        self,
        spec: WorldSpec,
        simulators: list[Simulator],
        goals: Float32[np.ndarray, "p s"],
        futures: Futures,
        *,
        hold: int = 1,
        over: Over = "mean",
    ) -> None:
        self._spec, self._simulators, self._goals = spec, simulators, goals
        self._futures, self._hold, self._over = futures, hold, over

    def __call__(self, actions: Float[Tensor, "p n t a"]) -> Float[Tensor, "p n"]:
        held = actions.detach().repeat_interleave(self._hold, dim=2).numpy()
        rows = zip(self._simulators, held, self._goals, strict=True)
        return torch.from_numpy(np.stack([self._cost(*row) for row in rows])).float()

    def _cost(self, simulator: Simulator, actions: np.ndarray, goal: np.ndarray) -> np.ndarray:
        states = self._futures(simulator, actions)
        if self._over == "last":
            states = states[:, -1:]
        cost: np.ndarray = np.square(goal_distance(self._spec, states, goal)).mean(axis=(1, 2))
        return cost


def futures_of(name: str) -> Futures:
    """Return what branches the simulator called `name`: fast but for ViZDoom, which is saved and loaded."""
    special: dict[str, Callable[[], Futures]] = {
        "two_room": lambda: two_room_futures,
        "pusht": PushTFutures,
        "reacher": lambda: control_suite_futures,
        "point_mass": lambda: control_suite_futures,
    }
    return special[name]() if name in special else any_futures


def any_futures(simulator: Simulator, actions: Float32[np.ndarray, "n t a"]) -> Float32[np.ndarray, "n t s"]:
    """Step the simulator itself through every candidate and bring it back: exact, and slow, since it draws."""
    moment, states = simulator.save(), []
    for sequence in actions:
        simulator.load(moment)
        states.append([simulator.step(action).state for action in sequence])
    simulator.load(moment)
    return np.array(states)


def control_suite_futures(simulator: Any, actions: Float32[np.ndarray, "n t a"]) -> Float64[np.ndarray, "n t s"]:
    """Let MuJoCo run all candidates, without a picture."""
    states: np.ndarray = simulator.futures(actions)
    return states


def two_room_futures(
    simulator: two_room.TwoRoom, actions: Float32[np.ndarray, "n t a"]
) -> Float64[np.ndarray, "n t s"]:
    """Move all candidates at once: the simulator's own arithmetic, operation by operation, on arrays."""
    n, steps, _ = actions.shape
    x, y, vx, vy, door = (np.full(n, value) for value in simulator.save())
    low, high = two_room.BORDER + two_room.RADIUS, 1.0 - two_room.BORDER - two_room.RADIUS
    push = np.clip(actions.astype(np.float64), -1.0, 1.0)
    states = np.empty((n, steps, 5))
    for step in range(steps):
        vx += two_room.RESPONSE * (two_room.MAX_SPEED * push[:, step, 0] - vx)
        vy += two_room.RESPONSE * (two_room.MAX_SPEED * push[:, step, 1] - vy)
        x += vx
        y += vy
        for top, bottom in ((-1.0, door - two_room.DOOR_HALF), (door + two_room.DOOR_HALF, 2.0)):
            dx = x - np.minimum(np.maximum(x, two_room.WALL[0]), two_room.WALL[1])
            dy = y - np.minimum(np.maximum(y, top), bottom)
            distance = np.sqrt(dx * dx + dy * dy)
            hit = (distance > 0.0) & (distance < two_room.RADIUS)
            safe = np.where(hit, distance, 1.0)
            nx, ny = np.where(hit, dx / safe, 0.0), np.where(hit, dy / safe, 0.0)
            depth = np.where(hit, two_room.RADIUS - distance, 0.0)
            x += depth * nx
            y += depth * ny
            inward = np.minimum(0.0, vx * nx + vy * ny)
            vx -= inward * nx
            vy -= inward * ny
        inside_x, inside_y = np.minimum(np.maximum(x, low), high), np.minimum(np.maximum(y, low), high)
        vx, vy = np.where(inside_x == x, vx, 0.0), np.where(inside_y == y, vy, 0.0)
        x, y = inside_x, inside_y
        states[:, step] = np.stack([x, y, vx, vy, door], axis=-1)
    return states


class PushTFutures:
    """Run the physics of PushT on a table of its own, one candidate after the other, from where a simulator stands.

    Beside places and speeds pymunk keeps the impulses between touching bodies, and a branch begins without them: in
    a push it differs from the simulator's own future by about a hundredth of a table unit.
    """

    def __init__(self) -> None:
        self._table: Any = make_simulator("pusht")
        self._table.reset(0)

    def __call__(self, simulator: Any, actions: Float32[np.ndarray, "n t a"]) -> Float64[np.ndarray, "n t s"]:
        env = self._table._env
        agent, block, space = env.agent, env.block, env.space
        real = simulator._env.agent, simulator._env.block
        moment = [(body.angle, body.position, body.velocity, body.angular_velocity) for body in real]
        low, high = np.array(simulator.spec.action_low), np.array(simulator.spec.action_high)
        substeps = int(1 / (env.dt * env.control_hz))
        states = np.empty((*actions.shape[:2], 8))
        for row, sequence in enumerate(np.clip(actions.astype(np.float64), low, high)):
            for body, (angle, position, velocity, spin) in zip((agent, block), moment, strict=True):
                body.angle = angle
                body.position, body.velocity, body.angular_velocity = position, velocity, spin
                space.reindex_shapes_for_body(body)
            for step, (target_x, target_y) in enumerate(sequence.tolist()):
                for _ in range(substeps):  # the controller of gym-pusht
                    (x, y), (vx, vy) = agent.position, agent.velocity
                    agent.velocity = (
                        vx + (env.k_p * (target_x - x) - env.k_v * vx) * env.dt,
                        vy + (env.k_p * (target_y - y) - env.k_v * vy) * env.dt,
                    )
                    space.step(env.dt)
                angle = block.angle
                places = (*agent.position, *block.position, np.sin(angle), np.cos(angle), *agent.velocity)
                states[row, step] = places
        return states
