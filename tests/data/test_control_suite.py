"""reacher and point_mass: the state is what the picture shows, dm_control agrees, the policies reach everything."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_simulators import world_or_skip

from worldline.data.simulators import Observation, Simulator


@pytest.fixture(scope="module")
def reacher() -> Simulator:
    return world_or_skip("reacher")


@pytest.fixture(scope="module")
def point_mass() -> Simulator:
    return world_or_skip("point_mass")


def states(world: Simulator, episodes: int, steps: int) -> np.ndarray:
    """Return the states of episodes by the world's own policy, (episodes, steps, s), without drawing a picture."""
    screen = world._screen  # type: ignore[attr-defined]
    draw, screen.draw = screen.draw, lambda data: np.zeros((64, 64, 3), np.uint8)
    try:
        found = []
        for seed in range(episodes):
            observation, policy = world.reset(seed), world.policy(seed)
            found.append([observation.state])
            for _ in range(steps - 1):
                observation = world.step(policy(observation))
                found[-1].append(observation.state)
        return np.array(found)
    finally:
        screen.draw = draw


def test_reacher_draws_finger_and_target_where_the_state_says(reacher: Simulator) -> None:
    for seed in range(4):
        first = reacher.reset(seed)
        names = list(reacher.spec.state_names)
        moment = reacher.save()
        # the same arm, the target elsewhere: what differs are the two places of the target
        other = reacher.load((moment[0], np.array([0.2, 0.2, 0.01])))
        changed = np.abs(first.frame.astype(float) - other.frame).sum(-1)
        changed[:16, 48:] = 0.0
        place = first.state[[names.index("target_x"), names.index("target_y")]]
        np.testing.assert_allclose(centre(changed), place, atol=0.01)


def test_point_mass_draws_the_mass_where_the_state_says(point_mass: Simulator) -> None:
    frames = [point_mass.reset(seed) for seed in range(8)]
    background = np.median([observation.frame for observation in frames], axis=0)
    for observation in frames:
        seen = np.abs(observation.frame - background).sum(-1)
        np.testing.assert_allclose(centre(seen * (seen > 60)), observation.state[:2], atol=0.008)


def centre(weights: np.ndarray) -> np.ndarray:
    """Return the centre of a picture's weights in the world's metres, x to the right and y down."""
    metres = (
        (np.arange(64) + 0.5 - 32) / 64 * 2 * 0.74 * np.tan(np.pi / 8)
    )  # seen from 0.75 high, the balls lie at 0.01
    return np.array([(weights.sum(0) * metres).sum(), (weights.sum(1) * metres).sum()]) / weights.sum()


def test_the_arm_is_where_its_angles_say(reacher: Simulator) -> None:
    found = states(reacher, 3, 60).reshape(-1, reacher.spec.state_dim).astype(float)
    shoulder, wrist = np.arctan2(found[:, 0], found[:, 1]), np.arctan2(found[:, 2], found[:, 3])
    x = 0.12 * np.cos(shoulder) + 0.12 * np.cos(shoulder + wrist)
    y = 0.12 * np.sin(shoulder) + 0.12 * np.sin(shoulder + wrist)
    np.testing.assert_allclose(found[:, 6:8], np.stack([x, -y], axis=1), atol=1e-5)


def test_an_action_to_the_right_and_down_moves_the_mass_right_and_down(point_mass: Simulator) -> None:
    before = point_mass.reset(0).state
    for _ in range(30):
        after = point_mass.step(np.array([1.0, 0.5], np.float32)).state
    assert after[0] - before[0] > 1.5 * (after[1] - before[1]) > 0.01
    assert after[2] == pytest.approx(2 * after[3], rel=1e-3)


def test_dm_controls_own_state_agrees_within_rounding(point_mass: Simulator) -> None:
    """`save` keeps more than dm_control's get_state; on what both keep, its set_state leads to the same future."""
    physics = point_mass._physics  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (150, 2)).astype(np.float32)
    for seed in range(3):
        point_mass.reset(seed)
        for action in actions[:50]:
            point_mass.step(action)
        state = physics.get_state()
        ends = []
        for _ in range(2):
            with physics.reset_context():
                physics.set_state(state)
            for action in actions[50:]:
                physics.set_control(action * (1, -1))
                physics.step()
            ends.append(physics.get_state())
        point_mass.reset(seed)
        for action in actions:
            point_mass.step(action)
        np.testing.assert_allclose(ends[0], physics.get_state(), rtol=0, atol=1e-12)
        assert np.array_equal(*ends)


def test_reachers_policy_turns_both_joints_everywhere(reacher: Simulator) -> None:
    found = states(reacher, 10, 200)
    shoulder, wrist = np.arctan2(found[..., 0], found[..., 1]), np.arctan2(found[..., 2], found[..., 3])
    for angles, reach in ((shoulder, np.pi), (wrist, np.radians(160))):
        share = np.histogram(angles, bins=8, range=(-reach, reach))[0] / angles.size
        assert share.min() > 0.04
    moved = np.abs(np.diff(np.unwrap(shoulder, axis=1), axis=1)) + np.abs(np.diff(np.unwrap(wrist, axis=1), axis=1))
    assert np.mean(moved < 0.002) < 0.05


def test_point_masses_policy_reaches_the_whole_box_and_keeps_going(point_mass: Simulator) -> None:
    found = states(point_mass, 20, 200)
    cells = {tuple(cell) for cell in np.floor((found[..., :2].reshape(-1, 2) + 0.3) / 0.15).astype(int)}
    assert len(cells) == 16
    speed = np.hypot(found[..., 2], found[..., 3])
    assert np.mean(speed < 0.005) < 0.1
    assert np.mean(np.hypot(*(found[:, -1, :2] - found[:, 0, :2]).T)) > 0.1


def test_a_renderer_that_is_missing_is_one_line_and_a_choice_is_kept(tmp_path: Path) -> None:
    """What a machine without OSMesa says to a user who asks for it."""
    pytest.importorskip("dm_control")
    (tmp_path / "OpenGL").mkdir()
    (tmp_path / "OpenGL/__init__.py").write_text("raise ImportError('no library of that name')")
    code = "from worldline.cli import main; raise SystemExit(main(['collect', 'env=point_mass', 'path=x']))"
    for chosen, told in (
        (None, "run: apt-get install libegl1"),
        ("egl", "run: apt-get install libegl1"),
        ("osmesa", "MUJOCO_GL=osmesa"),
    ):
        environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
        environment |= {"PYTHONPATH": str(tmp_path)} | ({"MUJOCO_GL": chosen} if chosen else {})
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith("worldline: MuJoCo cannot draw")
        assert told in done.stderr
        assert "no library of that name" in done.stderr
        assert done.stderr.count("\n") == 1


def test_making_a_world_leaves_the_environment_as_it_was(reacher: Simulator) -> None:
    code = (
        "import os; os.environ.pop('MUJOCO_GL', None); before = dict(os.environ)\n"
        "from worldline.data.simulators import make_simulator\n"
        "world = make_simulator('point_mass'); world.reset(0); print(dict(os.environ) == before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("True", "")


def test_a_world_made_in_one_thread_is_played_in_another(point_mass: Simulator) -> None:
    from threading import Thread

    here = [point_mass.reset(2), point_mass.step(np.ones(2, np.float32))]
    there: list[Observation] = []
    thread = Thread(target=lambda: there.extend([point_mass.reset(2), point_mass.step(np.ones(2, np.float32))]))
    thread.start()
    thread.join()
    assert all(np.array_equal(one.frame, other.frame) for one, other in zip(here, there, strict=True))
