"""The planner of `tinyengine/planner.hpp` in NumPy: cross-entropy in integers, its noise and its ties included."""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass

import numpy as np
from jaxtyping import Int16

from worldline.core.errors import WorldlineError
from worldline.edge import integer
from worldline.edge.world import IntegerWorld, State


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much to imagine. `spread` and `least` are deviations in the unit of `step`'s actions."""

    samples: int
    elites: int
    iterations: int
    horizon: int
    seed: int
    spread: int
    least: int

    def __post_init__(self) -> None:
        if not 1 <= self.elites <= self.samples or min(self.iterations, self.horizon) < 1:
            raise WorldlineError(f"a plan needs samples, at most as many elites, iterations and a horizon, got {self}")

    def words(self) -> bytes:
        return struct.pack("<7I", *astuple(self))


def plan(
    world: IntegerWorld, state: State, goal: Int16[np.ndarray, " d"], budget: Budget
) -> tuple[Int16[np.ndarray, "t a"], int]:
    """Return the actions that come nearest to a goal's latent from one state, and what the best sample costs."""
    bounds = [_bound(world, side) for side in (world.actions.low, world.actions.high)]
    low, high = (np.tile(side, (budget.horizon, 1)) for side in bounds)
    mean = integer.average(low + high, 2)
    deviation = np.full_like(mean, budget.spread)
    noise, best = _Noise(budget.seed), 2**64 - 1
    for _ in range(budget.iterations):
        offsets = np.array([[noise.normal() for _ in range(mean.size)] for _ in range(budget.samples - 1)], np.int64)
        moved = mean + ((deviation * offsets.reshape(-1, *mean.shape) + (1 << 11)) >> 12)
        samples = np.clip(np.concatenate((mean[None], moved)), low, high)
        costs = _costs(world, state, goal, samples.astype(np.int16))
        best = min(best, min(costs))
        elites = samples[_kept(costs, budget.elites)]
        mean = integer.average(elites.sum(axis=0), budget.elites)
        variance = ((elites - mean) ** 2).sum(axis=0) // budget.elites
        roots = np.array([integer.root(int(v)) for v in variance.ravel()], np.int64).reshape(mean.shape)
        deviation = np.clip(roots, budget.least, 2**15 - 1)
    return mean.astype(np.int16), best


class _Noise:
    def __init__(self, seed: int) -> None:
        self.x = seed or 1

    def normal(self) -> int:
        """Return a value about normal, in 1/4096 of a standard deviation: the sum of four uniform ones."""
        total = -4 * 32768
        for _ in range(4):
            self.x ^= (self.x << 13) & 0xFFFFFFFF
            self.x ^= self.x >> 17
            self.x ^= (self.x << 5) & 0xFFFFFFFF
            total += self.x >> 16
        return (total * 7094 + (1 << 15)) >> 16


def _bound(world: IntegerWorld, native: np.ndarray) -> np.ndarray:
    a = world.actions
    steps = (native - a.mean) * a.factor + np.float32(0.5)
    return np.floor(np.clip(steps, -(2**15), 2**15 - 1)).astype(np.int64)


def _costs(world: IntegerWorld, state: State, goal: np.ndarray, samples: Int16[np.ndarray, "n t a"]) -> list[int]:
    now = State(*(np.repeat(part, len(samples), axis=0) for part in state))
    total = np.zeros(len(samples), np.int64)
    for action in samples.transpose(1, 0, 2):
        now = world.step(now, action)
        total += ((now.z.astype(np.int64) - goal) ** 2).sum(axis=1)
    return [int(cost) for cost in total]


def _kept(costs: list[int], count: int) -> list[int]:
    """Return which samples are kept: one that is better than the worst takes its place; of equals, the later one's."""
    kept = list(range(count))
    for n in range(count, len(costs)):
        slot = max(range(count), key=lambda k: (costs[kept[k]], k))
        if costs[n] < costs[kept[slot]]:
            kept[slot] = n
    return kept
