"""What the firmware's images take in and must give back: the bytes of both, the latter from the plain reference.

Shape legend: n frames, h = w = image size, a action, c context.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32, UInt8

from worldline.core.errors import WorldlineError
from worldline.edge import build
from worldline.edge.build import Board
from worldline.edge.planner import Budget, plan
from worldline.edge.world import IntegerWorld, State

Name = Literal["observer", "planner", "player"]
FILES: dict[Name, tuple[str, str]] = {
    "observer": ("observer.bin", "drift.bin"),
    "planner": ("goal.bin", "actions.bin"),
    "player": ("session.bin", "chains.bin"),
}
"""What each reads and writes."""
CHAIN = 16
"""Bytes of a hash."""
_STACK = 4
_EVENT = struct.Struct("<3I")


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One run of an image."""

    name: Name
    given: bytes
    """Its input, without the size of the program that comes first."""
    wanted: bytes
    """Its output, without the bytes of stack that it says at the end."""


@dataclass(frozen=True)
class Event:
    """What happened to a session: pictures seen, actions taken, and what the chain takes in before the hashes."""

    prefix: bytes
    pictures: UInt8[np.ndarray, "c h w 3"] | None = None
    """Of a beginning, with the actions between them; one of an anchor; none of a step."""
    actions: Float32[np.ndarray, "n a"] | None = None
    """Native: one of a step."""

    @property
    def kind(self) -> int:
        if self.pictures is None:
            return 1
        return 2 if self.actions is None else 0


def observing(
    world: IntegerWorld,
    frames: UInt8[np.ndarray, "n h w 3"],
    native: Float32[np.ndarray, "n a"],
    context: int,
    ahead: int,
) -> Exchange:
    """Frames with the action before each: the first `context` are taken in, and later every `ahead`-th."""
    given, wanted = struct.pack("<2I", context, ahead), b""
    latents, actions = world.encode(frames), world.actions.run(native)
    state, steps = State(latents[:1], np.zeros((1, world.hidden), np.int16)), 0
    for t, frame in enumerate(frames):
        given += native[t].astype("<f4").tobytes() + frame.tobytes()
        if t > 0:
            state, steps = world.step(state, actions[t : t + 1]), steps + 1
        z = latents[t : t + 1]
        scores = (int(world.gauge.drift(state.z, z)[0]), int(world.gauge.region(state.z)[0]))
        wanted += struct.pack("<4I", 0, steps, *scores) + z.astype("<i2").tobytes()
        if t < context or steps >= ahead:
            state, steps = State(z, state.h), 0
    return Exchange(name="observer", given=given, wanted=wanted)


def planning(
    world: IntegerWorld, goal: UInt8[np.ndarray, "h w 3"], frames: UInt8[np.ndarray, "n h w 3"], budget: Budget
) -> Exchange:
    """A plan to the goal's picture from each frame, its first action done before the next."""
    given, wanted = budget.words() + goal.tobytes(), b""
    target, latents = world.encode(goal[None])[0], world.encode(frames)
    state = State(latents[:1], np.zeros((1, world.hidden), np.int16))
    for t, frame in enumerate(frames):
        given += frame.tobytes()
        state = State(latents[t : t + 1], state.h)
        actions, cost = plan(world, state, target, budget)
        wanted += struct.pack("<2IQ", 0, 0, cost) + actions.astype("<i2").tobytes()
        wanted += world.actions.native(actions[0]).astype("<f4").tobytes()
        state = world.step(state, actions[:1])
    return Exchange(name="planner", given=given, wanted=wanted)


def playing(world: IntegerWorld, genesis: bytes, events: Sequence[Event]) -> Exchange:
    """A session: what happens, and the chain of hashes over every picture drawn and every state."""
    state, chain, wanted = State(np.zeros((1, 0), np.int16), np.zeros((1, 0), np.int16)), genesis, b""
    for event in events:
        actions = None if event.actions is None else world.actions.run(event.actions[None])
        if event.pictures is not None:
            z = world.encode(event.pictures)
            state = State(z, state.h) if actions is None else world.begin(z[None], actions)
        elif actions is not None:
            state = world.step(state, actions[:, 0])
        seen = (world.decode(state.z)[0], state.z[0], state.h[0])
        marks = b"".join(_hash(part.astype(part.dtype.newbyteorder("<")).tobytes()) for part in seen)
        chain = _hash(chain + event.prefix + marks)
        wanted += chain
    return Exchange(name="player", given=session(genesis, events), wanted=wanted)


def session(genesis: bytes, events: Sequence[Event]) -> bytes:
    """Return what the player takes in, but for the size of the program."""
    given = [genesis]
    for event in events:
        count = 0 if event.pictures is None else len(event.pictures)
        given.append(_EVENT.pack(event.kind, len(event.prefix), count) + event.prefix)
        for i in range(max(1, count)):
            action = i - (event.pictures is not None)  # between pictures, or alone
            if event.actions is not None and action >= 0:
                given.append(event.actions[action].astype("<f4").tobytes())
            if event.pictures is not None:
                given.append(event.pictures[i].tobytes())
    return b"".join(given)


def exchange(
    target: Board | None, image: Path, name: Name, given: bytes, program: bytes, timeout_s: float = 600.0
) -> tuple[bytes, int]:
    """Run an image of `build.compile_image`; return its output, and the stack's depth in bytes (0 on this machine).

    Raises:
        WorldlineError: the image failed.
    """
    source, to = (image.parent / file for file in FILES[name])
    (image.parent / "program.bin").write_bytes(program)
    source.write_bytes(struct.pack("<I", len(program)) + given)
    build.run_image(target, image, timeout_s)
    found = to.read_bytes()
    if len(found) < _STACK:
        raise WorldlineError(f"{image} gave back nothing")
    return found[:-_STACK], int.from_bytes(found[-_STACK:], "little")


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=CHAIN).digest()
