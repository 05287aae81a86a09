"""What differs is named by frame, stage and tensor; chance, other arithmetic and hidden state are told apart."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from engine_world import SmallWorld, actions
from hypothesis import given, settings
from hypothesis import strategies as st

from worldline.engine.replay import bisect, seek, verify
from worldline.engine.runtime import Engine

FRAMES = 40


class Forgetful(SmallWorld):
    """Counts its steps, and the picture shows the count, which the state does not hold."""

    def reset(self, seed: int, prompt: str = "") -> None:
        self.steps = 0
        super().reset(seed, prompt)

    def _step(self) -> None:
        super()._step()
        self.steps = getattr(self, "steps", 0) + 1

    def _draw(self) -> None:
        super()._draw()
        self.frame[0, 0, 0] = getattr(self, "steps", 0)


class Other(SmallWorld):
    """Spoils one buffer at its 20th step."""

    def __init__(self, spoil: Callable[["Other"], None]) -> None:
        super().__init__()
        self.spoil, self.steps = spoil, 0

    def _step(self) -> None:
        super()._step()
        self.steps += 1
        if self.steps == 20:
            self.spoil(self)


def record(path: Path, world: SmallWorld, snapshot_every: int = 16) -> Path:
    with Engine(world, record=path, snapshot_every=snapshot_every) as engine:
        engine.reset(3)
        for action in actions(FRAMES - 1):
            engine.step(action)
    return path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("wlr") / "session.wlr", SmallWorld())


def test_equal_sessions_have_nothing_to_find(recorded: Path) -> None:
    finding = bisect(recorded, SmallWorld, tries=2)
    assert str(finding) == "40 frames, equal to the bit; so in 2 of 2 verifications"
    assert verify(recorded, SmallWorld(), other=SmallWorld()).ok


@pytest.mark.parametrize("tensor", ["memory", "z"])
def test_a_spoilt_tensor_is_named_with_its_stage(recorded: Path, tensor: str) -> None:
    def spoil(world: Other) -> None:
        getattr(world, tensor)[0, 3] += 1e-3

    verdict = verify(recorded, Other(spoil))
    assert (verdict.first_bad_frame, verdict.stage, verdict.tensor) == (20, "step", tensor)
    assert str(verdict) == f"differs at frame 20: step wrote another {tensor}"


def test_a_spoilt_picture_is_the_decoders(recorded: Path) -> None:
    def make() -> SmallWorld:
        world = SmallWorld()
        world.paint[5, 7] += 0.5
        return world

    finding = bisect(recorded, make, tries=3)
    assert (finding.verdict.first_bad_frame, finding.verdict.stage, finding.verdict.tensor) == (0, "reset", "frame")
    assert finding.repeats
    assert "the same other bits each time" in str(finding)


def test_chance_is_told_from_another_arithmetic(recorded: Path) -> None:
    numbers, hit = count(1), actions(FRAMES - 1)[19]

    class Chancy(SmallWorld):
        def _step(self) -> None:
            super()._step()
            if np.array_equal(self.action, hit):
                self.z[0, 0] += 1e-3 * next(numbers)

    finding = bisect(recorded, Chancy, tries=4)
    assert (finding.verdict.first_bad_frame, finding.verdict.stage, finding.verdict.tensor) == (20, "step", "z")
    assert not finding.repeats
    assert "4 different outcomes, 0 of them as recorded" in str(finding)


def test_what_the_state_forgets_shows_when_it_is_moved(tmp_path: Path) -> None:
    path = record(tmp_path / "forgetful.wlr", Forgetful())
    assert verify(path, Forgetful()).ok  # a replay from the beginning cannot see it
    verdict = verify(path, Forgetful(), other=Forgetful())
    assert (verdict.first_bad_frame, verdict.stage, verdict.tensor) == (2, "decode", "frame")


def test_hidden_state_does_not_show_from_a_snapshot(recorded: Path) -> None:
    def spoil(world: Other) -> None:
        world.memory[0, 0] += 1.0

    finding = bisect(recorded, lambda: Other(spoil), tries=3)
    assert finding.verdict.first_bad_frame == 20
    assert finding.repeats
    assert "carries something that its state does not hold" in str(finding)  # from there it is not its 20th step


@settings(max_examples=25, deadline=None)
@given(st.integers(0, FRAMES - 2), st.integers(2, 24))
def test_any_frame_goes_on_to_the_recorded_bits(frame: int, width: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session.wlr"
        with Engine(SmallWorld(width), record=path, snapshot_every=7) as engine:
            chains = [engine.reset(width).chain]
            chains += [engine.step(action).chain for action in actions(FRAMES - 1)]
        resumed = seek(path, SmallWorld(width), frame)
        again = [resumed.step(action).chain for action in actions(FRAMES - 1)[frame:]]
        assert again == chains[frame + 1 :]
