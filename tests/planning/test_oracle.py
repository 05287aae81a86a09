"""The oracle's branches are the simulators' own futures."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch

from worldline.core.errors import WorldlineError
from worldline.data.goals import TOLERANCES, goal_distance, reached
from worldline.data.simulators import _WORLDS, NAMES, make_simulator
from worldline.data.two_room import TwoRoom
from worldline.planning.oracle import OracleCost, any_futures, futures_of, two_room_futures
from worldline.planning.planners import PlannerConfig, Space, plan


def test_two_room_branches_equal_the_simulator_bit_for_bit() -> None:
    simulator, other = make_simulator("two_room"), make_simulator("two_room")
    futures = futures_of("two_room")
    rng = np.random.default_rng(0)
    blocked = 0
    for seed in range(6):
        policy, observation = simulator.policy(seed), simulator.reset(seed)
        other.reset(seed)
        for _ in range(30):
            action = policy(observation)
            observation = simulator.step(action)
            other.step(action)
        actions = np.repeat(rng.uniform(-1.5, 1.5, (8, 6, 2)), 8, axis=1).astype(np.float32)
        states = futures(simulator, actions)
        ahead = np.stack([other.step(action).state for action in actions[seed]])
        assert np.array_equal(states[seed].astype(np.float32), ahead)
        blocked += int((ahead[1:, 2:4] == 0).any())
        assert np.array_equal(any_futures(simulator, actions), states.astype(np.float32))  # it stayed where it was
    assert blocked >= 2  # walls took part


def test_any_simulator_is_branched_by_save_and_load() -> None:
    simulator = make_simulator("two_room")
    simulator.reset(2)
    actions = np.random.default_rng(1).uniform(-1, 1, (3, 7, 2)).astype(np.float32)
    before = simulator.save()
    states = any_futures(simulator, actions)
    assert simulator.save() == before
    assert np.array_equal(states, two_room_futures(simulator, actions).astype(np.float32))
    assert (states[0] != states[1]).any()


@pytest.mark.parametrize("name", ["reacher", "point_mass"])
def test_mujoco_runs_ahead_as_the_simulator_itself_would(name: str) -> None:
    try:
        simulator = make_simulator(name)
    except WorldlineError as missing:
        pytest.skip(str(missing))
    simulator.reset(3)
    rng = np.random.default_rng(0)
    for action in rng.uniform(-1.2, 1.2, (30, 2)).astype(np.float32):
        simulator.step(action)
    actions = np.repeat(rng.uniform(-1.3, 1.3, (3, 8, 2)), 5, axis=1).astype(np.float32)
    states = futures_of(name)(simulator, actions)
    assert np.abs(states - any_futures(simulator, actions)).max() < 1e-6  # which are float32
    assert np.abs(states[0, -1] - states[1, -1]).max() > 0.01


def test_every_simulator_has_a_criterion_for_every_factor() -> None:
    assert set(TOLERANCES) == set(NAMES)
    for name in NAMES:
        module, kind = _WORLDS[name].split(":")
        spec = getattr(import_module(f"worldline.data.{module}"), kind).spec
        assert set(TOLERANCES[name]) == {factor.name for factor in spec.factors}


def test_pusht_branches_equal_the_simulator_nearly() -> None:
    pytest.importorskip("gym_pusht")
    real = make_simulator("pusht")
    observation, policy = real.reset(3), real.policy(3)
    for _ in range(12):
        observation = real.step(policy(observation))
    block = observation.state[2:4]
    through = np.linspace(observation.state[:2], 2 * block - observation.state[:2], 15).astype(np.float32)
    elsewhere = np.full_like(through, 100.0)
    states = futures_of("pusht")(real, np.stack([elsewhere, through]))
    ahead = np.stack([real.step(action).state for action in through])
    assert np.abs(ahead[-1, 2:4] - block).max() > 5  # the block was pushed
    assert np.abs(states[1] - ahead).max() < 0.05  # table units, units a second


def test_the_oracle_plans_through_the_doorway() -> None:
    simulator = TwoRoom()
    start = simulator.reset(1).state
    x = 0.85 if start[0] < 0.5 else 0.15  # in the other room, beside the doorway
    goal = np.array([x, start[4], 0.0, 0.0, start[4]], dtype=np.float32)
    cost = OracleCost(simulator.spec, [simulator], goal[None], futures_of("two_room"), hold=5)
    space = Space.of(simulator.spec, torch.zeros(2), torch.full((2,), 0.58))
    found = plan(cost, space, PlannerConfig(steps=12, samples=100, iterations=8, elites=10), [0])
    for action in found.actions[0].numpy().repeat(5, axis=0):
        observation = simulator.step(action)
    assert (observation.state[0] > 0.5) == (x > 0.5)
    assert goal_distance(simulator.spec, observation.state, goal)[0] < 2.0


def test_the_criterion_wants_every_factor() -> None:
    spec = make_simulator("two_room").spec
    goal, limit = np.array([0.3, 0.4, 0.0, 0.0, 0.5]), TOLERANCES["two_room"]["agent"]
    assert reached(spec, np.array([0.3, 0.4 + 0.99 * limit, 5.0, 5.0, 0.5]), goal)  # velocities are no factor
    assert not reached(spec, np.array([0.3, 0.4 + 1.01 * limit, 0.0, 0.0, 0.5]), goal)


def test_pushts_criterion_is_20_units_and_20_degrees() -> None:
    from worldline.data.pusht import PushT

    def state(x: float, degrees: float) -> np.ndarray:
        angle = np.radians(degrees)
        return np.array([100.0, 100.0, x, 200.0, np.sin(angle), np.cos(angle), 0.0, 0.0])

    goal = state(200.0, 350.0)
    assert reached(PushT.spec, state(219.0, 9.0), goal)  # 19 degrees, across zero
    assert not reached(PushT.spec, state(219.0, 11.0), goal)
    assert not reached(PushT.spec, state(221.0, 350.0), goal)


def test_a_world_without_criterion_is_refused() -> None:
    from dataclasses import replace

    spec = replace(TwoRoom.spec, name="elsewhere")
    with pytest.raises(WorldlineError, match="criterion"):
        goal_distance(spec, np.zeros(5), np.zeros(5))
