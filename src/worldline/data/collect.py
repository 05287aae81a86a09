"""Episodes from a simulator, by several processes, into a LeRobot v3.0 dataset; a kill loses an episode each at most.

Each finished episode is one durable file in `PATH.partial`. Episode i depends on the seed and i only, so the dataset is
the same for any number of workers and any number of interruptions, to the byte.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from worldline.core.errors import WorldlineError, differing, require_at_least
from worldline.core.files import atomic_path, read_json, write_json
from worldline.core.progress import Task, progress
from worldline.core.seeding import seed_for
from worldline.data.lerobot import SIDECAR, split_episodes
from worldline.data.lerobot_writer import DatasetWriter
from worldline.data.simulators import Simulator, make_simulator
from worldline.data.video import Segment, encode_segment, frame_rate

_PATIENCE_SECONDS = 10.0
"""How long to wait for the orphaned workers of a killed run to finish their episodes."""


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """What to collect. `workers` changes how fast, never what: with 1, everything happens in this process."""

    env: str
    """The simulator."""
    path: str
    """The dataset to write; a finished one is never overwritten."""
    episodes: int = 150
    """How many; each begins from a start of its own."""
    steps: int = 240
    """Frames in each episode, the first one included."""
    seed: int = 0
    """Of everything drawn: episode i depends on (seed, i) only."""
    workers: int = 2
    """Processes."""
    test_steps: int | None = None
    """Frames in each episode of the test split, `steps` or more; None is `steps`. With 1,010 of them rollouts can be
    followed to step 1,000."""
    image_size: int | None = None
    """Height and width of the pictures; None is the simulator's own, 64."""

    def __post_init__(self) -> None:
        require_at_least(self, {"episodes": 1, "steps": 2, "seed": 0, "workers": 1}, "collect: ")
        if self.test_steps is not None and self.test_steps < self.steps:
            raise WorldlineError(f"collect: test_steps must be at least steps {self.steps}, got {self.test_steps}")
        if self.image_size is not None and not 16 <= self.image_size <= 512:
            raise WorldlineError(f"collect: image_size must be 16 to 512 pixels, got {self.image_size}")

    def identity(self) -> dict[str, Any]:
        """Return what decides the content of the dataset."""
        decisive = {key: value for key, value in asdict(self).items() if key not in ("path", "workers")}
        return {key: value for key, value in decisive.items() if value is not None}

    @property
    def split_key(self) -> str:
        """What decides the split of the episodes, beside their index."""
        return f"{self.env}/{self.seed}"


def collect(config: CollectConfig) -> Path:
    """Make the dataset at `config.path`, or finish the one that an interrupted run began there.

    A complete dataset of the same configuration is returned as it is.

    Raises:
        WorldlineError: the path holds something else, another run is at work on it, or a worker died.
    """
    path = Path(config.path)
    staging = path.with_name(path.name + ".partial")
    if _complete(path, staging, config):
        return path
    spec = make_simulator(config.env, config.image_size).spec
    with _locked(staging, path) as lock:
        if _complete(path, staging, config):  # by another run, while this one waited
            return path
        plan = staging / "config.json"
        if plan.exists():
            _compare(staging, read_json(plan), config)
        else:
            write_json(plan, config.identity())
        missing = [i for i in range(config.episodes) if not _staged(staging, i).exists()]
        done = config.episodes - len(missing)
        if missing:
            with progress(f"collect {config.env}", config.episodes, done) as task:
                if config.workers == 1 or len(missing) == 1:
                    _collect_here(config, staging, missing, task)
                else:
                    _collect_with_processes(config, staging, missing, task, lock)
        with DatasetWriter(path, spec, split_key=config.split_key, collect=config.identity()) as writer:
            for episode in range(config.episodes):
                segment, actions, state = _load(_staged(staging, episode))
                writer.add_encoded(segment, actions, state, f"explore {config.env}")
        shutil.rmtree(staging)
    return path


def record_episode(simulator: Simulator, seed: int, steps: int, rate: Fraction) -> dict[str, np.ndarray]:
    """Play one episode of `steps` frames with the simulator's own policy, and return it as named arrays."""
    observation = simulator.reset(seed_for(seed, "reset"))
    policy = simulator.policy(seed_for(seed, "policy"))
    low, high = (np.array(bound, dtype=np.float32) for bound in (simulator.spec.action_low, simulator.spec.action_high))
    frames, states, actions = [], [], []
    for step in range(steps):
        action = np.clip(policy(observation), low, high)
        frames.append(observation.frame)
        states.append(observation.state)
        actions.append(action)
        if step < steps - 1:
            observation = simulator.step(action)
    segment = encode_segment(np.stack(frames), rate)
    return {
        "actions": np.stack(actions),
        "state": np.stack(states),
        "video": np.frombuffer(segment.data, dtype=np.uint8),
        "shape": np.array([segment.num_frames, segment.height, segment.width]),
        "statistics": segment.statistics,
    }


