"""What TinyEngine takes: memory by schedule and resolution, instructions by core, beside others' published figures."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldline.bench.edge_report import report
from worldline.bench.harness import compare
from worldline.bench.tflm import arena_bytes, graph_of
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, write_bytes
from worldline.core.progress import progress
from worldline.core.result import write_result
from worldline.core.seeding import rng_for
from worldline.edge import build, cases, commands
from worldline.edge.arena_picture import chain_panel, draw
from worldline.edge.build import BOARDS, image_bytes
from worldline.edge.commands import Command
from worldline.edge.emit import bundle_for
from worldline.edge.graph import Chain, Flatten, Size, Stage
from worldline.edge.quantise import Calibration, quantise
from worldline.edge.schedule import Plan, pareto, plan_rows, plan_tiles
from worldline.edge.tflite import read_chain
from worldline.edge.world import IntegerWorld
from worldline.engine.workloads.int8 import Int8Workload
from worldline.engine.workloads.latent import LatentWorkload
from worldline.model.checkpoint import load_world
from worldline.model.int8 import CHECKPOINT, MANIFEST, PROGRAM, Program

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
PUBLISHED = {
    "mlperf_tiny_ms": {
        "Plumerai": (47.8, 167.8, 98.8), "ST": (62.9, 214.0, 118.7), "microTVM": (99.8, 389.6, 300.8),
    },
    "msf_cnn": [(8.5, 1.3), (11.8, 1.38), (23.0, 1.68)],
}  # fmt: skip
"""Their own figures. MLPerf Tiny v1.1 on a NUCLEO-L4R5ZI: keywords, image classes, visual wake words. msf-CNN
(arXiv 2505.11483): times less memory than layer by layer, the picture not counted, and times the multiplications."""


@dataclass(frozen=True, kw_only=True)
class EdgeBenchConfig:
    """On which world."""

    checkpoint: str
    """A checkpoint with its training data at hand, or a bundle of worldline export."""
    seconds: float = 4.0
    """CPU time for frames of the int8 world in turns with those of the float one."""
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
    encoder = _sizes_of(bundle).encoder
    figures["memory"] = {
        "ds96": _by_side(graph, SIDES),
        "world": _by_side(encoder, (encoder.stages[0].size_in[0], *SIDES)),
    }
    figures["tflm_wheel"] = {"model_bytes": DS96.stat().st_size}
    figures["plans"] = [_plan(plan, graph) for plan in _shown(graph)]
    figures["sizes"] = read_json(bundle / MANIFEST)["sizes"]
    figures["theirs"], figures["published"] = THEIRS, PUBLISHED
    out = Path(config.reports) / f"{date.today().isoformat()}-edge"
    timing = {**_play_speed(bundle, config.seconds), **_encode_speed(bundle, encoder, config.seconds)}
    write_result(out / "result.json", "bench-edge", figures, timing)
    page, picture = report(read_json(out / "result.json")), _picture(graph)
    places = [(out, "report.md")] + ([(Path(config.publish), "tinyengine_memory.md")] if config.publish else [])
    for folder, name in places:
        write_bytes(folder / name, page.encode())
        write_bytes(folder / "tinyengine_arena.svg", picture.encode())
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
        code = image_bytes(image)[0]
    if outcome.status != "ok" or (cases.values_of(graph, outcome.result) != graph.run(picture)[0]).any():
        raise WorldlineError(f"{core}: the reference graph gave other bytes than the reference ({outcome.status})")
    return {
        "instructions": outcome.ticks * board.instructions_per_tick,
        "arena_bytes": case.arena_bytes,
        "stack_bytes": outcome.stack_bytes,
        "code_bytes": code,
        "program_bytes": len(case.program),
        "scratch_bytes": plan_rows(graph).piece - plan_rows(graph).scratch,
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
        image = build.compile_image("world", board, Path(folder), int(manifest["arena_bytes"]))
        program = (bundle / PROGRAM).read_bytes()
        replies, stack = commands.run_world(board, image, program, (latent, world.spec.action_dim, size), asked)
        code = image_bytes(image)[0]
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
                ("float", _frame(real)), ("int8", _frame(whole)), seconds, clock=time.process_time_ns, calls_a_turn=20
            ).to_json()
    return compared


def _encode_speed(bundle: Path, encoder: Chain, seconds: float) -> dict[str, Any]:
    """Time a picture's way to its latent on this machine, in turns with LiteRT's of a graph of the same sizes."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        return {}
    theirs = Interpreter(model_content=graph_of(encoder, pads=True), num_threads=1)
    theirs.allocate_tensors()
    place, size = theirs.get_input_details()[0]["index"], encoder.stages[0].size_in
    ours, picture = Program(bundle), rng_for(0, "edge").integers(0, 256, (1, *size)).astype(np.uint8)
    given = (picture ^ 0x80).view(np.int8)

    def litert() -> None:
        theirs.set_tensor(place, given)
        theirs.invoke()

    def tinyengine() -> None:
        ours.encode(picture)

    return {
        "encode": compare(
            ("litert", litert), ("int8", tinyengine), seconds, clock=time.process_time_ns, calls_a_turn=50
        ).to_json()
    }


