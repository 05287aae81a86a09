"""One update of the `lewm` preset, timed beside plain PyTorch on the same network and batch, gradients compared."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldline.bench.harness import compare
from worldline.bench.plain import PlainLeWM
from worldline.cli import configure
from worldline.core.devices import require_device
from worldline.core.files import read_json, write_bytes
from worldline.core.result import write_result
from worldline.core.seeding import seed_for
from worldline.data.collect import CollectConfig, collect
from worldline.data.lerobot import open_dataset
from worldline.train.config import TrainConfig
from worldline.train.loop import Training, threads
from worldline.train.objective import JointBatch

_WARMUP_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class TrainBenchConfig:
    """How long to measure, and beside what."""

    options: str = ""
    """More options of `worldline train`, on top of `objective=lewm`; they may change sizes, not terms."""
    compare_seconds: float = 40.0
    """CPU time for each comparison in turns."""
    compiled: bool = True
    """Also compare with the plain step under `torch.compile`, which wants a C++ compiler and a minute."""
    device: Literal["cpu", "cuda"] = "cpu"
    reports: str = "reports"
    """Where `DATE-train/` is written, or `DATE-train-cuda/`."""


class PlainStep:
    """The plain update of the same weights on the same batch: forward, backward, clip, AdamW."""

    def __init__(self, training: Training, batch: JointBatch) -> None:
        config, self._stage = training.config, training.config.joint
        world, sizes = training.world, config.model
        self.network = PlainLeWM(
            image_size=sizes.image_size,
            latent_dim=sizes.latent_dim,
            width=sizes.conv_width,
            head=sizes.conv_head,
            hidden=sizes.hidden,
            actions=world.spec.action_dim,
        )
        self.network.to(config.device)
        wanted = self.network.state_dict()
        # on the windows of training, a GRU that begins anew from its context is a GRU
        ours = {name.replace("predictor.gru.", "predictor."): t.clone() for name, t in world.state_dict().items()}
        self.network.load_state_dict({name: t for name, t in ours.items() if name in wanted})
        self.loss: Callable[..., Tensor] = self.network
        self._frames = batch.frames.to(config.device)
        self._actions = world.normalise_actions(batch.actions.to(config.device))
        self._seed, self._latent_dim = config.seed, sizes.latent_dim
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self._stage.lr_encoder / 100, weight_decay=self._stage.weight_decay
        )

    def compile(self) -> None:
        self.loss = torch.compile(self.network)

    def __call__(self) -> Float[Tensor, ""]:
        generator = torch.Generator().manual_seed(seed_for(self._seed, "terms", 0))
        directions = torch.randn(self._latent_dim, self._stage.projections, generator=generator)
        directions = directions.to(self._frames.device)
        loss = self.loss(self._frames, self._actions, directions, self._stage.sigreg)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), self._stage.clip)
        self._optimizer.step()
        return loss.detach()


def run(config: TrainBenchConfig) -> Path:
    """Compare gradients, then time; write `result.json` and `report.md`, and return the report's path.

    Raises:
        WorldlineError: an option that `worldline train` does not have, or no such device.
    """
    require_device(config.device)
    with tempfile.TemporaryDirectory() as folder, threads(1):
        data = collect(CollectConfig(env="two_room", path=f"{folder}/data", episodes=40, steps=40, workers=1))
        options = [
            "objective=lewm",
            f"data={data}",
            f"path={folder}/run",
            f"device={config.device}",
            *config.options.split(),
        ]
        figures, comparisons = measure(configure("train", options), config)
    target = Path(config.reports) / f"{date.today():%Y-%m-%d}-train{'' if config.device == 'cpu' else '-cuda'}"
    write_result(target / "result.json", "bench-train", figures, {"comparisons": comparisons})
    report = target / "report.md"
    write_bytes(report, render(read_json(target / "result.json")).encode())
    return report


def measure(asked: TrainConfig, config: TrainBenchConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what the gradients of the first update are beside the plain ones, and the comparisons in turns."""
    steps: dict[str, Callable[[], object]] = {}
    gradients = {}
    for name, bfloat16 in (("worldline, bfloat16", True), ("worldline, float32", False)):
        training, batch = prepare(replace(asked, joint=replace(asked.joint, bfloat16=bfloat16)))
        plain = PlainStep(training, batch)
        update = _Update(training, batch)
        ours, theirs = float(update()), float(plain())
        gradients[name] = {"loss": ours, "plain_loss": theirs, **_gradient_errors(training, plain.network)}
        steps[name] = update
    reason = None if config.compiled else "it was not asked for"
    if config.compiled and shutil.which(os.environ.get("CXX", "c++")) is None:
        reason = "there is no C++ compiler"
    pairs = [("plain", "worldline, bfloat16"), ("plain", "worldline, float32")]
    steps["plain"] = plain
    if reason is None:
        compiled = PlainStep(training, batch)
        compiled.compile()
        steps["plain, compiled"] = compiled
        pairs += [("plain, compiled", "worldline, bfloat16"), ("plain, compiled", "worldline, float32")]
    on_cpu = config.device == "cpu"
    clock = time.thread_time_ns if on_cpu else _device_clock
    found = [
        compare((a, steps[a]), (b, steps[b]), config.compare_seconds, _WARMUP_SECONDS, clock=clock).to_json()
        for a, b in pairs
    ]
    figures = {
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
        "batch": list(batch.frames.shape),
        "projections": asked.joint.projections,
        "gradients": gradients,
        "compiled": reason or "yes",
        "parameters": sum(p.numel() for p in plain.network.parameters()),
    }
    return figures, found


