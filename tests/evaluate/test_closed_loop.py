"""Planning in the real two_room: goals are reached, solved starts are left out, and everything repeats and resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.data.cache import FrameCache
from worldline.data.collect import CollectConfig, collect
from worldline.data.goals import TOLERANCES, reached
from worldline.data.lerobot import Dataset, open_dataset
from worldline.data.two_room import MAX_SPEED, TwoRoom
from worldline.evaluate import closed_loop, planning
from worldline.evaluate.closed_loop import LoopConfig, OracleAgent, WorldAgent, attempt
from worldline.evaluate.distances import distance_matrix, goal_order
from worldline.evaluate.planning import PlanConfig, evaluate_planning
from worldline.evaluate.starts import Stage, Starts, choose_starts
from worldline.model.checkpoint import save_world
from worldline.model.gauge import Gauge
from worldline.model.world import State, World, WorldConfig
from worldline.planning.planners import PlannerConfig, Space

QUICK = PlannerConfig(steps=4, samples=40, iterations=4, elites=5)
LOOP = LoopConfig(hold=3, distance="plain")
SPACE = Space.of(TwoRoom.spec, torch.zeros(2), torch.full((2,), 0.58))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("planning") / "rooms"
    return open_dataset(collect(CollectConfig(env="two_room", path=str(path), episodes=40, steps=40, workers=1)))


class SeesThePlace(World):
    """A world made by hand: its latent is where the blue disc is, and it knows how an action moves it in the open."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.spec, self.config = TwoRoom.spec, WorldConfig(context=2, latent_dim=2)
        self.predictor, self.gauge = nn.Identity(), Gauge(2)
        self.action_mean, self.action_std = torch.zeros(2), torch.full((2,), 0.58)

    def encode(self, frames: UInt8[Tensor, "*b h w 3"]) -> Float[Tensor, "*b d"]:
        blue = ((frames[..., 0] < 30) & (frames[..., 2] > 150)).float()
        middle = (torch.arange(frames.shape[-2]) + 0.5) / frames.shape[-2]
        total = blue.sum(dim=(-2, -1))
        return torch.stack(((blue.sum(-2) * middle).sum(-1) / total, (blue.sum(-1) * middle).sum(-1) / total), dim=-1)

    def begin(self, z: Tensor, actions: Tensor) -> State:
        return State(z[:, -1].clone(), ())

    def step(self, state: State, action: Tensor) -> State:
        return State(state.z + MAX_SPEED * action, ())


def tried(agent: OracleAgent | WorldAgent, dataset: Dataset, seed: int = 0, count: int = 6) -> closed_loop.Outcome:
    starts = choose_starts(dataset, offset=15, context=2, count=count, seed=1)
    simulators = Stage(dataset).at(starts)
    return attempt(
        agent, FrameCache(dataset), starts, simulators, planner=QUICK, loop=LOOP, context=2, budget=45, seed=seed
    )


def test_the_oracle_reaches_its_goals(dataset: Dataset) -> None:
    outcome = tried(OracleAgent("two_room", SPACE, LOOP), dataset)
    assert (outcome.steps > 0).all()
    assert np.median(outcome.steps) < 30
    assert (outcome.decision_ms > 0).all()


def test_a_world_that_sees_the_place_reaches_most_goals_and_a_blind_one_few(dataset: Dataset) -> None:
    class Blind(SeesThePlace):
        def step(self, state: State, action: Tensor) -> State:
            return state

    seeing, blind = (tried(WorldAgent(world, LOOP, None), dataset, count=10) for world in (SeesThePlace(), Blind()))
    assert (seeing.steps > 0).mean() >= 0.7
    assert (blind.steps > 0).mean() <= (seeing.steps > 0).mean() - 0.4


def test_starts_do_not_disturb_each_other(dataset: Dataset) -> None:
    loop = LoopConfig(hold=3, distance="plain", carried_out=2)  # some arrive while others are on their way
    starts = choose_starts(dataset, offset=15, context=2, count=6, seed=1)

    def steps(some: Starts) -> list[int]:
        agent, simulators = WorldAgent(SeesThePlace(), loop, None), Stage(dataset).at(some)
        frames = FrameCache(dataset)
        outcome = attempt(agent, frames, some, simulators, planner=QUICK, loop=loop, context=2, budget=45, seed=0)
        return outcome.steps.tolist()

    together = steps(starts)
    assert len(set(together)) > 2
    assert together == [steps(replace(starts, index=starts.index[i : i + 1]))[0] for i in range(6)]


