"""A simulator in a process of its own, asked over its standard input: python -m worldline.serve.simulate NAME SIZE

A request is a kind, u32 length, and so many bytes: `B` seed i64 and actions (float32 rows) that lead to a start, or `S`
one action. An answer is u8 (0 for a picture, 1 for an error's text), u32 length, and so many bytes; the first one comes
unasked, an empty picture, when the simulator is made.
"""

from __future__ import annotations

import os
import struct
import sys
from typing import BinaryIO

import numpy as np

from worldline.core.errors import WorldlineError
from worldline.data.simulators import make_simulator

REQUEST = struct.Struct("<cI")
ANSWER = struct.Struct("<BI")
SEED = struct.Struct("<q")


def main(name: str, size: int, asked: BinaryIO, told: BinaryIO) -> None:
    """Answer until the other side is gone."""

    def tell(kind: int, body: bytes) -> None:
        told.write(ANSWER.pack(kind, len(body)) + body)
        told.flush()

    try:
        simulator = make_simulator(name, size)
    except WorldlineError as error:
        tell(1, str(error).encode())
        return
    tell(0, b"")
    while head := asked.read(REQUEST.size):
        kind, length = REQUEST.unpack(head)
        body = asked.read(length)
        if kind == b"B":
            (seed,) = SEED.unpack_from(body)
            observation = simulator.reset(seed)
            rows = np.frombuffer(body, np.float32, offset=SEED.size).reshape(-1, simulator.spec.action_dim)
            for action in rows:
                observation = simulator.step(action)
        else:
            observation = simulator.step(np.frombuffer(body, np.float32))
        tell(0, np.ascontiguousarray(observation.frame).tobytes())


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not land among the answers
    main(sys.argv[1], int(sys.argv[2]), sys.stdin.buffer, answers)
