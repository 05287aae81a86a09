"""The engine's frame: chain, ledger, memory, pace, and what it refuses."""

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_world import SmallWorld, actions, work_for
from hypothesis import given, settings
from hypothesis import strategies as st

from worldline.core.errors import WorldlineError
from worldline.engine.ledger import Ledger, Row
from worldline.engine.pace import Pace
from worldline.engine.runtime import Engine, ledger_path


def play(engine: Engine, count: int, seed: int = 0) -> list[bytes]:
    chains = [engine.reset(seed).chain]
    return chains + [engine.step(action).chain for action in actions(count)]


def typical_coverage(engine: Engine) -> float:
    """The median over frames: a frame in which the machine took the core away between two spans does not count."""
    rows = [row for row in engine.ledger.rows() if row.id > 0]
    return float(np.median([sum(row.spans.values()) / row.busy_ns for row in rows]))


def test_same_causes_same_chain() -> None:
    first, again = play(Engine(SmallWorld()), 30), play(Engine(SmallWorld()), 30)
    assert first == again
    assert len(set(first)) == 31
    assert play(Engine(SmallWorld()), 30, seed=1)[0] != first[0]


def test_the_chain_holds_each_of_its_parts() -> None:
    """A bit of the action, of the picture or of hidden state changes the chain from that frame on."""
    straight = play(Engine(SmallWorld()), 5)

    def chain_with(change) -> bytes:
        world = SmallWorld()
        engine = Engine(world)
        engine.reset(0)
        for action in actions(4):
            engine.step(action)
        action = actions(5)[4]
        change(world, action)
        return engine.step(action).chain

    def action(world: SmallWorld, action: np.ndarray) -> None:
        action[0] = np.nextafter(action[0], np.float32(2))

    def picture(world: SmallWorld, action: np.ndarray) -> None:
        world.frame_noise = 1

    assert chain_with(lambda world, action: None) == straight[5]
    assert chain_with(action) != straight[5]
    assert chain_with(picture) != straight[5]
    assert chain_with(lambda world, action: world.memory[0, 5].add_(1e-6)) != straight[5]


def test_an_action_is_in_the_chain_even_where_it_has_no_effect() -> None:
    worlds = SmallWorld(), SmallWorld()
    frames = []
    for world, zero in zip(worlds, (0.0, -0.0), strict=True):
        engine = Engine(world)
        engine.reset(0)
        frames.append(engine.step(np.array([zero, zero], dtype=np.float32)))
    assert torch.equal(worlds[0].z, worlds[1].z)
    assert frames[0].picture_hash == frames[1].picture_hash
    assert frames[0].chain != frames[1].chain


def test_any_thread_may_step() -> None:
    """Inference mode and the thread count belong to a thread; the engine sets both where it is called."""
    engine = Engine(SmallWorld())
    engine.reset(0)
    chains: list[bytes] = []

    def work() -> None:
        chains.extend(engine.step(action).chain for action in actions(10))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert chains == play(Engine(SmallWorld()), 10)[1:]


def test_torch_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        play(Engine(SmallWorld()), 2)
        assert torch.get_num_threads() == 2
        assert not torch.is_inference_mode_enabled()
    finally:
        torch.set_num_threads(before)


def test_ledger_covers_a_frame_with_real_work() -> None:
    engine = Engine(SmallWorld(busy_ms=2.0))
    engine.reset(0)
    for action in actions(40):
        engine.step(action)
    summary = engine.ledger.summary(ids_from=1)
    assert summary.frames == 40
    assert summary.coverage <= 1.0
    assert typical_coverage(engine) >= 0.99
    for name in ("step", "decode"):
        assert summary.stages[name].p50 >= 2.0e6
    row = engine.ledger.row(40)
    assert row is not None
    assert row.busy_ns == sum(row.spans.values()) + row.unattributed_ns
    assert row.unattributed_ns >= 0


