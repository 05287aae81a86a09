"""`worldline bottleneck`: what keeps a masked pre-training from going faster, on this machine and on a stated one.

Each part of an update is done alone, in turns: bytes off the disk, pictures out of bytes, batches with nobody to train,
updates of one batch again and again, and everything together. Alone, a part is as fast as it can be, its ceiling; the
lowest ceiling names what limits. What a clip costs (CPU seconds, bytes, FLOPs) then says what another machine needs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from worldline.bench.bottleneck_report import render
from worldline.core.errors import WorldlineError, require_at_least
from worldline.core.files import read_json, write_bytes
from worldline.core.memory import keep_freed_memory
from worldline.core.progress import progress
from worldline.core.result import write_result
from worldline.data.clip_cache import CachedClips
from worldline.data.clips import Clips, open_clips
from worldline.data.order import Order
from worldline.model.video import MaskedVideo, VideoConfig
from worldline.train.checkpoint import TIMING
from worldline.train.feed import Batch, Feed, FeedConfig
from worldline.train.learner import Learner, LearnerConfig
from worldline.train.loop import threads
from worldline.train.masks import MaskConfig
from worldline.train.parallel import ParallelConfig, Ranks
from worldline.train.pretrain import check_fit

_ENDLESS = 1 << 40
_FAR = 10_000
"""Steps from one turn's batches to the next one's, so that no turn reads what another has read."""
_PRODUCT = 2048


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """A machine that the same training is to fill."""

    model: VideoConfig = field(default_factory=VideoConfig)
    """What is trained there, on clips like the ones measured here."""
    gpus: int = 8
    """Ranks that share its parameters."""
    tflops: float = 989.0
    """Peak of each in the number format that it trains in; an H100 SXM's in bfloat16 without sparsity, by its data
    sheet."""
    mfu: float = 0.4
    """Share of the peak that updates are to reach, counting only what is computed: hidden tokens cost nothing."""
    network_gb_per_s: float = 50.0
    """What each GPU can send and receive, 1e9 bytes a second; 50 is 400 Gbit/s."""
    data_tb: float = 2.0
    """How much data there is, in the form that was measured here, 1e12 bytes."""

    def __post_init__(self) -> None:
        require_at_least(self, {"gpus": 1}, "target.")
        if min(self.tflops, self.mfu, self.network_gb_per_s, self.data_tb) <= 0:
            raise WorldlineError("target.tflops, mfu, network_gb_per_s and data_tb must be positive")


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """A pre-training as `worldline pretrain` would do it in one process, and how long to look at each part of it."""

    data: Path
    """The clips: what `worldline ingest` wrote."""
    model: VideoConfig = field(default_factory=VideoConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    feed: FeedConfig = field(default_factory=FeedConfig)
    batch: int = 32
    """Clips an update."""
    rounds: int = 5
    """Times that every part has its turn."""
    seconds: float = 4.0
    """How long a turn lasts."""
    threads: int = 1
    """CPU threads of updates; the feed has its own."""
    seed: int = 0
    """Of weights, masks and the order of clips."""
    run: Path | None = None
    """A worldline pretrain run, of any number of ranks, finished or not: what its updates waited is told, too."""
    target: TargetConfig = field(default_factory=TargetConfig)
    reports: Path = Path("reports")
    """Where `DATE-bottleneck/` is written."""

    def __post_init__(self) -> None:
        require_at_least(self, {"batch": 1, "rounds": 3, "threads": 1})
        if self.seconds <= 0:
            raise WorldlineError(f"seconds must be positive, got {self.seconds:g}")


def run(config: BottleneckConfig) -> Path:
    """Measure; write `result.json` and `report.md`, and return the report's path.

    Raises:
        WorldlineError: clips and models do not fit.
    """
    ours, there = ((model.frames, model.image_size) for model in (config.model, config.target.model))
    if ours != there:
        raise WorldlineError(
            f"the target's model wants clips of {there[0]} frames and {there[1]} pixels, here they are {ours}: "
            "what such a clip costs is measured on such clips; ingest some, or give target.model.image_size"
        )
    clips = open_clips(config.data)
    check_fit(config.data, clips, config.model)
    waited = None if config.run is None else read_waiting(config.run)
    keep_freed_memory()
    load = os.getloadavg()[0]
    with threads(config.threads):
        parts = _Parts(config, clips)
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in parts.all}
        with progress("bottleneck", config.rounds * len(turns)) as task:
            for number in range(config.rounds):
                order = list(parts.all.items())
                for name, part in order if number % 2 == 0 else order[::-1]:
                    turns[name].append(part())
                    task.advance(1, f"{name}: {turns[name][-1]['clips_per_second']:.1f} clips/s")
        product = _gemm_flops(torch.bfloat16 if config.learner.bfloat16 else torch.float32)
    figures = {
        "data": {"fingerprint": clips.fingerprint, "num_clips": clips.num_clips, "frames": clips.num_frames,
                 "image_size": clips.image_size, "kind": type(clips).__name__},
        "config": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()},
        "bytes_per_clip": parts.bytes_per_clip,
        "flops_per_clip": flops_per_clip(config.model, config.mask, config.learner),
        "target_flops_per_clip": flops_per_clip(config.target.model, config.mask, config.learner),
        "target_parameters": count_parameters(config.target.model),
    }  # fmt: skip
    timing = {
        "turns": turns,
        "stall": _spread(parts.stalls),
        "ready_batches": {name: float(np.mean(found)) for name, found in parts.ready.items()},
        "product_flops": product,
        "run": waited,
        "load": load,
    }
    folder = config.reports / f"{date.today():%Y-%m-%d}-bottleneck"
    write_result(folder / "result.json", "bottleneck", figures, timing)
    report = folder / "report.md"
    write_bytes(report, render(read_json(folder / "result.json")).encode())
    return report


def read_waiting(run: Path) -> dict[str, Any]:
    """Return what the updates of a pre-training waited for clips, from its `timing.jsonl`.

    A rank that waits makes all wait, so that an update's exposed stall is the longest one of its ranks. Of a run that
    went on with another number of ranks, what was trained on the last one counts.

    Raises:
        WorldlineError: there is no such run, or it has no timing of this kind yet.
    """
    try:
        written = (run / TIMING).read_text().splitlines(keepends=True)
    except FileNotFoundError:
        raise WorldlineError(f"{run}: expected a folder of worldline pretrain with {TIMING}") from None
    lines = [json.loads(line) for line in written if line.endswith("\n")]  # the last may be torn
    lines = [line for line in lines if "stalls" in line and line["ranks"] == lines[-1]["ranks"]]
    if not lines:
        raise WorldlineError(f"{run / TIMING} tells no stalls; pre-train with this worldline, for log_every updates")
    seconds = sum(line["seconds"] for line in lines)
    stalls = [stall for line in lines for stall in line["stalls"]]
    by_rank = np.sum([line["waited_by_rank"] for line in lines], axis=0) / seconds
    updates = [len(line["stalls"]) for line in lines]
    return {
        "path": str(run),
        "ranks": len(by_rank),
        "updates": len(stalls),
        "stall": _spread(stalls),
        "stall_over_ranks": _spread(by_rank.tolist()),
        "ready_batches": float(np.average([line["ready"] for line in lines], weights=updates)),
    }


def _spread(shares: list[float]) -> dict[str, float]:
    return {**{f"p{q}": float(np.percentile(shares, q)) for q in (50, 95)}, "max": max(shares)}


class _Parts:
    """The parts of an update, each to be done alone for a while."""

    def __init__(self, config: BottleneckConfig, clips: Clips) -> None:
        self._config, self._clips = config, clips
        self._order = Order(clips.num_clips, batch=config.batch, seed=config.seed)
        self._step = 0
        ranks = Ranks(0, 1, None, None)
        self._learner = Learner(
            config.model, config.mask, config.learner, ParallelConfig(), ranks, seed=config.seed, device="cpu"
        )
        with self._feed() as feed:
            self._batch = next(iter(feed))
        self._learner.update(self._batch)  # makes the optimiser's state
        self.stalls: list[float] = []
        """Of every update of `all`: the share of its time that it waited for its batch."""
        self.ready: dict[str, list[int]] = {"feed": [], "all": []}
        """Batches that lay ready when one was asked for."""
        self.bytes_per_clip: float | None = None
        self.all: dict[str, Callable[[], dict[str, float]]] = {}
        if isinstance(clips, CachedClips):
            pieces = clips.pieces(np.arange(min(clips.num_clips, 4096)))
            self.bytes_per_clip = float(np.mean([size for _, _, size in pieces]))
            self.all["read"] = self._read
        self.all |= {"decode": self._decode, "feed": self._feed_alone, "update": self._update, "all": self._all}

    @contextmanager
    def _feed(self) -> Iterator[Feed]:
        config = self._config
        with Feed(
            self._clips, self._order, config.feed, start=self._step, stop=_ENDLESS, rank=0, ranks=1,
            image_size=config.model.image_size, device="cpu",
        ) as feed:  # fmt: skip
            yield feed

    def _turn(self, once: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> dict[str, float]:
        """Do `once`, a batch each time, for as long as a turn lasts; at least twice."""
        begun, spent, count = time.perf_counter(), clock(), 0
        while count < 2 or time.perf_counter() - begun < self._config.seconds:
            once()
            count += 1
        clips = count * self._config.batch
        return {
            "clips_per_second": clips / (time.perf_counter() - begun),
            "cpu_seconds_per_clip": (clock() - spent) / clips,
        }

    def _next_ids(self) -> np.ndarray:
        self._step += 1
        return self._order.batch(self._step - 1)

    def _read(self) -> dict[str, float]:
        """Read the bytes of clips that the system was told to forget, by one thread, and throw them away."""
        assert isinstance(self._clips, CachedClips)
        clips = self._clips

        def once() -> None:
            for path, offset, size in clips.pieces(self._next_ids()):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
                    os.pread(descriptor, size, offset)
                finally:
                    os.close(descriptor)

        return self._turn(once)

    def _decode(self) -> dict[str, float]:
        """Decode clips whose bytes are in memory, by one thread."""
        ids = self._next_ids()
        self._clips.read(ids)
        return self._turn(lambda: self._clips.read(ids))

    def _feed_alone(self) -> dict[str, float]:
        with self._feed() as feed:
            batches = iter(feed)

            def once() -> None:
                self.ready["feed"].append(feed.ready)
                next(batches)

            found = self._turn(once, time.process_time)
        self._step += _FAR
        return found

    def _update(self) -> dict[str, float]:
        return self._turn(lambda: self._learner.update(self._batch), time.process_time)

    def _all(self) -> dict[str, float]:
        """Train as `worldline pretrain` does, and note what each update waited."""
        with self._feed() as feed:
            batches = iter(feed)
            next(batches)  # the first is always waited for

            def once() -> None:
                begun, waited = time.perf_counter(), feed.waited_seconds
                self.ready["all"].append(feed.ready)
                batch: Batch = next(batches)
                self._learner.update(batch)
                self.stalls.append((feed.waited_seconds - waited) / (time.perf_counter() - begun))

            found = self._turn(once, time.process_time)
        self._step += _FAR
        return found


def flops_per_clip(model: VideoConfig, mask: MaskConfig, learner: LearnerConfig) -> float:
    """Return multiplications and additions that an update spends on a clip, backward pass included, hidden tokens not:
    counted from the products that the training's own code asks for, on tensors without bytes.
    """
    clips = 2
    # attention written out: of its fused form on a CPU torch does not count the products
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        learning = Learner(model, mask, learner, ParallelConfig(), Ranks(0, 1, None, None), seed=0, device="cpu")
        shape = (clips, model.frames, model.image_size, model.image_size, 3)
        pictures = torch.zeros(shape, dtype=torch.uint8)
        batch = Batch(0, np.arange(clips), pictures, torch.ones(clips), lost=())
        with FlopCounterMode(display=False) as counter:
            learning.update(batch)
    return float(counter.get_total_flops()) / clips


def count_parameters(model: VideoConfig) -> dict[str, int]:
    """Return how many numbers encoder and predictor have."""
    with torch.device("meta"):
        made = MaskedVideo(model)
    encoder = sum(parameter.numel() for parameter in made.encoder.parameters())
    return {"encoder": encoder, "predictor": sum(parameter.numel() for parameter in made.parameters()) - encoder}


def _gemm_flops(dtype: torch.dtype) -> float:
    """Return what this machine reaches in one large product, FLOP/s, with the threads that updates have."""
    a, b = (torch.randn(_PRODUCT, _PRODUCT).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        begun = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - begun)
    return 2 * _PRODUCT**3 / float(np.median(times[2:]))