def _staged(staging: Path, episode: int) -> Path:
    return staging / f"episode-{episode:06d}.npz"


def _load(path: Path) -> tuple[Segment, np.ndarray, np.ndarray]:
    with np.load(path) as saved:
        num_frames, height, width = saved["shape"].tolist()
        segment = Segment(
            data=saved["video"].tobytes(),
            num_frames=num_frames,
            height=height,
            width=width,
            statistics=saved["statistics"],
        )
        return segment, saved["actions"], saved["state"]


class _Recorder:
    """Records and stages episodes, one at a time, with one simulator."""

    def __init__(self, config: CollectConfig, staging: Path) -> None:
        self._config, self._staging = config, staging
        self._simulator = make_simulator(config.env, config.image_size)
        self._rate = frame_rate(self._simulator.spec.step_seconds)
        self._test = frozenset(split_episodes(config.split_key, config.episodes)["test"])

    def record(self, episode: int) -> None:
        config = self._config
        seed = seed_for(config.env, config.seed, "episode", episode)
        steps = config.test_steps if config.test_steps and episode in self._test else config.steps
        arrays: dict[str, Any] = record_episode(self._simulator, seed, steps, self._rate)
        with atomic_path(_staged(self._staging, episode)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)


def _collect_here(config: CollectConfig, staging: Path, missing: list[int], task: Task) -> None:
    recorder = _Recorder(config, staging)
    for episode in missing:
        recorder.record(episode)
        task.advance()


def _collect_with_processes(config: CollectConfig, staging: Path, missing: list[int], task: Task, lock: int) -> None:
    """Hand out episodes one by one; a worker ends when this process closes its pipe, or dies.

    Workers are fresh interpreters that import this module alone, so that a caller's script needs no main guard. They
    hold the lock too: after a kill, nobody starts anew before the last of them has put down its episode.
    """
    waiting = iter(missing)
    pipes: list[Connection] = []
    processes = []
    try:
        for _ in range(min(config.workers, len(missing))):
            ours, theirs = multiprocessing.Pipe()
            with theirs:
                command = f"from worldline.data.collect import work; work({theirs.fileno()})"
                # a session of its own: Ctrl-C reaches this process only, which then closes the pipes
                process = subprocess.Popen(
                    [sys.executable, "-c", command], pass_fds=[theirs.fileno(), lock], start_new_session=True
                )
                processes.append(process)
            pipes.append(ours)
            ours.send((config, staging))
            ours.send(next(waiting))
        busy = list(pipes)
        while busy:
            for pipe in wait(busy):
                assert isinstance(pipe, Connection)
                problem = pipe.recv()
                if problem is not None:
                    raise problem
                task.advance()
                following = next(waiting, None)
                if following is None:
                    busy.remove(pipe)
                else:
                    pipe.send(following)
    except (EOFError, ConnectionError):
        raise WorldlineError(
            "collect: a worker process died (out of memory?); what is finished is kept, run the same command again"
        ) from None
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.wait()


def work(descriptor: int) -> None:
    """Live as a worker: record the episodes that the other end of the pipe `descriptor` asks for, until it closes."""
    with Connection(descriptor) as pipe:
        try:
            recorder = None
            config, staging = pipe.recv()
            while True:
                episode = pipe.recv()
                problem: Exception | None = None
                try:
                    recorder = recorder or _Recorder(config, staging)
                    recorder.record(episode)
                except Exception as error:  # the parent raises it
                    problem = error
                pipe.send(problem)
        except (EOFError, ConnectionError):
            return  # the parent has closed the pipe, or is gone


@contextmanager
def _locked(staging: Path, path: Path) -> Iterator[int]:
    """Hold the staging folder and yield the lock's descriptor; it is free when all processes with it have ended."""
    staging.mkdir(parents=True, exist_ok=True)
    with open(staging / "lock", "w") as file:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                raise WorldlineError(f"{path}: another collect is at work on it; wait for it or choose another path")
            time.sleep(0.05)
        yield file.fileno()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _complete(path: Path, staging: Path, config: CollectConfig) -> bool:
    """Say whether the dataset is there; if so, and it is the one asked for, clear away what staged it."""
    if not path.exists():
        return False
    if not (path / SIDECAR).exists():
        raise WorldlineError(f"{path}: exists and was not made by `worldline collect`; choose another path")
    _compare(path, read_json(path / SIDECAR)["collect"] or {}, config)
    shutil.rmtree(staging, ignore_errors=True)
    return True


def _compare(path: Path, there: dict[str, Any], config: CollectConfig) -> None:
    if differences := differing(there, config.identity()):
        raise WorldlineError(
            f"{path}: holds another collection ({differences}); it is never overwritten: "
            "remove it, or choose another path"
        )
