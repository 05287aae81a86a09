"""TinyEngine compiled for this machine, once, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from worldline.core.errors import WorldlineError
from worldline.core.files import atomic_path

TINYENGINE = Path(__file__).parents[1] / "tinyengine"
# contraction would round actions otherwise on one machine than on another
LANGUAGE = (
    "-std=c++17", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off", "-Wall", "-Wextra", "-Wconversion", "-Werror",
)  # fmt: skip
_HOST = ("-O3", "-march=native")


def compile_host(sources: Sequence[Path], image: Path, options: Sequence[str] = ()) -> None:
    """Compile for this machine, with whatever vectors it has.

    Raises:
        WorldlineError: there is no C++ compiler, or it refused.
    """
    run([_compiler(), *_HOST, *LANGUAGE, *options, *map(str, sources), "-o", str(image)])


def host_library() -> Path:
    """Return the library that runs programs of TinyEngine, compiled if this version of it never was for this machine.

    Raises:
        WorldlineError: there is no C++ compiler.
    """
    source = TINYENGINE / "host/library.cpp"
    digest = hashlib.sha256(" ".join((*_HOST, *LANGUAGE)).encode())
    for path in sorted((*TINYENGINE.glob("*.hpp"), source)):
        digest.update(path.read_bytes())
    digest.update(_processor())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "worldline"
    library = cache / f"tinyengine-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        with atomic_path(library) as temporary:
            compile_host([source], temporary, ["-shared", "-fPIC"])
    return library


def run(command: list[str], cwd: Path | None = None, timeout_s: float = 300.0) -> None:
    """Run a program to its end.

    Raises:
        WorldlineError: it did not end in time, or ended with an error; its last lines are told.
    """
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise WorldlineError(f"{command[0]} did not end within {timeout_s:g} s") from None
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-30:])
        raise WorldlineError(f"{Path(command[0]).name} failed with status {done.returncode}:\n{said}")


def _compiler() -> str:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise WorldlineError(
            "TinyEngine is compiled where it runs, and there is no C++ compiler here; on Debian: apt-get install g++"
        )
    return compiler


def _processor() -> bytes:
    """Return what tells processors apart for `-march=native`."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except FileNotFoundError:
        return b""
    return b"\n".join(line for line in lines if line.startswith((b"flags", b"Features", b"model name")))
