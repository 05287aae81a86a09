"""A plan by the cross-entropy method, timed beside a plain loop that is given the same noise."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from worldline.bench.harness import compare
from worldline.core.files import read_json, write_bytes
from worldline.core.result import write_result
from worldline.core.seeding import seed_for
from worldline.engine.workloads.latent import Starts, load_starts
from worldline.model.checkpoint import find_world, load_world
from worldline.model.world import State, World
from worldline.planning.goal import GoalCost
from worldline.planning.planners import PlannerConfig, Space, plan
from worldline.planning.screen import Screen, make_screen


@dataclass(frozen=True, kw_only=True)
class PlanBenchConfig:
    """What to plan with, and how often."""

    checkpoint: str
    """A checkpoint, a run, or a shipped world's name; with the starts that `worldline train` or `play` gives it."""
    samples: int = 300
    """Candidates of an iteration."""
    iterations: int = 30
    """Iterations of a plan."""
    steps: int = 5
    """Steps of a plan."""
    elites: int = 30
    """Elites of an iteration."""
    problems: int = 30
    """Pairs of start and goal whose elites are compared; each turn times the next one."""
    compare_seconds: float = 90.0
    """Time for the comparison in turns."""
    threads: int = 1
    """Threads of torch, for both."""
    reports: str = "reports"
    """Where `DATE-plan/` is written."""


class Problem:
    """From one real start to the last picture of another."""

    def __init__(self, world: World, state: State, goal: Float[Tensor, "1 d"], seed: int) -> None:
        self.world, self.state, self.goal, self.seed = world, state, goal, seed
        self.space = Space.of(world.spec, world.action_mean, world.action_std)

    @torch.inference_mode()
    def plain(self, config: PlannerConfig) -> tuple[Tensor, list[Tensor]]:
        """Plan as one would write it down: every candidate is stepped, in float32, and the least costs are kept.

        Returns the planned actions (t, a) and the elites' indices of every iteration.
        """
        generator = torch.Generator().manual_seed(self.seed)
        low, high, mean, scale = self.space
        mean, std = mean.expand(config.steps, -1), (config.std * scale).expand(config.steps, -1)
        chosen = []
        for _ in range(config.iterations):
            noise = torch.randn(config.samples, *mean.shape, generator=generator)
            candidates = torch.clamp(mean + std * noise, low, high)
            n = config.samples
            state = State(self.state.z.expand(n, -1), tuple(m.expand(n, -1) for m in self.state.memory))
            for step in range(config.steps):
                state = self.world.step(state, candidates[:, step])
            costs = (state.z - self.goal).square().sum(dim=-1)
            elites = torch.argsort(costs, stable=True)[: config.elites].sort().values
            mean = candidates[elites].mean(dim=0)
            std = torch.maximum(candidates[elites].std(dim=0, correction=0), config.min_std * scale)
            chosen.append(elites)
        return mean, chosen

    @torch.inference_mode()
    def ours(self, config: PlannerConfig, screen: Screen | None) -> tuple[Tensor, list[Tensor]]:
        """Plan with the code of `worldline plan`, for the last step's plain distance; returns the same as `plain`."""
        cost = _Noting(GoalCost(self.world, self.state, self.goal, over="last", screen=screen))
        return plan(cost, self.space, config, [self.seed]).actions[0], cost.chosen


class _Noting:
    """A cost that notes which elites were chosen."""

    def __init__(self, cost: GoalCost) -> None:
        self._cost = cost
        self.chosen: list[Tensor] = []

    def __call__(self, actions: Float[Tensor, "p n t a"]) -> Float[Tensor, "p n"]:
        return self._cost(actions)

    def elites(self, actions: Float[Tensor, "p n t a"], k: int) -> Int64[Tensor, "p k"]:
        chosen = self._cost.elites(actions, k)
        self.chosen.append(chosen[0].sort().values)
        return chosen


