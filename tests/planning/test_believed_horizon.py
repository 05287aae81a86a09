"""A plan is judged only as far as the world is believed."""

import pytest
import torch

from toy_world import SPEC
from worldline.core.errors import WorldlineError
from worldline.evaluate.closed_loop import LoopConfig, WorldAgent
from worldline.model import WorldConfig
from worldline.model.estimator import ErrorEstimator
from worldline.model.world import State, World
from worldline.planning.goal import GoalCost, last_believed
from worldline.planning.planners import PlannerConfig, Space, plan
from worldline.planning.screen import make_screen


@pytest.fixture
def world() -> World:
    torch.manual_seed(0)
    made = World(WorldConfig(image_size=32, latent_dim=24, conv_width=8, hidden=48, decoder_width=8), SPEC).eval()
    made.requires_grad_(False)
    made.predictor.out[2].weight.mul_(20.0)  # an untrained world hardly moves
    made.gauge.fit(made, torch.randn(500, 24))
    made.gauge.estimator = ErrorEstimator(24, 30).requires_grad_(False)
    made.gauge.estimator.hidden.weight.zero_()[0, 6] = 1.0  # the more the actions add up, the less it is believed
    made.gauge.estimator.hidden.bias.zero_()
    made.gauge.estimator.out.weight.zero_()[0, 0] = 1.0
    made.gauge.estimator.out.bias.copy_(torch.tensor([-2.0, -0.9]))  # the spread of log e is 0.4 everywhere
    return made


def begun(world: World, count: int = 2) -> State:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(count, 4, 24, generator=generator)
    return world.begin(z, 512 * torch.rand(count, 3, 2, generator=generator))


def test_the_last_believed_step_comes_before_the_first_doubt() -> None:
    error = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.6, 0.1], [0.9, 0.1, 0.1], [0.1, 0.5, 0.7]])
    assert last_believed(error, 0.5).tolist() == [2, 0, 0, 1]
    assert last_believed(torch.full((1, 3), torch.nan), 0.5).tolist() == [0]


@pytest.mark.parametrize("over", ["mean", "last"])
def test_what_is_not_believed_does_not_count(world: World, over: str) -> None:
    state, goal = begun(world), torch.randn(2, 24)
    actions = 512 * torch.rand(2, 9, 4, 2)
    held = actions.repeat_interleave(3, dim=2)
    found = GoalCost(world, state, goal, hold=3, over=over, trust=0.5)(actions)  # type: ignore[arg-type]
    ends = set()
    for problem in range(2):
        start = State(state.z[problem : problem + 1], tuple(part[problem : problem + 1] for part in state.memory))
        for n in range(9):
            imagined, expected = world.rollout_with_error(start, held[problem, n : n + 1])
            doubted = (expected.error[0] > 0.5).nonzero()
            end = max(int(doubted[0]) - 1, 0) if len(doubted) else imagined.shape[1] - 1
            ends.add(end)
            distance = (imagined[0] - goal[problem]).square().sum(dim=-1)
            distance[end + 1 :] = distance[end]
            wanted = distance.mean() if over == "mean" else distance[-1]
            torch.testing.assert_close(found[problem, n], wanted)
    assert len(ends) > 2  # else this shows nothing
    believing = GoalCost(world, state, goal, hold=3, over=over, trust=1e9)  # type: ignore[arg-type]
    assert torch.equal(believing(actions), GoalCost(world, state, goal, hold=3, over=over)(actions))  # type: ignore[arg-type]


def test_a_plan_is_made_and_repeats(world: World) -> None:
    space = Space.of(world.spec, world.action_mean, world.action_std)
    planner = PlannerConfig(steps=4, samples=32, iterations=3, elites=4)
    goal = torch.randn(2, 24)
    plain, first, again = (
        plan(GoalCost(world, begun(world), goal, hold=3, trust=trust), space, planner, [0, 1]).actions
        for trust in (None, 0.5, 0.5)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, plain)


def test_trust_wants_an_estimator_and_no_screen(world: World) -> None:
    state, goal = begun(world), torch.randn(2, 24)
    screen = make_screen(world)
    if screen is not None:
        with pytest.raises(WorldlineError, match="got a screen"):
            GoalCost(world, state, goal, screen=screen, trust=0.5)
    WorldAgent(world, LoopConfig(trust=0.5), None)
    world.gauge.estimator = None
    with pytest.raises(WorldlineError, match="got no estimator"):
        GoalCost(world, state, goal, trust=0.5)
    with pytest.raises(WorldlineError, match="error estimator, and this one has none"):
        WorldAgent(world, LoopConfig(trust=0.5), None)
    with pytest.raises(WorldlineError, match="must be positive"):
        LoopConfig(trust=0.0)
