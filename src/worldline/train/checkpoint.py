"""A run's directory: its configuration, metrics, and checkpoints that are whole or absent.

RUN/run.json            what was asked for, and of which data; written once the data could be read
RUN/metrics.jsonl       the same lines however often the run was interrupted
RUN/timing.jsonl        what differs each time: speed, and the share of time that the loader cost
RUN/checkpoints/STEP/   a world, with the optimiser's state beside it
RUN/last, RUN/best      links to checkpoints; `last` decides what a run resumes from
RUN/result.json         written last: the run is finished
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from worldline.core.errors import WorldlineError
from worldline.core.files import atomic_path, fsync_directory, read_json, sha256_file, write_bytes, write_json
from worldline.core.result import provenance
from worldline.model.checkpoint import write_world
from worldline.model.world import World
from worldline.train.config import differing_options, with_defaults

RUN, METRICS, TIMING, RESULT = "run.json", "metrics.jsonl", "timing.jsonl", "result.json"
TRAINING, TENSORS = "training.json", "training.safetensors"
_FORMAT = "worldline-run"
_FREE = ("path", "data", "threads", "device", "track", "track_project")
"""Options that may differ when a run is resumed: where, not what."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint knows beside the world itself."""

    step: int
    best_step: int
    best_score: float | None
    tensors: dict[str, Tensor]
    """Optimiser state, and weights that the kept world does not show."""


@runtime_checkable
class RunConfig(Protocol):
    """Options of a run, `TrainConfig` for example."""

    @property
    def path(self) -> Path: ...
    def to_json(self) -> dict[str, Any]: ...


@contextmanager
def open_run(
    config: RunConfig,
    fingerprint: str,
    free: tuple[str, ...] = _FREE,
    fill: Callable[[dict[str, Any]], dict[str, Any]] = with_defaults,
) -> Iterator[bool]:
    """Take hold of a run directory, new or unfinished; yield True if it is finished already and must be left alone.

    `free` options may differ from those it was begun with, and `fill` gives a stored config the options that came
    later. A new one stays empty until `record_run`, so that whatever is refused before leaves nothing behind.

    Raises:
        WorldlineError: the directory belongs to something else, to a run with other options or data, or another
            process is training it.
    """
    path = config.path
    ours = (".lock", f".{RUN}.")  # all that a process killed before it wrote `run.json` can have left
    if path.exists() and not (path / RUN).exists() and any(not p.name.startswith(ours) for p in path.iterdir()):
        raise WorldlineError(f"{path} holds other files; choose an empty place with path=...")
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "a+") as lock:  # the system lets go of it however the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorldlineError(f"{path}: another process is training this run; wait for it, or stop it") from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        if (path / RUN).exists():
            _check_same(config, fingerprint, free, fill)
        yield (path / RESULT).exists()


def record_run(config: RunConfig, fingerprint: str) -> None:
    """Write what the run is, unless it goes on with one."""
    if not (config.path / RUN).exists():
        record = {"format": _FORMAT, "config": config.to_json(), "data": fingerprint, "provenance": provenance()}
        write_json(config.path / RUN, record)


def save_checkpoint(run: Path, world: World, saved: Saved, training: dict[str, Any]) -> Path:
    """Write a checkpoint, point `last` and `best` at what they should, and remove the others."""
    name = f"{saved.step:08d}"
    target = run / "checkpoints" / name
    temporary = target.with_name(f".{name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write_world(temporary, world, training=training)
    write_bytes(temporary / TENSORS, save(saved.tensors))
    details = {
        "step": saved.step,
        "best_step": saved.best_step,
        "best_score": saved.best_score,
        "sha256": sha256_file(temporary / TENSORS),
    }
    write_json(temporary / TRAINING, details)
    shutil.rmtree(target, ignore_errors=True)  # a leftover that `last` never came to point at
    os.rename(temporary, target)
    fsync_directory(target.parent)
    _point(run, "last", saved.step)
    _settle(run, saved.step, saved.best_step)
    return target


def load_checkpoint(run: Path) -> tuple[Path, Saved] | None:
    """Return where `last` points and what lies there, or None for a run without a checkpoint; clear away leftovers.

    Raises:
        WorldlineError: the checkpoint is damaged.
    """
    last = run / "last"
    if not last.is_symlink():
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        return None
    directory = run / "checkpoints" / os.readlink(last).rsplit("/", 1)[-1]
    details = read_json(directory / TRAINING)
    tensors = directory / TENSORS
    if not tensors.exists() or sha256_file(tensors) != details["sha256"]:
        raise WorldlineError(f"{tensors} is damaged: its hash is not the recorded one; start again with another path=")
    try:
        saved = Saved(
            step=details["step"],
            best_step=details["best_step"],
            best_score=details["best_score"],
            tensors=load_file(tensors),
        )
    except (SafetensorError, KeyError) as error:
        raise WorldlineError(f"{directory} is damaged ({error}); start again with another path=") from None
    _settle(run, saved.step, saved.best_step)
    return directory, saved


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def flush_to_disk(path: Path) -> None:
    """Make appended lines survive a power cut."""
    with open(path, "ab") as file:
        os.fsync(file.fileno())


def truncate_lines(path: Path, step: int) -> None:
    """Keep the whole lines up to a step, so that a resumed run writes the rest again; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (json.JSONDecodeError, UnicodeDecodeError):
            break
        kept.append(line)
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def _check_same(
    config: RunConfig,
    fingerprint: str,
    free: tuple[str, ...],
    fill: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    path = config.path
    record = read_json(path / RUN)
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise WorldlineError(f"{path / RUN} is not a run of worldline; choose another place with path=...")
    before, now = fill(record["config"]), config.to_json()
    for name in free:
        before.pop(name, None)
        now.pop(name, None)
    state = "a finished" if (path / RESULT).exists() else "an unfinished"
    if different := differing_options(before, now):
        raise WorldlineError(
            f"{path} holds {state} run with other options ({', '.join(different[:4])}); "
            "give the same ones to go on with it, or another path="
        )
    if record["data"] != fingerprint:
        raise WorldlineError(f"{path} holds {state} run on other data; give another path=")


def _settle(run: Path, last_step: int, best_step: int) -> None:
    """Let `best` follow what `last` says, and remove checkpoints that neither needs."""
    _point(run, "best", best_step)
    needed = {f"{last_step:08d}", f"{best_step:08d}"}
    for entry in (run / "checkpoints").iterdir():
        if entry.name not in needed:
            shutil.rmtree(entry)


def _point(run: Path, link: str, step: int) -> None:
    temporary = run / f".{link}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(f"checkpoints/{step:08d}")
    os.replace(temporary, run / link)
    fsync_directory(run)
