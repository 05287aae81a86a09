"""The simulator's process: what it answers, and what is said when it cannot."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from worldline.core.errors import WorldlineError
from worldline.data.simulators import make_simulator
from worldline.engine.workloads.latent import Starts, load_starts
from worldline.serve import truth
from worldline.serve.truth import TrueWorld, find_true_world


@pytest.fixture(scope="module")
def starts(checkpoint: Path) -> Starts:
    return load_starts(checkpoint, make_simulator("two_room").spec)


@pytest.fixture
def world(starts: Starts) -> Iterator[TrueWorld]:
    made = TrueWorld("two_room", starts)
    yield made
    made.close()


def test_it_shows_what_a_simulator_here_would(world: TrueWorld, starts: Starts) -> None:
    simulator = make_simulator("two_room")
    for seed in (1, 0):
        world.begin(seed)
        assert np.array_equal(world.picture(), starts.begin_truth(simulator, seed).frame)
        for action in np.float32([[1, 0], [0, -1]]):
            world.step(action)
            assert np.array_equal(world.picture(), simulator.step(action).frame)


def test_an_answer_that_nobody_collected_is_not_taken_for_the_next(world: TrueWorld, starts: Starts) -> None:
    simulator = make_simulator("two_room")
    world.begin(0)
    starts.begin_truth(simulator, 0)
    for _ in range(3):
        world.step(np.float32([1, 1]))
        seen = simulator.step(np.float32([1, 1]))
    assert np.array_equal(world.picture(), seen.frame)


def test_another_version_of_the_simulator_is_not_this_worlds_truth(starts: Starts) -> None:
    world = TrueWorld("two_room", dataclasses.replace(starts, frames=starts.frames ^ 1))
    world.begin(0)
    with pytest.raises(WorldlineError, match="another version"):
        world.picture()
    assert world.process is None


def test_what_went_wrong_over_there_is_said_here(world: TrueWorld, starts: Starts) -> None:
    world.step(np.float32([]))
    with pytest.raises(WorldlineError, match="the simulator of two_room failed with ValueError"):
        world.picture()
    unknown = TrueWorld("three_room", starts)
    unknown.begin(0)
    with pytest.raises(WorldlineError, match="no simulator called 'three_room'"):
        unknown.picture()


def test_one_that_died_or_hangs_is_an_error_and_begins_again(world: TrueWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world.begin(0)
    first = world.picture()
    assert world.process is not None
    world.process.kill()
    world.process.wait()
    world.step(np.float32([0, 0]))
    with pytest.raises(WorldlineError, match="ended by itself"):
        world.picture()
    world.begin(0)
    assert np.array_equal(world.picture(), first)
    os.kill(world.process.pid, signal.SIGSTOP)
    monkeypatch.setattr(truth, "PATIENCE_SECONDS", 0.1)
    world.step(np.float32([0, 0]))
    with pytest.raises(WorldlineError, match="gave no answer"):
        world.picture()
    assert world.process is None


def test_recorded_worlds_have_no_truth(starts: Starts) -> None:
    spec = dataclasses.replace(make_simulator("two_room").spec, name="kitchen")
    assert find_true_world(spec, starts) == (
        None,
        "This world comes from recorded episodes: nobody can simulate it.",
    )
