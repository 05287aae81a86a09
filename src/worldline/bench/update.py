"""An update of a masked pre-training on one device: how fast, what share of the peak, and what memory beside the plan.

On CUDA the measured peak stands beside what `worldline plan-memory` counts on tensors without bytes.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from worldline.bench.bottleneck import count_parameters, flops_per_clip
from worldline.core.devices import require_device
from worldline.core.errors import WorldlineError, require_at_least
from worldline.core.files import read_json, write_bytes
from worldline.core.result import write_result
from worldline.core.seeding import rng_for
from worldline.model.video import VideoConfig
from worldline.train.feed import Batch
from worldline.train.learner import Learner, LearnerConfig
from worldline.train.loop import threads
from worldline.train.masks import MaskConfig
from worldline.train.memory import measuring
from worldline.train.parallel import ParallelConfig, Ranks

_WARMUP = 3
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class UpdateBenchConfig:
    """What to train, on what, and for how long."""

    model: VideoConfig = field(default_factory=VideoConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batch: int = 8
    """Clips an update, of pictures without meaning, which lie on the device already."""
    seconds: float = 10.0
    """How long updates are timed, at least eight of them."""
    tflops: float = 989.0
    """Peak of the device in the number format that it trains in; an H100 SXM's in bfloat16, by its data sheet."""
    device: Literal["cpu", "cuda"] = "cpu"
    reports: Path = Path("reports")
    """Where `DATE-update-DEVICE/` is written."""

    def __post_init__(self) -> None:
        require_at_least(self, {"batch": 1})
        if self.seconds <= 0 or self.tflops <= 0:
            raise WorldlineError(f"seconds and tflops must be positive, got {self.seconds:g} and {self.tflops:g}")
        if self.parallel.offload:
            raise WorldlineError(
                "bench update measures one process, which has nothing to offload; leave parallel.offload"
            )


def run(config: UpdateBenchConfig) -> Path:
    """Time updates, note the peak of memory; write `result.json` and `report.md`, and return the report's path.

    Raises:
        WorldlineError: there is no such device.
    """
    require_device(config.device)
    cuda = config.device == "cuda"
    with threads(1):
        with measuring(config.model, config.mask, config.learner, config.parallel, ranks=1) as measure:
            planned = measure(config.batch)
        nanoseconds, peak = _time(config)
    figures = {
        "config": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "parameters": count_parameters(config.model),
        "flops_per_clip": flops_per_clip(config.model, config.mask, config.learner),
        "planned_bytes": planned.total,
    }
    low, median, high = np.percentile(nanoseconds, (25, 50, 75)).tolist()
    timing = {
        "update_ns": {"median": median, "quartiles": (low, high), "updates": len(nanoseconds)},
        "peak_bytes": peak,
    }
    folder = config.reports / f"{date.today():%Y-%m-%d}-update-{config.device}"
    write_result(folder / "result.json", "bench-update", figures, timing)
    report = folder / "report.md"
    write_bytes(report, render(read_json(folder / "result.json")).encode())
    return report


def _time(config: UpdateBenchConfig) -> tuple[list[int], int | None]:
    """Return what updates took, and the most bytes of tensors that a CUDA device held in one of them."""
    cuda = config.device == "cuda"
    model, rng = config.model, rng_for(0, "bench-update")
    before = torch.cuda.memory_allocated() if cuda else 0
    learner = Learner(
        model, config.mask, config.learner, config.parallel, Ranks(0, 1, None, None), seed=0, device=config.device
    )
    shape = (config.batch, model.frames, model.image_size, model.image_size, 3)
    pictures = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)).to(config.device)
    batch = Batch(0, np.arange(config.batch), pictures, torch.ones(config.batch, device=config.device), ())

    def clock() -> int:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter_ns()

    for _ in range(_WARMUP):
        learner.update(batch)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    taken: list[int] = []
    until = clock() + round(config.seconds * 1e9)
    while len(taken) < 8 or clock() < until:
        started = clock()
        learner.update(batch)
        taken.append(clock() - started)
    return taken, torch.cuda.max_memory_allocated() - before if cuda else None


def render(result: dict[str, Any]) -> str:
    """Write the report from `result.json` alone."""
    config, made, taken = result["config"], result["provenance"], result["timing"]["update_ns"]
    model, parallel = config["model"], config["parallel"]
    per_second = config["batch"] * 1e9 / taken["median"]
    reached = per_second * result["flops_per_clip"] / 1e12
    low, high = (quartile / 1e6 for quartile in taken["quartiles"])
    peak, planned = result["timing"]["peak_bytes"], result["planned_bytes"] / _GB
    settings = ["bfloat16" if config["learner"]["bfloat16"] else "float32"]
    settings += [name for name in ("checkpointing", "compile") if parallel[name]]
    parameters = sum(result["parameters"].values())
    lines = [
        f"# An update of a masked pre-training: {per_second:.1f} clips/s",
        "",
        f"A video transformer of {model['width']} channels and {model['depth']} blocks, {parameters:,} parameters with "
        f"its predictor, target `{config['learner']['target']}`, {', '.join(settings)}; {config['batch']} clips of "
        f"{model['frames']} frames of {model['image_size']} px an update, on {result['device']}.",
        "",
        f"- An update takes {taken['median'] / 1e6:.1f} ms (quartiles {low:.1f} to {high:.1f}, {taken['updates']} "
        "updates).",
        f"- {result['flops_per_clip'] / 1e12:.2f} TFLOP a clip, backward pass included and recomputing not, are "
        f"{reached:,.1f} TFLOP/s"
        + (f": {100 * reached / config['tflops']:.0f}% of {config['tflops']:g} (MFU)." if peak is not None else "."),
    ]
    if peak is not None:
        lines.append(
            f"- Tensors took {peak / _GB:.2f} GB at the worst moment; `worldline plan-memory` counts {planned:.2f} GB, "
            f"{100 * (planned * _GB / peak - 1):+.0f}%."
        )
    lines += [
        "",
        f"Machine: {made['machine']['processor']}, {made['machine']['cores']} cores; torch "
        f"{made['versions'].get('torch')}; commit {made['commit']}.",
        "",
        f"Again: `{made['command']}`",
        "",
    ]
    return "\n".join(lines)
