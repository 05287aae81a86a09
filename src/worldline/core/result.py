"""Result files: figures with the provenance that lets somebody else get them again."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from worldline.core.files import write_json

_PACKAGES = ("worldline", "torch", "numpy", "pyarrow", "av", "gym-pusht", "pymunk", "dm_control", "mujoco", "vizdoom")


def provenance() -> dict[str, Any]:
    """Return commit, command, versions, machine and time of this process.

    `command` tells paths below the working directory without it. `commit` is None outside a git checkout of the
    project, or what WORLDLINE_COMMIT says of a copy without one; `-dirty` is appended when tracked files differ from
    it. The machine's `gpu` is told by a process that has used CUDA.
    """
    machine = {"processor": _processor(), "cores": _cores(), "system": platform.platform(terse=True)}
    return {
        "command": shlex.join([_program(), *(word.replace(f"{Path.cwd()}/", "") for word in sys.argv[1:])]),
        "commit": _commit(),
        "machine": machine | _gpu(),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_result(path: str | Path, kind: str, figures: dict[str, Any], timing: dict[str, Any] | None = None) -> None:
    """Write a `result.json`: `figures` must repeat exactly when run again; what cannot goes into `timing`."""
    write_json(path, {"kind": kind, **figures, "timing": timing or {}, "provenance": provenance()})


def _program() -> str:
    """Return the command's name, also where its package was run with `python -m`."""
    program = Path(sys.argv[0])
    return program.parent.name if program.name == "__main__.py" else program.name


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return os.environ.get("WORLDLINE_COMMIT")
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty", "--match="]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _gpu() -> dict[str, str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
