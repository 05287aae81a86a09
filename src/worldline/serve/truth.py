"""The true world beside the imagined one: the same start, the same actions, in a process of its own.

A simulator takes as long as a frame or longer, most of it in Python, where two threads of one process wait for each
other. So it is asked before a frame is computed and answers after it.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from jaxtyping import Float32, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.types import WorldSpec
from worldline.data.simulators import NAMES
from worldline.engine.workloads.latent import Starts
from worldline.serve.simulate import ANSWER, REQUEST, SEED


class TrueWorld:
    """A simulator that is led to a session's start and then follows its actions; one request at a time.

    Raises:
        WorldlineError: there is no such simulator, or its package is not installed.
    """

    def __init__(self, name: str, starts: Starts) -> None:
        self._starts, self._shape = starts, starts.frames.shape[2:]
        command = [sys.executable, "-m", "worldline.serve.simulate", name, str(self._shape[0])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.asked = True  # it says when it is ready
        """A request has not been answered yet."""
        self._answer()

    def ask_begin(self, seed: int) -> None:
        """Ask for the true picture of the start that `seed` picks."""
        start = seed % len(self._starts)
        prefix = self._starts.prefix[start, : self._starts.prefix_lengths[start]]
        way = np.concatenate((prefix, self._starts.actions[start])).astype(np.float32)
        self._ask(b"B", SEED.pack(int(self._starts.seeds[start])) + way.tobytes())

    def ask_step(self, action: Float32[np.ndarray, " a"]) -> None:
        """Ask for the true picture after `action`."""
        self._ask(b"S", np.asarray(action, np.float32).tobytes())

    def answer(self) -> UInt8[np.ndarray, "h w 3"]:
        """Wait for the picture that was asked for.

        Raises:
            WorldlineError: the process has ended.
        """
        return np.frombuffer(self._answer(), np.uint8).reshape(self._shape)

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait(timeout=10)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _ask(self, kind: bytes, body: bytes) -> None:
        if self.asked:
            self._answer()  # of a frame that came to nothing
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(REQUEST.pack(kind, len(body)) + body)
            self._process.stdin.flush()
        except OSError:
            raise WorldlineError(_GONE) from None
        self.asked = True

    def _answer(self) -> bytes:
        assert self._process.stdout is not None
        self.asked = False
        head = self._process.stdout.read(ANSWER.size)
        kind, length = ANSWER.unpack(head) if len(head) == ANSWER.size else (1, 0)
        body = self._process.stdout.read(length)
        if kind or len(body) != length:
            raise WorldlineError(body.decode(errors="replace") or _GONE)
        return body


_GONE = "the true world's process has ended; see the server's output"


def find_true_world(spec: WorldSpec, starts: Starts) -> tuple[TrueWorld | None, str]:
    """Return the true world of `spec`, or None and why there is none, in words for the page.

    It must show the pictures that the starts hold: a simulator of another version is not this world's truth.
    """
    if spec.name not in NAMES:
        return None, "This world comes from recorded episodes: nobody can simulate it."
    try:
        world = TrueWorld(spec.name, starts)
        world.ask_begin(0)
        first = world.answer()
    except WorldlineError as error:
        return None, f"{str(error)[:1].upper()}{str(error)[1:]}"
    if not np.array_equal(first, starts.frames[0, -1]):
        world.close()
        return None, "The simulator installed here does not show this checkpoint's start frames: another version."
    return world, ""


def picture_error(picture: UInt8[np.ndarray, "h w 3"], truth: UInt8[np.ndarray, "h w 3"]) -> float:
    """Return the root mean squared difference of two pictures, 0 to 1."""
    gap = picture.astype(np.float32) - truth
    return float(np.sqrt(np.mean(gap * gap))) / 255.0
