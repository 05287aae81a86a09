"""A long session with random input: does anything grow, does it repeat, can it be taken up anywhere."""

from __future__ import annotations

import io
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.figure import Figure

from worldline.bench.engine import hand
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, write_bytes
from worldline.core.progress import progress
from worldline.core.result import write_result
from worldline.core.seeding import rng_for
from worldline.engine.contracts import Level, resident_bytes, slope
from worldline.engine.recording import PICTURES, Kind, Recording
from worldline.engine.replay import seek, verify
from worldline.engine.runtime import Engine
from worldline.engine.workloads.latent import LatentWorkload

_BLOCKS = 100
_RESUMED = 500  # frames played on from a snapshot
_LEAST_FRAMES = 2_000


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """What to play, and for how long."""

    checkpoint: str
    """A checkpoint, a run, or a shipped world's name."""
    frames: int = 100_000
    """Frames of the session, as fast as they come."""
    seed: int = 0
    """Of the start, of the hand that steers, and of the snapshot that is taken up."""
    contracts: Level = "strict"
    """Whether some frames are audited for what a warm frame must not do, and whether a breach ends the run."""
    reports: str = "reports"
    """Where `DATE-soak/` is written."""

    def __post_init__(self) -> None:
        if self.frames < _LEAST_FRAMES:
            raise WorldlineError(f"soak wants at least {_LEAST_FRAMES:,} frames to see a trend in, got {self.frames}")


def run(config: SoakConfig) -> Path:
    """Play, verify, take up a snapshot; write `result.json`, `report.md` and its picture; return the report's path.

    Raises:
        WorldlineError: no such checkpoint, too few frames, or a contract was broken.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "soak.wlr"
        workload = LatentWorkload.open(config.checkpoint)
        with progress(f"soak {workload.world.spec.name}", 2 * config.frames) as task:
            found = _play(config, workload, path, lambda count: task.advance(count, "playing"))
            verdict = verify(
                path, LatentWorkload.open(config.checkpoint), lambda done, total: task.advance(1, "verifying")
            )
        resumed = _take_up(config, path)
        size = path.stat().st_size
    figures = {
        "config": asdict(config),
        "fingerprint": workload.fingerprint(),
        "chain": found["chain"],
        "broken_contracts": found["broken"],
        "replay": str(verdict),
        "replay_ok": verdict.ok,
        "resumed": resumed,
        "recording_bytes": size,
        "gauge": found["gauge"],
    }
    output = Path(config.reports) / f"{date.today():%Y-%m-%d}-soak"
    write_result(output / "result.json", "soak", figures, found["timing"])
    result = read_json(output / "result.json")
    write_bytes(output / "soak.svg", _draw(result).encode())
    write_bytes(output / "report.md", render(result).encode())
    return output / "report.md"


def _play(config: SoakConfig, workload: LatentWorkload, path: Path, advance: Any) -> dict[str, Any]:
    block = config.frames // _BLOCKS
    actions = hand(workload.world.spec, config.frames, config.seed)
    # laid out beforehand, or the session would grow by what is noted down of it
    memory, times = np.zeros(_BLOCKS, np.int64), np.zeros((_BLOCKS, 4))
    gauge = np.zeros((_BLOCKS, len(workload.gauge_names), 3))
    started = time.perf_counter()
    with Engine(workload, path, ledger_frames=block, contracts=config.contracts) as engine:
        engine.reset(config.seed)
        readings = np.zeros((block, len(workload.gauge_names)))
        for index, action in enumerate(actions, start=1):
            readings[index % block] = list(engine.step(action).gauge.values())
            if index % block == 0:
                number, summary = index // block - 1, engine.ledger.summary()
                if number < _BLOCKS:
                    times[number] = summary.busy.p50, summary.busy.p99, summary.busy.max, summary.coverage
                    memory[number] = resident_bytes()
                    gauge[number] = np.percentile(readings, (5, 50, 95), axis=0).T
                advance(block)
        chain, broken = engine.chain.hex(), [str(each) for each in engine.contracts.found]
    return {
        "chain": chain,
        "broken": broken,
        "gauge": {"names": list(workload.gauge_names), "p5_p50_p95": gauge.round(4).tolist()},
        "timing": {
            "seconds": time.perf_counter() - started,
            "block": block,
            "resident_bytes": memory.tolist(),
            "p50_p99_max_coverage": times.tolist(),
        },
    }


def _take_up(config: SoakConfig, path: Path) -> dict[str, Any]:
    """Go on from a random frame, in a world of its own, and compare with what was recorded."""
    recording = Recording(path)
    frame = int(rng_for(config.seed, "soak-snapshot").integers(1, recording.frames - _RESUMED))
    engine = seek(path, LatentWorkload.open(config.checkpoint), frame)
    equal = 0
    for record in recording.records():
        if record.kind in PICTURES and frame < record.id <= frame + _RESUMED:
            assert record.kind is Kind.STEP
            equal += engine.step(np.frombuffer(record.body, dtype="<f4")).chain == record.chain
    return {"frame": frame, "frames": _RESUMED, "equal": equal}


def trends(result: dict[str, Any]) -> dict[str, float]:
    """Return the trends after the first tenth: memory in bytes every 1,000 frames, and p99 of the last tenth over the
    first's, with 99% intervals of the slopes."""
    timing = result["timing"]
    block, warm = timing["block"], _BLOCKS // 10
    at = np.arange(warm, _BLOCKS) * block / 1000
    memory = slope(list(zip(at, timing["resident_bytes"][warm:], strict=True)))
    p50, p99 = np.array(timing["p50_p99_max_coverage"])[warm:, :2].T
    typical = slope(list(zip(at, p50, strict=True)))
    tenth = _BLOCKS // 10
    return {
        "memory_low": memory.low,
        "memory": memory.middle,
        "memory_high": memory.high,
        "p50_low": typical.low,
        "p50": typical.middle,
        "p50_high": typical.high,
        "p99_ratio": float(np.median(p99[-tenth:]) / np.median(p99[:tenth])),
    }