def _sizes_of(bundle: Path) -> IntegerWorld:
    """Return a world of a bundle's sizes: its ranges are of noise, and nothing is computed with it."""
    world = load_world(bundle / CHECKPOINT)
    size, context = world.config.image_size, world.config.context
    frames = torch.from_numpy(rng_for(0, "edge").integers(0, 256, (2 * context, size, size, 3)).astype(np.uint8))
    with torch.no_grad():
        z = world.encode(frames).reshape(2, context, -1)
    return quantise(world, Calibration(frames, z, torch.zeros(2, context, world.spec.action_dim)))


def _picture(graph: Chain) -> str:
    """Draw three plans of the graph to one scale."""
    tiles = min(
        (plan for plan in pareto(graph, keep_picture=True) if plan.macs <= 1.5 * graph.macs), key=lambda p: p.size
    )
    named = (
        ("Layer by layer", plan_tiles(graph)),
        ("{} x {} tiles".format(*tiles.tile), tiles),
        ("Rows", plan_rows(graph)),
    )
    return draw([chain_panel(name, graph, plan) for name, plan in named])


def _frame(workload: LatentWorkload | Int8Workload) -> Callable[[], None]:
    stages = [stage.run for stage in workload.stages[:2]]

    def frame() -> None:
        for run in stages:
            run()

    return frame


def resized(chain: Chain, side: int) -> Chain:
    """Return a chain over pictures of another size; a matrix over its last grid grows with it, empty."""
    size: Size = (side, side, chain.stages[0].size_in[2])
    stages: list[Stage] = []
    for stage in chain.stages:
        (top, left), k, s = stage.padding, stage.kernel, stage.stride
        rows, columns = ((n + 2 * before - k) // s + 1 for n, before in zip(size[:2], (top, left), strict=True))
        stages.append(replace(stage, size_in=size, size=(rows, columns, stage.size[2])))
        size = stages[-1].size
    end = chain.end
    if isinstance(end, Flatten):
        weight = np.zeros((len(end.matrix.weight), int(np.prod(size))), np.int8)
        end = replace(end, matrix=replace(end.matrix, weight=weight))
    return Chain(stages=tuple(stages), end=end)


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


def _by_side(graph: Chain, sides: Sequence[int]) -> list[dict[str, int]]:
    rows = []
    for side in sides:
        chain = graph if side == graph.stages[0].size_in[0] else resized(graph, side)
        tiles = min(
            (plan for plan in pareto(chain, keep_picture=True) if plan.macs <= 1.5 * chain.macs), key=lambda p: p.size
        )
        rows.append(
            {
                "side": side,
                "tflm": arena_bytes(chain, pads=True),
                "tflm_padding": arena_bytes(chain, pads=False),
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
