"""Run chains outside Python: many in one go, on this machine or on a board, and get back what they gave and cost."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldline.core.errors import WorldlineError
from worldline.core.native import TINYENGINE
from worldline.edge import build
from worldline.edge.build import Board
from worldline.edge.graph import Average, Chain, Flatten, Pixels
from worldline.edge.program import Writer, finish_program, write_chain
from worldline.edge.schedule import Plan, padded, plan_rows

SOURCE = TINYENGINE / "firmware/cases.cpp"
STATUS = (
    "ok",
    "not_a_program",
    "other_version",
    "damaged",
    "bad_program",
    "small_arena",
    "wrong_order",
    "bad_argument",
)
_SIZES, _HEAD = struct.Struct("<4I"), struct.Struct("<4I")


@dataclass(frozen=True)
class Case:
    """A program with one chain, and a picture for it."""

    program: bytes
    arena_bytes: int
    picture: NDArray[np.int8]
    result_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What an image made of a case."""

    status: str
    ticks: int
    stack_bytes: int
    """The most that was used since the image began; 0 on this machine."""
    arena_end: int
    """The first byte behind all that was written in the arena, found by painting it."""
    result: bytes


def case_of(chain: Chain, picture: NDArray[np.int8], plan: Plan | None = None) -> Case:
    """Write a chain down as a program of its own, by a plan that begins at 0, or (None) streamed row by row."""
    out, plan = Writer(), plan or plan_rows(chain)
    place, arena = write_chain(out, chain, plan), padded(plan.end, 16)
    if isinstance(chain.end, (Flatten, Average)):
        result = 2 * len(chain.end.matrix.weight)
    else:
        result = int(np.prod(chain.stages[-1].size))  # 12 channels are 2 x 2 pixels of 3
    return Case(finish_program(out, arena, (place,)), arena, picture, result)


def values_of(chain: Chain, result: bytes) -> NDArray[Any]:
    """Return an outcome's result in the shape and type that the reference has for one picture."""
    if isinstance(chain.end, (Flatten, Average)):
        return np.frombuffer(result, np.int16)
    rows, columns, channels = chain.stages[-1].size
    if isinstance(chain.end, Pixels):
        return np.frombuffer(result, np.uint8).reshape(2 * rows, 2 * columns, 3)
    return np.frombuffer(result, np.int8).reshape(rows, columns, channels)


def compile_cases(target: Board | None, folder: Path, options: Sequence[str] = ()) -> Path:
    """Compile the image that runs cases, for a board or (None) for this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / "cases.elf"
    if target is None:
        build.compile_host([SOURCE], image, ["-DTINYENGINE_ROOM=(1<<21)", *options])
    else:
        room = min(1 << 18, target.ram[1] // 6)  # four rooms, and a stack
        build.compile_board(target, [SOURCE], image, [f"-DTINYENGINE_ROOM={room // 16 * 16}", *options])
    return image


def run_cases(target: Board | None, image: Path, cases: Sequence[Case], timeout_s: float = 300.0) -> list[Outcome]:
    """Run cases through an image of `compile_cases`.

    Raises:
        WorldlineError: the image failed, or gave back less than was asked.
    """
    with open(image.parent / "cases.bin", "wb") as file:
        for case in cases:
            sizes = (len(case.program), case.arena_bytes, case.picture.nbytes, case.result_bytes)
            file.write(_SIZES.pack(*sizes) + case.program + np.ascontiguousarray(case.picture).tobytes())
    build.run_image(target, image, timeout_s)
    data, outcomes, at = (image.parent / "results.bin").read_bytes(), [], 0
    for case in cases:
        if at + _HEAD.size + case.result_bytes > len(data):
            raise WorldlineError(f"{image} gave back {len(data)} bytes, fewer than its cases have")
        status, ticks, stack, end = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        outcomes.append(Outcome(STATUS[status], ticks, stack, end, data[at : at + case.result_bytes]))
        at += case.result_bytes
    return outcomes
