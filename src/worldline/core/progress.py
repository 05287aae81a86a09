"""Progress with an estimate of the time left, on a terminal and in a log alike."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_WINDOW = 60
"""Seconds that the pace is taken from."""
_OUTER: ContextVar[Callable[[float], str] | None] = ContextVar("outer", default=None)


@contextmanager
def within(describe: Callable[[float], str]) -> Iterator[None]:
    """Let every progress inside also show its place in something longer.

    `describe` takes the seconds that the inner work still needs, 0 while unknown, and returns a few words.
    """
    before = _OUTER.set(describe)
    try:
        yield
    finally:
        _OUTER.reset(before)


class Task:
    """A running piece of work; `advance` it and, where useful, `note` a figure beside it."""

    def __init__(self, progress: Progress | None, label: str, total: int, done: int) -> None:
        self._progress, self._label, self._total, self._done = progress, label, total, done
        self._started = time.monotonic()
        self._printed = self._started
        self._seen: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._note = ""
        self._id = progress.add_task(label, total=total, completed=done, note="") if progress else None

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self._done += count
        now = time.monotonic()
        if not self._seen or now - self._seen[-1][0] >= 1.0:
            self._seen.append((now, self._done))
        self._note = note if note is not None else self._note
        if self._progress is not None and self._id is not None:
            self._progress.update(self._id, completed=self._done, note=self._note + self._place())
        elif now - self._printed >= 10:
            self._printed = now
            self.print()

    def print(self) -> None:
        elapsed = time.monotonic() - self._started
        seconds = self._seconds_left()
        left = "starting" if seconds is None else f"{seconds:.0f} s left"
        line = (
            f"{self._label}: {self._done}/{self._total}, {elapsed:.0f} s, {left} {self._note}".rstrip() + self._place()
        )
        print(line, flush=True)

    def _seconds_left(self) -> float | None:
        """Estimate by the pace of the last minute, so that neither a slow start nor an earlier part counts."""
        if self._done >= self._total:
            return 0.0
        since, done = self._seen[0] if self._seen else (0.0, self._done)
        return (
            (time.monotonic() - since) / (self._done - done) * (self._total - self._done) if self._done > done else None
        )

    def _place(self) -> str:
        outer = _OUTER.get()
        return f" | {outer(self._seconds_left() or 0.0)}" if outer else ""


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Task]:
    """Show a bar with elapsed time and ETA on a terminal, or a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            yield Task(bar, label, total, done)
    else:
        task = Task(None, label, total, done)
        yield task
        task.print()
