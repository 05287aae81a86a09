"""ViZDoom: the state is where the walls let one be, the policy gets about, and nothing is left lying around."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_simulators import world_or_skip

from worldline.data.simulators import Simulator
from worldline.data.vizdoom import TURN_DEGREES


@pytest.fixture(scope="module")
def world() -> Simulator:
    return world_or_skip("vizdoom")


def test_a_turn_to_the_right_takes_the_angle_back_by_what_it_says(world: Simulator) -> None:
    before = world.reset(0).state
    for _ in range(10):
        after = world.step(np.array([0.5, 0.0], np.float32)).state
    turned = np.degrees(np.arctan2(before[2], before[3]) - np.arctan2(after[2], after[3]))
    assert (turned + 180) % 360 - 180 == pytest.approx(5 * TURN_DEGREES, abs=0.1)
    assert np.array_equal(before[:2], after[:2])


def test_a_full_turn_shows_the_first_picture_again(world: Simulator) -> None:
    first = world.reset(0)
    turn = 360 / 80 / TURN_DEGREES
    seen = [world.step(np.array([turn, 0.0], np.float32)) for _ in range(80)]
    away = [np.abs(observation.frame.astype(float) - first.frame).mean() for observation in seen]
    assert away[-1] < 0.2 * np.median(away)
    standing = world.step(np.zeros(2, np.float32))
    assert np.array_equal(standing.frame, world.step(np.zeros(2, np.float32)).frame)  # nothing moves but the player


def test_walking_ahead_goes_where_the_angle_says(world: Simulator) -> None:
    import vizdoom

    camera = vizdoom.GameVariable.CAMERA_POSITION_Z
    for seed in range(6):
        before = world.reset(seed).state
        heights = set()
        for _ in range(3):
            after = world.step(np.array([0.0, -1.0], np.float32)).state
            heights.add(world._game.get_game_variable(camera))  # type: ignore[attr-defined]
        assert len(heights) == 1  # the view does not bob
        moved = after[:2] - before[:2]
        np.testing.assert_allclose(moved / np.linalg.norm(moved), before[[3, 2]], atol=0.02)


def test_the_vest_that_would_end_the_episode_is_gone(world: Simulator) -> None:
    """Walks over its place, to the end of the corridor; in the shipped scenario that is the end of the episode."""
    x, y, sin, cos, *_ = world.reset(213).state  # north of it
    assert (round(float(x)), round(float(y))) == (1039, -170)
    turn = (np.degrees(np.arctan2(sin, cos)) + 90) / 10 / TURN_DEGREES
    for _ in range(10):
        world.step(np.array([turn, 0.0], np.float32))
    for _ in range(60):
        observation = world.step(np.array([0.0, -1.0], np.float32))
    assert observation.state[:2] == pytest.approx((1039.3, -400), abs=1.0)
    assert world.step(np.array([1.0, 1.0], np.float32)).state[1] > observation.state[1]


def test_the_policy_gets_about_and_seldom_stands(world: Simulator) -> None:
    found = []
    for seed in range(8):
        observation, policy = world.reset(seed), world.policy(seed)
        found.append([observation.state])
        for _ in range(199):
            observation = world.step(policy(observation))
            found[-1].append(observation.state)
    states = np.array(found)
    cells = [{tuple(cell) for cell in np.floor(episode[:, :2] / 64).astype(int)} for episode in states]
    assert np.mean([len(visited) for visited in cells]) > 5
    assert np.mean(np.hypot(states[..., 4], states[..., 5]) < 0.3) < 0.3
    angles = np.arctan2(states[..., 2], states[..., 3])
    share = np.histogram(angles, bins=8, range=(-np.pi, np.pi))[0] / angles.size
    assert share.min() > 0.04


def test_nothing_is_left_in_the_users_folder_nor_running_after_a_kill(tmp_path: Path) -> None:
    world_or_skip("vizdoom")
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from worldline.data.simulators import make_simulator\n"
        "world = make_simulator('vizdoom')\n"
        "world.reset(0)\n"
        "print(*(task.read_text() for task in Path('/proc/self/task').glob('*/children')), flush=True)\n"
        "if {kill}: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    (tmp_path / "work").mkdir()
    before = shared()
    for kill in (False, True):
        command = [sys.executable, "-c", code.replace("{kill}", str(kill))]
        done = subprocess.run(
            command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.stdout.split()  # the engine
        if not kill:
            assert done.returncode == 0
            assert done.stderr == ""
        # what it printed to is closed, so it has ended, or the run above would have waited for it
        assert not any((tmp_path / "work").iterdir())
        deadline = time.monotonic() + 10
        while any((tmp_path / "temporary").iterdir()) or shared() - before:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def shared() -> set[Path]:
    """Return the engines' shared memory."""
    return set(Path("/dev/shm").glob("ViZDoom*"))
