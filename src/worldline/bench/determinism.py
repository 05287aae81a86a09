"""A price list: what each level of determinism costs, and whether it keeps what it promises."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from worldline.bench.engine import EngineBenchConfig, elsewhere, hand
from worldline.bench.harness import compare
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, write_bytes
from worldline.core.result import write_result
from worldline.engine.determinism import Level
from worldline.engine.runtime import Engine
from worldline.engine.workloads.latent import LatentWorkload, Mode
from worldline.engine.workloads.static_world import unsupported

_CALLS = 10  # frames in a row, so that caches are as in a session
_PAIRS: tuple[tuple[Level, Level], ...] = (("off", "run"), ("run", "machine"), ("off", "machine"))
PROMISES: dict[Level, str] = {
    "off": "none; no hashes, no recording",
    "run": "equal actions give equal bits within one process",
    "machine": "and across processes on one machine",
}


@dataclass(frozen=True, kw_only=True)
class DeterminismBenchConfig:
    """What to play, and for how long."""

    checkpoint: str
    """A checkpoint, a run, or a shipped world's name."""
    compare_seconds: float = 4.0
    """Time for each comparison in turns."""
    frames: int = 1_000
    """Frames of each process whose hash chains are compared, at least 200."""
    seed: int = 0
    """Of the start and of the hand that steers."""
    device: str = "cpu"
    """cpu or cuda."""
    reports: str = "reports"
    """Where `DATE-determinism/` is written, or `DATE-determinism-cuda/`."""
    publish: str | None = None
    """Where the page goes besides, such as docs/reports."""


def run(config: DeterminismBenchConfig) -> Path:
    """Compare the levels in turns, eager and as a graph; chains across processes, and on a CPU across threads.

    Writes `result.json` and `report.md`; returns the report's path.

    Raises:
        WorldlineError: no such checkpoint or device, or too short a time or too few frames to say anything.
    """
    if config.compare_seconds <= 0 or config.frames < 200:
        raise WorldlineError(
            "bench determinism needs compare_seconds > 0 and frames >= 200, got "
            f"{config.compare_seconds} and {config.frames}"
        )
    torch.set_num_threads(1)
    on_cpu = config.device == "cpu"
    world = LatentWorkload.open(config.checkpoint, "eager", config.device).world
    modes: list[Mode] = ["eager"] if on_cpu and unsupported(world) else ["graph", "eager"]
    actions = hand(world.spec, 1000, config.seed)
    timing: dict[str, Any] = {}
    chains: dict[str, Any] = {}
    threads: dict[str, Any] = {}
    for mode in modes:
        timing[mode] = []
        for pair in _PAIRS:
            workloads = [LatentWorkload.open(config.checkpoint, mode, config.device) for _ in pair]
            engines = [Engine(each, determinism=level) for each, level in zip(workloads, pair, strict=True)]
            for engine in engines:
                engine.reset(config.seed)
            calls = [lambda e=engine: e.step(actions[e.id % len(actions)]) for engine in engines]
            found = compare(
                (pair[0], calls[0]), (pair[1], calls[1]), budget_s=config.compare_seconds, calls_a_turn=_CALLS
            )
            timing[mode].append(found.to_json())
        played = EngineBenchConfig(
            checkpoint=config.checkpoint, frames=config.frames, seed=config.seed, mode=mode, device=config.device
        )
        chains[mode] = [elsewhere(played, None)["chain"] for _ in range(2)]
        if on_cpu:
            threads[mode] = _threads(config, mode, actions)
    folder = Path(config.reports) / f"{date.today():%Y-%m-%d}-determinism{'' if on_cpu else '-cuda'}"
    figures = {
        "checkpoint": config.checkpoint,
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
        "frames": config.frames,
        "chains": chains,
        "threads": threads,
    }
    write_result(folder / "result.json", "bench-determinism", figures, timing)
    page = render(read_json(folder / "result.json")).encode()
    write_bytes(folder / "report.md", page)
    if config.publish:
        write_bytes(Path(config.publish) / "determinism.md", page)
    return folder / "report.md"


