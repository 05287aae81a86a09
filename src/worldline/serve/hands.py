"""From a person's hands to the action of the next frame, by what the world can be told (`WorldSpec.control`)."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float32, Float64

from worldline.core.types import WorldSpec
from worldline.serve.protocol import Blur, Edge, Key, Pointer

KEY_SPEED = 0.55
"""How fast keys move a target, in widths of its range a second of the world's time."""
POINTER_SPEED = 0.8
"""How fast a target follows the pointer: a jump across the table is an action that no training data has."""
STICK_RADIUS = 0.15
"""Pointer distance from where it was pressed, as a share of the picture, that means full speed."""
_STICK_DEAD = 0.015

_DIRECTIONS = {
    "ArrowLeft": (-1.0, 0.0),
    "KeyA": (-1.0, 0.0),
    "ArrowRight": (1.0, 0.0),
    "KeyD": (1.0, 0.0),
    "ArrowUp": (0.0, -1.0),
    "KeyW": (0.0, -1.0),
    "ArrowDown": (0.0, 1.0),
    "KeyS": (0.0, 1.0),
}


class Hands:
    """The state of keys and pointer; `action` is called once a frame.

    In a `target` world keys move the target at a constant speed, and a press of the pointer is a goal that the target
    heads for until it is there or a key takes over. In a `velocity` world keys give a direction, and the pointer is a
    stick whose centre is where it was pressed. Whatever is pressed and let go between two frames acts in one.
    """

    def __init__(self, spec: WorldSpec) -> None:
        self._low = np.array(spec.action_low, dtype=np.float64)
        self._high = np.array(spec.action_high, dtype=np.float64)
        self._step_seconds = spec.step_seconds
        self._control = spec.control
        self._axes = min(2, spec.action_dim)  # x and y of the picture; further dimensions stay where they are
        self._held: set[str] = set()
        self._tapped: set[str] = set()
        self._pressed = self._let_go = False
        self._origin, self._stick = np.zeros(2), np.zeros(2)
        self._goal: Float64[np.ndarray, " 2"] | None = None
        self._action = self._rest()
        self.edge_ms = math.nan
        """Client time of the newest edge: a key or the pointer went down or up."""

    def begin(self, action: Float32[np.ndarray, " a"] | None) -> None:
        """Go on from the action that led to a session's first frame, if there was one."""
        self._action = self._rest() if action is None else np.clip(action.astype(np.float64), self._low, self._high)
        self._goal = None

    def apply(self, edge: Edge) -> None:
        """Take in one edge."""
        if isinstance(edge, Key):
            if edge.down:
                self._held.add(edge.code)
                self._tapped.add(edge.code)
                self._goal = None
            else:
                self._held.discard(edge.code)
            self.edge_ms = edge.time_ms
        elif isinstance(edge, Pointer):
            point = np.array([edge.x, edge.y])
            if edge.down != self._pressed:
                self.edge_ms = edge.time_ms
            if edge.down and not self._pressed:
                self._origin = point
                self._let_go = False
            if edge.down or self._pressed:
                self._goal = point
                self._stick = point - self._origin
            self._let_go = self._let_go or (self._pressed and not edge.down)
            self._pressed = edge.down
        elif isinstance(edge, Blur):
            self.let_go()

    def let_go(self) -> None:
        """Count every key and the pointer as up: the page cannot see them any more."""
        self._held.clear()
        self._let_go = self._let_go or self._pressed
        self._pressed = False

    def action(self) -> Float32[np.ndarray, " a"]:
        """Return the next frame's action, native units; taps are used up by it."""
        pushes = [_DIRECTIONS[code] for code in self._held | self._tapped]
        self._tapped.clear()
        direction = np.clip(np.sum(pushes, axis=0), -1.0, 1.0) if pushes else np.zeros(2)
        if direction.all():
            direction = direction / math.sqrt(2.0)  # a diagonal is as fast as a straight line
        axes = slice(0, self._axes)
        if self._control == "target":
            span = self._high[axes] - self._low[axes]
            if pushes:
                move = direction[axes] * KEY_SPEED * self._step_seconds
            else:
                move = self._towards_goal((self._action[axes] - self._low[axes]) / span)
            self._action[axes] = np.clip(self._action[axes] + move * span, self._low[axes], self._high[axes])
        elif self._control == "velocity":
            if not pushes and (self._pressed or self._let_go):
                distance = float(np.linalg.norm(self._stick))
                if distance > _STICK_DEAD:
                    direction = self._stick / max(distance, STICK_RADIUS)
            limit = np.where(direction > 0, self._high[:2], -self._low[:2]) if self._axes == 2 else self._high[:1]
            self._action[axes] = direction[axes] * limit
        self._let_go = False
        return self._action.astype(np.float32)

    def place(self) -> tuple[float, float]:
        """Return where the last action points, as shares of the picture: a target's place, or 0.5 plus half a push."""
        if self._control == "none" or self._axes < 2:
            return math.nan, math.nan
        x, y = ((self._action - self._low) / (self._high - self._low))[:2]
        return float(x), float(y)

    def _towards_goal(self, place: Float64[np.ndarray, " axes"]) -> Float64[np.ndarray, " axes"]:
        if self._goal is None:
            return np.zeros(self._axes)
        offset = self._goal[: self._axes] - place
        distance, reach = float(np.linalg.norm(offset)), POINTER_SPEED * self._step_seconds
        if distance <= reach:
            if not self._pressed:
                self._goal = None
            return np.asarray(offset)
        return np.asarray(offset * (reach / distance))

    def _rest(self) -> Float64[np.ndarray, " a"]:
        """Return an action that asks for nothing: no push, or the middle of what targets can be."""
        if self._control == "target":
            return (self._low + self._high) / 2
        return np.clip(np.zeros_like(self._low), self._low, self._high)
