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


def rolled(world: World, state: State, actions: Tensor) -> Tensor:
    n = len(actions)
    return world.rollout(State(state.z.expand(n, -1), (state.memory[0].expand(n, -1),)), actions)


def drawn(width: float, seed: int = 2) -> Tensor:
    return 256.0 + width * (torch.rand(100, 6, 2, generator=torch.Generator().manual_seed(seed)) - 0.5)


@pytest.mark.parametrize("fold", [False, True])
def test_rough_rollouts_are_near_and_nearer_the_narrower(world: World, fold: bool) -> None:
    state, _ = begun(world, 1)
    screen, errors, kept = Screen(world), [], []
    z, h = state.z[0], state.memory[0][0]
    for width in (512.0, 51.2, 5.12):
        actions = drawn(width)
        with torch.no_grad():
            reference, own = screen.reference(z, h, actions, fold)
            rough = screen.rollout(z, h, actions, reference)
            exact = rolled(world, state, actions)
        assert exact.std(dim=0).mean() > 0  # the actions matter
        errors.append(float(torch.maximum((rough - exact).abs(), (own - exact).abs()).max()))
        kept.append(sum(step.x.shape[1] for step in reference))
    assert errors[0] < 0.05
    assert errors[2] < 0.2 * errors[0]
    assert kept[2] < 0.5 * kept[0] if fold else kept[2] == kept[0]


def test_a_unit_that_later_candidates_switch_is_put_back(world: World) -> None:
    state, _ = begun(world, 1)
    screen, z, h = Screen(world), state.z[0], state.memory[0][0]
    with torch.no_grad():
        reference, _ = screen.reference(z, h, drawn(5.12), fold=True)
        reference = [step._replace(directions=None) for step in reference]
        wider = drawn(51.2)
        error = (screen.rollout(z, h, wider, reference) - rolled(world, state, wider)).abs().mean()
        unfolded, _ = screen.reference(z, h, drawn(5.12), fold=False)
        wanted = (screen.rollout(z, h, wider, unfolded) - rolled(world, state, wider)).abs().mean()
    assert error < 1.5 * wanted


def test_memories_of_narrow_searches_move_in_few_directions(world: World) -> None:
    state, _ = begun(world, 1)
    screen, z, h = Screen(world), state.z[0], state.memory[0][0]
    with torch.no_grad():
        wide, _ = screen.reference(z, h, drawn(512.0), fold=True)
        narrow, _ = screen.reference(z, h, drawn(5.12), fold=True)
        others = drawn(5.12, seed=3)  # none that the directions were taken from
        others[0] += 20.0  # one that leaves them
        exact = rolled(world, state, others)
        rough = screen.rollout(z, h, others, narrow)
        plain = screen.rollout(z, h, others, [step._replace(directions=None) for step in narrow])
    assert wide[-2].directions is None
    assert all(step.directions is not None and step.directions.basis.shape[1] < 30 for step in narrow[:-1])
    assert (rough - plain)[1:].abs().max() > 0  # they were used
    assert (rough - exact)[1:].abs().mean() < 0.02 * exact[1:].std(dim=0).mean()
    assert (rough - exact)[0].abs().mean() < 2.0 * (plain - exact)[0].abs().mean()


def test_a_reference_is_renewed_on_rollouts_by_the_last(world: World) -> None:
    state, _ = begun(world, 1)
    screen, z, h = Screen(world), state.z[0], state.memory[0][0]
    actions = drawn(5.12)
    with torch.no_grad():
        last, _ = screen.reference(z, h, drawn(512.0), fold=True)
        renewed, own = screen.reference(z, h, actions, fold=True, last=last)
        assert torch.equal(own, screen.rollout(z, h, actions, last))
        exact = rolled(world, state, actions)
        assert (screen.rollout(z, h, actions, renewed) - exact).abs().mean() < 0.5 * (own - exact).abs().mean()


@pytest.mark.parametrize("fold", [False, True])
def test_a_few_are_imagined_as_by_the_world(world: World, fold: bool) -> None:
    state, _ = begun(world, 1)
    screen, z, h = Screen(world), state.z[0], state.memory[0][0]
    with torch.no_grad():
        reference, _ = screen.reference(z, h, drawn(5.12), fold)
        actions = drawn(100.0)[:7]  # wider, so that they switch units that were folded
        few, exact = screen.rollout(z, h, actions, reference, exact=True), rolled(world, state, actions)
    assert torch.allclose(few, exact, atol=1e-5, rtol=1e-5)


def test_costs_that_are_not_numbers_are_no_elites_and_do_no_lasting_harm(world: World) -> None:
    asked = []

    class Faulty(Screen):
        def rollout(self, *arguments: object, **options: object) -> Tensor:
            imagined = super().rollout(*arguments, **options)  # type: ignore[arg-type]
            if options.get("exact"):
                if not asked:
                    imagined[0] = torch.nan
                asked.append(len(imagined))
            return imagined

    state, goal = begun(world, 1)
    cost = GoalCost(world, state, goal, screen=Faulty(world))
    actions = drawn(100.0)[None]
    with torch.no_grad():
        cost.elites(actions, 10)
        first = sum(asked)
        cost.elites(actions, 10)
        assert first == 100  # all, since what is not a number may be as wrong as it likes
        assert sum(asked) < 150
        actions[0, 5:] = torch.nan
        anew = GoalCost(world, state, goal, screen=Screen(world))
        assert set(range(5)) < set(anew.elites(actions, 10)[0].tolist())


def test_ties_are_decided_by_the_world(world: World) -> None:
    state, goal = begun(world, 1)
    actions = drawn(0.002)[None]
    with torch.no_grad():
        chosen = GoalCost(world, state, goal, screen=Screen(world)).elites(actions, 10).sort().values
        wanted = GoalCost(world, state, goal).elites(actions, 10).sort().values
    assert torch.equal(chosen, wanted)


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
        def rollout(self, *arguments: object, **options: object) -> Tensor:
            rough = super().rollout(*arguments, **options)  # type: ignore[arg-type]
            if options.get("exact"):
                return rough
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
