"""Acting by plans: look, plan, carry out a little of the plan, look again, until the goal is reached or time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from worldline.core.errors import WorldlineError
from worldline.core.seeding import seed_for
from worldline.data.cache import FrameCache
from worldline.data.goals import reached
from worldline.data.simulators import Observation, Simulator
from worldline.evaluate.distances import encode
from worldline.evaluate.starts import Starts
from worldline.evaluate.windows import states_of
from worldline.model.world import State, World
from worldline.planning.distance import Distance
from worldline.planning.goal import GoalCost, Over
from worldline.planning.oracle import OracleCost, futures_of
from worldline.planning.planners import Cost, PlannerConfig, Space, plan
from worldline.planning.screen import make_screen


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How plans are carried out."""

    hold: int = 5
    """Environment steps that each planned action lasts."""
    carried_out: int = 1
    """Planned actions that are carried out before the next plan."""
    over: Over = "mean"
    """What a plan's cost is taken over: the mean over its steps, or the last."""
    distance: Distance = "change"
    """What the distance to the goal's latent is measured by: what latents change within `hold` steps of the episodes
    that the world was trained on, their covariance (white), or every latent value as it is (plain)."""
    trust: float | None = None
    """Believe imagined steps up to where the world expects an error above this (1 is the variance of real latents);
    None believes all. Without the screen that makes plans cheaper."""

    def __post_init__(self) -> None:
        if self.trust is not None and self.trust <= 0:
            raise WorldlineError(f"loop.trust must be positive, got {self.trust}")


class Problems(NamedTuple):
    """The starts as a planner meets them."""

    frames: UInt8[np.ndarray, "n c h w 3"]
    """What was seen up to the start."""
    actions: Float32[np.ndarray, "n c1 a"]
    """What was done between those frames."""
    goal_frames: UInt8[np.ndarray, "n h w 3"]
    goal_states: Float32[np.ndarray, "n s"]


class Outcome(NamedTuple):
    """What became of each start."""

    steps: Int64[np.ndarray, " n"]
    """Environment steps until the goal was reached; -1 if it was not within the budget."""
    frames: UInt8[np.ndarray, "n h w 3"]
    """The last picture."""
    decision_ms: Float[np.ndarray, " decisions"]
    """Wall-clock time of each decision, divided by the number of starts that were decided for."""


@runtime_checkable
class Agent(Protocol):
    """What plans: it is told what happens, and asked what each plan costs."""

    space: Space

    def begin(self, problems: Problems, simulators: list[Simulator]) -> None:
        """Hear of the starts. `simulators` are the real ones, which only an oracle looks into."""
        ...

    def cost(self, rows: list[int]) -> Cost:
        """Return the cost of plans from here on, for the starts in `rows`."""
        ...

    def observe(self, rows: list[int], actions: Float32[np.ndarray, "r a"], seen: list[Observation]) -> None:
        """Hear which actions were carried out for `rows` and what was seen then."""
        ...


class WorldAgent:
    """Plans in a world's imagination, towards the latent of the goal's picture."""

    def __init__(self, world: World, loop: LoopConfig, matrix: Float[Tensor, "d r"] | None) -> None:
        """
        Args:
            matrix: what `evaluate.distances.distance_matrix` returns for `loop.distance`.

        Raises:
            WorldlineError: `trust` is given and nothing estimates the world's error.
        """
        if loop.trust is not None and world.gauge.estimator is None:
            raise WorldlineError(
                "loop.trust wants a world with an error estimator, and this one has none; scripts/fit_gauge fits one"
            )
        self.space = Space.of(world.spec, world.action_mean, world.action_std)
        self._world, self._loop = world, loop
        self._matrix = matrix
        self._screen = make_screen(world) if loop.trust is None else None

    @torch.no_grad()
    def begin(self, problems: Problems, simulators: list[Simulator]) -> None:
        world, kept = self._world, self._world.config.context
        context = encode(world, problems.frames[:, -kept:])
        before = problems.actions[:, problems.actions.shape[1] - kept + 1 :]
        self._state = world.begin(context, torch.from_numpy(before.copy()))
        self._goal = encode(world, problems.goal_frames)

    def cost(self, rows: list[int]) -> Cost:
        return GoalCost(
            self._world,
            _rows_of(self._state, rows),
            self._goal[rows],
            hold=self._loop.hold,
            matrix=self._matrix,
            over=self._loop.over,
            screen=self._screen,
            trust=self._loop.trust,
        )

    @torch.no_grad()
    def observe(self, rows: list[int], actions: Float32[np.ndarray, "r a"], seen: list[Observation]) -> None:
        world = self._world
        expected = world.step(_rows_of(self._state, rows), torch.from_numpy(actions))
        z = encode(world, np.stack([observation.frame for observation in seen]))
        now = world.observe(expected, z)
        for whole, part in zip((self._state.z, *self._state.memory), (now.z, *now.memory), strict=True):
            whole[rows] = part


