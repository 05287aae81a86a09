"""Run a world's program outside Python by commands, on this machine or on a board, and get back values and costs."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from worldline.core.errors import WorldlineError
from worldline.edge import build
from worldline.edge.build import Board
from worldline.edge.cases import STATUS
from worldline.edge.planner import Budget

Verb = Literal["picture", "begin", "observe", "step", "decode", "region", "drift", "plan"]
_CODES: dict[Verb, int] = {
    "picture": 1,
    "begin": 2,
    "observe": 3,
    "step": 4,
    "decode": 5,
    "region": 6,
    "drift": 7,
    "plan": 8,
}


@dataclass(frozen=True)
class Command:
    """What the world is to do: `picture` takes a picture, `begin`, `observe` and `drift` a latent, `step` an action."""

    verb: Verb
    values: NDArray[Any] | None = None
    budget: Budget | None = None
    """Of `plan`, whose values are the goal's latent."""


@dataclass(frozen=True)
class Reply:
    """What it answered: a latent (picture, step), a picture (decode), a number (region, drift), or nothing.

    To `plan`: the actions, and behind them the best sample's cost as four int16.
    """

    status: str
    ticks: int
    values: NDArray[Any]


def run_world(
    target: Board | None,
    image: Path,
    program: bytes,
    sizes: tuple[int, int, int],
    commands: Sequence[Command],
    timeout_s: float = 600.0,
) -> tuple[list[Reply], int]:
    """Run commands through an `world` image; returns the replies and the bytes of stack that were used.

    `sizes` are the values of a latent, those of an action, and the side of a picture.

    Raises:
        WorldlineError: the program was refused, the image failed, or it gave back less than was asked.
    """
    folder, (latent, action, picture_size) = image.parent, sizes
    (folder / "program.bin").write_bytes(program)
    with open(folder / "commands.bin", "wb") as file:
        file.write(struct.pack("<I", len(program)))
        for command in commands:
            values = b"" if command.values is None else np.ascontiguousarray(command.values).tobytes()
            rows = len(command.values) if command.verb == "picture" and command.values is not None else 0
            budget = b"" if command.budget is None else command.budget.words()
            file.write(struct.pack("<2I", _CODES[command.verb], rows) + budget + values)
    build.run_image(target, image, timeout_s)
    data = (folder / "results.bin").read_bytes()
    status = STATUS[int.from_bytes(data[:4], "little")]
    if status != "ok":
        raise WorldlineError(f"the program was refused: {status}")
    at, replies = 4, []
    for command in commands:
        picture = 3 * picture_size**2 if command.verb == "decode" else 0
        score = command.verb in ("region", "drift")
        planned = 0 if command.budget is None else command.budget.horizon * action
        count = latent if command.verb in ("picture", "step") else planned + 4 if planned else int(score)
        dtype: type[np.uint32 | np.int16] = np.uint32 if score else np.int16
        size = count * np.dtype(dtype).itemsize
        if at + picture + 8 + size > len(data) - 4:
            raise WorldlineError(f"{image} gave back {len(data)} bytes, fewer than its commands have")
        code, ticks = struct.unpack_from("<2I", data, at + picture)
        answer: NDArray[Any] = np.frombuffer(data, dtype, count, at + picture + 8)
        if picture:
            answer = np.frombuffer(data, np.uint8, picture, at).reshape(picture_size, picture_size, 3)
        replies.append(Reply(STATUS[code], ticks, answer))
        at += picture + 8 + size
    return replies, int.from_bytes(data[-4:], "little")