def test_what_is_seen_replaces_what_was_imagined(dataset: Dataset) -> None:
    class Lost(SeesThePlace):
        def step(self, state: State, action: Tensor) -> State:
            return State(state.z + 9.0, ())

    world, starts = Lost(), choose_starts(dataset, offset=15, context=2, count=3, seed=1)
    agent, simulators = WorldAgent(world, LOOP, None), Stage(dataset).at(starts)
    agent.begin(closed_loop.problems_at(FrameCache(dataset), starts, 2), simulators)
    before = agent._state.z.clone()
    seen = [simulators[row].step(np.ones(2, np.float32)) for row in (0, 2)]
    agent.observe([0, 2], np.ones((2, 2), np.float32), seen)
    assert torch.equal(agent._state.z[1], before[1])
    for row, observation in zip((0, 2), seen, strict=True):
        assert torch.equal(agent._state.z[row], world.encode(torch.from_numpy(observation.frame)))


def test_reached_is_told_by_the_true_state(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOLERANCES["two_room"], "agent", 1e-9)
    starts = choose_starts(dataset, offset=15, context=2, count=2, seed=1)
    agent = OracleAgent("two_room", SPACE, LOOP)
    simulators = Stage(dataset).at(starts)
    outcome = attempt(
        agent, FrameCache(dataset), starts, simulators, planner=QUICK, loop=LOOP, context=2, budget=15, seed=0
    )
    assert outcome.steps.tolist() == [-1, -1]


