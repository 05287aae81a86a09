from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldline.core.errors import WorldlineError
from worldline.data.simulators import make_simulator
from worldline.engine.recording import Kind, Recording
from worldline.engine.replay import verify
from worldline.engine.workloads.latent import LatentWorkload, load_starts
from worldline.serve import protocol
from worldline.serve.protocol import Flag, FrameMessage, unpack
from worldline.serve.recordings import find_recording, new_recording
from worldline.serve.session import Pause, Play, Session
from worldline.serve.truth import find_true_world


class Desk:
    """A session and everything that it published."""

    def __init__(self, checkpoint: Path, recordings: Path, fps: float = 200.0, codec: protocol.Codec = "raw") -> None:
        workload = LatentWorkload.open(checkpoint)
        truth, _ = find_true_world(workload.world.spec, workload.starts)
        self.frames: list[FrameMessage] = []
        self.events: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self.session = Session(
            workload,
            truth=truth,
            recordings=recordings,
            fps=fps,
            codec=codec,
            publish=lambda message: self._add(self.frames, unpack(message)),
            notify=lambda event: self._add(self.events, event),
        )
        self.session.start()
        self.session.post(Pause(False))

    def _add(self, where: list[Any], what: Any) -> None:
        with self._news:
            where.append(what)
            self._news.notify_all()

    def wait(self, done: Any) -> None:
        with self._news:
            assert self._news.wait_for(done, timeout=20), f"waited in vain; the last events are {self.events[-3:]}"

    def more(self, count: int) -> None:
        """Wait for `count` more frames."""
        goal = len(self.frames) + count
        self.wait(lambda: len(self.frames) >= goal)

    def event(self, kind: str) -> dict[str, Any]:
        self.wait(lambda: any(event["t"] == kind for event in self.events))
        return next(event for event in self.events if event["t"] == kind)


@pytest.fixture
def desk(checkpoint: Path, tmp_path: Path) -> Any:
    made = Desk(checkpoint, tmp_path / "recordings")
    yield made
    made.session.stop()
    assert made.session.failure is None


def record(desk: Desk, meanwhile: Any) -> Path:
    desk.session.post(protocol.Record(on=True))
    desk.wait(lambda: any(event.get("recording") for event in desk.events))  # frames before it are in no file
    meanwhile()
    desk.session.post(protocol.Record(on=False))
    return desk.session.recordings / desk.event("saved")["name"]


def test_a_tap_within_one_frame_reaches_the_engine_once(desk: Desk, checkpoint: Path) -> None:
    def tap() -> None:
        desk.more(5)
        desk.session.post(Pause(True))  # so that both edges surely meet before the same frame
        desk.session.post(protocol.Key(code="KeyD", down=True, time_ms=1.0))
        desk.session.post(protocol.Key(code="KeyD", down=False, time_ms=2.0))
        desk.session.post(Pause(False))
        desk.more(10)

    path = record(desk, tap)
    steps = [np.frombuffer(r.body, np.float32) for r in Recording(path).records() if r.kind is Kind.STEP]
    assert [action.tolist() for action in steps if action.any()] == [[1.0, 0.0]]
    verdict = verify(path, LatentWorkload.open(checkpoint))
    assert verdict.ok
    assert verdict.complete
    assert verdict.frames >= 15


def test_the_echo_names_the_first_frame_that_applied_an_edge(desk: Desk) -> None:
    desk.more(3)
    desk.session.post(protocol.Key(code="ArrowLeft", down=True, time_ms=123.25))
    desk.wait(lambda: desk.frames[-1].input_time_ms == 123.25)
    desk.more(3)
    echoed = [frame for frame in desk.frames if frame.input_time_ms == 123.25]
    assert {frame.input_frame for frame in echoed} == {echoed[0].frame_id}


