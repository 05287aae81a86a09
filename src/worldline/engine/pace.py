"""Real time: a frame starts at its own deadline, whatever the frames before it did."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from worldline.core.errors import WorldlineError

_SPIN_NS = 300_000  # sleeping overshoots by about 0.1 ms on an idle Linux; the rest of the wait is spun


class Tick(NamedTuple):
    """The slot of one frame, in nanoseconds of the pace's clock."""

    slot: int
    due_ns: int
    deadline_ns: int
    """When the next slot begins: a frame that ends later was missed."""


class Pace:
    """Absolute deadlines: slot k begins at `origin + k / fps`, so lateness never accumulates.

    A frame that comes late within its slot starts at once. Slots that have passed entirely are skipped and counted;
    they are not caught up in a burst.

    Args:
        aligned: slots begin where those of every other aligned pace of this clock and rate do, so that sessions have
            their frames at once.
    """

    def __init__(
        self,
        fps: float,
        aligned: bool = False,
        clock: Callable[[], int] = time.perf_counter_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not 0.01 <= fps <= 1000:
            raise WorldlineError(f"frames a second must lie between 0.01 and 1000, got {fps}")
        self.fps = fps
        self.skipped = 0
        self._clock, self._sleep = clock, sleep
        self._aligned = aligned
        self.restart()

    def restart(self) -> None:
        """Begin slot 0 now (aligned: at the next common moment), as after a pause; nothing counts as skipped."""
        self._origin, self._next = self._clock(), 0
        if self._aligned:
            self._origin = round(-(-self._origin * self.fps // 1e9) * 1e9 / self.fps)

    def wait(self) -> Tick:
        """Wait for the next slot and return it."""
        index = self._next
        now = self._clock()
        if now >= self._due(index + 1):
            current = int((now - self._origin) * self.fps / 1e9)
            current += (self._due(current + 1) <= now) - (self._due(current) > now)  # rounding of the division
            self.skipped += current - index
            index = current
        due = self._due(index)
        if (left := due - now) > _SPIN_NS:
            self._sleep((left - _SPIN_NS) / 1e9)
        while self._clock() < due:
            self._sleep(0)  # gives other threads the interpreter
        self._next = index + 1
        return Tick(index, due, self._due(index + 1))

    def _due(self, index: int) -> int:
        return self._origin + round(index * 1e9 / self.fps)