class OracleAgent:
    """Plans with the true dynamics of the world called `name`, towards the goal's true state."""

    def __init__(self, name: str, space: Space, loop: LoopConfig) -> None:
        self.space, self._loop = space, loop
        self._futures = futures_of(name)

    def begin(self, problems: Problems, simulators: list[Simulator]) -> None:
        self._simulators, self._goals = simulators, problems.goal_states

    def cost(self, rows: list[int]) -> Cost:
        simulators = [self._simulators[row] for row in rows]
        spec, hold, over = simulators[0].spec, self._loop.hold, self._loop.over
        return OracleCost(spec, simulators, self._goals[rows], self._futures, hold=hold, over=over)

    def observe(self, rows: list[int], actions: Float32[np.ndarray, "r a"], seen: list[Observation]) -> None:
        """Do nothing: the simulators have moved on by themselves."""


def attempt(
    agent: Agent,
    cache: FrameCache,
    starts: Starts,
    simulators: list[Simulator],
    *,
    planner: PlannerConfig,
    loop: LoopConfig,
    context: int,
    budget: int,
    seed: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> Outcome:
    """Let an agent try every start for at most `budget` environment steps, each as if it were the only one. A start
    whose goal is reached is left alone.

    `simulators` stand at the starts, and have moved on afterwards.

    Candidates are drawn by (seed, episode, start, offset, decision): the same for every agent with the same planner.
    """
    dataset, n = cache.dataset, len(starts.index)
    problems = problems_at(cache, starts, context)
    agent.begin(problems, simulators)
    steps, last = np.full(n, -1), problems.frames[:, -1].copy()
    moved_on: Float[Tensor, "n t a"] = agent.space.centre.expand(n, planner.steps, -1).clone()
    milliseconds = []
    done = 0
    while done < budget and (rows := np.flatnonzero(steps < 0).tolist()):
        seeds = [seed_for(seed, *starts.index[row].tolist(), starts.offset, "decision", done) for row in rows]
        begun = time.perf_counter()
        found = plan(agent.cost(rows), agent.space, planner, seeds, moved_on[rows]).actions
        milliseconds.append((time.perf_counter() - begun) * 1e3 / len(rows))
        rest = agent.space.centre.expand(len(rows), loop.carried_out, -1)
        moved_on[rows] = torch.cat((found[:, loop.carried_out :], rest), dim=1)
        before, going = done, np.arange(len(rows))  # which of the rows planned for are still on their way
        for action in _each(found[:, : loop.carried_out].numpy(), loop.hold):
            if done == budget or not len(going):
                break
            left = [rows[at] for at in going]
            seen = [simulators[row].step(action[at]) for at, row in zip(going, left, strict=True)]
            done += 1
            agent.observe(left, action[going], seen)
            states = np.stack([observation.state for observation in seen])
            there = reached(dataset.spec, states, problems.goal_states[left])
            for row, observation, is_there in zip(left, seen, there.tolist(), strict=True):
                last[row] = observation.frame
                steps[row] = done if is_there else -1
            going = going[~there]
        advance(done - before)
    advance(budget - done)
    return Outcome(steps, last, np.array(milliseconds))


def problems_at(cache: FrameCache, starts: Starts, context: int) -> Problems:
    """Return what is seen and done up to each start, and its goal. `cache` holds the dataset's own picture size."""
    dataset, goal = cache.dataset, starts.offset
    return Problems(
        frames=np.stack([cache.frames(e, t - context + 1, context) for e, t in starts.index.tolist()]),
        actions=np.stack([dataset.actions(e)[t - context + 1 : t] for e, t in starts.index.tolist()]),
        goal_frames=np.stack([cache.frames(e, t + goal, 1)[0] for e, t in starts.index.tolist()]),
        goal_states=np.stack([states_of(dataset, e)[t + goal] for e, t in starts.index.tolist()]),
    )


def _each(actions: Float32[np.ndarray, "n t a"], hold: int) -> Iterator[Float32[np.ndarray, "n a"]]:
    for step in range(actions.shape[1]):
        for _ in range(hold):
            yield actions[:, step]


def _rows_of(state: State, rows: list[int]) -> State:
    return State(state.z[rows], tuple(part[rows] for part in state.memory))
