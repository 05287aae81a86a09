"""Planners that search for actions of least cost: CEM, iCEM, MPPI, and gradient descent.

A planner knows nothing of worlds: it draws candidates, asks `cost` what they lead to, and draws better ones. Problems
are solved side by side, each with a random generator of its own, so that a problem gets the same candidates whatever
it is batched with.

Shape legend: p problems, n candidates of each, t planned actions, a action, k elites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from worldline.core.errors import WorldlineError
from worldline.core.types import WorldSpec

Cost = Callable[[Float[Tensor, "p n t a"]], Float[Tensor, "p n"]]
"""What candidates, in native action units, would cost. A cost may also offer `elites`, as `planning.goal.GoalCost`."""


@dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """How to search."""

    method: Literal["cem", "icem", "mppi", "gradient"] = "cem"
    """Cross-entropy method, the same with coloured noise and kept elites, path integral control, gradient descent."""
    steps: int = 5
    """Actions of a plan."""
    samples: int = 64
    """Candidates of an iteration; those that gradient descent starts from."""
    iterations: int = 5
    """Rounds of drawing candidates and narrowing down on the better ones; steps of gradient descent."""
    elites: int = 6
    """Candidates that the next iteration is drawn around, of CEM and iCEM."""
    std: float = 1.0
    """Spread of the first candidates, in standard deviations of the actions that the world was trained on."""
    min_std: float = 0.05
    """Spread below which no iteration narrows, in the same unit. Without it the last iterations would choose among
    candidates that differ by rounding errors."""
    noise_exponent: float = 1.0
    """Colour of iCEM's noise over time: its power falls with frequency to this power; 0 is white."""
    kept: float = 0.3
    """Share of the elites that iCEM keeps for the next iteration."""
    temperature: float = 0.3
    """MPPI's, in standard deviations of the candidates' costs."""
    step_size: float = 0.1
    """Of gradient descent (Adam's), in standard deviations of the actions."""

    def __post_init__(self) -> None:
        if min(self.steps, self.samples, self.iterations) < 1 or not 1 <= self.elites <= self.samples:
            raise WorldlineError(
                "a planner wants at least one step, sample and iteration, and from 1 to `samples` elites, got "
                f"{self.steps} steps, {self.samples} samples, {self.iterations} iterations, {self.elites} elites"
            )


class Space(NamedTuple):
    """Where actions are searched: native units, each action with its range, its centre and its scale."""

    low: Float[Tensor, " a"]
    high: Float[Tensor, " a"]
    centre: Float[Tensor, " a"]
    scale: Float[Tensor, " a"]

    @classmethod
    def of(cls, spec: WorldSpec, mean: Float[Tensor, " a"], std: Float[Tensor, " a"]) -> Space:
        """Return the spec's bounds (infinite where it has none) with the mean and std of real actions."""
        return cls(torch.tensor(spec.action_low).float(), torch.tensor(spec.action_high).float(), mean, std)

    def clip(self, actions: Float[Tensor, "*b a"]) -> Float[Tensor, "*b a"]:
        return torch.clamp(actions, self.low, self.high)


class Plan(NamedTuple):
    actions: Float[Tensor, "p t a"]
    """Native units, within bounds."""
    cost: Float[Tensor, " p"]


