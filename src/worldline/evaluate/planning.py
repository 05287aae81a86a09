"""Success of planning with a checkpoint, beside the same planner with the true dynamics: `worldline plan`."""

from __future__ import annotations

import hashlib
import io
import json
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from worldline.core.errors import WorldlineError
from worldline.core.files import atomic_path, read_json, write_bytes
from worldline.core.progress import progress
from worldline.core.result import write_result
from worldline.core.seeding import seed_for
from worldline.data.cache import FrameCache
from worldline.data.goals import TOLERANCES
from worldline.data.lerobot import Dataset, open_dataset
from worldline.evaluate.closed_loop import Agent, LoopConfig, OracleAgent, Outcome, WorldAgent, attempt, problems_at
from worldline.evaluate.distances import distance_matrix, goal_order
from worldline.evaluate.reliability import DRAWS, Bootstrap, interval
from worldline.evaluate.starts import Stage, Starts, choose_starts
from worldline.model.checkpoint import load_world, weights_sha256
from worldline.model.foreign import is_foreign
from worldline.model.picture import filmstrip
from worldline.model.world import World
from worldline.planning.distance import DISTANCES, Distance
from worldline.planning.planners import PlannerConfig, Space

_SHOWN = 4
_DISTANCES = {"change": "what changes meanwhile", "white": "the latents' covariance", "plain": "every value alike"}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What plans, from where to where, and how hard."""

    checkpoint: str
    """A checkpoint, a run (its best checkpoint), or a shipped world's name."""
    data: str
    """A dataset of `worldline collect`: starts and goals come from its test episodes, actions go into its simulator."""
    out: str | None = None
    """Directory for the result; None means `planning` in the checkpoint, `plannings/NAME` for a name."""
    compare: str | None = None
    """Another checkpoint on the same starts with the same planner; the difference in success gets a paired interval."""
    offsets: tuple[int, ...] = (25, 50, 75, 100)
    """How many frames after its start each goal was seen."""
    starts: int = 20
    """Starts of each offset."""
    latest: int | None = None
    """No start after this frame of its episode, since the simulator draws every frame on the way; None is anywhere."""
    planner_seeds: int = 3
    """How many times everything is tried, with other candidates each time."""
    budget: float = 2.0
    """Environment steps that a start may take, as a multiple of the offset."""
    oracle: bool = True
    """Try the same starts with the true dynamics, too."""
    seed: int = 0
    """Of the starts, the candidates, and the bootstrap."""
    draws: int = DRAWS
    """Bootstrap draws over episodes."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    oracle_planner: PlannerConfig = field(
        default_factory=lambda: PlannerConfig(steps=10, samples=40, iterations=4, elites=4)
    )

    def __post_init__(self) -> None:
        if not self.offsets or min(self.offsets) < 1 or self.starts < 1 or self.planner_seeds < 1 or self.budget <= 0:
            raise WorldlineError(
                "plan wants offsets from 1, at least one start and one planner seed, and a positive budget, got "
                f"{list(self.offsets)}, {self.starts}, {self.planner_seeds}, {self.budget:g}"
            )


def evaluate_planning(config: PlanConfig) -> Path:
    """Plan from every start and return the directory with `result.json`, `report.md` and `filmstrip.png`.

    What each agent did with each offset and planner seed is kept in `parts/`, so that the same call goes on from there.

    Raises:
        WorldlineError: checkpoint and dataset do not fit, no criterion for the world, or too few starts.
    """
    begun = time.monotonic()
    dataset = open_dataset(config.data)
    for path in (config.checkpoint, config.compare):
        if path and is_foreign(path):
            raise WorldlineError(
                f"{path}: only worlds of worldline plan; worldline evaluate scores other people's models"
            )
    worlds = {"world": load_world(config.checkpoint)} | (
        {"compared": load_world(config.compare)} if config.compare else {}
    )
    for world in worlds.values():
        _require_fit(world, dataset)
    out, cache, loop = _out(config), FrameCache(dataset), config.loop
    context = max(world.config.context for world in worlds.values())
    chosen = [
        choose_starts(
            dataset, offset=offset, context=context, count=config.starts, seed=config.seed, latest=config.latest
        )
        for offset in config.offsets
    ]
    agents: dict[str, tuple[Agent, PlannerConfig, str]] = {}  # with what a part depends on beside the options
    matrices: dict[str, dict[Distance, Tensor | None]] = {}
    for name, world in worlds.items():
        known = [
            distance for distance in DISTANCES if distance in ("change", "plain", loop.distance) or world.gauge.fitted
        ]
        matrices[name] = {distance: distance_matrix(world, distance, cache, loop.hold) for distance in known}
        matrix = matrices[name][loop.distance]
        measure = "" if matrix is None else hashlib.sha256(matrix.numpy().tobytes()).hexdigest()
        agents[name] = WorldAgent(world, loop, matrix), config.planner, weights_sha256(world) + measure
    if config.oracle:
        first = worlds["world"]
        space = Space.of(first.spec, first.action_mean, first.action_std)
        agents["oracle"] = (
            OracleAgent(first.spec.name, space, config.loop),
            config.oracle_planner,
            weights_sha256(first),
        )
    outcomes: dict[str, list[list[Outcome]]] = {}
    stage = Stage(dataset)
    budgets = [round(config.budget * offset) for offset in config.offsets]
    total = len(agents) * config.planner_seeds * sum(budgets)
    with progress(f"plan {dataset.spec.name}", total) as task:
        for name, (agent, planner, weights) in agents.items():
            outcomes[name] = []
            for starts, budget in zip(chosen, budgets, strict=True):
                label = f"{name}, goal {starts.offset} ahead"
                of_seeds = []
                for seed in range(config.planner_seeds):
                    key = _fingerprint(
                        *(asdict(planner), asdict(config.loop), weights, dataset.fingerprint, starts.index.tolist()),
                        *(context, budget, config.seed),
                    )
                    part = out / "parts" / f"{name}-{starts.offset}-{seed}-{key}.npz"
                    if part.exists():
                        task.advance(budget, label)
                    else:
                        outcome = attempt(
                            agent,
                            cache,
                            starts,
                            stage.at(starts),
                            planner=planner,
                            loop=config.loop,
                            context=context,
                            budget=budget,
                            seed=seed_for(config.seed, "planner", seed),
                            advance=partial(task.advance, note=label),
                        )
                        _write_part(part, outcome)
                    of_seeds.append(_read_part(part))
                outcomes[name].append(of_seeds)
    figures = _figures(config, dataset, worlds, chosen, budgets, outcomes)
    figures["goal_order"] = {name: goal_order(world, cache, chosen, matrices[name]) for name, world in worlds.items()}
    timing = {"seconds": round(time.monotonic() - begun, 1), "decision_ms": _decision_ms(outcomes)}
    write_result(out / "result.json", "plan", figures, timing)
    write_bytes(out / "filmstrip.png", _strip(cache, chosen, context, outcomes["world"]))
    write_bytes(out / "report.md", render(read_json(out / "result.json")).encode())
    print(sentence(figures))
    return out


def sentence(figures: dict[str, Any]) -> str:
    """Return what came out, in one line."""
    shown = []
    for name, rows in figures["success"].items():
        rates = ", ".join(f"{100 * row['value']:.0f}% at {offset}" for offset, row in rows.items())
        shown.append(f"{name} {rates}")
    return "reached: " + "; ".join(shown)


def render(result: dict[str, Any]) -> str:
    """Write the report from `result.json` alone."""
    config, made = result["config"], result["provenance"]
    offsets = list(map(str, config["offsets"]))
    planner, loop, oracle = config["planner"], config["loop"], config["oracle_planner"]
    lines = [
        f"# Planning in {result['dataset']['name']}",
        "",
        sentence(result)[0].upper() + sentence(result)[1:] + ".",
        "",
        f"Success with 95% intervals over episodes; {config['starts']} starts of each offset, "
        f"{config['planner_seeds']} planner seeds, a budget of {config['budget']:g} times the offset in environment "
        "steps.",
        "",
        "| planned with | " + " | ".join(f"goal {offset} ahead" for offset in offsets) + " |",
        "|---" * (len(offsets) + 1) + "|",
    ]
    for name, rows in result["success"].items():
        cells = [_percent(rows[offset]) for offset in offsets]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, rows in result["differences"].items():
        cells = [_percent(rows[offset], signed=True) for offset in offsets]
        lines.append(f"| {name}, paired | " + " | ".join(cells) + " |")
    steps = result["median_steps"]
    for name in result["success"]:
        cells = ["n/a" if steps[name][o] is None else f"{steps[name][o]:g}" for o in offsets]
        lines.append(f"| median steps to the goal, {name} | " + " | ".join(cells) + " |")
    criterion = ", ".join(f"{factor} within {limit:.3g}" for factor, limit in result["criterion"].items())
    removed = ", ".join(f"{result['solved_removed'][offset]} at {offset}" for offset in offsets)
    lines += [
        "",
        "![start, goal and the last picture, a row for each offset](filmstrip.png)",
        "",
        "Each row: start, goal, last picture (first planner seed, first start of each offset).",
        "",
        f"Reached means at some step within the budget, by the true state: {criterion}. Starts removed because they "
        f"were solved already: {removed}. Planner: {planner['method']}, {planner['samples']} samples, "
        f"{planner['iterations']} iterations, {planner['steps']} actions of {loop['hold']} steps each, "
        f"{loop['carried_out']} of them carried out, latent distance by {_DISTANCES[loop['distance']]}, "
        f"{loop['over']} over steps; the oracle has {oracle['samples']} samples, {oracle['iterations']} iterations and "
        f"{oracle['steps']} actions.",
        "",
        "Does a distance lead to the goal? Rank correlation, over the real frames of a goal's episode, of the latents' "
        "distance to the goal's with that of the true states; the mean over goals:",
        "",
        "| latent distance by | " + " | ".join(result["goal_order"]) + " |",
        "|---" * (len(result["goal_order"]) + 1) + "|",
        *(
            f"| {_DISTANCES[distance]} | "
            + " | ".join(
                f"{found[distance]:.2f}" if distance in found else "n/a" for found in result["goal_order"].values()
            )
            + " |"
            for distance in _DISTANCES
        ),
        "",
        "| milliseconds a decision, for one start | p25 | median | p75 |",
        "|---|---|---|---|",
    ]
    for name, spread in result["timing"]["decision_ms"].items():
        lines.append(f"| {name} | {spread['p25']:.0f} | {spread['p50']:.0f} | {spread['p75']:.0f} |")
    lines += [
        "",
        f"Machine: {made['machine']['processor']}, {made['machine']['cores']} cores; commit {made['commit']}. Starts "
        "are planned for together, and a decision's time is divided among them.",
        "",
        f"Again: `{made['command']}`",
        "",
    ]
    return "\n".join(lines)


def _figures(
    config: PlanConfig,
    dataset: Dataset,
    worlds: dict[str, World],
    chosen: list[Starts],
    budgets: list[int],
    outcomes: dict[str, list[list[Outcome]]],
) -> dict[str, Any]:
    settings = asdict(config)
    settings["offsets"] = list(config.offsets)
    success = {
        name: [np.stack([outcome.steps >= 0 for outcome in of_seeds], axis=1).astype(float) for of_seeds in rows]
        for name, rows in outcomes.items()
    }
    others = [name for name in success if name != "world"]
    return {
        "dataset": {"name": dataset.spec.name, "fingerprint": dataset.fingerprint},
        "models": {name: {"weights_sha256": weights_sha256(world)} for name, world in worlds.items()},
        "config": settings,
        "criterion": {factor.name: TOLERANCES[dataset.spec.name][factor.name] for factor in dataset.spec.factors},
        "starts": {str(s.offset): s.index.tolist() for s in chosen},
        "solved_removed": {str(s.offset): s.num_solved for s in chosen},
        "budget_steps": {str(s.offset): budget for s, budget in zip(chosen, budgets, strict=True)},
        "reached": {
            name: {str(s.offset): values.astype(bool).tolist() for s, values in zip(chosen, rows, strict=True)}
            for name, rows in success.items()
        },
        "success": {name: _by_offset(config, chosen, values) for name, values in success.items()},
        "differences": {
            f"world minus {other}": _by_offset(
                config, chosen, [ours - theirs for ours, theirs in zip(success["world"], success[other], strict=True)]
            )
            for other in others
        },
        "success_by_seed": {
            name: {
                str(s.offset): [round(float(v), 4) for v in values.mean(axis=0)]
                for s, values in zip(chosen, rows, strict=True)
            }
            for name, rows in success.items()
        },
        "median_steps": {
            name: {str(s.offset): _median_steps(of_seeds) for s, of_seeds in zip(chosen, rows, strict=True)}
            for name, rows in outcomes.items()
        },
    }


def _by_offset(
    config: PlanConfig, chosen: list[Starts], values: list[Float[np.ndarray, "n seeds"]]
) -> dict[str, dict[str, float]]:
    """Return the mean over starts and seeds with its interval; all agents share the draws of episodes."""
    found = {}
    for starts, rows in zip(chosen, values, strict=True):
        bootstrap = Bootstrap(starts.episodes, config.draws, config.seed)
        count = bootstrap.sums(np.ones(len(rows)))
        mean = interval(bootstrap.sums(rows.mean(axis=1)) / count)
        found[str(starts.offset)] = {key: round(value, 4) for key, value in asdict(mean).items()}
    return found


def _median_steps(of_seeds: list[Outcome]) -> float | None:
    steps = np.concatenate([outcome.steps for outcome in of_seeds])
    return float(np.median(steps[steps >= 0])) if (steps >= 0).any() else None


def _decision_ms(outcomes: dict[str, list[list[Outcome]]]) -> dict[str, dict[str, float]]:
    found = {}
    for name, rows in outcomes.items():
        spent = np.concatenate([outcome.decision_ms for of_seeds in rows for outcome in of_seeds])
        quartiles = np.percentile(spent, (25, 50, 75))
        found[name] = {key: round(float(v), 2) for key, v in zip(("p25", "p50", "p75"), quartiles, strict=True)}
    return found


def _strip(cache: FrameCache, chosen: list[Starts], context: int, rows: list[list[Outcome]]) -> bytes:
    films = []
    for starts, of_seeds in list(zip(chosen, rows, strict=True))[:_SHOWN]:
        problems = problems_at(cache, starts, context)
        films.append(np.stack([problems.frames[0, -1], problems.goal_frames[0], of_seeds[0].frames[0]]))
    buffer = io.BytesIO()
    filmstrip(films, every=1).save(buffer, format="PNG")
    return buffer.getvalue()


def _fingerprint(*settings: Any) -> str:
    """Return what a part depends on, so that none is taken for one of other settings."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _write_part(path: Path, outcome: Outcome) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **outcome._asdict())


def _read_part(path: Path) -> Outcome:
    with np.load(path) as saved:
        return Outcome(**{name: saved[name] for name in Outcome._fields})


def _percent(row: dict[str, float], signed: bool = False) -> str:
    sign = "+" if signed else ""
    value, low, high = (f"{100 * row[key]:{sign}.0f}" for key in ("value", "low", "high"))
    return f"{value}% ({low} to {high})"


def _require_fit(world: World, dataset: Dataset) -> None:
    if world.spec.name != dataset.spec.name or world.spec.action_dim != dataset.spec.action_dim:
        raise WorldlineError(
            f"this is a world of {world.spec.name} with {world.spec.action_dim} actions, {dataset.path} holds episodes "
            f"of {dataset.spec.name} with {dataset.spec.action_dim}; plan on data of its own world"
        )


def _out(config: PlanConfig) -> Path:
    if config.out is not None:
        return Path(config.out)
    checkpoint = Path(config.checkpoint)
    return checkpoint / "planning" if checkpoint.is_dir() else Path("plannings") / checkpoint.name
