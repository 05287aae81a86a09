"""The simulators: the same seed and actions give the same bits, whoever asks; two_room's geometry holds."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from worldline.core.errors import WorldlineError
from worldline.data.simulators import NAMES, make_simulator
from worldline.data.two_room import BORDER, DOOR_HALF, MAX_SPEED, RADIUS, WALL, TwoRoom


def digest(name: str, seed: int, steps: int) -> str:
    """Return a hash over all frames and states of an episode with the simulator's own policy."""
    simulator = make_simulator(name)
    observation = simulator.reset(seed)
    policy = simulator.policy(seed)
    content = hashlib.sha256()
    for _ in range(steps):
        content.update(observation.frame.tobytes() + observation.state.tobytes())
        observation = simulator.step(policy(observation))
    return content.hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_sees_the_same_bits(name: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(__file__).rsplit('/', 1)[0]!r}); "
    code += f"from test_simulators import digest; print(digest({name!r}, 3, 40))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]
    assert digest(name, 3, 40) == there
    assert digest(name, 4, 40) != there


@pytest.mark.parametrize("name", NAMES)
def test_what_was_played_before_does_not_matter(name: str) -> None:
    used, fresh = make_simulator(name), make_simulator(name)
    used.reset(8)
    low, high = np.array(used.spec.action_low), np.array(used.spec.action_high)
    for _ in range(20):
        used.step(np.random.default_rng(0).uniform(low, high).astype(np.float32))
    for simulator in (used, fresh):
        simulator.reset(9)
    for step in range(20):
        action = np.random.default_rng(step).uniform(low, high).astype(np.float32)
        one, other = used.step(action), fresh.step(action)
        assert np.array_equal(one.frame, other.frame)
        assert np.array_equal(one.state, other.state)


@pytest.mark.parametrize("name", NAMES)
def test_observations_match_the_spec(name: str) -> None:
    simulator = make_simulator(name)
    observation = simulator.reset(0)
    size = simulator.spec.image_size
    assert observation.frame.shape == (size, size, 3)
    assert observation.frame.dtype == np.uint8
    assert observation.state.shape == (simulator.spec.state_dim,)
    assert observation.state.dtype == np.float32
    columns = [column for factor in simulator.spec.factors for column in factor.columns]
    assert max(columns) < simulator.spec.state_dim


def test_an_unknown_simulator_is_named() -> None:
    with pytest.raises(WorldlineError, match="no simulator called 'three_room'; there are two_room, pusht"):
        make_simulator("three_room")


def test_two_room_never_enters_a_wall_and_changes_rooms_only_by_the_door() -> None:
    world = TwoRoom()
    rng = np.random.default_rng(0)
    crossings = 0
    for seed in range(20):
        x, y, _, _, door = world.reset(seed).state.astype(np.float64)
        push = np.zeros(2)
        for step in range(150):
            if step % 12 == 0:
                push = rng.uniform(-1.5, 1.5, 2)  # also beyond the range, where it must be clipped
            state = world.step(push.astype(np.float32)).state.astype(np.float64)
            before, (x, y) = x, state[:2]
            assert min(x, y) >= BORDER + RADIUS - 1e-6
            assert max(x, y) <= 1 - BORDER - RADIUS + 1e-6
            for low, high in ((-1.0, door - DOOR_HALF), (door + DOOR_HALF, 2.0)):
                gap = np.hypot(x - np.clip(x, *WALL), y - np.clip(y, low, high))
                assert gap >= RADIUS - 1e-6
            assert np.hypot(*state[2:4]) <= np.sqrt(2) * MAX_SPEED + 1e-6
            if (before < 0.5) != (x < 0.5):
                crossings += 1
                assert abs(y - door) < DOOR_HALF
    assert crossings >= 5


def test_two_room_slides_along_a_wall_and_keeps_some_momentum() -> None:
    world = TwoRoom()
    world.reset(0)
    for _ in range(60):
        state = world.step(np.array([-1.0, 0.0], dtype=np.float32)).state
    assert state[0] == pytest.approx(BORDER + RADIUS)
    along = world.step(np.array([-1.0, 1.0 if state[1] < 0.5 else -1.0], dtype=np.float32)).state
    assert along[0] == pytest.approx(BORDER + RADIUS)
    assert abs(along[1] - state[1]) > 0
    coasting = world.step(np.zeros(2, dtype=np.float32)).state
    assert abs(coasting[1] - along[1]) > 0


def test_two_room_draws_the_agent_where_the_state_says() -> None:
    world = TwoRoom()
    for seed in range(5):
        observation = world.reset(seed)
        floor = world._background
        seen = np.abs(observation.frame.astype(float) - floor).sum(-1)
        rows, columns = np.mgrid[:64, :64] + 0.5
        centre = np.array([(seen * columns).sum(), (seen * rows).sum()]) / seen.sum() / 64
        np.testing.assert_allclose(centre, observation.state[:2], atol=0.5 / 64)


def test_two_room_policy_visits_both_rooms_and_both_sides_of_the_speed() -> None:
    world = TwoRoom()
    sides, speeds, crossings = [], [], 0
    for seed in range(10):
        observation = world.reset(seed)
        policy = world.policy(seed)
        states = []
        for _ in range(240):
            observation = world.step(policy(observation))
            states.append(observation.state)
        side = np.array(states)[:, 0] > 0.5
        crossings += int((side[1:] != side[:-1]).sum())
        sides.append(side.mean())
        speeds.append(np.hypot(*np.array(states)[:, 2:4].T) / MAX_SPEED)
    assert 0.3 < np.mean(sides) < 0.7
    assert crossings >= 30
    low, high = np.percentile(np.concatenate(speeds), [10, 90])
    assert low < 0.4 < 0.8 < high


def test_pusht_shows_what_its_environment_shows() -> None:
    cv2, package = pytest.importorskip("cv2"), pytest.importorskip("gym_pusht.envs.pusht")
    world = make_simulator("pusht")
    env = package.PushTEnv(obs_type="pixels", observation_width=512, observation_height=512)
    env.control_hz = 25
    observation, (pixels, _) = world.reset(5), env.reset(seed=5)
    policy = world.policy(5)
    for _ in range(40):
        assert np.array_equal(observation.frame, cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_AREA))
        action = policy(observation)
        observation, pixels = world.step(action), env.step(action.astype(np.float64))[0]