def test_ids_go_up_by_one_and_spans_add_up_to_the_busy_time(desk: Desk) -> None:
    desk.more(60)
    ids = [frame.frame_id for frame in desk.frames]
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    for frame in desk.frames[2:]:
        whole = sum(frame.spans_us) + frame.unattributed_us
        assert abs(whole - frame.busy_us) <= len(frame.spans_us) + 1  # each is rounded down to a microsecond
        assert len(frame.spans_us) == len(desk.session.stages)


def test_the_same_seed_begins_with_the_same_pictures(desk: Desk) -> None:
    for seed in (2, 1, 2):
        desk.session.post(protocol.Reset(seed=seed))
    desk.wait(lambda: sum(Flag.FIRST in frame.flags for frame in desk.frames) == 4)
    first = [frame for frame in desk.frames if Flag.FIRST in frame.flags][1:]
    assert np.array_equal(first[0].picture, first[2].picture)
    assert np.array_equal(first[0].truth, first[2].truth)
    assert not np.array_equal(first[0].truth, first[1].truth)


def test_reanchoring_corrects_the_state_and_replays(desk: Desk, checkpoint: Path) -> None:
    def anchor() -> None:
        desk.more(5)
        desk.session.post(protocol.Anchor())
        desk.wait(lambda: any(Flag.ANCHORED in frame.flags for frame in desk.frames))
        desk.more(3)

    path = record(desk, anchor)
    assert [r.kind for r in Recording(path).records()].count(Kind.ANCHOR) == 1
    assert verify(path, LatentWorkload.open(checkpoint)).ok


def test_a_recording_plays_with_the_same_chain_and_ends_live(desk: Desk) -> None:
    path = record(desk, lambda: desk.more(20))
    recorded = {r.id: r.chain for r in Recording(path).records() if r.kind is Kind.STEP}
    desk.session.post(Play(Recording(path)))
    desk.wait(lambda: any("played to its end" in event.get("text", "") for event in desk.events))
    replayed = {frame.frame_id: frame.chain for frame in desk.frames if Flag.REPLAYING in frame.flags}
    assert replayed == recorded
    desk.more(3)
    assert Flag.REPLAYING not in desk.frames[-1].flags


def test_without_the_truth_there_is_no_second_picture_and_no_anchor(desk: Desk) -> None:
    desk.session.post(protocol.Truth(on=False))
    desk.wait(lambda: desk.frames and desk.frames[-1].truth is None)
    assert np.isnan(desk.frames[-1].error)
    desk.session.post(protocol.Anchor())
    assert "true world" in desk.event("note")["text"]
    desk.session.post(protocol.Truth(on=True))
    desk.wait(lambda: desk.frames[-1].truth is not None)


def test_every_true_picture_belongs_to_its_frame(desk: Desk, checkpoint: Path) -> None:
    def play() -> None:
        desk.session.post(protocol.Reset(seed=2))
        for code in ("KeyD", "KeyS"):
            desk.session.post(protocol.Key(code=code, down=True, time_ms=1.0))
            desk.more(10)

    path = record(desk, play)
    shown = {frame.frame_id: frame for frame in desk.frames}
    simulator, starts = make_simulator("two_room"), load_starts(checkpoint, make_simulator("two_room").spec)
    begun = False
    for r in Recording(path).records():
        begun = begun or r.kind is Kind.RESET
        if r.kind is Kind.RESET:
            seen = starts.begin_truth(simulator, r.seed)
        elif r.kind is Kind.STEP and begun:
            seen = simulator.step(np.frombuffer(r.body, np.float32))
        else:
            continue
        assert np.array_equal(shown[r.id].truth, seen.frame), f"frame {r.id}"
    assert begun


def test_a_paused_session_makes_no_frames(desk: Desk) -> None:
    desk.more(3)
    desk.session.post(Pause(True))
    desk.wait(lambda: desk.events and desk.events[-1].get("state") == "paused")
    count = len(desk.frames)
    time.sleep(0.1)
    assert len(desk.frames) == count
    desk.session.post(Pause(False))
    desk.more(3)


