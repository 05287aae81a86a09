"""Masked pre-training of a video encoder, the same function on one rank and on many.

Everything random is a function of (seed, step, clip), so that a run sees the same clips under the same masks whatever
the number of ranks, and may change it when it is resumed.

RUN/run.json            what was asked for, and of which clips
RUN/metrics.jsonl       loss and gradient, means over `log_every` updates
RUN/batches.jsonl       a line an update: a hash of the ids that all ranks read for it
RUN/lost.jsonl          a line for each clip that an update should have seen and could not: which, attempts, reason
RUN/deadly.json         clips that kill the process that reads them, and are passed over
RUN/timing.jsonl        speed, and the share of time that updates waited for clips: over ranks and updates, seconds of
                        each rank, and by update (`stalls`) that of the rank that waited longest
RUN/checkpoints, last   see `shards.py`
RUN/encoder.json, encoder.safetensors   the pre-trained encoder, for `load_encoder`
RUN/unseen.parquet      every clip that no update saw, by file and reason; see `unseen.py`
RUN/result.json         written last: the run is finished
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from worldline.core.devices import require_device
from worldline.core.errors import WorldlineError, require_at_least
from worldline.core.files import atomic_path
from worldline.core.memory import keep_freed_memory
from worldline.core.progress import progress
from worldline.core.result import provenance, write_result
from worldline.data.clips import Clips, JoinedClips, open_clips
from worldline.data.order import Order, batch_hash
from worldline.model.picture import filmstrip
from worldline.model.video import CARD, WEIGHTS, VideoConfig, save_encoder
from worldline.train.checkpoint import (
    METRICS,
    RESULT,
    TIMING,
    append_line,
    flush_to_disk,
    open_run,
    record_run,
    truncate_lines,
)
from worldline.train.feed import IN_HAND, Batch, Feed, FeedConfig, Lost, know_deadly
from worldline.train.learner import Learner, LearnerConfig
from worldline.train.loop import threads
from worldline.train.masks import MaskConfig, masks, shade
from worldline.train.parallel import ParallelConfig, Ranks, open_ranks
from worldline.train.shards import Shards
from worldline.train.tracking import Tracker, Tracking, flatten, open_tracker
from worldline.train.unseen import UNSEEN, entry_of, list_unseen, sum_up, told

BATCHES, LOST = "batches.jsonl", "lost.jsonl"
_FREE = (
    "path", "data", "also", "threads", "device", "parallel", "feed", "ray", "log_every", "checkpoint_every", "track",
    "track_project",
)  # fmt: skip
"""Options that may differ when a run is resumed: where and how, not what."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Workers of a Ray cluster in place of this process; 0 workers start none."""

    workers: int = 0
    """Ranks that Ray Train starts, anywhere in its cluster; needs worldline[ray]. The run's path and the clips must be
    reachable from all of them."""
    least: int | None = None
    """Fewest to train on while the cluster has no room for all; null waits for all. Every number from here to `workers`
    must divide the batch."""
    look_every_s: float = 60.0
    """Seconds between two looks for room for more, when there are fewer than `workers`."""
    cpus: int = 1
    """Cores of each."""
    failures: int = 3
    """Times that all workers are started again after one has died; they go on from the last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A masked pre-training run."""

    data: Path
    """The clips: what `worldline ingest` wrote."""
    also: tuple[Path, ...] = ()
    """Further clips of the same shape, mixed in."""
    weights: tuple[float, ...] = ()
    """Share of each in the order of data and also, exact over every 10,000 clips; none is by their sizes."""
    path: Path
    """The run directory to write. An unfinished run there goes on where it stopped; a finished one is never touched."""
    model: VideoConfig = field(default_factory=VideoConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    feed: FeedConfig = field(default_factory=FeedConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    batch: int = 32
    """Clips an update, over all ranks; a multiple of their number times parallel.accumulate."""
    seed: int = 0
    """Of the first weights, the order of the clips and all masks."""
    threads: int = 1
    """CPU threads of each rank; 0 leaves torch's own choice."""
    device: Literal["cpu", "cuda"] = "cpu"
    log_every: int = 20
    """Updates between two lines of metrics."""
    checkpoint_every: int = 500
    """Updates between two checkpoints."""
    track: Tracking = "none"
    """Show metrics, masked clips and the encoder to TensorBoard or Weights & Biases, too; rank 0 does."""
    track_project: str = "worldline"
    """The project in Weights & Biases."""

    def __post_init__(self) -> None:
        require_at_least(self, {"batch": 1, "threads": 0, "log_every": 1, "checkpoint_every": 1})
        if self.feed.by == "ray" and not self.ray.workers:
            raise WorldlineError("feed.by=ray reads on the Ray cluster that trains; give ray.workers=N with it")
        if self.parallel.accumulate > 1 and self.learner.target == "sigreg":
            raise WorldlineError(
                f"parallel.accumulate must be 1 with learner.target=sigreg, which compares all clips of an update, got "
                f"{self.parallel.accumulate}; save memory by parallel.checkpointing=true or more ranks"
            )
        if self.ray.least is not None:
            counts = range(self.ray.least, self.ray.workers + 1)
            if not counts or self.ray.least < 1:
                raise WorldlineError(f"ray.least must be 1 to ray.workers, got {self.ray.least} of {self.ray.workers}")
            if odd := [count for count in counts if self.batch % (count * self.parallel.accumulate)]:
                raise WorldlineError(
                    f"batch must be a multiple of every number of workers from ray.least to ray.workers (x "
                    f"parallel.accumulate), got {self.batch} and {odd[0]}"
                )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dict(json.loads(json.dumps(asdict(self), default=str)))


class Seen(NamedTuple):
    """What a rank tells the others of an update."""

    step: int
    ids: list[int]
    lost: tuple[Lost, ...]
    loss: float
    gradient: float
    waited: float
    seconds: float
    ready: int
    """Batches that lay ready when this one was asked for."""


def pretrain(config: PretrainConfig) -> Path:
    """Pre-train an encoder and return the run directory, ready for `load_encoder`.

    Called by every rank; alone in a plain process.

    Raises:
        WorldlineError: clips, run directory or ranks do not fit, there is no such device, or the loss stopped being a
            finite number.
    """
    require_device(config.device)
    parts = [open_clips(path) for path in (config.data, *config.also)]
    clips = JoinedClips(parts) if len(parts) > 1 else parts[0]
    check_fit(config.data, clips, config.model)
    with open_ranks(config.device) as ranks, threads(config.threads), _opened(config, clips, ranks) as finished:
        if finished:
            _say(ranks, f"{config.path}: this run is finished already")
        else:
            Pretraining(config, clips, ranks).run()
    return config.path


class Pretraining:
    """A run in progress, as one rank sees it."""

    def __init__(self, config: PretrainConfig, clips: Clips, ranks: Ranks) -> None:
        parts = ranks.count * config.parallel.accumulate
        if config.batch % parts:
            raise WorldlineError(
                f"batch must be a multiple of ranks x parallel.accumulate, {ranks.count} x "
                f"{config.parallel.accumulate}, got {config.batch}"
            )
        keep_freed_memory()
        self.config, self.clips, self.ranks = config, clips, ranks
        sizes = clips.sizes if isinstance(clips, JoinedClips) else (clips.num_clips,)
        self.order = Order(sizes, config.batch, config.seed, config.weights or None)
        self.learner = Learner(
            config.model, config.mask, config.learner, config.parallel, ranks, seed=config.seed, device=config.device
        )
        self.shards = Shards(config.path, ranks)
        self.tracker: Tracker
        self.step, self.loss = 0, math.nan

    def run(self) -> None:
        started, spent = time.monotonic(), time.process_time()
        self.step = resumed_at = self.learner.restore(self.shards)
        if self.ranks.rank == 0:
            for name in (METRICS, TIMING, BATCHES, LOST):
                truncate_lines(self.config.path / name, self.step)
        if self.step:
            _say(self.ranks, f"{self.config.path}: going on from step {self.step} on {self.ranks.count} rank(s)")
        config = self.config
        kind = config.track if self.ranks.rank == 0 else "none"
        tracker = open_tracker(kind, config.path, config.to_json(), config.track_project, self.step)
        with closing(tracker) as self.tracker:
            self._train()
            self.shards.finish()
            timing = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - spent}
            self._finish(timing | {"resumed_at": resumed_at, "ranks": self.ranks.count})
            self.tracker.finish("encoder", [config.path / name for name in (CARD, WEIGHTS)])

    def _train(self) -> None:
        config, total = self.config, self.config.learner.steps
        deadly = know_deadly(config.path, self.clips, self.ranks)
        seen: list[tuple[Batch, Any, Any, float, float, int]] = []
        with ExitStack() as stack:
            task = None
            if self.ranks.rank == 0:
                task = stack.enter_context(progress("pretrain", total, self.step))
            feed = stack.enter_context(
                Feed(
                    self.clips,
                    self.order,
                    config.feed,
                    start=self.step,
                    stop=total,
                    rank=self.ranks.rank,
                    ranks=self.ranks.count,
                    image_size=config.model.image_size,
                    device=config.device,
                    deadly=deadly,
                    in_hand=config.path / IN_HAND,
                )
            )
            mark, waited, ready = time.perf_counter(), 0.0, feed.ready
            for batch in feed:
                loss, gradient = self.learner.update(batch)
                self.step += 1
                now = time.perf_counter()
                seen.append((batch, loss, gradient, feed.waited_seconds - waited, now - mark, ready))
                mark, waited = now, feed.waited_seconds
                saves = self.step % config.checkpoint_every == 0 or self.step == total
                if saves or self.step % config.log_every == 0:
                    self._log(seen)
                    seen = []
                    if saves:
                        self.tracker.picture(self.step, "masks", partial(self._masked, batch))
                        self.learner.save(self.shards, self.step)
                self.shards.poll()
                if task is not None:
                    task.advance(note="" if math.isnan(self.loss) else f"loss {self.loss:.4f}")
                ready = feed.ready

    def _log(self, own: list[tuple[Batch, Any, Any, float, float, int]]) -> None:
        """Exchange what the ranks have seen since the last time; rank 0 writes it down."""
        mine = [
            Seen(batch.step, batch.ids.tolist(), batch.lost, float(loss), float(gradient), waited, seconds, ready)
            for batch, loss, gradient, waited, seconds, ready in own
        ]
        updates = list(zip(*self.ranks.gather(mine), strict=True))
        losses = [self._over_seen(update) for update in updates]
        self.loss = sum(losses) / len(losses)
        gradient = max(update[0].gradient for update in updates)
        if not (math.isfinite(self.loss) and math.isfinite(gradient)):
            raise WorldlineError(
                f"training stopped by step {self.step}: loss {self.loss}, gradient norm {gradient}; the last "
                f"checkpoint is in {self.config.path}; try a new run with a lower learner.lr"
            )
        lost = [each for update in updates for seen in update for each in seen.lost]
        if len(lost) == len(updates) * self.config.batch:
            raise WorldlineError(
                f"none of the clips of the last {len(updates)} updates could be read ({lost[0].reason}); see whether "
                f"{self.config.data} is still whole, then give the same command again"
            )
        if self.ranks.rank == 0:
            self._write(updates, losses, gradient, lost)

    def _over_seen(self, update: tuple[Seen, ...]) -> float:
        """Return the mean loss over the clips that were there; in the gradient, lost ones count as 0."""
        there = self.config.batch - sum(len(seen.lost) for seen in update)
        return sum(seen.loss for seen in update) / self.ranks.count * self.config.batch / max(1, there)

    def _write(self, updates: list[tuple[Seen, ...]], losses: list[float], gradient: float, lost: list[Lost]) -> None:
        run = self.config.path
        for update in updates:
            ids = np.concatenate([np.array(seen.ids, dtype=np.int64) for seen in update])
            append_line(run / BATCHES, {"step": update[0].step + 1, "batch": batch_hash(ids)})
        if lost:
            record = self.clips.record()
            for each in lost:
                append_line(run / LOST, {**each._asdict(), "step": each.step + 1, **entry_of(record, each.clip)})
        metrics = {"step": self.step, "loss": self.loss, "losses": losses, "gradient_norm": gradient}
        metrics["lost"] = len(lost)
        append_line(run / METRICS, metrics)
        stalls = np.array([[seen.waited / seen.seconds for seen in update] for update in updates])
        seconds = sum(update[0].seconds for update in updates)
        waited = [sum(seen.waited for seen in of_rank) for of_rank in zip(*updates, strict=True)]
        p50, p95 = (float(q) for q in np.percentile(stalls, (50, 95)))
        timing = {
            "updates_per_second": len(updates) / seconds,
            "clips_per_second": len(updates) * self.config.batch / seconds,
            "stall": sum(waited) / self.ranks.count / seconds,
            "stall_p50": p50,
            "stall_p95": p95,
            "stall_max": float(stalls.max()),
            "ready": float(np.mean([seen.ready for update in updates for seen in update])),
            "ranks": self.ranks.count,
            "seconds": seconds,
            "waited_by_rank": waited,
            "stalls": stalls.max(axis=1).round(5).tolist(),
        }
        append_line(run / TIMING, {"step": self.step, **timing})
        self.tracker.numbers(self.step, flatten(metrics) | flatten(timing, "timing/"))
        for name in (METRICS, BATCHES) + ((LOST,) if lost else ()):
            flush_to_disk(run / name)

    def _masked(self, batch: Batch) -> Image.Image:
        """Draw the first clip of a batch, and what the encoder saw of it under each of its masks."""
        config, clip = self.config, batch.clips[0].cpu().numpy()
        films = [clip]
        for kind in range(len(config.mask.block)):
            _, hidden = masks(config.mask, kind, config.model.grid, batch.ids[:1], batch.step, config.seed)
            films.append(shade(clip, hidden[0], config.model.grid))
        return filmstrip(films, every=config.model.tubelet, scale=1)

    def _finish(self, timing: dict[str, Any]) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.learner.kept_encoder, options=options)  # all ranks take part
        if self.ranks.rank == 0:
            run, config = self.config.path, self.config.to_json()
            shutil.rmtree(run / IN_HAND, ignore_errors=True)
            card = {"step": self.step, "data": self.clips.fingerprint, "config": config, "provenance": provenance()}
            save_encoder(run, self.config.model, weights, card)
            lines = (run / LOST).read_text().splitlines() if (run / LOST).exists() else []
            lost = [json.loads(line) for line in lines]
            unseen = list_unseen(self.clips.record(), self.order, self.step, lost)
            with atomic_path(run / UNSEEN) as temporary:
                pq.write_table(unseen, temporary, compression="zstd")
            never_seen = sum_up(unseen)
            figures = {
                "steps": self.step,
                "loss": self.loss,
                "lost": len(lost),
                "lost_clips": sorted({each["clip"] for each in lost}),
                "clips": self.clips.num_clips,
                "never_seen": never_seen,
                "parameters": self.learner.num_parameters,
                "data": self.clips.fingerprint,
                "config": config,
            }
            write_result(run / RESULT, "pretraining", figures, timing)
            print(f"{run}: loss {self.loss:.4f} after {self.step} updates")
            if lost:
                print(f"{len(lost)} times a clip could not be read, see {LOST}")
            if len(unseen):
                print(f"never seen: {told(never_seen)}; see {UNSEEN}")
        self.ranks.wait()


def check_fit(data: Path, clips: Clips, model: VideoConfig) -> None:
    """
    Raises:
        WorldlineError: the model wants other clips.
    """
    if clips.num_frames != model.frames or clips.image_size < model.image_size:
        raise WorldlineError(
            f"{data} has clips of {clips.num_frames} frames and {clips.image_size} pixels, the model wants "
            f"{model.frames} and {model.image_size}; give model.frames={clips.num_frames} and "
            f"model.image_size={clips.image_size}, or ingest the videos anew"
        )


@contextmanager
def _opened(config: PretrainConfig, clips: Clips, ranks: Ranks) -> Iterator[bool]:
    """Let rank 0 take hold of the run directory, and all ranks know what came of it."""
    with ExitStack() as stack:
        finished, problem = False, ""
        if ranks.rank == 0:
            try:
                finished = stack.enter_context(open_run(config, clips.fingerprint, free=_FREE, fill=dict))
                if not finished:
                    record_run(config, clips.fingerprint)
            except WorldlineError as error:
                problem = str(error)
        finished, problem = ranks.gather((finished, problem))[0]
        if problem:
            raise WorldlineError(problem)
        yield finished


def _say(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        print(text, flush=True)