def test_hidden_time_shows_as_unattributed() -> None:
    """A gauge that computes when it is read works outside of every stage."""

    class Hiding(SmallWorld):
        @property
        def gauge(self) -> np.ndarray:
            work_for(3.0)
            return self._gauge

        @gauge.setter
        def gauge(self, value: np.ndarray) -> None:
            self._gauge = value

    def rows(world: SmallWorld) -> list[Row]:
        engine = Engine(world)
        engine.reset(0)
        for action in actions(10):
            engine.step(action)
        return engine.ledger.rows()

    assert all(row.unattributed_ns >= 3_000_000 for row in rows(Hiding()))
    assert min(row.unattributed_ns for row in rows(SmallWorld())) < 1_000_000


def test_spans_from_outside_lengthen_the_frame() -> None:
    ledger = Ledger(("step", "send"), capacity=4)
    for frame in range(6):
        ledger.write(frame, 1000 * frame + 1, 0, [(1000 * frame + 1, 10), (0, 0)])
        ledger.close()
    row = ledger.row(5)
    assert row is not None
    end = row.end_ns
    ledger.extend(5, "send", end + 50, end + 80)
    ledger.extend(5, "send", end + 90, end + 100)
    after = ledger.row(5)
    assert after is not None
    assert after.end_ns == end + 100
    assert after.spans["send"] == 40
    assert after.unattributed_ns == row.unattributed_ns + 60
    ledger.extend(0, "send", 1, 2)
    assert ledger.row(0) is None
    assert [item.id for item in ledger.rows()] == [2, 3, 4, 5]


def test_deadlines_kept_and_missed() -> None:
    engine = Engine(SmallWorld())
    engine.reset(0)
    for index, action in enumerate(actions(10)):
        engine.step(action, deadline_ns=1 if index < 3 else 2**62)
    summary = engine.ledger.summary()
    assert (summary.paced, summary.missed, summary.attainment) == (10, 3, 0.7)


def test_input_span_reaches_back_to_where_the_caller_began() -> None:
    engine = Engine(SmallWorld())
    frame = engine.reset(0)
    row = engine.ledger.row(0)
    assert row is not None
    began = row.end_ns
    frame = engine.step(actions(1)[0], begun_ns=began)
    row = engine.ledger.row(1)
    assert row is not None
    assert row.begin_ns == row.starts["input"] == began
    assert frame.spans["input"] == row.spans["input"]


def test_nothing_grows_over_2000_frames() -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    engine = Engine(SmallWorld(), ledger_frames=64)
    play(engine, 50)
    before = tensors()
    addresses = [tensor.data_ptr() for tensor in engine.workload.state().values()]
    for action in actions(2000):
        engine.step(action)
    assert tensors() == before
    assert addresses == [tensor.data_ptr() for tensor in engine.workload.state().values()]
    assert engine.ledger.summary().frames == 64


@pytest.mark.parametrize("action", [[np.nan, 0.0], [0.0, np.inf], [1e39, 0.0], [1.0], [[1.0, 2.0]], [1.0, 2.0, 3.0]])
def test_bad_actions_leave_the_session_as_it_was(action: list) -> None:
    engine = Engine(SmallWorld())
    first = engine.reset(0)
    with pytest.raises(WorldlineError, match="an action"):
        engine.step(np.array(action))
    assert engine.chain == first.chain
    assert engine.step(actions(1)[0]).chain == play(Engine(SmallWorld()), 1)[1]


def test_a_stage_that_fails_ends_the_session_until_a_reset() -> None:
    world = SmallWorld()
    engine = Engine(world)
    engine.reset(0)
    world.paint = world.paint[:3]
    with pytest.raises(RuntimeError):
        engine.step(actions(1)[0])
    with pytest.raises(WorldlineError, match=r"call reset\(seed\) first"):
        engine.step(actions(1)[0])
    world.paint = SmallWorld().paint
    engine.reset(0)
    engine.step(actions(1)[0])


