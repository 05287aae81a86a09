"""The engine, headless: how fast, where the time goes, whether anything grows, whether two runs agree to the bit."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float32

from worldline.bench.harness import Comparison, compare
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, write_bytes
from worldline.core.result import write_result
from worldline.core.seeding import rng_for
from worldline.core.types import WorldSpec
from worldline.model.checkpoint import find_world

if TYPE_CHECKING:
    from worldline.engine.workloads.latent import LatentWorkload

_CALLS = 10  # frames in a row, so that caches are as in a session


@dataclass(frozen=True, kw_only=True)
class EngineBenchConfig:
    """What to play, and for how long."""

    checkpoint: str
    """A checkpoint, a run, or a shipped world's name."""
    frames: int = 10_000
    """Frames of each run, at least 1000."""
    seed: int = 0
    """Of the start and of the hand that steers."""
    compare_seconds: float = 2.0
    """Time for each comparison in turns."""
    device: str = "cpu"
    """cpu or cuda; the plain loop runs there too."""
    mode: Literal["auto", "eager", "graph", "compile"] = "auto"
    """auto, eager, graph or compile."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """float32, and on cuda bfloat16 or float16; the plain loop stays in float32."""
    reports: str = "reports"
    """Where `DATE-engine/` is written, or `DATE-engine-cuda/`."""
    determinism: Literal["run", "machine"] = "machine"
    """What is promised about bits; `worldline bench determinism` compares the levels."""
    contracts: Literal["strict", "warn", "off"] = "strict"
    """Whether some frames are audited for what a warm frame must not do, and whether a breach ends the run."""


def run(config: EngineBenchConfig) -> Path:
    """Play the same session twice, each in a process of its own; compare, and write `result.json` and `report.md`.

    The first run records and verifies what it recorded. Returns the report's path.

    Raises:
        WorldlineError: no such checkpoint, or too few frames to say anything.
    """
    if config.frames < 200:
        raise WorldlineError(f"the engine benchmark wants at least 200 frames, got {config.frames}")
    find_world(config.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        first = elsewhere(config, Path(folder) / "session.wlr")
        second = elsewhere(config, None)
    figures = {
        "checkpoint": config.checkpoint,
        "fingerprint": first["fingerprint"],
        "frames": config.frames,
        "seed": config.seed,
        "chain": [first["chain"], second["chain"]],
        "runs_equal": first["chain"] == second["chain"],
        "replay": first["replay"],
        "replay_ok": first["replay_ok"],
        "tensors": [first["tensors"], second["tensors"]],
    }
    timing = {"runs": [first["timing"], second["timing"]], "comparisons": first["comparisons"]}
    folder_path = Path(config.reports) / f"{date.today():%Y-%m-%d}-engine{'' if config.device == 'cpu' else '-cuda'}"
    write_result(folder_path / "result.json", "engine", figures, timing)
    report = folder_path / "report.md"
    write_bytes(report, render(read_json(folder_path / "result.json")).encode())
    return report


def play(config: EngineBenchConfig, record: Path | None) -> dict[str, Any]:
    """Play one session in this process and return its figures; with `record`, also verify it and compare costs."""
    from worldline.engine.contracts import resident_bytes
    from worldline.engine.replay import verify
    from worldline.engine.runtime import Engine

    workload = open_workload(config)
    spec = workload.world.spec
    actions = hand(spec, config.frames, config.seed)
    warm = config.frames // 10
    memory: list[dict[str, int]] = []
    began = time.perf_counter_ns()
    with Engine(
        workload, record, ledger_frames=config.frames + 1, contracts=config.contracts, determinism=config.determinism
    ) as engine:
        engine.reset(config.seed)
        for index, action in enumerate(actions, start=1):
            engine.step(action)
            if index % warm == 0:
                memory.append({"frame": index, "rss_bytes": resident_bytes(), "tensors": count_tensors()})
        seconds = (time.perf_counter_ns() - began) / 1e9
        summary = engine.ledger.summary(ids_from=warm + 1)
        chain = engine.chain.hex()
    outcome: dict[str, Any] = {
        "chain": chain,
        "fingerprint": engine.fingerprint,
        "tensors": {"after_warmup": memory[0]["tensors"], "end": memory[-1]["tensors"]},
        "timing": {
            "seconds": seconds,
            "frames_per_busy_second": 1e9 / summary.busy.mean,
            "ledger": summary.to_json(),
            "memory": memory,
        },
    }
    if record is not None:
        verdict = verify(record, open_workload(config))
        outcome |= {
            "replay": str(verdict),
            "replay_ok": verdict.ok,
            "comparisons": [found.to_json() for found in comparisons(config, actions)],
        }
    return outcome


def comparisons(config: EngineBenchConfig, actions: Float32[np.ndarray, "t a"]) -> list[Comparison]:
    """Compare the engine with a plain loop over the same model, with its stages alone, and with itself otherwise."""
    import torch

    from worldline.engine.runtime import Engine

    def stepping(threads: int = 1, record: Path | None = None, **options: Any) -> tuple[Engine, Any]:
        workload = open_workload(replace(config, **options))
        workload.threads = threads
        engine = Engine(workload, record=record, determinism=config.determinism)
        engine.reset(config.seed)
        return engine, lambda: engine.step(actions[engine.id % len(actions)])

    def bare() -> Any:
        workload = open_workload(config)
        with torch.inference_mode():
            workload.reset(config.seed)

        def frame() -> None:
            with torch.inference_mode():
                for stage in workload.stages:
                    stage.run()

        return frame

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recorded, recording = stepping(record=Path(folder) / "compared.wlr")
        pairs = [
            (("plain loop", plain_loop(config, actions)), ("engine", stepping()[1])),
            (("stages alone", bare()), ("engine", stepping()[1])),
            (("not recording", stepping()[1]), ("recording", recording)),
        ]
        if config.device == "cpu":
            pairs.append((("1 thread", stepping()[1]), ("2 threads", stepping(threads=2)[1])))
        if recorded.fingerprint["mode"] != "eager":
            pairs.insert(1, (("eager", stepping(mode="eager")[1]), (recorded.fingerprint["mode"], stepping()[1])))
        with recorded:
            return [compare(a, b, budget_s=config.compare_seconds, calls_a_turn=_CALLS) for a, b in pairs]


def open_workload(config: EngineBenchConfig) -> LatentWorkload:
    """Open the checkpoint on the device, in the mode and precision that are asked for."""
    from worldline.engine.workloads.latent import LatentWorkload

    return LatentWorkload.open(config.checkpoint, config.mode, config.device, config.dtype)


def plain_loop(config: EngineBenchConfig, actions: Float32[np.ndarray, "t a"]) -> Callable[[], None]:
    """Return a frame as one would write it down: step, draw, both readings; no buffers, no ledger, no hash."""
    import torch

    from worldline.engine.workloads.latent import load_starts
    from worldline.model.checkpoint import find_world, load_world

    world = load_world(config.checkpoint).to(config.device)
    starts = load_starts(find_world(config.checkpoint), world.spec)
    low, high = (torch.tensor(bound, device=config.device) for bound in (world.spec.action_low, world.spec.action_high))
    gauge = world.gauge
    with torch.no_grad():
        z = world.encode(torch.from_numpy(starts.frames[0]).to(config.device))
        state = world.begin(z[None], torch.from_numpy(starts.actions[0])[None].to(config.device))
    count = 0

    def frame() -> None:
        nonlocal state, count
        with torch.no_grad():
            action = torch.from_numpy(actions[count % len(actions)])[None].to(config.device).clamp(low, high)
            state = world.step(state, action)
            picture = world.decode(state.z)
            picture[0].cpu().numpy()
            if gauge.fitted:
                float(gauge.region(state.z))
                float(((world.encode(picture) - state.z) @ gauge.whitening).norm() / gauge.cycle99)
        count += 1

    return frame


def hand(spec: WorldSpec, count: int, seed: int) -> Float32[np.ndarray, "t a"]:
    """Return actions as a person's hand makes them: straight strokes between places in the action range."""
    rng = rng_for(seed, "bench-hand")
    low, high = np.array(spec.action_low), np.array(spec.action_high)
    low, high = np.where(np.isfinite(low), low, -1.0), np.where(np.isfinite(high), high, 1.0)
    stroke = 20
    places = rng.uniform(low, high, (count // stroke + 2, spec.action_dim))
    share = (np.arange(count) % stroke / stroke)[:, None]
    before = np.arange(count) // stroke
    return (places[before] * (1 - share) + places[before + 1] * share).astype(np.float32)


def count_tensors() -> int:
    """Return the number of live tensors that Python knows."""
    import torch

    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def render(result: dict[str, Any]) -> str:
    """Write the report from `result.json` alone."""
    runs, machine = result["timing"]["runs"], result["provenance"]["machine"]
    ledger, memory = runs[0]["ledger"], runs[0]["memory"]
    agree = "the same hash chain" if result["runs_equal"] else "DIFFERENT hash chains"
    grown = (memory[-1]["rss_bytes"] - memory[0]["rss_bytes"]) / 1024
    lines = [
        "# Engine, headless",
        "",
        f"{result['frames']:,} frames of `{result['checkpoint']}` run at {runs[0]['frames_per_busy_second']:.0f} and "
        f"{runs[1]['frames_per_busy_second']:.0f} frames per busy second in two processes, with {agree} "
        f"(`{result['chain'][0]}`). Replay of the first: {result['replay']}. Leaf spans cover "
        f"{100 * ledger['coverage']:.2f}% of busy time. After warm-up, resident memory changed by {grown:+,.0f} KiB "
        f"and tensors by {memory[-1]['tensors'] - memory[0]['tensors']:+d}.",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['system']}; torch "
        f"{result['provenance']['versions'].get('torch')}, {result['fingerprint']['device']} "
        f"{result['fingerprint']['dtype']}, {result['fingerprint']['threads']} thread; commit "
        f"{result['provenance']['commit']}.",
        "",
        "## Where the time of a frame goes (microseconds)",
        "",
        "| stage | p50 | p95 | p99 | max | share of busy time |",
        "|---|---|---|---|---|---|",
    ]
    rows = {**ledger["stages"], "unattributed": ledger["unattributed"], "**busy**": ledger["busy"]}
    for name, spread in rows.items():
        cells = " | ".join(f"{spread[key] / 1e3:.1f}" for key in ("p50", "p95", "p99", "max"))
        lines.append(f"| {name} | {cells} | {100 * spread['mean'] / ledger['busy']['mean']:.1f}% |")
    lines += ["", "## Memory", "", "| frame | resident MiB | tensors |", "|---|---|---|"]
    lines += [f"| {m['frame']:,} | {m['rss_bytes'] / 2**20:.1f} | {m['tensors']} |" for m in memory]
    lines += [
        "",
        "## In turns",
        "",
        "| A | B | A us | B us | B / A, 95% interval | B is |",
        "|---|---|---|---|---|---|",
    ]
    for c in result["timing"]["comparisons"]:
        interval = f"{c['ratio']:.3f} ({c['interval'][0]:.3f} to {c['interval'][1]:.3f}), {c['rounds']} rounds"
        times = " | ".join(f"{median / 1e3:.1f}" for median in c["medians"])
        lines.append(f"| {c['names'][0]} | {c['names'][1]} | {times} | {interval} | {c['verdict']} |")
    lines += [
        "",
        "The first tenth of the frames is warm-up and left out of the percentiles. Caveats: other work on the machine",
        "lengthens the tails; the counts of tensors and bytes are taken between frames and cost them their caches.",
        "",
        f"Again: `worldline bench engine`, here run as `{result['provenance']['command']}`.",
        "",
    ]
    return "\n".join(lines)


def elsewhere(config: EngineBenchConfig, record: Path | None) -> dict[str, Any]:
    """Run `play` in a fresh process."""
    code = (
        "import json, sys; from pathlib import Path; from worldline.bench.engine import EngineBenchConfig, play;"
        "config, record = json.loads(sys.argv[1]);"
        "outcome = play(EngineBenchConfig(**config), Path(record) if record else None);"
        "print(json.dumps(outcome))"
    )
    arguments = json.dumps([vars(config), str(record) if record else None])
    done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
        raise WorldlineError(f"the engine benchmark's run failed: {reason.removeprefix('worldline.core.errors.')}")
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome
