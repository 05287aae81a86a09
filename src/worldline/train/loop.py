"""Training: joint on pictures, then the predictor alone on frozen latents.

Every random choice is a function of (seed, stage, step), so that a run that was killed goes on to the same bits on a
CPU with the same number of threads.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldline.core.devices import require_device
from worldline.core.errors import WorldlineError
from worldline.core.memory import keep_freed_memory
from worldline.core.progress import Task, progress
from worldline.core.result import provenance, write_result
from worldline.core.seeding import seed_for
from worldline.data.cache import FrameCache
from worldline.data.lerobot import Dataset, open_dataset
from worldline.data.sampler import Prefetcher
from worldline.model.checkpoint import find_world, load_world, save_estimator, weights_sha256, world_tensors
from worldline.model.world import World
from worldline.train.checkpoint import (
    METRICS,
    RESULT,
    TIMING,
    Saved,
    append_line,
    flush_to_disk,
    load_checkpoint,
    open_run,
    record_run,
    save_checkpoint,
    truncate_lines,
)
from worldline.train.config import StageConfig, TrainConfig, rollout_length, stage_at, total_steps
from worldline.train.estimate import fit_estimator, rollout_steps
from worldline.train.features import PictureFeatures
from worldline.train.geometry import Geometry, measure_geometry
from worldline.train.losses import warmup_cosine
from worldline.train.modules import encoder_parts, new_modules
from worldline.train.objective import Terms, frozen_terms, joint_terms, weighted_sum
from worldline.train.tracking import Tracker, flatten, open_tracker
from worldline.train.validate import Validation
from worldline.train.windows import FrozenWindows, JointWindows, encode_frames, sample_frames

__all__ = ["TrainConfig", "train"]

_BACKGROUND_FRAMES = 256
_GAUGE_FRAMES = 2000
_LOADERS = 4
"""Threads that make batches for a GPU, which leaves the CPU idle."""


def train(config: TrainConfig) -> Path:
    """Train a world and return its run directory, ready for `load_world`.

    An unfinished run at `config.path` goes on from its last checkpoint; a finished one is returned as it is.

    Raises:
        WorldlineError: the data or the run directory do not fit, there is no such device, or the loss stopped being a
            finite number.
    """
    require_device(config.device)
    dataset = open_dataset(config.data)
    with open_run(config, dataset.fingerprint) as finished, threads(config.threads):
        if finished:
            print(f"{config.path}: this run is finished already")
        else:
            training = Training(config, dataset)  # decodes the frames: a damaged video ends here
            record_run(config, dataset.fingerprint)
            training.run()
    return config.path


class Clock:
    """What a run took, interrupted or not: since this process began it, and before, up to its last checkpoint."""

    def __init__(self) -> None:
        self._began = {"seconds": time.monotonic(), "cpu_seconds": time.process_time()}

    def spent(self) -> dict[str, float]:
        now = {"seconds": time.monotonic(), "cpu_seconds": time.process_time()}
        return {name: now[name] - began for name, began in self._began.items()}

    def go_on(self, timings: Path) -> None:
        """Count as spent what the last of the timings says, too."""
        before = json.loads(timings.read_text().splitlines()[-1])
        for name in self._began:
            self._began[name] -= before[name]


class Training:
    """A run in progress: the world, what optimises it, and how far it has come."""

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        keep_freed_memory()
        self.config, self.dataset = config, dataset
        self.cache = FrameCache(dataset, config.model.image_size)
        self.validation = Validation(self.cache, config.model.context, config.validation_windows, config.seed)
        sample = sample_frames(self.cache, _GAUGE_FRAMES, config.seed)
        self.gauge_frames = sample
        background = np.median(sample[:: max(1, len(sample) // _BACKGROUND_FRAMES)], axis=0) / 255.0
        self.background = torch.from_numpy(background.astype(np.float32)).to(config.device)
        wanted = config.joint.features and config.joint.steps
        self.features = PictureFeatures(sample, config.device) if wanted else None
        source = None if config.encoder is None else load_world(config.encoder)
        self.world, self.heads = new_modules(config, dataset, self.features, source)
        self.geometry: Geometry | None = None
        self.average: World | None = None
        self.optimizer: torch.optim.AdamW | None = None
        self.tracker: Tracker
        self._restored: dict[str, Tensor] = {}
        self.step, self.best_step = 0, 0
        self.clock: Clock
        self.best_score: float | None = None
        self.card = {
            "provenance": provenance(),
            "seed": config.seed,
            "data": {"name": dataset.spec.name, "fingerprint": dataset.fingerprint},
            "encoder": None if source is None else weights_sha256(source),
            "config": config.to_json(),
        }

    def run(self) -> None:
        self.clock = Clock()
        self._restore()
        total, config = total_steps(self.config), self.config
        tracker = open_tracker(config.track, config.path, config.to_json(), config.track_project, self.step)
        with closing(tracker) as self.tracker:
            with progress(f"train {self.dataset.spec.name}", total, self.step) as task:
                if self.step < config.joint.steps:
                    self._run_stage(task)
                if self.step < total:
                    self._run_stage(task)
            self._finish()
            self.tracker.finish("world", sorted(find_world(config.path).iterdir()))

    def _run_stage(self, task: Task) -> None:
        """Run the stage that the next update belongs to, to its end."""
        name, stage, first = stage_at(self.config, self.step)
        produce = self.enter(name, stage)
        sums, count, mark, waited = Terms(), 0, time.perf_counter(), 0.0
        loaders = 1 if self.config.device == "cpu" else _LOADERS
        with Prefetcher(produce, first, stage.steps, depth=3 * loaders, num_threads=loaders) as batches:
            for local, batch in enumerate(batches, start=first):
                terms, gradient = self.update(name, stage, local, batch)
                self.step += 1
                for key, term in terms.items():
                    sums[key] = sums.get(key, torch.zeros((), device=term.device)) + term
                count += 1
                task.advance(note=f"{name} loss {float(terms['loss']):.4f}")
                ends = local + 1 == stage.steps
                saves = ends or (local + 1) % self.config.checkpoint_every == 0
                if saves or (local + 1) % self.config.log_every == 0:
                    means = {key: float(value) / count for key, value in sums.items()}
                    self._log(METRICS, {"stage": name, **means, "gradient_norm": gradient})
                    elapsed = time.perf_counter() - mark
                    wait = batches.waited_seconds - waited
                    rates = {"updates_per_second": count / elapsed, "loader_share": wait / elapsed}
                    self._log(TIMING, {**rates, **self.clock.spent()})
                    sums, count, waited = Terms(), 0, batches.waited_seconds
                    if saves:
                        self._checkpoint(name, stage, ends)
                    mark = time.perf_counter()

    def update(self, name: str, stage: StageConfig, local: int, batch: Any) -> tuple[Terms, float]:
        """Do one update; return its terms and the gradient's norm before clipping."""
        assert self.optimizer is not None
        device = torch.device(self.config.device)
        factor = warmup_cosine(local, steps=stage.steps, warmup=stage.warmup, end=stage.lr_end)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        rollout = rollout_length(stage, local)
        with torch.autocast(device.type, torch.bfloat16, enabled=stage.bfloat16):
            if name == "joint":
                generator = torch.Generator().manual_seed(seed_for(self.config.seed, "terms", local))
                terms = joint_terms(self.world, self.heads, batch, stage, rollout, self.background, generator)
            else:
                generator = torch.Generator().manual_seed(seed_for(self.config.seed, "frozen-terms", local))
                terms = frozen_terms(
                    self.world, self.heads, batch, stage, rollout, self.background, generator, self.geometry
                )
        loss = weighted_sum(terms, stage)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradient = float(nn.utils.clip_grad_norm_(parameters, stage.clip))
        if not (math.isfinite(gradient) and math.isfinite(float(loss.detach()))):
            raise WorldlineError(
                f"training stopped at step {self.step + 1} ({name}): loss {float(loss.detach())}, gradient norm "
                f"{gradient}; the last checkpoint is in {self.config.path}; try a new run with lower learning rates"
            )
        self.optimizer.step()
        if self.average is not None:
            _follow(self.average, self.world, stage.ema)
        return {"loss": loss.detach()} | {key: term.detach() for key, term in terms.items()}, gradient

    def enter(self, name: str, stage: StageConfig) -> Callable[[int], Any]:
        """Set what a stage trains, with the optimiser's state where a checkpoint within the stage had one.

        Returns what makes the batch of an update, counted within the stage.
        """
        joint = name == "joint"
        parts: list[tuple[nn.Module | None, float]] = [
            *(encoder_parts(self.world.encoder, stage.lr_encoder, self.config) if joint else ()),
            (self.world.predictor, stage.lr_predictor),
            (self.world.decoder if joint or stage.grounding else None, stage.lr_decoder),
            (self.heads if joint else self.heads.inverse if stage.inverse_dynamics else None, stage.lr_encoder),
        ]
        self.world.requires_grad_(False).train(joint)
        groups = []
        for module, lr in parts:
            if module is not None:
                parameters = list(module.requires_grad_(True).parameters())
                groups.append({"params": parameters, "lr": lr, "base_lr": lr})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=stage.weight_decay, fused=True)
        _fill_optimizer(self.optimizer, self._restored)
        self._restored = {}
        if stage.ema and self.average is None:
            self.average = copy.deepcopy(self.world).requires_grad_(False)
        if not joint and not stage.grounding:  # what it reads does not change any more
            self._fit_gauge(self.world)
            if self.average is not None:
                self.average.gauge.load_state_dict(self.world.gauge.state_dict())
        if joint:
            return self._staged(
                JointWindows(self.cache, stage, self.config.model.context, self.config.seed, self.features)
            )
        produce = FrozenWindows(self.cache, stage, self.world, self.config.seed)
        if stage.excess_growth or stage.rollout_sigreg:
            found = measure_geometry(produce.latents, stage.rollout, self.config.seed)
            self.geometry = Geometry(*(tensor.to(self.config.device) for tensor in found))
        return self._staged(produce)

    def _staged(self, produce: Callable[[int], Any]) -> Callable[[int], Any]:
        """Return what makes a batch and puts it where it is computed with, so that the thread that calls it does it."""
        device = self.config.device
        if device == "cpu":
            return produce

        def staged(step: int) -> Any:
            batch = produce(step)
            return type(batch)(*(t if t.is_cuda else t.pin_memory().to(device, non_blocking=True) for t in batch))

        return staged

    def _checkpoint(self, name: str, stage: StageConfig, ends: bool) -> None:
        """Validate, decide whether this is the best so far, and save."""
        if ends and self.average is not None:
            self.world.load_state_dict(self.average.state_dict())
            self.average = None
        kept = self.world if self.average is None else self.average
        if name == "joint" or stage.grounding:
            self._fit_gauge(kept)
        found = self.validation(kept)
        self.tracker.picture(self.step, "rollout", lambda: self.validation.picture(kept))
        if name == "joint":  # latent errors of different encoders cannot be compared: the newest counts
            self.best_step, self.best_score = self.step, None
        elif self.best_score is None or found["rollout_error"] < self.best_score:
            self.best_step, self.best_score = self.step, found["rollout_error"]
        self._log(METRICS, {"stage": name, "validation": found})
        flush_to_disk(self.config.path / METRICS)
        tensors: dict[str, Tensor] = {}
        if not ends:
            assert self.optimizer is not None
            tensors |= _optimizer_tensors(self.optimizer)
            tensors |= {} if self.average is None else _prefixed("world.", self.world)
        tensors |= _prefixed("heads.", self.heads)
        saved = Saved(step=self.step, best_step=self.best_step, best_score=self.best_score, tensors=tensors)
        save_checkpoint(self.config.path, kept, saved, {**self.card, "step": self.step, "stage": name})

    def _restore(self) -> None:
        """Go back to the last checkpoint, and take back the metrics written since."""
        found = load_checkpoint(self.config.path)
        if found is not None:
            directory, saved = found
            self.step, self.best_step, self.best_score = saved.step, saved.best_step, saved.best_score
            kept = world_tensors(load_world(directory))
            raw = _without("world.", saved.tensors)
            self.world.load_state_dict(raw or kept)
            if raw:
                self.average = copy.deepcopy(self.world).requires_grad_(False)
                self.average.load_state_dict(kept)
            self.heads.load_state_dict(_without("heads.", saved.tensors))
            self._restored = _without("optimizer.", saved.tensors)
            print(f"{self.config.path}: going on from step {self.step}")
        for name in (METRICS, TIMING):
            truncate_lines(self.config.path / name, self.step)
        if self.step:
            self.clock.go_on(self.config.path / TIMING)

    def _fit_gauge(self, world: World) -> None:
        was_training = world.training
        world.eval()
        world.gauge.fit(world, encode_frames(world, self.gauge_frames).to(self.config.device))
        world.train(was_training)

    def _fit_estimator(self, best: World) -> bool:
        """Put an error estimator beside the best checkpoint, if the validation episodes suffice; say so if not."""
        if not rollout_steps(self.dataset, best.config.context):
            print(f"{self.config.path}: too few or too short validation episodes for an error estimator; left out")
            return False
        save_estimator(find_world(self.config.path), fit_estimator(best, self.cache, self.config.seed))
        return True

    def _log(self, file: str, line: dict[str, Any]) -> None:
        append_line(self.config.path / file, {"step": self.step, **line})
        self.tracker.numbers(self.step, flatten(line, "timing/" if file == TIMING else ""))

    def _finish(self) -> None:
        """Write the result and say what lies where."""
        lines = [json.loads(line) for line in (self.config.path / METRICS).read_text().splitlines()]
        validations = {line["step"]: line["validation"] for line in lines if "validation" in line}
        best = load_world(self.config.path)
        estimates = self._fit_estimator(best)
        figures = {
            "steps": self.step,
            "best_step": self.best_step,
            "validation": validations[self.best_step],
            "weights": weights_sha256(best),
            "parameters": sum(p.numel() for p in best.parameters()),
            "error_estimator": estimates,
            "data": self.card["data"],
            "config": self.config.to_json(),
        }
        write_result(self.config.path / RESULT, "training", figures, self.clock.spent())
        shown = ", ".join(
            f"{k} {v:.4f}" for k, v in figures["validation"].items() if k.startswith(("rollout", "error"))
        )
        print(f"{self.config.path}: best at step {self.best_step} of {self.step} ({shown})")
        print("  best/, last/: checkpoints; metrics.jsonl, timing.jsonl: curves; result.json: figures and provenance")


@torch.no_grad()
def _follow(average: World, world: World, decay: float) -> None:
    """Move the averaged weights towards the present ones; buffers are taken as they are."""
    for slow, fast in zip(average.parameters(), world.parameters(), strict=True):
        slow.lerp_(fast, 1.0 - decay)
    for kept, now in zip(average.buffers(), world.buffers(), strict=True):
        kept.copy_(now)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimiser's state as named tensors: optimizer.PARAMETER.KEY."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}


def _fill_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    if not tensors:
        return
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _without(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