def test_the_seed_alone_decides_the_loop(dataset: Dataset) -> None:
    first, again, other = (tried(WorldAgent(SeesThePlace(), LOOP, None), dataset, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.steps, again.steps)
    assert np.array_equal(first.frames, again.frames)
    assert not np.array_equal(first.frames, other.frames)


def test_solved_starts_are_removed_and_counted(dataset: Dataset) -> None:
    offset, state = 3, {e: dataset.state(e) for e in dataset.split("test")}
    solved = [
        (e, t)
        for e, rows in state.items()
        for t in range(1, len(rows) - offset)
        if reached(dataset.spec, rows[t], rows[t + offset])
    ]
    assert solved  # three frames are short enough for that
    possible = sum(len(rows) - offset - 1 for rows in state.values())
    starts = choose_starts(dataset, offset=offset, context=2, count=possible - len(solved), seed=0)
    assert starts.num_solved <= len(solved)
    for episode, start in starts.index.tolist():
        assert (episode, start) not in solved
        distance = np.linalg.norm(state[episode][start + offset, :2] - state[episode][start, :2])
        assert distance > TOLERANCES["two_room"]["agent"]
    assert len({tuple(row) for row in starts.index.tolist()}) == possible - len(solved)
    with pytest.raises(WorldlineError, match="solved already"):
        choose_starts(dataset, offset=offset, context=2, count=possible - len(solved) + 1, seed=0)


def test_simulators_stand_at_the_recorded_frames_again_and_again(dataset: Dataset) -> None:
    starts = choose_starts(dataset, offset=15, context=2, count=4, seed=1, latest=20)
    assert starts.index[:, 1].max() <= 20
    stage, cache = Stage(dataset), FrameCache(dataset)
    for _ in range(2):
        for simulator, (episode, start) in zip(stage.at(starts), starts.index.tolist(), strict=True):
            observation = simulator.step(dataset.actions(episode)[start])
            assert np.array_equal(observation.frame, cache.frames(episode)[start + 1])
            assert np.array_equal(observation.state, dataset.state(episode)[start + 1])


def test_an_episode_that_does_not_repeat_is_refused(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worldline.data.two_room.MAX_SPEED", 0.03)
    with pytest.raises(WorldlineError, match="does not repeat"):
        Stage(dataset).at(choose_starts(dataset, offset=15, context=2, count=1, seed=1))


def checkpoint(path: Path, dataset: Dataset, seed: int) -> str:
    torch.manual_seed(seed)
    sizes = {"latent_dim": 8, "conv_width": 8, "conv_head": 4, "hidden": 16, "decoder_width": 4, "context": 2 + seed}
    return str(save_world(path, World(WorldConfig(**sizes), dataset.spec).eval(), training={}))


def test_planning_repeats_resumes_and_reports(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def config(out: str) -> PlanConfig:
        return PlanConfig(
            checkpoint=checkpoint(tmp_path / f"{out}-a", dataset, 0),
            compare=checkpoint(tmp_path / f"{out}-b", dataset, 1),
            data=str(dataset.path),
            out=str(tmp_path / out),
            offsets=(8, 15),
            starts=4,
            planner_seeds=2,
            draws=100,
            loop=LOOP,
            planner=QUICK,
            oracle_planner=QUICK,
        )

    def figures(out: Path) -> str:
        result = read_json(out / "result.json")
        for key in ("timing", "provenance", "config"):
            result.pop(key)
        return json.dumps(result)

    calls = []

    def interrupted(*arguments: object, **options: object) -> closed_loop.Outcome:
        calls.append(options["seed"])
        if len(calls) == 6:
            raise KeyboardInterrupt
        return attempt(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(planning, "attempt", interrupted)
    first = config("first")
    with pytest.raises(KeyboardInterrupt):
        evaluate_planning(first)
    out = evaluate_planning(first)
    assert len(calls) == 12 + 1  # 3 agents, 2 offsets, 2 seeds; one was interrupted
    assert figures(evaluate_planning(config("second"))) == figures(out)

    result = read_json(out / "result.json")
    assert set(result["success"]) == {"world", "compared", "oracle"}
    assert result["success"]["oracle"]["15"]["value"] > 0.7
    for offset in ("8", "15"):
        by_seed = result["success_by_seed"]["world"][offset]
        assert result["success"]["world"][offset]["value"] == pytest.approx(np.mean(by_seed), abs=1e-3)
        gap = result["success"]["world"][offset]["value"] - result["success"]["oracle"][offset]["value"]
        paired = result["differences"]["world minus oracle"][offset]
        assert paired["value"] == pytest.approx(gap, abs=1e-3)
        assert paired["low"] <= paired["value"] <= paired["high"]
    assert result["timing"]["decision_ms"]["world"]["p50"] > 0
    report = (out / "report.md").read_text()
    assert "agent within 0.05" in report
    assert "world minus compared, paired" in report
    assert (out / "filmstrip.png").stat().st_size > 500
    assert "reached: world" in capsys.readouterr().out


def test_whitening_wants_a_fitted_gauge_and_uses_it(dataset: Dataset) -> None:
    world = World(WorldConfig(latent_dim=8, conv_width=8, conv_head=4, hidden=16, decoder_width=4), dataset.spec).eval()
    cache = FrameCache(dataset)
    with pytest.raises(WorldlineError, match=r"loop\.distance=change"):
        distance_matrix(world, "white", cache, 5)
    with torch.no_grad():
        world.gauge.radius99.fill_(1.0)
        world.gauge.whitening.copy_(2.0 * torch.eye(8))
        starts = choose_starts(dataset, offset=15, context=4, count=1, seed=1)
        problems, actions, costs = closed_loop.problems_at(cache, starts, 4), torch.zeros(1, 2, 3, 2), []
        for distance in ("white", "plain"):
            agent = WorldAgent(world, LoopConfig(distance=distance), distance_matrix(world, distance, cache, 5))
            agent.begin(problems, [])
            costs.append(agent.cost([0])(actions))
    assert torch.allclose(costs[0], 4.0 * costs[1])


class SeesMore(SeesThePlace):
    """The same place, small, beside a large latent that is another at every moment."""

    def encode(self, frames: UInt8[Tensor, "*b h w 3"]) -> Float[Tensor, "*b d"]:
        place = super().encode(frames)
        return torch.cat((place, 100.0 * torch.sin(1e4 * place.sum(dim=-1, keepdim=True))), dim=-1)


def test_the_distance_by_change_orders_states_by_their_place(dataset: Dataset) -> None:
    cache, starts = FrameCache(dataset), choose_starts(dataset, offset=15, context=2, count=8, seed=1)
    for world, better in ((SeesMore(), "change"), (SeesThePlace(), "plain")):
        matrices = {name: distance_matrix(world, name, cache, 5) for name in ("change", "plain")}
        order = goal_order(world, cache, [starts], matrices)
        assert order[better] > 0.8
        assert (order["plain"] < 0.5) == (better == "change")


def test_a_world_of_another_name_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    from dataclasses import replace

    spec = replace(dataset.spec, name="elsewhere")
    world = World(WorldConfig(latent_dim=8, conv_width=8, conv_head=4, hidden=16, decoder_width=4), spec).eval()
    with pytest.raises(WorldlineError, match="its own world"):
        evaluate_planning(
            PlanConfig(checkpoint=str(save_world(tmp_path / "w", world, training={})), data=str(dataset.path))
        )