class Noise:
    """Standard normal draws, one generator for each problem."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __len__(self) -> int:
        return len(self._generators)

    def normal(self, n: int, t: int, a: int) -> Float[Tensor, "p n t a"]:
        return torch.stack([torch.randn(n, t, a, generator=generator) for generator in self._generators])

    def coloured(self, n: int, t: int, a: int, exponent: float) -> Float[Tensor, "p n t a"]:
        """Return noise of unit variance whose power falls with frequency as f^-exponent along t.

        Source: arXiv 2008.06389, section 3.1.
        """
        spectrum = torch.fft.rfft(self.normal(n, t, a), dim=2)
        frequency = torch.fft.rfftfreq(t).clamp(min=1.0 / t)
        weight = frequency.pow(-exponent / 2)
        count = torch.full_like(weight, 2.0)  # a real signal has every frequency twice, but the first and an even last
        count[0] = 1.0
        if t % 2 == 0:
            count[-1] = 1.0
        weight = weight / (count * weight.square()).sum().div(t).sqrt()
        coloured: Tensor = torch.fft.irfft(spectrum * weight[:, None], n=t, dim=2)
        return coloured


def plan(
    cost: Cost,
    space: Space,
    config: PlannerConfig,
    seeds: Sequence[int],
    start: Float[Tensor, "p t a"] | None = None,
) -> Plan:
    """Search for the actions of least cost, one problem for each seed. The same seeds give the same plan.

    Args:
        start: where to begin the search, as the last plan moved on by what was carried out; else the space's centre.

    Raises:
        WorldlineError: gradient descent on a cost that cannot be differentiated.
    """
    noise = Noise(seeds)
    mean = space.centre.expand(len(noise), config.steps, -1).clone() if start is None else space.clip(start)
    with torch.no_grad():
        actions = METHODS[config.method](cost, space, config, noise, mean)
        return Plan(actions, cost(actions[:, None])[:, 0])


def elites(cost: Cost, candidates: Float[Tensor, "p n t a"], k: int) -> Int64[Tensor, "p k"]:
    """Return which k candidates cost least, in the order of their indices; undefined costs count as infinite."""
    own = getattr(cost, "elites", None)
    chosen: Tensor
    if own is not None:
        chosen = own(candidates, k)
    else:
        chosen = least(_defined(cost(candidates)), k)
    return chosen.sort(dim=1).values  # so that sums over elites do not depend on how they were found


def least(costs: Float[Tensor, "*p n"], k: int) -> Int64[Tensor, "*p k"]:
    """Return which k cost least; of equal costs the first, which `topk` leaves open."""
    return torch.argsort(costs, dim=-1, stable=True)[..., :k]


def _cem(cost: Cost, space: Space, config: PlannerConfig, noise: Noise, mean: Tensor) -> Tensor:
    """Cross-entropy method: draw, keep the elites, draw around them. The plan is their mean."""
    std = (config.std * space.scale).expand_as(mean)
    shape = (config.samples, config.steps, mean.shape[-1])
    for _ in range(config.iterations):
        candidates = space.clip(mean[:, None] + std[:, None] * noise.normal(*shape))
        best = _take(candidates, elites(cost, candidates, config.elites))
        mean, std = best.mean(dim=1), _spread(best, space, config)
    return mean


def _icem(cost: Cost, space: Space, config: PlannerConfig, noise: Noise, mean: Tensor) -> Tensor:
    """CEM with noise that holds its direction for a while, and elites that live on. The plan is the best one seen.

    Source: arXiv 2008.06389; without its decay of the number of samples.
    """
    std = (config.std * space.scale).expand_as(mean)
    shape = (config.samples, config.steps, mean.shape[-1])
    num_kept = round(config.kept * config.elites)
    kept = mean[:, None]  # the search's beginning is a candidate too
    for _ in range(config.iterations):
        drawn = noise.coloured(*shape, config.noise_exponent)
        candidates = torch.cat((space.clip(mean[:, None] + std[:, None] * drawn), kept), dim=1)
        costs = _defined(cost(candidates))
        best = _take(candidates, least(costs, config.elites))  # best first
        mean, std = best.mean(dim=1), _spread(best, space, config)
        kept = best[:, : max(num_kept, 1)]
    return kept[:, 0]


def _mppi(cost: Cost, space: Space, config: PlannerConfig, noise: Noise, mean: Tensor) -> Tensor:
    """Path integral control: every candidate counts, by exp(-cost / temperature).

    Source: arXiv 1707.02342 eq. 34 for the weights; mean and spread of several iterations as in arXiv 2203.04955.
    """
    std = (config.std * space.scale).expand_as(mean)
    shape = (config.samples, config.steps, mean.shape[-1])
    for _ in range(config.iterations):
        candidates = space.clip(mean[:, None] + std[:, None] * noise.normal(*shape))
        costs = cost(candidates)
        finite = torch.isfinite(costs)
        known = torch.where(finite, costs, costs[finite].max() if finite.any() else 0.0)
        scale = known.std(dim=1, keepdim=True, correction=0).clamp(min=1e-12)
        logits = torch.where(finite, -known / (config.temperature * scale), -1e30)
        weights = torch.softmax(logits, dim=1)[:, :, None, None]
        mean = (weights * candidates).sum(dim=1)
        variance = (weights * (candidates - mean[:, None]).square()).sum(dim=1)
        std = torch.maximum(variance.sqrt(), config.min_std * space.scale)
    return mean


def _gradient(cost: Cost, space: Space, config: PlannerConfig, noise: Noise, mean: Tensor) -> Tensor:
    """Descend from several starts at once with Adam, back into the bounds after every step; the best one counts."""
    scale = space.scale
    drawn = noise.normal(config.samples, config.steps, mean.shape[-1])
    drawn[:, 0] = 0.0  # one starts at the beginning itself
    actions = space.clip(mean[:, None] + config.std * scale * drawn)
    first, second = torch.zeros_like(actions), torch.zeros_like(actions)
    for step in range(1, config.iterations + 1):
        with torch.enable_grad():
            actions.requires_grad_(True)
            costs = cost(actions)
            if not costs.requires_grad:
                raise WorldlineError("the gradient planner wants a cost that can be differentiated; take cem instead")
            (slope,) = torch.autograd.grad(costs.sum(), actions)
        slope = torch.nan_to_num(slope) * scale  # in the scaled actions
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope.square()
        change = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        actions = space.clip(actions.detach() - config.step_size * scale * change)
    return _take(actions, _defined(cost(actions)).argmin(dim=1, keepdim=True))[:, 0]


METHODS = {"cem": _cem, "icem": _icem, "mppi": _mppi, "gradient": _gradient}


def _take(candidates: Tensor, chosen: Tensor) -> Tensor:
    return candidates.gather(1, chosen[:, :, None, None].expand(-1, -1, *candidates.shape[2:]))


def _spread(best: Tensor, space: Space, config: PlannerConfig) -> Tensor:
    return torch.maximum(best.std(dim=1, correction=0), config.min_std * space.scale)


def _defined(costs: Tensor) -> Tensor:
    return torch.nan_to_num(costs, nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