def render(result: dict[str, Any]) -> str:
    """Write the report from `result.json` alone."""
    config, made, timing, found = result["config"], result["provenance"], result["timing"], trends(result)
    coverage = min(row[3] for row in timing["p50_p99_max_coverage"])
    resumed = result["resumed"]
    broken = result["broken_contracts"]
    return "\n".join(
        [
            f"# {config['frames']:,} frames of `{config['checkpoint']}`",
            "",
            "![memory, frame time and drift gauge over the session](soak.svg)",
            "",
            f"- Memory: {_trend(found, 'memory', 1024)} KiB every 1,000 frames, after the first tenth.",
            f"- Frame time: p50 {_trend(found, 'p50', 1000)} us every 1,000 frames; p99 of the last tenth is "
            f"{found['p99_ratio']:.3f} times that of the first after warm-up.",
            f"- Replay: {result['replay']}. The chain ends in `{result['chain']}`; the recording has "
            f"{result['recording_bytes'] / 2**20:.1f} MiB.",
            f"- Taken up at frame {resumed['frame']:,} from the snapshot before it, {resumed['equal']} of "
            f"{resumed['frames']} frames have the recorded chain.",
            f"- Contracts ({config['contracts']}): {'; '.join(broken) if broken else 'none broken'}.",
            f"- Leaf spans cover at least {100 * coverage:.2f}% of every block's busy time.",
            "",
            f"{timing['seconds']:.0f} s of play. Machine: {made['machine']['processor']}, {made['machine']['cores']} "
            f"cores; torch {made['versions'].get('torch')}, mode {result['fingerprint']['mode']}; commit "
            f"{made['commit']}. Other work on the machine lengthens the tails.",
            "",
            f"Again: `{made['command']}`",
            "",
        ]
    )


def _trend(found: dict[str, float], name: str, unit: float) -> str:
    low, middle, high = (found[key] / unit for key in (f"{name}_low", name, f"{name}_high"))
    return f"{middle:+.2f} (99%: {low:+.2f} to {high:+.2f})"


def _draw(result: dict[str, Any]) -> str:
    timing, gauge = result["timing"], result["gauge"]
    x = np.arange(1, _BLOCKS + 1) * timing["block"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "worldline", "font.size": 10}):
        figure = Figure(figsize=(10, 6), layout="constrained")
        top, middle, bottom = figure.subplots(3, 1, sharex=True)
        top.plot(x, np.array(timing["resident_bytes"]) / 2**20, color="#0072b2")
        top.set(ylabel="resident MiB")
        p50, p99 = np.array(timing["p50_p99_max_coverage"])[:, :2].T / 1e6
        middle.plot(x, p50, color="#0072b2", label="p50")
        middle.plot(x, p99, color="#d55e00", label="p99")
        middle.set(ylabel="frame, ms", ylim=(0, None))
        middle.legend(frameon=False)
        for number, name in enumerate(gauge["names"]):
            low, mid, high = np.array(gauge["p5_p50_p95"])[:, number].T
            line = bottom.plot(x, mid, label=name)[0]
            bottom.fill_between(x, low, high, alpha=0.2, lw=0, color=line.get_color())
        bottom.axhline(1.0, color="#c1c2c3", lw=1)
        bottom.set(ylabel="drift gauge, real 99% = 1", xlabel="frame", ylim=(0, None))
        bottom.legend(frameon=False)
        for ax in (top, middle, bottom):
            ax.spines[["top", "right"]].set_visible(False)
        data = io.StringIO()
        figure.savefig(data, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return data.getvalue()[data.getvalue().index("<svg") :]