def test_refusals() -> None:
    engine = Engine(SmallWorld())
    with pytest.raises(WorldlineError, match=r"call reset\(seed\) first"):
        engine.step(actions(1)[0])
    with pytest.raises(WorldlineError, match="a seed"):
        engine.reset(-1)
    engine.reset(0)
    with pytest.raises(WorldlineError, match="anchor wants a uint8 frame"):
        engine.anchor(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(WorldlineError, match="snapshots need"):
        Engine(SmallWorld(), snapshot_every=0)
    picture = engine.step(actions(1)[0]).picture
    with pytest.raises(ValueError, match="read-only"):
        picture[0] = 0


class FakeTime:
    """A clock that only moves when somebody sleeps, looks at it, or works; sleep oversleeps by a fixed amount."""

    def __init__(self, oversleep_ns: int) -> None:
        self.now, self.oversleep = 1_000_000, oversleep_ns

    def clock(self) -> int:
        self.now += 100
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * 1e9) + (self.oversleep if seconds else 2_000)


@settings(max_examples=50, deadline=None)
@given(
    fps=st.sampled_from([1.0, 24.0, 25.0, 29.97, 60.0, 240.0]),
    works=st.lists(st.floats(0, 3.5), min_size=1, max_size=60),
    oversleep_ns=st.integers(0, 200_000),
)
def test_pace_keeps_absolute_deadlines(fps: float, works: list[float], oversleep_ns: int) -> None:
    """Whatever each frame takes, slots lie at origin + k / fps, none begins early, late ones are skipped, not burst."""
    time = FakeTime(oversleep_ns)
    pace = Pace(fps, clock=time.clock, sleep=time.sleep)
    period = 1e9 / fps
    origin = None
    previous, skipped = -1, 0
    for work in works:
        asked = time.now
        tick = pace.wait()
        origin = tick.due_ns if origin is None else origin
        assert abs(tick.due_ns - origin - tick.slot * period) <= 1
        assert abs(tick.deadline_ns - tick.due_ns - period) <= 2
        assert time.now >= tick.due_ns
        assert tick.slot > previous
        assert time.now - tick.due_ns < 5_000 or asked > tick.due_ns - 400_000  # on time unless asked too late
        assert asked < tick.deadline_ns  # the slot has not passed already
        skipped += tick.slot - previous - 1
        previous = tick.slot
        time.now += round(work * period)
    assert pace.skipped == skipped


def test_pace_refuses_nonsense() -> None:
    for fps in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(WorldlineError, match="frames a second"):
            Pace(fps)


def test_the_ledger_of_a_recording_lies_beside_it(tmp_path: Path) -> None:
    engine = Engine(SmallWorld())
    engine.reset(0)
    for action in actions(5):
        engine.step(action)
    engine.start_recording(tmp_path / "a.wlr")
    for action in actions(7):
        engine.step(action)
    engine.stop_recording()
    ledger, info = Ledger.load(ledger_path(tmp_path / "a.wlr"))
    assert [row.id for row in ledger.rows()] == list(range(6, 13))
    assert info["recording"] == "a.wlr"
    assert info["fingerprint"] == engine.fingerprint


def test_aligned_paces_are_due_at_once_whenever_they_began() -> None:
    time = FakeTime(0)
    due = []
    for started in (123_456_789, 987_654_321, 5_555_555_555):
        time.now = started
        pace = Pace(24.0, aligned=True, clock=time.clock, sleep=time.sleep)
        due.append([pace.wait().due_ns for _ in range(200)])
        assert started <= due[-1][0] < started + 1e9 / 24 + 1
    for dues in due[1:]:
        common = [(a, b) for a in due[0] for b in dues if abs(a - b) < 1e6]
        assert len(common) > 50
        assert all(abs(a - b) <= 2 for a, b in common)
