"""Play a recorded session again outside Python, on a board or on this machine, and get its chain of hashes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.native import TINYENGINE
from worldline.edge import build
from worldline.edge.build import Board
from worldline.edge.commands import room_for

SOURCE = TINYENGINE / "firmware/player.cpp"
_EVENT = struct.Struct("<4I")
_CHAIN = 16


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


def compile_player(target: Board | None, folder: Path, arena_bytes: int, options: Sequence[str] = ()) -> Path:
    """Compile the player, for a board or (None) for this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / "player.elf"
    options = (f"-DTINYENGINE_ARENA={arena_bytes}", *options)
    if target is None:
        build.compile_host([SOURCE], image, options)
    else:
        build.compile_board(target, [SOURCE], image, [*room_for(target), *options])
    return image


def play(
    target: Board | None, image: Path, program: bytes, genesis: bytes, events: Sequence[Event], timeout_s: float = 600.0
) -> list[bytes]:
    """Play events through an image of `compile_player`; returns the chain after each of them.

    Raises:
        WorldlineError: the image failed, or gave back fewer hashes than there are events.
    """
    folder = image.parent
    (folder / "program.bin").write_bytes(program)
    with open(folder / "session.bin", "wb") as file:
        file.write(struct.pack("<I", len(program)) + genesis)
        for event in events:
            count, rows = (0, 0) if event.pictures is None else event.pictures.shape[:2]
            file.write(_EVENT.pack(event.kind, len(event.prefix), count, rows) + event.prefix)
            for i in range(max(1, count)):
                action = i - (event.pictures is not None)  # between pictures, or alone
                if event.actions is not None and action >= 0:
                    file.write(event.actions[action].astype("<f4").tobytes())
                if event.pictures is not None:
                    file.write(event.pictures[i].tobytes())
    if target is None:
        build.run_host(image, timeout_s)
    else:
        build.run_board(target, image, timeout_s)
    data = (folder / "chains.bin").read_bytes()
    if len(data) != _CHAIN * len(events):
        raise WorldlineError(f"{image} gave back {len(data) // _CHAIN} hashes for {len(events)} events")
    return [data[i : i + _CHAIN] for i in range(0, len(data), _CHAIN)]
