"""What a plan costs in a world: the distance of imagined latents to the latent of a goal picture.

Shape legend: p problems, n candidates of each, t planned actions, a action, d latent, r directions that count,
k elites.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from worldline.core.errors import WorldlineError
from worldline.model.world import State, World
from worldline.planning.planners import least
from worldline.planning.screen import Screen, Step

Over = Literal["mean", "last"]

_CONTENDERS = 12
"""Candidates around the border between elites and others that are imagined exactly at least."""
_SAFETY = 7.0
"""Candidates farther from the border than this many times the error seen there (root mean square) count as decided."""
_ROUNDING = 2e-6
"""Costs that differ by less than this share of them are told apart by the world itself, not by the screen's float32."""
_RENEWED = (3, 8, 13, 20)
"""Rounds of a search after which the screen's reference is made anew, since a search narrows most at its beginning."""


class GoalCost:
    """Squared distance of the imagined latents to the goal's: the mean over all imagined steps, or that of the last.

    The mean asks for arriving early and staying; the last step alone leaves open when.

    `hold` world steps are imagined for each planned action. `matrix` maps latents to the directions that count
    (`planning.distance`); None counts all alike. With a `screen` of the same world, `elites` imagines most candidates
    roughly and only those near the border between elites and others exactly.

    With `trust`, a candidate's horizon ends at the first step whose expected error (`World.rollout_with_error`) passes
    it: later steps count as far from the goal as the last one believed, so that nothing is gained by what is imagined
    there. The first step is always believed.
    """

    def __init__(
        self,
        world: World,
        state: State,
        goal: Float[Tensor, "p d"],
        *,
        hold: int = 1,
        matrix: Float[Tensor, "d r"] | None = None,
        over: Over = "mean",
        screen: Screen | None = None,
        trust: float | None = None,
    ) -> None:
        """
        Raises:
            WorldlineError: `trust` is given for a world without an error estimator, or together with a screen.
        """
        if trust is not None and (world.gauge.estimator is None or screen is not None):
            raise WorldlineError(
                "trust wants a world with an error estimator and no screen, got "
                + ("no estimator; scripts/fit_gauge fits one" if world.gauge.estimator is None else "a screen")
            )
        self._world, self._state, self._goal = world, state, goal
        self._hold, self._matrix, self._over = hold, matrix, over
        self._screen, self._trust = screen, trust
        self._references: list[list[Step] | None] = [None] * len(goal)
        self._stale = [True] * len(goal)
        self._errors, self._rounds = [0.0] * len(goal), [0] * len(goal)

    def __call__(self, actions: Float[Tensor, "p n t a"]) -> Float[Tensor, "p n"]:
        # one problem at a time: hundreds of rows fill a processor, and the bits are those of each problem alone
        return torch.stack([self._exact(problem, part) for problem, part in enumerate(actions.unbind())])

    def elites(self, actions: Float[Tensor, "p n t a"], k: int) -> Int64[Tensor, "p k"]:
        """Return which k candidates cost least: the same as by exact costs."""
        return torch.stack([self._elites(problem, part, k) for problem, part in enumerate(actions.unbind())])

    def _elites(self, problem: int, actions: Float[Tensor, "n t a"], k: int) -> Int64[Tensor, " k"]:
        n = len(actions)
        screened = self._screen is not None and n >= 4 * _CONTENDERS and k < n
        costs = _defined(self._rough(problem, actions) if screened else self._exact(problem, actions))
        border = torch.kthvalue(costs, k).values
        if screened and not torch.isfinite(border):  # a reference that is not a number tells nothing
            screened, costs = False, _defined(self._exact(problem, actions))
        if not screened:
            return least(costs, k)
        away = (costs - border).abs()
        nearest, checked = torch.argsort(away), costs.clone()
        known, before = 0, self._errors[problem]
        error = before
        while known < (wanted := max(_CONTENDERS, int((away <= _SAFETY * error).sum()))):
            asked = nearest[known:wanted]
            checked[asked] = _defined(self._checked(problem, actions[asked]))
            known = wanted
            off = torch.nan_to_num((checked - costs)[nearest[:known]], nan=torch.inf)
            now = float(off.square().mean().sqrt())
            error = max(now, before)  # a few contenders may agree by chance
        border = torch.kthvalue(checked, k).values
        away = (checked - border).abs()
        tied = int((away <= _ROUNDING * border.abs()).sum())
        if tied > 1:
            asked = torch.argsort(away)[: max(_CONTENDERS, tied)]  # not so few that they are summed in another order
            checked[asked] = _defined(self._exact(problem, actions[asked]))
        pooled = math.sqrt((before**2 + now**2) / 2)
        self._errors[problem] = pooled if math.isfinite(pooled) else 0.0
        self._rounds[problem] += 1
        moved = known > 4 * _CONTENDERS and not self._stale[problem]  # else it has just been made
        self._stale[problem] = self._rounds[problem] in _RENEWED or moved  # the search has narrowed or moved on
        return least(checked, k)

    def _exact(self, problem: int, actions: Float[Tensor, "n t a"]) -> Float[Tensor, " n"]:
        n = len(actions)
        z, memory = self._state.z[problem], (part[problem] for part in self._state.memory)
        state = State(z.expand(n, -1), tuple(part.expand(n, *part.shape) for part in memory))
        held = actions.repeat_interleave(self._hold, dim=1)
        if self._trust is None:
            return self._distance(problem, self._world.rollout(state, held))
        imagined, expected = self._world.rollout_with_error(state, held)
        return self._distance(problem, imagined, last_believed(expected.error, self._trust))

    def _checked(self, problem: int, actions: Float[Tensor, "n t a"]) -> Float[Tensor, " n"]:
        z, h, reference = self._state.z[problem], self._state.memory[0][problem], self._references[problem]
        assert self._screen is not None
        assert reference is not None
        held = actions.repeat_interleave(self._hold, dim=1)
        return self._distance(problem, self._screen.rollout(z, h, held, reference, exact=True))

    def _rough(self, problem: int, actions: Float[Tensor, "n t a"]) -> Float[Tensor, " n"]:
        assert self._screen is not None
        z, h = self._state.z[problem], self._state.memory[0][problem]
        held = actions.repeat_interleave(self._hold, dim=1)
        reference = self._references[problem]
        if reference is None or self._stale[problem]:
            fold = self._rounds[problem] > 0  # the first candidates are wide
            self._references[problem], imagined = self._screen.reference(z, h, held, fold, reference)
        else:
            imagined = self._screen.rollout(z, h, held, reference)
        return self._distance(problem, imagined)

    def _distance(
        self, problem: int, imagined: Float[Tensor, "n t d"], believed: Int64[Tensor, " n"] | None = None
    ) -> Float[Tensor, " n"]:
        if believed is not None:
            step = torch.arange(imagined.shape[1]).minimum(believed[:, None])  # (n, t)
            imagined = imagined.gather(1, step[:, :, None].expand_as(imagined))
        if self._over == "last":
            imagined = imagined[:, -1:]
        offset = imagined - self._goal[problem]
        if self._matrix is not None:
            offset = offset @ self._matrix
        return offset.square().sum(dim=-1).mean(dim=-1)


def last_believed(error: Float[Tensor, "n t"], trust: float) -> Int64[Tensor, " n"]:
    """Return the index of the last step before the expected error passes `trust` for the first time; at least 0."""
    believed: Tensor = (error <= trust).long().cumprod(dim=1).sum(dim=1)
    return (believed - 1).clamp(min=0)


def _defined(costs: Tensor) -> Tensor:
    return torch.nan_to_num(costs, nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
