"""Who reads ahead of training: threads of its process, processes of their own, or tasks of Ray Data, in turns.

Also what training then waits for them (`stall.py`).
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from worldline.bench import stall
from worldline.bench.harness import median_interval
from worldline.core.errors import WorldlineError, require_at_least
from worldline.core.files import read_json, write_bytes
from worldline.core.memory import keep_freed_memory
from worldline.core.progress import progress
from worldline.core.result import write_result
from worldline.data.clips import Clips, open_clips
from worldline.data.collect import CollectConfig, collect
from worldline.data.ingest import IngestConfig, ingest
from worldline.data.order import Order
from worldline.train.feed import Batch, Feed, FeedConfig, Reader

_ENV, _EPISODE, _NUM_FRAMES, _SEED = "pusht", 160, 16, 0


@dataclass(frozen=True, kw_only=True)
class FeedBenchConfig:
    """How much to read, and of what."""

    image_size: int = 224
    """Of the simulated episodes."""
    episodes: int = 12
    """Simulated episodes, of 160 frames."""
    batch: int = 16
    """Clips, of 16 frames."""
    batches: int = 30
    """In a turn."""
    rounds: int = 12
    """Turns of each."""
    workers: int = 2
    """Threads, or processes, at most; one alone is measured too."""
    ray: bool = True
    """Also Ray Data, one task at a time, where Ray is installed."""
    updates: int = 200
    """Updates of each training on PushT whose waiting is measured; 0 is none."""
    reports: str = "reports"
    """Where `DATE-feed/` is written."""

    def __post_init__(self) -> None:
        require_at_least(self, {"episodes": 2, "batch": 1, "batches": 2, "rounds": 3, "workers": 1, "updates": 0})


Way = Callable[[int, int], Iterator[Batch]]
"""Gives the batches of updates `start` to `stop`."""


def run(config: FeedBenchConfig) -> Path:
    """Measure, write `result.json` and `report.md`, and return the report's path.

    Raises:
        WorldlineError: this system does not tell the CPU time of other processes.
    """
    if not Path("/proc/self/stat").exists():
        raise WorldlineError("the CPU time of processes is read from /proc, which is not here; run this on Linux")
    with tempfile.TemporaryDirectory() as folder:
        data, small = (
            collect(
                CollectConfig(
                    env=_ENV,
                    path=f"{folder}/data{size}",
                    episodes=config.episodes,
                    steps=_EPISODE,
                    image_size=size,
                    workers=1,
                )
            )
            for size in (config.image_size, 64)
        )
        found: dict[str, Any] = {}
        for codec in ("raw", "jpeg"):
            options: dict[str, Any] = {"num_frames": _NUM_FRAMES, "stride": 1, "image_size": config.image_size}
            path = ingest(IngestConfig(source=str(data), path=f"{folder}/{codec}", codec=codec, workers=1, **options))
            found[codec] = measure(open_clips(path), config)
        if config.updates:
            found["stall"] = stall.measure(small, Path(folder), config.updates)
    figures = {name: getattr(config, name) for name in ("image_size", "batch", "batches", "rounds")}
    target = Path(config.reports) / f"{date.today():%Y-%m-%d}-feed"
    write_result(target / "result.json", "bench-feed", {**figures, "num_frames": _NUM_FRAMES}, found)
    report = target / "report.md"
    write_bytes(report, render(read_json(target / "result.json")).encode())
    return report


def measure(clips: Clips, config: FeedBenchConfig) -> list[dict[str, Any]]:
    """Return a row for each way: CPU time of all its processes a clip, clips a second, and both beside one thread."""
    keep_freed_memory()  # as in training
    order = Order(clips.num_clips, config.batch, _SEED)
    options: dict[str, Any] = {"rank": 0, "ranks": 1, "image_size": clips.image_size}

    def fed(start: int, stop: int, **chosen: Any) -> Iterator[Batch]:
        with Feed(clips, order, FeedConfig(**chosen), start=start, stop=stop, device="cpu", **options) as feed:
            yield from feed

    def threads(count: int) -> Way:
        return lambda start, stop: fed(start, stop, threads=count)

    reader = Reader(clips, order, FeedConfig(), **options)
    counts = sorted({1, config.workers})
    with ExitStack() as stack:
        ways = {f"{count} thread{'s' * (count > 1)}": threads(count) for count in counts}
        for count in counts:
            processes = stack.enter_context(_Processes(reader, count))
            ways[f"{count} process{'es' * (count > 1)}"] = processes.batches
        rows = _in_turns(ways, config)
    if config.ray and find_spec("ray") is not None:
        import ray

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            pair = {"1 thread": threads(1), "Ray Data, 1 task": lambda start, stop: fed(start, stop, by="ray")}
            rows += _in_turns(pair, config)[1:]  # in turns with the thread that it is compared with
        finally:
            ray.shutdown()
    return rows


class _Processes:
    """The same reader in processes of torch's DataLoader, which hand batches over in shared memory."""

    def __init__(self, reader: Reader, count: int) -> None:
        self._steps: list[int] = []
        self._loader: Any = DataLoader(
            _Steps(reader),
            batch_size=None,
            sampler=self._steps,
            collate_fn=_as_it_is,
            num_workers=count,
            prefetch_factor=max(1, FeedConfig().depth // count),
            multiprocessing_context="spawn",
            persistent_workers=True,
        )

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        self._steps[:] = range(start, stop)
        yield from self._loader

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self._loader = None  # its processes end with it


class _Steps(Dataset[Batch]):
    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getitem__(self, step: int) -> Batch:
        return self._reader(step)


def _as_it_is(batch: Any) -> Any:
    return batch


def _in_turns(ways: Mapping[str, Way], config: FeedBenchConfig) -> list[dict[str, Any]]:
    """Time the same batches every way; neither the first round counts nor the first quarter of a turn.

    By then what was read ahead while a way began has been taken, and batches come as fast as they are made.
    """
    taken = np.empty((config.rounds, len(ways), 2))
    first, last = config.batches // 4, config.batches - 1
    clips = (last - first) * config.batch
    with progress("read in turns", config.rounds) as task:
        for turn in range(-1, config.rounds):
            start = max(turn, 0) * config.batches
            digests = set()
            for place in range(len(ways)) if turn % 2 else reversed(range(len(ways))):
                name = list(ways)[place]
                clock = time.process_time if "thread" in name else cpu_seconds
                marks, digest = [], 0.0
                batches = ways[name](start, start + config.batches)
                for number, batch in enumerate(batches):
                    digest += float(batch.clips[0].sum(dtype=torch.int64)) * (number + 1)
                    if number in (first, last):
                        marks.append((clock(), time.perf_counter()))
                digests.add(digest)
                ((cpu, wall),) = ((b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks))
                taken[max(turn, 0), place] = 1000 * cpu / clips, 1000 * wall / clips
            assert len(digests) == 1, "the feeds differ"
            task.advance(int(turn >= 0))
    rows = []
    for place, name in enumerate(ways):
        row: dict[str, Any] = {"name": name}
        for kind, measured in enumerate(("cpu", "wall")):
            ms, ratios = taken[:, place, kind], taken[:, place, kind] / taken[:, 0, kind]
            row[f"{measured}_ms_a_clip"] = [float(value) for value in np.percentile(ms, (25, 50, 75))]
            row[f"{measured}_ratio"] = [float(np.median(ratios)), *median_interval(ratios)]
        rows.append(row)
    return rows


def cpu_seconds() -> float:
    """Return the CPU time of this process and of all below it, down to those that Ray has started."""
    parents, spent = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has just ended
        pid = int(stat.parent.name)
        parents[pid] = int(words[1])
        spent[pid] = sum(map(int, words[11:15]))
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(spent[pid] for pid in ours) / os.sysconf("SC_CLK_TCK")


def render(result: dict[str, Any]) -> str:
    """Write the report."""
    made, timing = result["provenance"], result["timing"]
    lines = []
    for codec in (name for name in timing if name != "stall"):
        head = "| who reads | CPU ms a clip | beside 1 thread | ms a clip on the clock | beside 1 thread |"
        lines += ["", f"`{codec}` clips:", "", head, "|---|---|---|---|---|"]
        for row in timing[codec]:
            cells = [row["name"]]
            for measured in ("cpu", "wall"):
                low, middle, high = row[f"{measured}_ms_a_clip"]
                ratio, least, most = row[f"{measured}_ratio"]
                cells += [f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{ratio:.2f} ({least:.2f} to {most:.2f})"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += stall.render(timing["stall"]) if "stall" in timing else []
    return "\n".join(
        [
            f"# {_headline(timing)}",
            "",
            f"PushT, clips of {result['num_frames']} frames at {result['image_size']} px, {result['batch']} a batch; "
            f"{result['batches']} batches a turn, of which the first quarter is not counted, {result['rounds']} turns, "
            "the same batches every way (compared). "
            "Medians with quartiles; ratios are medians over turns with their 95% interval. CPU time is of all "
            "processes that take part, Ray's own among them. Nothing is trained in these turns. Processes are those of "
            "torch's DataLoader and hand batches over in shared memory; Ray Data had turns with a thread of its own.",
            *lines,
            "",
            f"Machine: {made['machine']['processor']}, {made['machine']['cores']} cores, which other work shares: "
            "the clock says what was left, CPU time what it costs. "
            f"torch {made['versions'].get('torch')}; commit {made['commit']}.",
            "",
            f"Again: `{made['command']}`",
            "",
        ]
    )


def _headline(timing: dict[str, Any]) -> str:
    parts = []
    for codec in (name for name in timing if name != "stall"):
        ratios = {row["name"]: row["cpu_ratio"][0] for row in timing[codec]}
        told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if name.startswith(("1 p", "Ray")))
        parts.append(f"{codec}: {told}")
    if "stall" in timing:
        parts.append(
            f"training on PushT waits {max(row['overall'] for row in timing['stall']):.1%} of its time at most"
        )
    return f"Who reads ahead: CPU time beside one thread; {'; '.join(parts)}"
