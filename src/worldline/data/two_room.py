"""Two rooms, a wall between them, a doorway in it, and a round agent with a little momentum: small, exact and fast.

Lengths are in units of the picture's width, x to the right and y down, so the world is the unit square. The arithmetic
uses only operations that IEEE 754 rounds exactly, so that the same seed and actions give the same bits everywhere.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from worldline.core.seeding import rng_for
from worldline.core.types import Factor, WorldSpec
from worldline.data.simulators import Observation, Policy

IMAGE_SIZE = 64
RADIUS = 0.07
BORDER = 0.05
WALL = (0.47, 0.53)
DOOR_HALF = 0.15
MAX_SPEED = 0.035
"""Distance that an agent at full speed covers in one step."""
RESPONSE = 0.35
"""Share of the gap between wanted and real velocity that one step closes: the agent forgets a push in about 3 steps."""

_DOOR_CENTRE = (0.25, 0.75)
_FREE = (BORDER + RADIUS, 1.0 - BORDER - RADIUS)
_LEFT_FLOOR, _RIGHT_FLOOR = (244, 238, 224), (226, 236, 242)
_WALL_COLOUR, _AGENT_COLOUR = (70, 72, 80), (0, 114, 178)


class TwoRoom:
    """The agent is pushed towards a wanted velocity, slides along walls, and changes rooms only through the doorway.

    The doorway's place is drawn from the seed, so that where the agent can pass is only in the picture.
    """

    spec = WorldSpec(
        name="two_room",
        image_size=IMAGE_SIZE,
        step_seconds=0.04,
        action_names=("vx", "vy"),
        action_low=(-1.0, -1.0),
        action_high=(1.0, 1.0),
        control="velocity",
        state_names=("agent_x", "agent_y", "agent_vx", "agent_vy", "door_y"),
        factors=(Factor(name="agent", columns=(0, 1)),),
    )

    def __init__(self, image_size: int | None = None) -> None:
        self._size = image_size = image_size or IMAGE_SIZE
        self.spec = replace(self.spec, image_size=image_size)
        self._x = self._y = self._vx = self._vy = self._door = 0.5
        self._background: Float64[np.ndarray, "h w 3"] = np.zeros((image_size, image_size, 3))

    def reset(self, seed: int) -> Observation:
        rng = rng_for(seed, "two_room")
        self._door = float(rng.uniform(*_DOOR_CENTRE))
        left = rng.random() < 0.5
        room = (_FREE[0], WALL[0] - RADIUS) if left else (WALL[1] + RADIUS, _FREE[1])
        self._x, self._y = float(rng.uniform(*room)), float(rng.uniform(*_FREE))
        self._vx = self._vy = 0.0
        self._background = self._draw_rooms()
        return self._observe()

    def step(self, action: Float32[np.ndarray, " a"]) -> Observation:
        push_x, push_y = (min(1.0, max(-1.0, float(value))) for value in action)
        self._vx += RESPONSE * (MAX_SPEED * push_x - self._vx)
        self._vy += RESPONSE * (MAX_SPEED * push_y - self._vy)
        self._x += self._vx
        self._y += self._vy
        self._collide()
        return self._observe()

    def policy(self, seed: int) -> Policy:
        return _Wanderer(seed)

    def save(self) -> tuple[float, ...]:
        return self._x, self._y, self._vx, self._vy, self._door

    def load(self, moment: tuple[float, ...]) -> Observation:
        self._x, self._y, self._vx, self._vy, self._door = moment
        self._background = self._draw_rooms()
        return self._observe()

    def _collide(self) -> None:
        """Push the disc out of whatever it entered, and take away the velocity that led into it."""
        for top, bottom in ((-1.0, self._door - DOOR_HALF), (self._door + DOOR_HALF, 2.0)):
            dx = self._x - min(max(self._x, WALL[0]), WALL[1])
            dy = self._y - min(max(self._y, top), bottom)
            distance = math.sqrt(dx * dx + dy * dy)
            if 0.0 < distance < RADIUS:
                nx, ny = dx / distance, dy / distance
                self._x += (RADIUS - distance) * nx
                self._y += (RADIUS - distance) * ny
                inward = min(0.0, self._vx * nx + self._vy * ny)
                self._vx -= inward * nx
                self._vy -= inward * ny
        # a step is shorter than the radius, so the centre never reaches the inside of a wall
        x, y = min(max(self._x, _FREE[0]), _FREE[1]), min(max(self._y, _FREE[0]), _FREE[1])
        self._vx = self._vx if x == self._x else 0.0
        self._vy = self._vy if y == self._y else 0.0
        self._x, self._y = x, y

    def _observe(self) -> Observation:
        state = np.array([self._x, self._y, self._vx, self._vy, self._door], dtype=np.float32)
        return Observation(self._draw(), state)

    def _draw_rooms(self) -> Float64[np.ndarray, "h w 3"]:
        size = self._size
        border, door = BORDER, (self._door - DOOR_HALF, self._door + DOOR_HALF)
        inside = _cover(size, border, 1.0 - border)
        wall_rows = 1.0 - _cover(size, *door)
        open_floor = inside[:, None] * inside[None, :] * (1.0 - wall_rows[:, None] * _cover(size, *WALL)[None, :])
        right = _cover(size, 0.5, 1.0)[None, :, None]
        floor = np.array(_LEFT_FLOOR) * (1.0 - right) + np.array(_RIGHT_FLOOR) * right
        picture: Float64[np.ndarray, "h w 3"] = np.array(_WALL_COLOUR) * (1.0 - open_floor[:, :, None])
        picture += floor * open_floor[:, :, None]
        return picture

    def _draw(self) -> UInt8[np.ndarray, "h w 3"]:
        """Blend the disc over the rooms; a pixel's share is its centre's depth inside the disc, in pixels."""
        size = self._size
        reach = RADIUS + 1.0 / size
        x0, x1 = int(max(0.0, self._x - reach) * size), min(size, int((self._x + reach) * size) + 1)
        y0, y1 = int(max(0.0, self._y - reach) * size), min(size, int((self._y + reach) * size) + 1)
        dx = np.arange(x0, x1) + 0.5 - self._x * size
        dy = np.arange(y0, y1) + 0.5 - self._y * size
        distance = np.sqrt(dx[None, :] ** 2 + dy[:, None] ** 2)
        share = np.clip(RADIUS * size - distance + 0.5, 0.0, 1.0)[:, :, None]
        picture = (self._background + 0.5).astype(np.uint8)
        patch = self._background[y0:y1, x0:x1]
        picture[y0:y1, x0:x1] = patch + (np.array(_AGENT_COLOUR) - patch) * share + 0.5
        return picture


def _cover(size: int, low: float, high: float) -> Float64[np.ndarray, " size"]:
    """Return the share of each of `size` pixels in a row that lies between `low` and `high`."""
    edges = np.arange(size, dtype=np.float64)
    overlap: Float64[np.ndarray, " size"] = np.minimum(edges + 1.0, high * size) - np.maximum(edges, low * size)
    return overlap.clip(0.0, 1.0)


class _Wanderer:
    """Makes long strokes to places drawn at random, more often than not in the other room, at varied speed.

    A stroke to the other room goes by way of the doorway. One in five strokes is a blind push in a random direction,
    so that walls and door posts are met at every angle, and some end in a short rest.
    """

    def __init__(self, seed: int) -> None:
        self._rng = rng_for(seed, "two_room-policy")
        self._goals: list[tuple[float, float]] = []
        self._push = np.zeros(2)
        self._left = 0
        self._speed = 0.0
        self._noise = np.zeros(2)

    def __call__(self, observation: Observation) -> Float32[np.ndarray, " a"]:
        x, y, vx, vy, door = (float(value) for value in observation.state)
        self._left -= 1
        if self._left <= 0:
            self._next_stroke(x, y, door)
        if self._goals:
            goal_x, goal_y = self._goals[0]
            # aim from where the momentum will carry the agent
            offset = np.array([goal_x - x - 2.0 * vx, goal_y - y - 2.0 * vy])
            distance = math.sqrt(float(offset @ offset))
            if distance < MAX_SPEED:
                self._goals.pop(0)
                self._left = self._left if self._goals else int(self._rng.integers(1, 5))
            self._push = offset / max(distance, MAX_SPEED) * self._speed
        self._noise = 0.9 * self._noise + self._rng.normal(0.0, 0.05, 2)
        return np.clip(self._push + self._noise, -1.0, 1.0).astype(np.float32)

    def _next_stroke(self, x: float, y: float, door: float) -> None:
        rng = self._rng
        self._speed = float(rng.uniform(0.4, 1.4))  # above 1 the clip to the action's range makes it full speed
        self._left = 80
        kind = rng.random()
        if kind < 0.05:
            self._goals, self._push, self._left = [], np.zeros(2), int(rng.integers(3, 10))
            return
        if kind < 0.2:
            direction = rng.normal(0.0, 1.0, 2)
            self._goals, self._left = [], int(rng.integers(10, 30))
            self._push = direction / math.sqrt(float(direction @ direction)) * self._speed
            return
        to_left = (x >= 0.5) if rng.random() < 0.65 else (x < 0.5)
        room = (_FREE[0], WALL[0] - RADIUS) if to_left else (WALL[1] + RADIUS, _FREE[1])
        goal = (float(rng.uniform(*room)), float(rng.uniform(*_FREE)))
        if to_left == (x < 0.5):
            self._goals = [goal]
        else:
            beside = 0.5 + (0.13 if to_left else -0.13)
            self._goals = [(beside, door), (1.0 - beside, door), goal]