def _threads(config: DeterminismBenchConfig, mode: Mode, actions: Float32[np.ndarray, "t a"]) -> dict[str, Any]:
    """Play the same 100 frames on one thread and on two; return both chains, and where the fingerprints part."""
    engines = []
    for count in (1, 2):
        workload = LatentWorkload.open(config.checkpoint, mode)
        workload.threads = count
        engine = Engine(workload)
        engine.reset(config.seed)
        for action in actions[:100]:
            engine.step(action)
        engines.append(engine)
    one, two = (engine.fingerprint for engine in engines)
    return {
        "chains": [engine.chain.hex() for engine in engines],
        "differs": [key for key in one if one[key] != two[key]],
    }


def render(result: dict[str, Any]) -> str:
    """Write the page from `result.json` alone."""
    made = result["provenance"]
    lines = [
        "# What determinism costs",
        "",
        f"`{result['checkpoint']}` on {_where(result)}, frames per busy second at each level, pairs in turns of "
        f"{_CALLS} frames (AB BA AB ...), median ratio of times with its 95% interval.",
        "",
        "| level | promise |",
        "|---|---|",
        *(f"| `{level}` | {promise} |" for level, promise in PROMISES.items()),
        "",
        "| mode | A | B | A frames/s (quartiles) | B frames/s (quartiles) | time of B / time of A | B is |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode, pairs in result["timing"].items():
        for found in pairs:
            speeds = " | ".join(
                f"{1e9 / median:,.0f} ({1e9 / slow:,.0f} to {1e9 / fast:,.0f})"
                for median, (fast, slow) in zip(found["medians"], found["quartiles"], strict=True)
            )
            low, high = found["interval"]
            names = " | ".join(found["names"])
            told = f"{found['ratio']:.3f} ({low:.3f} to {high:.3f}), {found['rounds']} rounds | {found['verdict']}"
            lines.append(f"| {mode} | {names} | {speeds} | {told} |")
    lines.append("")
    for mode, (first, second) in result["chains"].items():
        told = f"the same hash chain (`{first}`)" if first == second else f"DIFFERENT hash chains: {first}, {second}"
        lines.append(f"- {mode}, `machine`: two processes of {result['frames']:,} frames each end in {told}.")
    for mode, found in result["threads"].items():
        bits = "the same bits" if len(set(found["chains"])) == 1 else "other bits"
        where = ", ".join(found["differs"]) or "NOWHERE"
        lines.append(f"- {mode}, one thread and two: {bits} after 100 frames; their fingerprints part in: {where}.")
    lines += ["", *(_price(mode, pairs[-1]) for mode, pairs in result["timing"].items())]
    lines += [
        "",
        "What is paid for: hashes, settings made and put back around the frame, and on a GPU other kernels "
        "(`device=cuda`).",
        "",
        f"Machine: {made['machine']['processor']}, {made['machine']['cores']} cores; torch "
        f"{made['versions'].get('torch')}; commit {made['commit']}.",
        "",
        f"Again: `{made['command']}`",
        "",
    ]
    return "\n".join(lines)


def _where(result: dict[str, Any]) -> str:
    device = result.get("device", "cpu")
    return "a CPU" if device == "cpu" else f"an {device}"


def _price(mode: str, found: dict[str, Any]) -> str:
    """Say what `machine` costs beside `off`, no more surely than the interval allows."""
    least, most = (100 * (end - 1) for end in found["interval"])
    if least <= 0 <= most:
        return f"- {mode}: no price could be told from noise ({least:+.1f}% to {most:+.1f}% a frame)."
    return (
        f"- {mode}: a frame takes {100 * (found['ratio'] - 1):+.1f}% of its time more ({least:+.1f}% to {most:+.1f}%)."
    )
