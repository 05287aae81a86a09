"""Clips that kill the process that reads them: what a dead one had in hand is tried by another."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from worldline.core.errors import WorldlineError
from worldline.data.clips import Clips

DEATHS = 2
"""How many processes a clip must kill to be given up."""


class InHand:
    """A small file for each batch that is being read, which outlives a process that dies of it."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def note(self, step: int, ids: Sequence[int]) -> Iterator[None]:
        """Keep the note while the block runs, and where it ends by no exception but by the process's death."""
        path = self._folder / f"{self._rank}-{step}.json"
        path.write_text(json.dumps(ids))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def left_in_hand(folder: Path) -> list[int]:
    """Return the clips of the notes that dead processes left, and clear them away."""
    found: set[int] = set()
    for path in sorted(folder.glob("*.json")):
        with suppress(json.JSONDecodeError):  # it died while it wrote, and before it read
            found.update(json.loads(path.read_text()))
        path.unlink()
    return sorted(found)


def find_deadly(clips: Clips, ids: Sequence[int]) -> dict[int, str]:
    """Read clips one by one in a process of its own; return those that two processes died of, and how.

    Raises:
        WorldlineError: processes die before they read anything.
    """
    deaths: Counter[int] = Counter()
    deadly: dict[int, str] = {}
    todo = list(ids)
    while todo:
        last, status = _try(clips, todo)
        if status == 0:
            break
        if last is None:
            raise WorldlineError(
                f"the process that tries clips dies at its start with status {status} (out of memory?); "
                "give the same command again"
            )
        deaths[last] += 1
        todo = todo[todo.index(last) :]
        if deaths[last] >= DEATHS:
            told = f"signal {-status}" if status < 0 else f"status {status}"
            deadly[last] = f"{DEATHS} processes that read it ended by {told}"
            todo = todo[1:]
    return deadly


def _try(clips: Clips, ids: list[int]) -> tuple[int | None, int]:
    """Return the last clip that a fresh interpreter began to read, and its exit status."""
    ours, theirs = multiprocessing.Pipe()
    command = f"from worldline.data.deadly import read_each; read_each({theirs.fileno()})"
    paths = os.pathsep.join(path for path in sys.path if path)
    with ours:
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-c", command],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": paths},
            )
        last = None
        with suppress(EOFError, ConnectionError):
            ours.send((clips, ids))
            while True:
                last = ours.recv()
        return last, child.wait()


def read_each(descriptor: int) -> None:
    """Read the clips that the other end of a pipe names, telling the number of each beforehand."""
    with Connection(descriptor) as pipe:
        clips, ids = pipe.recv()
        for clip in ids:
            pipe.send(clip)
            with suppress(WorldlineError, OSError):
                clips.read(np.array([clip], dtype=np.int64))
