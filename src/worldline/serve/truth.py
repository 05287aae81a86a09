"""The true world beside the imagined one: the same start, the same actions, in a process of its own."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float32, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.types import WorldSpec
from worldline.data.simulators import NAMES
from worldline.engine.workloads.latent import Starts

PATIENCE_SECONDS = 20.0
"""A simulator that has not answered for so long counts as dead; loading one takes about a second."""


class TrueWorld:
    """A simulator that is led to a session's start and then follows its actions.

    `begin` and `step` only ask, and `picture` collects the answer: between the two the simulator works beside the
    model. One that died or failed is started again by the next `begin`.
    """

    def __init__(self, name: str, starts: Starts) -> None:
        self._name, self._starts = name, starts
        self._expected: UInt8[np.ndarray, "h w 3"] | None = None
        self.asked = False
        """Whether an answer is still to be collected."""
        self.process: subprocess.Popen[bytes] | None = None
        """None after a failure, until the next `begin`."""
        self._start()

    def begin(self, seed: int) -> None:
        """Ask for the true picture of the start that `seed` picks."""
        if self.process is None:
            self._start()
        start = seed % len(self._starts)
        self._ask(*self._starts.way(start))
        self._expected = self._starts.frames[start, -1]

    def step(self, action: Float32[np.ndarray, " a"]) -> None:
        """Ask for the true picture after `action`."""
        self._ask(None, [action])

    def picture(self) -> UInt8[np.ndarray, "h w 3"]:
        """Wait for what was asked for.

        Raises:
            WorldlineError: the simulator is not installed, is another version, failed, died or does not answer. Its
                process is ended.
        """
        expected, self._expected, self.asked = self._expected, None, False
        problem = f"gave no answer for {PATIENCE_SECONDS:g} s"
        try:
            if self._pipe.poll(PATIENCE_SECONDS):
                answer = self._pipe.recv()
                if isinstance(answer, Exception):
                    raise answer
                if expected is None or np.array_equal(answer, expected):
                    return np.asarray(answer)
                problem = "does not show this checkpoint's start frames: another version is installed here"
        except WorldlineError:
            self.close()
            raise
        except (EOFError, ConnectionError):
            problem = "ended by itself"
        except Exception as error:  # the simulator's own, whatever it is
            problem = f"failed with {error!r}"
        self.close()
        raise WorldlineError(f"the simulator of {self._name} {problem}; switch the true world on to try again")

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self._pipe.close()
            self.process.kill()
            self.process.wait()
            self.process = None

    def _start(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worldline.serve.simulator", self._name, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the server only, which then closes the pipe
            )

    def _ask(self, seed: int | None, actions: Iterable[Float32[np.ndarray, " a"]]) -> None:
        if self.asked:
            self.picture()  # of a frame that the engine failed to make
        self.asked = True
        try:
            self._pipe.send((seed, list(actions)))
        except ConnectionError:
            return  # it has died, which `picture` reports


def find_true_world(spec: WorldSpec, starts: Starts) -> tuple[TrueWorld | None, str]:
    """Return the true world of `spec`, or None and why there is none, in words for the page."""
    if spec.name not in NAMES:
        return None, "This world comes from recorded episodes: nobody can simulate it."
    return TrueWorld(spec.name, starts), ""


def picture_error(picture: UInt8[np.ndarray, "h w 3"], truth: UInt8[np.ndarray, "h w 3"]) -> float:
    """Return the root mean squared difference of two pictures, 0 to 1."""
    gap = picture.astype(np.float32) - truth
    return float(np.sqrt(np.mean(gap * gap))) / 255.0
