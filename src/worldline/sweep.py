"""The jobs of a sweep, one after the other, each a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple


class Job(NamedTuple):
    """One run of a sweep."""

    picked: tuple[str, ...]
    """The swept options, as KEY=VALUE."""
    words: tuple[str, ...]
    """What comes after `worldline` on its command line."""
    path: str


def run_jobs(jobs: Sequence[Job]) -> int:
    """Run every job, also after one that failed; print a table, and return the worst exit status.

    What is finished, and what goes on where it stopped, is for each job's own command to know.
    """
    rows, worst = [], 0
    for number, job in enumerate(jobs, 1):
        print(f"\n[{number} of {len(jobs)}] worldline {' '.join(job.words)}", flush=True)
        started = time.monotonic()
        status = subprocess.run([sys.executable, "-m", "worldline", *job.words], check=False).returncode
        if status == 130:  # Ctrl-C may reach the job first
            raise KeyboardInterrupt
        seconds = f"{time.monotonic() - started:.1f}"
        values = (word.split("=", 1)[1] for word in job.picked)
        rows.append((*values, "done" if status == 0 else f"status {status}", seconds, job.path))
        worst = max(worst, abs(status))
    names = [word.split("=", 1)[0] for word in jobs[0].picked]
    table = [(*names, "job", "seconds", "path"), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return worst
