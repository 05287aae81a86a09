"""What TinyEngine takes: memory by schedule and resolution, instructions by core, beside others' published figures."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldline.bench.edge_report import report
from worldline.bench.harness import compare
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, write_bytes
from worldline.core.progress import progress
from worldline.core.result import write_result
from worldline.core.seeding import rng_for
from worldline.edge import cases, commands
from worldline.edge.build import BOARDS
from worldline.edge.commands import Command
from worldline.edge.emit import bundle_for
from worldline.edge.graph import Chain, Rows, Size, Stage
from worldline.edge.schedule import Plan, pareto, plan_rows, plan_tiles
from worldline.edge.tflite import read_chain
from worldline.engine.workloads.int8 import Int8Workload
from worldline.engine.workloads.latent import LatentWorkload
from worldline.model.checkpoint import load_world
from worldline.model.int8 import CHECKPOINT, MANIFEST, PROGRAM

DS96 = Path(__file__).parent / "graphs/ds96_int8.tflite"
CORES = ("m4", "m7", "m33", "m55")
SIDES = (96, 128, 160, 224)
THEIRS = {
    "tflm": {
        "m4": 18.30e6,
        "m55": 5.40e6,
        "arena_bytes": 160_084,
        "stack_bytes": 1700,
        "code_bytes": 123_000,
    },
    "executorch": {"arena_bytes": 175_104},
}
"""For the same graph and weights, measured by us with their releases under the same QEMU; not measured in this run."""


@dataclass(frozen=True, kw_only=True)
class EdgeBenchConfig:
    """On which world."""

    checkpoint: str
    """A checkpoint with its training data at hand, or a bundle of worldline export."""
    seconds: float = 4.0
    """Time for frames of the int8 world in turns with those of the float one."""
    reports: str = "reports"
    """Where `DATE-edge/` is written."""
    publish: str | None = None
    """Where the page goes besides, such as docs/reports."""


def run(config: EdgeBenchConfig) -> Path:
    """Measure; write `result.json` and `report.md`, and return the report's path.

    Raises:
        WorldlineError: no compiler for Arm, no QEMU, or a build that gives other bytes than the reference.
    """
    bundle = bundle_for(config.checkpoint)
    graph = read_chain(DS96)
    with progress("bench edge", 2 * len(CORES)) as task:
        figures: dict[str, Any] = {
            "graph": {core: _graph_on(core, graph) for core in _each(task)},
            "world": {core: _world_on(core, bundle) for core in _each(task)},
        }
    figures["memory"] = {"ds96": _by_side(graph)}
    figures["plans"] = [_plan(plan, graph) for plan in _shown(graph)]
    figures["sizes"] = read_json(bundle / MANIFEST)["sizes"]
    figures["theirs"] = THEIRS
    out = Path(config.reports) / f"{date.today().isoformat()}-edge"
    write_result(out / "result.json", "bench-edge", figures, _play_speed(bundle, config.seconds))
    page = report(read_json(out / "result.json"))
    write_bytes(out / "report.md", page.encode())
    if config.publish:
        write_bytes(Path(config.publish) / "tinyengine_memory.md", page.encode())
    return out / "report.md"


def _each(task: Any) -> Iterator[str]:
    for core in CORES:
        yield core
        task.advance(1, core)


def _graph_on(core: str, graph: Chain) -> dict[str, float]:
    board = BOARDS[core]
    picture = rng_for(0, "edge").integers(-128, 128, (1, *graph.stages[0].size_in)).astype(np.int8)
    with tempfile.TemporaryDirectory() as folder:
        image = cases.compile_cases(board, Path(folder))
        case = cases.case_of(graph, picture)
        (outcome,) = cases.run_cases(board, image, [case])
        code = _code_bytes(image)
    if outcome.status != "ok" or (cases.values_of(graph, outcome.result) != graph.run(picture)[0]).any():
        raise WorldlineError(f"{core}: the reference graph gave other bytes than the reference ({outcome.status})")
    return {
        "instructions": outcome.ticks * board.instructions_per_tick,
        "arena_bytes": case.arena_bytes,
        "stack_bytes": outcome.stack_bytes,
        "code_bytes": code,
    }


def _world_on(core: str, bundle: Path) -> dict[str, float]:
    board, manifest, world = BOARDS[core], read_json(bundle / MANIFEST), load_world(bundle)
    size, latent = world.config.image_size, world.config.latent_dim
    picture = rng_for(0, "edge").integers(0, 256, (size, size, 3)).astype(np.uint8)
    action = np.zeros(world.spec.action_dim, np.int16)
    zero = np.zeros(latent, np.int16)
    asked = [Command("picture", picture), Command("begin", zero), Command("step", action), Command("decode")]
    asked += [Command("region"), Command("drift", zero)]
    with tempfile.TemporaryDirectory() as folder:
        image = commands.compile_world(board, Path(folder), int(manifest["arena_bytes"]))
        program = (bundle / PROGRAM).read_bytes()
        replies, stack = commands.run_world(board, image, program, (latent, world.spec.action_dim, size), asked)
        code = _code_bytes(image)
    costs = {c.verb: r.ticks * board.instructions_per_tick for c, r in zip(asked, replies, strict=True)}
    return {
        **{verb: costs[verb] for verb in ("picture", "step", "decode", "region", "drift")},
        "stack_bytes": stack,
        "code_bytes": code,
    }


def _play_speed(bundle: Path, seconds: float) -> dict[str, Any]:
    """Time frames (a step and its drawing) on this machine, in turns with the float world's, eager and as graph."""
    torch.set_num_threads(1)
    whole = Int8Workload.open(bundle)
    compared = {}
    for mode in ("eager", "graph"):
        real = LatentWorkload.open(bundle / CHECKPOINT, mode=mode)
        for workload in (real, whole):
            workload.reset(0)
        with torch.inference_mode():
            compared[mode] = compare(
                ("float", _frame(real)), ("int8", _frame(whole)), seconds, calls_a_turn=20
            ).to_json()
    return compared


