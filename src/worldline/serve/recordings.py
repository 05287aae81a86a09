"""The folder of replay files: new names, and plain ones only."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from worldline.core.errors import WorldlineError

SUFFIX = ".wlr"


def new_recording(directory: Path, world: str) -> Path:
    """Return a name in `directory` that no file has."""
    stem = f"{world}-{datetime.now():%Y%m%d-%H%M%S}"
    path, count = directory / f"{stem}{SUFFIX}", 1
    while path.exists():
        count += 1
        path = directory / f"{stem}-{count}{SUFFIX}"
    return path


def list_recordings(directory: Path) -> list[dict[str, Any]]:
    """Return name, bytes and time of every recording, newest first."""
    found = sorted(directory.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [
        {
            "name": path.name,
            "bytes": path.stat().st_size,
            "time": f"{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M:%S}",
        }
        for path in found
    ]


def newest_recording(directory: Path) -> str | None:
    """Return the name of the newest recording, or None without one."""
    found = list_recordings(directory)
    return found[0]["name"] if found else None


def find_recording(directory: Path, name: str) -> Path:
    """Return the recording called `name`, a plain file name of `directory`.

    Raises:
        WorldlineError: there is no such recording.
    """
    path = directory / name
    if Path(name).name != name or path.suffix != SUFFIX or not path.is_file():
        raise WorldlineError(f"no recording called {name!r}; Open lists those that there are")
    return path
