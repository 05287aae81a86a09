"""The planners on a world with known linear dynamics: the optimum that can be calculated, bounds, seeds, batches."""

from __future__ import annotations

import pytest
import torch
from linear_world import SPACE, LinearWorld, begin

from worldline.core.errors import WorldlineError
from worldline.planning.goal import GoalCost
from worldline.planning.planners import METHODS, Cost, Noise, PlannerConfig, elites, least, plan

EVERY = pytest.mark.parametrize("method", sorted(METHODS))
STEPS = 3
WORLD = LinearWorld()
INSIDE = torch.tensor([[1.3, 0.4], [-0.5, 1.6], [2.2, 1.1]])
"""Actions within bounds; what they lead to is a goal that can be reached exactly."""
OUTSIDE = torch.tensor([[4.0, 1.0], [5.0, 1.0], [6.0, 1.0]])


def config(method: str, **options: float) -> PlannerConfig:
    size = {"samples": 20, "iterations": 150} if method == "gradient" else {"samples": 200, "iterations": 40}
    return PlannerConfig(**{"method": method, "steps": STEPS, "elites": 20, "min_std": 0.002, **size, **options})


def towards(actions: torch.Tensor, *starts: list[float], **options: object) -> Cost:
    state = begin(*starts)
    goal = WORLD.rollout(state, actions.expand(len(starts), -1, -1))[:, -1]
    return GoalCost(WORLD, state, goal, over="last", **options)


@EVERY
def test_a_goal_that_can_be_reached_is_reached(method: str) -> None:
    cost = towards(INSIDE, [0.5, -0.2, 0.1])
    found = plan(cost, SPACE, config(method), [7])
    still = cost(SPACE.centre.expand(1, 1, STEPS, 2))[0, 0]
    assert found.cost[0] < 2e-4 * still
    assert torch.allclose(cost(found.actions[:, None])[:, 0], found.cost)


@EVERY
def test_the_plan_is_the_analytic_optimum(method: str) -> None:
    """Over the mean of the steps with a goal that cannot be held, least squares tells the best actions."""
    state, goal = begin([0.5, -0.2, 0.1]), torch.tensor([[1.2, 0.9, 0.5]])
    cost = GoalCost(WORLD, state, goal)
    free = WORLD.rollout(state, torch.zeros(1, STEPS, 2)).flatten()
    unit = torch.eye(STEPS * 2).reshape(-1, STEPS, 2)
    effect = torch.stack([WORLD.rollout(state, row[None]).flatten() - free for row in unit], dim=1)
    best = torch.linalg.lstsq(effect, (goal.repeat(STEPS, 1).flatten() - free)[:, None]).solution.reshape(STEPS, 2)
    assert ((best > SPACE.low) & (best < SPACE.high)).all()  # no bound takes part
    least = cost(best[None, None])[0, 0]
    found = plan(cost, SPACE, config(method), [3])
    assert found.cost[0] >= least - 1e-6
    assert found.cost[0] < least + 2e-3
    assert (found.actions[0] - best).abs().max() < 0.25  # the last action hardly matters to the cost


@EVERY
def test_bounds_hold_and_are_reached_where_the_optimum_lies_beyond(method: str) -> None:
    cost = towards(OUTSIDE, [0.0, 0.0, 0.0])
    seen = []

    def watched(actions: torch.Tensor) -> torch.Tensor:
        seen.append(actions.detach())
        return cost(actions)

    found = plan(watched, SPACE, config(method), [1])
    for actions in [*seen, found.actions]:
        assert ((actions >= SPACE.low) & (actions <= SPACE.high)).all()
    assert (found.actions[0, :, 0] > 2.9).all()


