"""Collecting: the same dataset whatever the workers and interruptions, and no mixing of different collections."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_simulators import world_or_skip

from worldline.core.errors import WorldlineError
from worldline.core.seeding import seed_for
from worldline.data import collect as module
from worldline.data.collect import CollectConfig, collect
from worldline.data.lerobot import open_dataset
from worldline.data.simulators import NAMES


def config(path: Path, **changes: object) -> CollectConfig:
    settings = {"env": "two_room", "path": str(path), "episodes": 5, "steps": 20, "seed": 3, "workers": 1}
    return CollectConfig(**(settings | changes))  # type: ignore[arg-type]


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_collection_is_a_dataset_of_its_world(tmp_path: Path) -> None:
    dataset = open_dataset(collect(config(tmp_path / "a")))
    assert dataset.spec.name == "two_room"
    assert dataset.lengths == [20] * 5
    assert dataset.collected_with == {"env": "two_room", "episodes": 5, "steps": 20, "seed": 3}
    episode = dataset.read_episode(2)
    assert episode.frames.shape == (20, 64, 64, 3)
    assert np.abs(episode.actions).max() <= 1
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("env", NAMES)
def test_actions_lead_from_each_frame_to_the_next(tmp_path: Path, env: str) -> None:
    """Playing the recorded actions again, from the recorded seed, gives the recorded frames and states."""
    world = world_or_skip(env)
    episode = open_dataset(collect(config(tmp_path / "a", env=env))).read_episode(4)
    observation = world.reset(seed_for(seed_for(env, 3, "episode", 4), "reset"))
    for frame, state, action in zip(episode.frames, episode.state, episode.actions, strict=True):
        assert np.array_equal(observation.frame, frame)
        assert np.array_equal(observation.state, state)
        observation = world.step(action)


@pytest.mark.parametrize("env", NAMES)
def test_the_number_of_workers_changes_nothing(tmp_path: Path, env: str) -> None:
    world_or_skip(env)
    one, two = (collect(config(tmp_path / str(n), env=env, workers=n, steps=12)) for n in (1, 2))
    assert files(one) == files(two)
    other = collect(config(tmp_path / "other", env=env, steps=12, seed=4))
    assert files(one) != files(other)


def test_a_killed_collection_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    """kill -9 a real process while two workers record, run it again, and compare with an uninterrupted run."""
    settings = {"episodes": 40, "steps": 60, "workers": 2}
    target = tmp_path / "killed"
    code = (
        "from worldline.data.collect import CollectConfig, collect\n"
        f"collect(CollectConfig(env='two_room', path={str(target)!r}, seed=3, episodes=40, steps=60, workers=2))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, start_new_session=True)
    staging = tmp_path / "killed.partial"
    while process.poll() is None and len(list(staging.glob("episode-*.npz"))) < 4:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    staged = {path: path.stat().st_mtime_ns for path in staging.glob("episode-*.npz")}
    assert 4 <= len(staged) < 40
    assert not target.exists()
    recorded = []
    original = module.record_episode

    def counting(*args: object) -> dict[str, np.ndarray]:
        recorded.append(args[1])
        return original(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "record_episode", counting)
        collect(config(target, **(settings | {"workers": 1})))
    assert len(recorded) <= 40 - len(staged)  # what was finished is not recorded again
    assert files(target) == files(collect(config(tmp_path / "whole", **settings)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


def test_a_kill_while_the_dataset_is_put_together_is_harmless(tmp_path: Path) -> None:
    whole = collect(config(tmp_path / "whole"))
    code = (
        "import os, signal\n"
        "from worldline.data import lerobot_writer\n"
        "from worldline.data.collect import CollectConfig, collect\n"
        "lerobot_writer.write_json = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"collect(CollectConfig(env='two_room', path={str(tmp_path / 'a')!r}, seed=3, episodes=5, steps=20, workers=1))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "a.assembling").exists()
    assert not (tmp_path / "a").exists()
    assert files(collect(config(tmp_path / "a"))) == files(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "whole"]


def test_a_kill_after_the_rename_is_cleared_up(tmp_path: Path) -> None:
    path = collect(config(tmp_path / "a"))
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial/episode-000000.npz").write_bytes(b"")
    assert collect(config(tmp_path / "a")) == path
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_complete_dataset_is_kept(tmp_path: Path) -> None:
    path = collect(config(tmp_path / "a"))
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    assert collect(config(tmp_path / "a", workers=2)) == path
    with pytest.raises(WorldlineError, match=r"another collection \(steps=20 there, steps=30 asked for\); it is never"):
        collect(config(tmp_path / "a", steps=30))
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before


def test_a_folder_of_something_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(WorldlineError, match="was not made by `worldline collect`"):
        collect(config(tmp_path / "a"))


def test_a_begun_collection_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    module.write_json(tmp_path / "a.partial/config.json", config(tmp_path / "a", seed=9).identity())
    with pytest.raises(WorldlineError, match=r"a.partial: holds another collection \(seed=9 there, seed=3 asked for\)"):
        collect(config(tmp_path / "a"))


def test_two_at_once_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.0)
    with (
        module._locked(tmp_path / "a.partial", tmp_path / "a"),
        pytest.raises(WorldlineError, match="another collect is at work on it"),
    ):
        collect(config(tmp_path / "a"))


def test_a_dead_worker_is_reported_and_its_work_done_again(tmp_path: Path) -> None:
    """Kill one worker from outside: the parent says so, and the next run finishes."""
    code = (
        "from worldline.data.collect import CollectConfig, collect\n"
        f"collect(CollectConfig(env='two_room', path={str(tmp_path / 'a')!r}, episodes=400, steps=100, workers=2))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list((tmp_path / "a.partial").glob("episode-*.npz")):
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        process.communicate()
        pytest.skip("needs /proc to find the worker")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "a worker process died" in errors
    assert (tmp_path / "a.partial").exists()


def test_a_workers_mistake_reaches_the_caller(tmp_path: Path) -> None:
    with pytest.raises(WorldlineError, match="no simulator called 'three_room'"):
        collect(config(tmp_path / "a", env="three_room", workers=2))


@pytest.mark.parametrize("change", [{"test_steps": 10}, {"episodes": 0}, {"steps": 1}, {"seed": -1}, {"workers": 0}])
def test_impossible_settings_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(WorldlineError, match=f"{next(iter(change))} must be at least"):
        config(tmp_path, **change)


def test_test_episodes_may_be_longer(tmp_path: Path) -> None:
    dataset, plain = (
        open_dataset(collect(config(tmp_path / name, test_steps=steps))) for name, steps in (("a", 50), ("b", None))
    )
    assert {dataset.lengths[e] for e in dataset.split("test")} == {50}
    assert {dataset.lengths[e] for name in ("train", "validation") for e in dataset.split(name)} == {20}
    test = dataset.split("test")
    assert test == plain.split("test")
    assert np.array_equal(dataset.actions(test[0])[:19], plain.actions(test[0])[:19])


def test_pictures_may_have_another_size_than_the_simulators_own(tmp_path: Path) -> None:
    config = CollectConfig(env="two_room", path=str(tmp_path / "large"), episodes=1, steps=3, workers=1, image_size=96)
    dataset = open_dataset(collect(config))
    assert dataset.spec.image_size == 96
    assert dataset.read_episode(0).frames.shape == (3, 96, 96, 3)
    assert collect(config) == dataset.path
    with pytest.raises(WorldlineError):
        collect(CollectConfig(env="two_room", path=str(tmp_path / "large"), episodes=1, steps=3, workers=1))