def test_recordings_get_new_names_and_only_plain_names_are_found(tmp_path: Path) -> None:
    first = new_recording(tmp_path, "rooms")
    first.touch()
    second = new_recording(tmp_path, "rooms")
    assert second != first
    assert find_recording(tmp_path, first.name) == first
    (tmp_path.parent / "secret.wlr").touch()
    for name in ("../secret.wlr", "", "none.wlr", str(first)):
        with pytest.raises(WorldlineError, match="no recording"):
            find_recording(tmp_path, name)


def test_a_tap_right_before_an_action_acts_and_is_echoed_in_the_next_frame(checkpoint: Path, tmp_path: Path) -> None:
    desk = Desk(checkpoint, tmp_path, fps=4.0)
    try:
        desk.more(2)
        desk.session.post(protocol.Key(code="KeyD", down=True, time_ms=5.0))
        desk.session.post(protocol.Key(code="KeyD", down=False, time_ms=6.0))
        desk.session.post(protocol.Action(values=(0.0, -0.5), id=9))
        acted = desk.event("answer")["frame"]
        desk.more(2)
    finally:
        desk.session.stop()
    frames = {frame.frame_id: frame for frame in desk.frames}
    assert frames[acted].target == (0.5, 0.25)
    assert np.isnan(frames[acted].input_time_ms)
    assert frames[acted + 1].target == (1.0, 0.5)
    assert (frames[acted + 1].input_time_ms, frames[acted + 1].input_frame) == (6.0, acted + 1)


def test_more_actions_than_may_wait_are_refused_and_no_edge_is_lost(checkpoint: Path, tmp_path: Path) -> None:
    desk = Desk(checkpoint, tmp_path)
    try:
        desk.more(1)
        desk.session.post(protocol.Key(code="KeyD", down=True, time_ms=5.0))
        for number in range(300):
            desk.session.post(protocol.Action(values=(0.0, 0.0), id=number))
        desk.wait(lambda: sum(event["t"] == "answer" for event in desk.events) == 300)
        desk.wait(lambda: desk.frames[-1].target == (1.0, 0.5))
    finally:
        desk.session.stop()
    answers = [event for event in desk.events if event["t"] == "answer"]
    assert {event["id"] for event in answers} == set(range(300))
    assert any(event["frame"] is None and "wait" in event["why"] for event in answers)


def test_encoded_frames_are_the_raw_ones_in_order_and_encoding_is_not_in_their_time(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = protocol._encoded

    def slow(picture: np.ndarray, codec: protocol.Codec) -> bytes | memoryview:
        time.sleep(0.01)  # a frame has an imagined and a true picture
        return encode(picture, codec)

    monkeypatch.setattr(protocol, "_encoded", slow)
    desk = Desk(checkpoint, tmp_path, fps=20.0, codec="webp")
    try:
        desk.more(12)
    finally:
        desk.session.stop()
    raw = Desk(checkpoint, tmp_path)
    try:
        raw.wait(lambda: len(raw.frames) > desk.frames[-1].frame_id)
    finally:
        raw.session.stop()
    ids = [frame.frame_id for frame in desk.frames]
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    others = {frame.frame_id: frame for frame in raw.frames}
    for frame in desk.frames:
        assert frame.encode_us >= 20_000
        assert np.array_equal(frame.picture, others[frame.frame_id].picture)
        assert frame.chain == others[frame.frame_id].chain
    encode_span = desk.session.stages.index("encode")
    assert np.median([frame.spans_us[encode_span] for frame in desk.frames[2:]]) < 10_000


def test_a_picture_that_cannot_be_encoded_ends_the_session_with_the_reason(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(picture: np.ndarray, codec: protocol.Codec) -> bytes:
        raise OSError("no encoder for it")

    monkeypatch.setattr(protocol, "_encoded", broken)
    desk = Desk(checkpoint, tmp_path, codec="jpeg")
    desk.wait(lambda: any("could not be encoded as jpeg" in event.get("text", "") for event in desk.events))
    desk.session.stop()
