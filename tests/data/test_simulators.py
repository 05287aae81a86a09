"""The simulators: the same seed and actions give the same bits, whoever asks; two_room's geometry holds."""

import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from worldline.core.errors import WorldlineError
from worldline.data.simulators import NAMES, Simulator, make_simulator
from worldline.data.two_room import BORDER, DOOR_HALF, MAX_SPEED, RADIUS, WALL, TwoRoom


@pytest.fixture(scope="module", params=NAMES)
def world(request: pytest.FixtureRequest) -> Simulator:
    return world_or_skip(request.param)


def world_or_skip(name: str) -> Simulator:
    """Make a simulator; where its package or a library is missing, skip and say how to get it."""
    try:
        return make_simulator(name)
    except WorldlineError as error:
        pytest.skip(str(error))


def random_actions(world: Simulator, count: int, seed: int = 0) -> np.ndarray:
    spec = world.spec
    draw = np.random.default_rng(seed).uniform(spec.action_low, spec.action_high, (count, spec.action_dim))
    return draw.astype(np.float32)


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


def test_a_fresh_process_sees_the_same_bits(world: Simulator) -> None:
    name = world.spec.name
    code = f"import sys; sys.path.insert(0, {str(__file__).rsplit('/', 1)[0]!r}); "
    code += f"from test_simulators import digest; print(digest({name!r}, 3, 40))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]
    assert digest(name, 3, 40) == there
    assert digest(name, 4, 40) != there


def test_what_was_played_before_does_not_matter(world: Simulator) -> None:
    fresh = make_simulator(world.spec.name)
    world.reset(8)
    for action in random_actions(world, 20):
        world.step(action)
    for simulator in (world, fresh):
        simulator.reset(9)
    for action in random_actions(world, 20, seed=1):
        one, other = world.step(action), fresh.step(action)
        assert np.array_equal(one.frame, other.frame)
        assert np.array_equal(one.state, other.state)


def test_twins_of_a_moment_are_equal_to_the_bit_and_to_the_way_on_without_a_pause(world: Simulator) -> None:
    world.reset(5)
    policy, observation = world.policy(5), world.reset(5)
    for _ in range(60):
        observation = world.step(policy(observation))
    moment = pickle.loads(pickle.dumps(world.save()))
    actions = random_actions(world, 100)
    futures = [[world.step(action) for action in actions]]
    other = make_simulator(world.spec.name)
    for twin in (world, other):
        twin.reset(6)
        twin.step(actions[0])
        again = twin.load(moment)
        assert np.array_equal(again.frame, observation.frame)
        assert np.array_equal(again.state, observation.state)
        futures.append([twin.step(action) for action in actions])
    for seen in zip(*futures, strict=True):
        assert all(np.array_equal(seen[0].frame, twin.frame) for twin in seen[1:])
        assert all(np.array_equal(seen[0].state, twin.state) for twin in seen[1:])
    world.load(moment)
    apart = [world.step(action) for action in -actions]
    assert not np.array_equal(apart[-1].state, futures[0][-1].state)


def test_observations_match_the_spec(world: Simulator) -> None:
    observation = world.reset(0)
    size = world.spec.image_size
    assert observation.frame.shape == (size, size, 3)
    assert observation.frame.dtype == np.uint8
    assert observation.state.shape == (world.spec.state_dim,)
    assert observation.state.dtype == np.float32
    columns = [column for factor in world.spec.factors for column in factor.columns]
    assert max(columns) < world.spec.state_dim


def test_actions_beyond_the_range_are_clipped_to_it(world: Simulator) -> None:
    high = np.array(world.spec.action_high, np.float32)
    ends = []
    for action in (high, high * 3):
        world.reset(1)
        ends.append([world.step(action) for _ in range(5)][-1])
    assert np.array_equal(ends[0].state, ends[1].state)


def test_larger_pictures_show_the_same(world: Simulator) -> None:
    large = make_simulator(world.spec.name, 128)
    one, other = world.reset(4).frame, large.reset(4).frame
    assert other.shape == (128, 128, 3)
    averaged = other.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(averaged - one).mean() < 4.0


def test_an_unknown_simulator_is_named() -> None:
    with pytest.raises(WorldlineError, match="no simulator called 'three_room'; there are two_room, pusht, reacher"):
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