def run(config: PlanBenchConfig) -> Path:
    """Compare elites, then time; write `result.json` and `report.md`, and return the report's path.

    Raises:
        WorldlineError: no such checkpoint, or it has no real frames to begin from.
    """
    torch.set_num_threads(config.threads)
    world = load_world(config.checkpoint).eval()
    problems = make_problems(world, load_starts(find_world(config.checkpoint), world.spec), config.problems)
    planner = PlannerConfig(
        steps=config.steps, samples=config.samples, iterations=config.iterations, elites=config.elites
    )
    screen = make_screen(world)
    rows = []
    for problem in problems:
        (ours, our_elites), (plain, plain_elites) = problem.ours(planner, screen), problem.plain(planner)
        equal = [torch.equal(a, b) for a, b in zip(our_elites, plain_elites, strict=True)]
        rows.append(
            {
                "iterations_with_equal_elites": sum(equal),
                "iterations": len(equal),
                "largest_difference_of_plans": float((ours - plain).abs().max()),
            }
        )
    plain_turns, our_turns = itertools.cycle(problems), itertools.cycle(problems)  # in step: a round has one problem
    found = compare(
        ("plain loop", lambda: next(plain_turns).plain(planner)),
        ("worldline plan", lambda: next(our_turns).ours(planner, screen)),
        budget_s=config.compare_seconds,
        warmup_s=1.0,
    )
    folder = Path(config.reports) / f"{date.today():%Y-%m-%d}-plan"
    figures = {
        "checkpoint": config.checkpoint,
        "predictor": world.config.predictor,
        "hidden": world.config.hidden,
        "screened": screen is not None,
        "samples": config.samples,
        "iterations": config.iterations,
        "steps": config.steps,
        "elites": config.elites,
        "threads": config.threads,
        "problems": rows,
    }
    write_result(folder / "result.json", "bench-plan", figures, {"comparison": found.to_json()})
    report = folder / "report.md"
    write_bytes(report, render(read_json(folder / "result.json")).encode())
    return report


def make_problems(world: World, starts: Starts, count: int) -> list[Problem]:
    """Return `count` problems: from each real start to the picture that another one ends with."""
    with torch.no_grad():
        z = world.encode(torch.from_numpy(starts.frames))  # (s, c, d)
        state = world.begin(z, torch.from_numpy(starts.actions))
    problems = []
    for number in range(count):
        row, goal = number % len(z), (number % len(z) + 1 + number // len(z)) % len(z)
        one = State(state.z[row : row + 1], tuple(part[row : row + 1] for part in state.memory))
        problems.append(Problem(world, one, z[goal : goal + 1, -1], seed_for("bench-plan", number)))
    return problems


def render(result: dict[str, Any]) -> str:
    """Write the report from `result.json` alone."""
    timed, made = result["timing"]["comparison"], result["provenance"]
    plain_ms, ours_ms = (median / 1e6 for median in timed["medians"])
    spreads = [f"{low / 1e6:.0f} to {high / 1e6:.0f}" for low, high in timed["quartiles"]]
    equal = sum(row["iterations_with_equal_elites"] for row in result["problems"])
    total = sum(row["iterations"] for row in result["problems"])
    largest = max(row["largest_difference_of_plans"] for row in result["problems"])
    speed, low, high = (1 / timed["ratio"], 1 / timed["interval"][1], 1 / timed["interval"][0])
    return "\n".join(
        [
            f"# A plan, {speed:.2f} times as fast as a plain loop",
            "",
            f"CEM in `{result['checkpoint']}` ({result['predictor']}, {result['hidden']} wide): {result['samples']} "
            f"samples x {result['iterations']} iterations x {result['steps']} steps, {result['elites']} elites, "
            f"{result['threads']} thread, float32.",
            "",
            "| | median ms | quartiles |",
            "|---|---|---|",
            f"| plain loop | {plain_ms:.0f} | {spreads[0]} |",
            f"| worldline plan | {ours_ms:.0f} | {spreads[1]} |",
            "",
            f"Ratio {speed:.2f} ({low:.2f} to {high:.2f}, 95% of the median), {timed['rounds']} rounds in turns, each "
            f"of the next problem. Given the same noise both chose the same elites in {equal} of {total} iterations of "
            f"{len(result['problems'])} problems; the plans differ by at most {largest:.3g}.",
            "",
            "A plan is matrix products and little else. "
            + (
                "Most candidates are imagined roughly: in bfloat16, without the units that no candidate switches and, "
                "once they are close together, in the directions where they differ; those near the border of the "
                "elites again in float32."
                if result["screened"]
                else "This machine or predictor has no screen, so both do the same."
            ),
            "",
            f"Machine: {made['machine']['processor']}, {made['machine']['cores']} cores; torch "
            f"{made['versions'].get('torch')}; commit {made['commit']}. Other work on the machine lengthens both.",
            "",
            f"Again: `{made['command']}`",
            "",
        ]
    )
