"""What training on PushT waits for its data: the share of each update's time, beside the most that it may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from worldline.bench.bottleneck import read_waiting
from worldline.cli import configure
from worldline.data.ingest import IngestConfig, ingest
from worldline.train.checkpoint import TIMING
from worldline.train.loop import train
from worldline.train.pretrain import pretrain

MOST = 0.02
"""Share of the time of all updates that training may wait, on two cores."""

_BATCH = 4
"""Clips of an update of pre-training: reading and learning cost in proportion to it."""


def measure(data: Path, folder: Path, updates: int) -> list[dict[str, Any]]:
    """Train a world on a dataset's windows, and pre-train an encoder on JPEG clips of it.

    Returns a row for each: `overall` is the time waited over the time of all updates, the first included, for which
    nothing could be read ahead; `p50`, `p95` and `max` are over updates.
    """
    options: dict[str, Any] = {"codec": "jpeg", "stride": 1, "image_size": 64, "workers": 1}
    clips = ingest(IngestConfig(source=str(data), path=str(folder / "stall-clips"), **options))
    rows = [
        {"training": "`train`, windows of frames", **_world(data, folder / "world", updates)},
        {"training": f"`pretrain batch={_BATCH}`, JPEG clips", **_encoder(clips, folder / "encoder", updates)},
    ]
    return [{**row, "kept": row["overall"] <= MOST} for row in rows]


def _world(data: Path, run: Path, updates: int) -> dict[str, Any]:
    often = ["log_every=1", f"checkpoint_every={updates}"]  # a line an update
    train(configure("train", [f"data={data}", f"path={run}", f"joint.steps={updates}", "frozen.steps=0", *often]))
    return sum_up([json.loads(line) for line in (run / TIMING).read_text().splitlines()])


def sum_up(lines: list[dict[str, float]]) -> dict[str, Any]:
    """Return a row of `measure` from what `worldline train` says of the time of each update."""
    seconds = np.array([1 / line["updates_per_second"] for line in lines])
    shares = np.array([line["loader_share"] for line in lines])
    p50, p95, most = (float(value) for value in np.percentile(shares, (50, 95, 100)))
    return {
        "updates": len(lines),
        "step_ms": float(np.median(seconds)) * 1000,
        "overall": float((shares * seconds).sum() / seconds.sum()),
        "p50": p50,
        "p95": p95,
        "max": most,
    }


def _encoder(clips: Path, run: Path, updates: int) -> dict[str, Any]:
    options = [f"batch={_BATCH}", f"learner.steps={updates}", "log_every=1", f"checkpoint_every={updates}"]
    pretrain(configure("pretrain", [f"data={clips}", f"path={run}", *options]))
    found = read_waiting(run)
    rates = [json.loads(line)["updates_per_second"] for line in (run / TIMING).read_text().splitlines()]
    return {
        "updates": found["updates"],
        "step_ms": 1000 / float(np.median(rates)),
        "overall": found["stall_over_ranks"]["p50"],  # of one rank
        **found["stall"],
    }


def render(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the report."""
    lines = [
        "",
        f"Training on PushT at 64 px, one thread that learns and one that reads for it; it may wait {MOST:.0%} of the "
        "time of its updates. Over updates:",
        "",
        "| training | updates | ms an update | waited in all | p50 | p95 | longest | kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = " | ".join(f"{row[name]:.2%}" for name in ("overall", "p50", "p95", "max"))
        kept = "yes" if row["kept"] else "no"
        lines.append(f"| {row['training']} | {row['updates']} | {row['step_ms']:.0f} | {shares} | {kept} |")
    return lines