def _device_clock() -> int:
    """Return the time once the device has done all it was given."""
    torch.cuda.synchronize()
    return time.perf_counter_ns()


def prepare(config: TrainConfig) -> tuple[Training, JointBatch]:
    """Return a training at the beginning of its joint stage, and its first batch."""
    training = Training(config, open_dataset(config.data))
    batch = training.enter("joint", config.joint)(0)
    assert isinstance(batch, JointBatch)
    return training, batch


class _Update:
    """The update of `worldline train`, on one batch."""

    def __init__(self, training: Training, batch: JointBatch) -> None:
        self._training, self._batch = training, batch

    def __call__(self) -> Float[Tensor, ""]:
        terms, _ = self._training.update("joint", self._training.config.joint, 0, self._batch)
        return terms["loss"]


def _gradient_errors(training: Training, plain: PlainLeWM) -> dict[str, dict[str, float]]:
    """Return cosine and relative error of our clipped gradient beside the plain one, for each part."""
    errors = {}
    for part in ("encoder", "predictor"):
        ours, theirs = (
            torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).double()
            for module in (getattr(training.world, part), getattr(plain, part))
        )
        errors[part] = {
            "cosine": float(torch.cosine_similarity(ours, theirs, dim=0)),
            "relative_error": float((ours - theirs).norm() / theirs.norm()),
        }
    return errors


def render(result: dict[str, Any]) -> str:
    """Write the report from `result.json` alone."""
    made, timed = result["provenance"], result["timing"]["comparisons"]
    device = result.get("device", "cpu")
    on_cpu = device == "cpu"
    windows, frames, size = result["batch"][:3]
    digits = 0 if on_cpu else 2
    lines = [
        f"# An update of `lewm`, {1 / timed[0]['ratio']:.2f} times as fast as plain PyTorch",
        "",
        f"`objective=lewm` on the `tiny` world, joint stage: {windows} windows of {frames} frames of {size} px, "
        f"{result['parameters']:,} parameters, SIGReg with 17 knots and {result['projections']} projections at each "
        f"time step; forward, backward, clip and AdamW on {'one thread' if on_cpu else 'an ' + device}. Plain: "
        "`bench/plain.py`, the same network and batch in float32, channels first, all knots of SIGReg in one tensor.",
        "",
        "| A | B | A ms | B ms | A / B, 95% interval of the median |",
        "|---|---|---|---|---|",
    ]
    for row in timed:
        low, high = (1 / bound for bound in reversed(row["interval"]))
        times = " | ".join(
            f"{median / 1e6:.{digits}f} ({quartiles[0] / 1e6:.{digits}f} to {quartiles[1] / 1e6:.{digits}f})"
            for median, quartiles in zip(row["medians"], row["quartiles"], strict=True)
        )
        ratio = f"{1 / row['ratio']:.2f} ({low:.2f} to {high:.2f}), {row['rounds']} rounds"
        lines.append(f"| {row['names'][0]} | {row['names'][1]} | {times} | {ratio} |")
    lines += [
        "",
        "Milliseconds are "
        + (
            "CPU time of the one thread that computes, the time of day of an idle machine"
            if on_cpu
            else "time by the clock until the device has nothing left to do"
        )
        + ": median (quartiles), in turns.",
        *([] if result["compiled"] == "yes" else ["", f"`torch.compile`: n/a, {result['compiled']}."]),
        "",
        "Gradients of the first update beside the plain ones in float32:",
        "",
        "| | loss | plain loss | encoder: cosine, relative error | predictor: cosine, relative error |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["gradients"].items():
        parts = " | ".join(
            f"{row[part]['cosine']:.6f}, {row[part]['relative_error']:.2g}" for part in ("encoder", "predictor")
        )
        lines.append(f"| {name} | {row['loss']:.5f} | {row['plain_loss']:.5f} | {parts} |")
    lines += [
        "",
        f"Machine: {made['machine']['processor']}, {made['machine']['cores']} cores; torch "
        f"{made['versions'].get('torch')}; commit {made['commit']}. Other work shares its caches and memory.",
        "",
        f"Again: `{made['command']}`",
        "",
    ]
    return "\n".join(lines)