def _frame(workload: LatentWorkload | Int8Workload) -> Callable[[], None]:
    stages = [stage.run for stage in workload.stages[:2]]

    def frame() -> None:
        for run in stages:
            run()

    return frame


def _code_bytes(image: Path) -> int:
    """Return the bytes of code and constants of an image: engine, start-up and what feeds it."""
    told = subprocess.run(["arm-none-eabi-size", str(image)], capture_output=True, text=True, check=True).stdout
    return int(told.splitlines()[1].split()[0])


def resized(chain: Chain, side: int) -> Chain:
    """Return a chain's stages over pictures of another size; what came behind them is left out."""
    size: Size = (side, side, chain.stages[0].size_in[2])
    stages: list[Stage] = []
    for stage in chain.stages:
        (top, left), k, s = stage.padding, stage.kernel, stage.stride
        rows, columns = ((n + 2 * before - k) // s + 1 for n, before in zip(size[:2], (top, left), strict=True))
        stages.append(replace(stage, size_in=size, size=(rows, columns, stage.size[2])))
        size = stages[-1].size
    return Chain(stages=tuple(stages), end=Rows())


def ideal(chain: Chain) -> int:
    """Return what layer by layer takes at least: the largest input and output together, every layer apart."""
    most = 0
    for stage in chain.stages:
        source, out = int(np.prod(stage.size_in)), int(np.prod(stage.size))
        if stage.kind == "separable":
            middle = stage.size[0] * stage.size[1] * stage.size_in[2]
            most = max(most, source + middle, middle + out)
        else:
            most = max(most, source + out)
    return most


def _by_side(graph: Chain) -> list[dict[str, int]]:
    rows = []
    for side in SIDES:
        chain = graph if side == graph.stages[0].size_in[0] else resized(graph, side)
        tiles = min(
            (plan for plan in pareto(chain, keep_picture=True) if plan.macs <= 1.5 * chain.macs), key=lambda p: p.size
        )
        rows.append(
            {
                "side": side,
                "ideal": ideal(chain),
                "layer_by_layer": plan_tiles(chain).size,
                "tiles": tiles.size,
                "tiles_macs_percent": round(100 * tiles.macs / chain.macs),
                "rows_picture_kept": plan_rows(chain).size + int(np.prod(chain.stages[0].size_in)),
                "rows": plan_rows(chain).size,
            }
        )
    return rows


def _shown(graph: Chain) -> list[Plan]:
    return [plan_rows(graph), *pareto(graph, keep_picture=True)]


def _plan(plan: Plan, graph: Chain) -> dict[str, Any]:
    name = "rows" if plan.kind == 1 else "layer by layer" if plan.num_tiled == 0 else "tiles"
    return {
        "schedule": name,
        "num_tiled": plan.num_tiled,
        "tile": list(plan.tile),
        "bytes": plan.size,
        "macs_ratio": round(plan.macs / graph.macs, 4),
    }