@EVERY
def test_the_seed_alone_decides(method: str) -> None:
    cost = towards(OUTSIDE, [0.5, -0.2, 0.1])
    quick = config(method, iterations=2)
    first, again, other = (plan(cost, SPACE, quick, [seed]).actions for seed in (5, 5, 6))
    torch.manual_seed(1)  # the global generator plays no part
    assert torch.equal(first, again)
    assert torch.equal(first, plan(cost, SPACE, quick, [5]).actions)
    assert not torch.equal(first, other)


@EVERY
def test_batched_is_one_by_one(method: str) -> None:
    starts = [[0.5, -0.2, 0.1], [1.0, 0.0, -1.0], [0.0, 0.3, 0.4]]
    quick = config(method, iterations=4)
    together = plan(towards(INSIDE, *starts), SPACE, quick, [1, 2, 3])
    for row, start in enumerate(starts):
        alone = plan(towards(INSIDE, start), SPACE, quick, [row + 1])
        assert torch.equal(together.actions[row], alone.actions[0])
        assert torch.equal(together.cost[row], alone.cost[0])


def test_each_planned_action_is_held() -> None:
    cost = towards(INSIDE.repeat_interleave(4, dim=0), [0.5, -0.2, 0.1], hold=4)
    assert cost(INSIDE[None, None])[0, 0] < 1e-10


def test_a_matrix_weighs_directions() -> None:
    state, goal = begin([0.0, 0.0, 0.0]), torch.tensor([[1.0, 1.0, 1.0]])
    matrix = torch.tensor([[2.0], [0.0], [0.0]])
    actions = torch.rand(1, 5, STEPS, 2)
    expected = 4 * (WORLD.rollout(begin([0.0] * 3), actions[0])[:, -1, 0] - 1).square()
    assert torch.allclose(GoalCost(WORLD, state, goal, matrix=matrix, over="last")(actions)[0], expected)


def test_a_plan_goes_on_from_a_start() -> None:
    cost = towards(INSIDE, [0.5, -0.2, 0.1])
    narrow = config("cem", iterations=1, std=0.01)
    found = plan(cost, SPACE, narrow, [1], start=INSIDE[None])
    assert (found.actions[0] - INSIDE).abs().max() < 0.05


@EVERY
def test_undefined_costs_are_never_chosen(method: str) -> None:
    cost = towards(INSIDE, [0.5, -0.2, 0.1])

    def broken(actions: torch.Tensor) -> torch.Tensor:
        return torch.where(actions[:, :, 0, 0] > 1.5, torch.nan, cost(actions))

    found = plan(broken, SPACE, config(method), [1])
    assert torch.isfinite(found.cost).all()


def test_coloured_noise_has_unit_variance_and_its_colour() -> None:
    for steps in (7, 8):
        drawn = Noise([0]).coloured(4000, steps, 2, 2.0)[0]
        assert drawn.var().item() == pytest.approx(1.0, abs=0.05)
        neighbours = (drawn[:, 1:] * drawn[:, :-1]).mean() / drawn.var()
        assert neighbours > 0.5
        white = Noise([0]).coloured(4000, steps, 2, 0.0)[0]
        assert abs((white[:, 1:] * white[:, :-1]).mean()) < 0.05


def test_elites_are_the_least_in_order_of_their_indices() -> None:
    costs = torch.tensor([[3.0, torch.nan, 1.0, 2.0, -torch.inf]])
    assert elites(lambda actions: costs, torch.zeros(1, 5, 1, 1), 2).tolist() == [[2, 3]]


def test_mistakes_are_told() -> None:
    with pytest.raises(WorldlineError, match="elites"):
        PlannerConfig(samples=4, elites=5)
    with pytest.raises(WorldlineError, match="differentiated"):
        plan(lambda actions: actions.detach().sum(dim=(2, 3)), SPACE, config("gradient"), [1])


def test_of_equal_costs_the_first_are_elites() -> None:
    costs = torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0, 0.0]).repeat(2, 50)
    assert least(costs, 60)[1].tolist() == [*range(5, 300, 6), 1, 3, 4, 7, 9, 10, 13, 15, 16, 19]
