"""The screen chooses the elites that exact costs choose, and the plan is that of a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toy_world import SPEC
from worldline.bench.plan import Problem
from worldline.model import WorldConfig
from worldline.model.world import State, World
from worldline.planning.goal import GoalCost
from worldline.planning.planners import PlannerConfig
from worldline.planning.screen import Screen, make_screen

PLANNER = PlannerConfig(steps=4, samples=200, iterations=8, elites=20)


@pytest.fixture(scope="module")
def world() -> World:
    torch.manual_seed(0)
    made = World(WorldConfig(image_size=32, latent_dim=24, conv_width=8, hidden=96, decoder_width=8), SPEC).eval()
    with torch.no_grad():
        made.predictor.out[2].weight.mul_(20.0)  # an untrained world hardly moves
        made.predictor.cell.weight_hh.mul_(2.0)
    return made


def begun(world: World, count: int) -> tuple[State, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(count, 3, 24, generator=generator)
    with torch.no_grad():
        state = world.begin(z, 512 * torch.rand(count, 2, 2, generator=generator))
    return state, torch.randn(count, 24, generator=generator)


@pytest.mark.parametrize("fold", [False, True])
def test_rough_rollouts_are_near_and_nearer_the_narrower(world: World, fold: bool) -> None:
    state, _ = begun(world, 1)
    screen, errors, kept = Screen(world), [], []
    z, h = state.z[0], state.memory[0][0]
    for width in (512.0, 51.2, 5.12):
        actions = 256.0 + width * (torch.rand(100, 6, 2, generator=torch.Generator().manual_seed(2)) - 0.5)
        with torch.no_grad():
            reference, own = screen.reference(z, h, actions, fold)
            rough = screen.rollout(z, h, actions, reference)
            exact = world.rollout(State(state.z.expand(100, -1), (state.memory[0].expand(100, -1),)), actions)
        assert exact.std(dim=0).mean() > 0  # the actions matter
        errors.append(float(torch.maximum((rough - exact).abs(), (own - exact).abs()).max()))
        kept.append(sum(len(step.embed[1]) for step in reference))
    assert errors[0] < 0.05
    assert errors[2] < 0.2 * errors[0]
    assert kept[2] < 0.5 * kept[0] if fold else kept[2] == kept[0]


@pytest.mark.parametrize("over", ["last", "mean"])
def test_screened_elites_are_the_exact_ones(world: World, over: str) -> None:
    state, goal = begun(world, 3)
    exact = GoalCost(world, state, goal, over=over)
    screened = GoalCost(world, state, goal, over=over, screen=Screen(world))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for width in (512.0, 100.0, 20.0):
            actions = 256.0 + width * (torch.rand(3, 200, 4, 2, generator=generator) - 0.5)
            chosen, wanted = (cost.elites(actions, 20).sort(dim=1).values for cost in (screened, exact))
            assert torch.equal(chosen, wanted)


def test_a_bad_screen_costs_time_and_not_elites(world: World) -> None:
    class Bad(Screen):
        def rollout(self, *arguments: object) -> Tensor:
            rough = super().rollout(*arguments)  # type: ignore[arg-type]
            return rough + 0.3 * torch.randn(rough.shape, generator=torch.Generator().manual_seed(4))

    state, goal = begun(world, 1)
    actions = 512 * torch.rand(1, 200, 4, 2, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        chosen = GoalCost(world, state, goal, screen=Bad(world)).elites(actions, 20).sort().values
        wanted = GoalCost(world, state, goal).elites(actions, 20).sort().values
    assert torch.equal(chosen, wanted)


@pytest.mark.parametrize("screened", [False, True])
def test_the_plan_is_that_of_a_plain_loop(world: World, screened: bool) -> None:
    state, goal = begun(world, 1)
    problem = Problem(world, state, goal, seed=9)
    screen = Screen(world) if screened else None
    (ours, our_elites), (plain, plain_elites) = problem.ours(PLANNER, screen), problem.plain(PLANNER)
    assert len(our_elites) == PLANNER.iterations
    assert all(torch.equal(a, b) for a, b in zip(our_elites, plain_elites, strict=True))
    assert torch.allclose(ours, plain, atol=1e-3)
    assert (ours - SPEC_MIDDLE).abs().max() > 5  # it planned something


SPEC_MIDDLE = 256.0


def test_only_a_gru_is_screened() -> None:
    config = WorldConfig(image_size=32, latent_dim=24, conv_width=8, decoder_width=8, predictor="transformer")
    assert make_screen(World(config, SPEC)) is None
