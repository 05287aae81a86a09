"""A person's session: edges in, actions to the engine, frames out, at a steady pace, in a thread of its own."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from worldline.core.errors import WorldlineError
from worldline.engine.determinism import Level
from worldline.engine.pace import Pace
from worldline.engine.recording import PICTURES, Kind, Record, Recording
from worldline.engine.runtime import Engine, Frame
from worldline.engine.workloads import WorldWorkload
from worldline.serve import protocol
from worldline.serve.encoder import Encoder
from worldline.serve.hands import Hands
from worldline.serve.protocol import Flag
from worldline.serve.recordings import new_recording, newest_recording
from worldline.serve.truth import TrueWorld, picture_error

OUTER_STAGES = ("truth", "encode", "send")
MAX_ACTIONS = 64
"""Commands that may wait when an action arrives; each action takes a frame, and key edges must not be pushed out."""
MAX_WAITING = 1024
"""Commands that may wait for the next frame; the oldest are dropped beyond that."""


class Pause(NamedTuple):
    """Nobody is looking."""

    on: bool


class Play(NamedTuple):
    """A recording to play, checked already."""

    recording: Recording


Wish = (
    protocol.Reset | protocol.Pace | protocol.Record | protocol.Truth | protocol.Anchor | protocol.Live | Pause | Play
)
Command = protocol.Edge | protocol.Action | Wish


class Session:
    """One world, played by one person, seen by any number.

    Args:
        determinism: what the engine promises about bits; `off` cannot be recorded.
        codec: how pictures travel; any but `raw` is made by a thread of its own, beside the next frame.
        label: of one of several sessions: goes into the names of its recordings, and its frames are due with theirs.
        publish: receives every packed frame, in the session's thread; it must not block.
        notify: receives events for the pages (JSON objects), in the session's thread; it must not block.
    """

    def __init__(
        self,
        workload: WorldWorkload,
        *,
        truth: TrueWorld | None,
        truth_on: bool = True,
        recordings: Path,
        seed: int = 0,
        fps: float | None = None,
        label: str = "",
        codec: protocol.Codec = "raw",
        determinism: Level = "machine",
        publish: Callable[[bytearray], None],
        notify: Callable[[dict[str, Any]], None],
    ) -> None:
        self.engine = Engine(workload, outer_stages=OUTER_STAGES, determinism=determinism)
        self.recordings = recordings
        self.failure: BaseException | None = None
        """What ended the thread, if it did not end in order."""
        self._workload, self._spec = workload, workload.world.spec
        self._playing = self.engine
        self._truth = truth
        self._truth_on = truth_on and truth is not None
        self._true_picture: UInt8[np.ndarray, "h w 3"] | None = None
        self._label = label
        self._seed, self._fps = seed, workload.fps if fps is None else fps
        self._publish, self._notify = publish, notify
        self._encoder = None if codec == "raw" else Encoder(codec, publish)
        self._hands = Hands(self._spec)
        self._given: protocol.Action | None = None  # the next frame's action, sent as such
        self._edge_ms, self._edge_frame = math.nan, 0
        self._commands: deque[Command] = deque(maxlen=MAX_WAITING)
        self._wake = threading.Event()
        self._stopping = False
        self._paused = True
        self._replay: Iterator[Record] | None = None
        self._replay_name, self._last = "", newest_recording(recordings)
        self._record_first: int | None = None
        self._pace: Pace | None = None
        self._began_ns = self._missed = 0
        self._thread = threading.Thread(target=self._main, name="session", daemon=True)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the spans that every frame message carries, in order."""
        return self.engine.ledger.stages

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a recording is closed in order."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def post(self, command: Command) -> None:
        """Hand over a command; it acts at the beginning of the next frame."""
        if isinstance(command, protocol.Action) and len(self._commands) >= MAX_ACTIONS:
            self._answer(command, None, f"{MAX_ACTIONS} commands wait already; wait for their answers")
            return
        self._commands.append(command)
        self._wake.set()

    def status(self) -> dict[str, Any]:
        """Return what the session is doing, for the pages."""
        recording = self.engine.recording
        return {
            "t": "status",
            "state": "paused" if self._paused else "replaying" if self._replay else "live",
            "fps": self._fps,
            "seed": self._seed,
            "truth_on": self._truth_on,
            "recording": None if recording is None else {"name": recording.name, "first": self._record_first},
            "replay": self._replay_name or None,
            "last": self._last,
        }

    def _main(self) -> None:
        try:
            self._set_pace(self._fps)
            self._reset(self._seed)
            while not self._stopping:
                if self._paused:
                    self._wake.wait()
                    self._wake.clear()
                    self._obey()
                    if not self._paused and self._pace:
                        self._pace.restart()
                else:
                    self._frame()
        except BaseException as error:
            self.failure = error
            self._notify({"t": "failed", "text": f"the session ended: {error!r}"})
            raise
        finally:
            self.engine.close()
            if self._encoder is not None:
                self._encoder.stop()
            if self._truth is not None:
                self._truth.close()

    def _frame(self) -> None:
        """Wait for the next slot and play one frame."""
        deadline = self._pace.wait().deadline_ns if self._pace else 0
        begun = time.perf_counter_ns()
        if self._obey() or self._paused:
            return  # a reset or an anchor was this slot's frame
        try:
            if self._replay is not None:
                self._replay_one(self._replay)
                return
            action = self._action()
            self._follow(lambda truth: truth.ask_step(action))
            frame = self._playing.step(action, begun_ns=begun, deadline_ns=deadline)
            self._show(frame, begun, Flag(0))
            if self._given is not None:
                self._answer(self._given, frame.id)
        except WorldlineError as error:  # such as a full disk, which ends the recording and not the session
            self._tell(str(error))
            self._notify(self.status())
            if self._given is not None:
                self._answer(self._given, None, str(error))
        finally:
            self._given = None

    def _obey(self) -> bool:
        """Do what was asked since the last frame; return whether that made a frame.

        What comes after an action waits for the next frame: every action has a frame of its own.
        """
        made = False
        while self._commands and not made and self._given is None:
            command = self._commands.popleft()
            if isinstance(command, protocol.Edge):
                self._hands.apply(command)
                continue
            why = ""
            try:
                if isinstance(command, protocol.Action):
                    self._take(command)
                    continue
                made = self._arrange(command)
            except WorldlineError as error:
                self._tell(why := str(error))
            if not isinstance(command, protocol.Action):
                self._notify(self.status())
            self._answer(command, None if why else self._playing.id, why)
        return made

    def _take(self, command: protocol.Action) -> None:
        """Keep a given action for the next frame."""
        low, high = np.array((self._spec.action_low, self._spec.action_high), dtype=np.float32)
        values = np.array(command.values, dtype=np.float32)
        if self._replay is not None or self._paused:
            raise WorldlineError("an action needs a live session: leave the replay, or show the player's page")
        if values.shape != low.shape or (values < low).any() or (values > high).any():
            raise WorldlineError(f"expected an action from {low.tolist()} to {high.tolist()}, got {values.tolist()}")
        self._given = command

    def _action(self) -> Float32[np.ndarray, " a"]:
        """Return the next frame's action: the given one, which the hands then go on from, or the hands' own."""
        if self._given is None:
            return self._hands.action()
        action = np.array(self._given.values, dtype=np.float32)
        self._hands.begin(action)
        return action

    def _arrange(self, command: Wish) -> bool:
        """Fulfil a wish; return whether that made a frame."""
        if isinstance(command, protocol.Reset):
            self._leave_replay()
            return self._reset(command.seed)
        if isinstance(command, protocol.Live) and self._replay is not None:
            self._leave_replay()
            return self._reset(self._seed)
        if isinstance(command, protocol.Anchor):
            return self._anchor()
        if isinstance(command, protocol.Truth):
            return self._set_truth(command.on)
        if isinstance(command, Pause):
            self._paused = command.on
            if command.on:
                self._hands.let_go()
        elif isinstance(command, protocol.Pace):
            self._set_pace(self._workload.fps if command.fps is None else command.fps)
        elif isinstance(command, protocol.Record):
            self._record(command.on)
        elif isinstance(command, Play):
            self._open(command.recording)
        return False

    def _set_truth(self, on: bool) -> bool:
        if self._truth is None or on == self._truth_on:
            return False
        self._truth_on, self._true_picture = on, None
        # The simulator can only join at a start that it knows.
        return self._reset(self._seed) if on and self._replay is None else False

    def _set_pace(self, fps: float) -> None:
        if fps and not 1 <= fps <= protocol.MAX_FPS:
            raise WorldlineError(
                f"the pace is 1 to {protocol.MAX_FPS:g} frames a second, or 0 for no limit, got {fps:g}"
            )
        self._fps, self._pace, self._missed = fps, Pace(fps, aligned=bool(self._label)) if fps else None, 0

    def _reset(self, seed: int) -> bool:
        begun = time.perf_counter_ns()
        self._seed, self._missed = seed, 0
        self._follow(lambda truth: truth.ask_begin(seed))
        frame = self._playing.reset(seed)
        self._hands.begin(self._first_action(seed))
        self._show(frame, begun, Flag.FIRST)
        if self._pace:
            self._pace.skipped = 0
            self._pace.restart()  # leading the simulator to its start takes longer than a slot
        return True

    def _first_action(self, seed: int) -> Float32[np.ndarray, " a"] | None:
        """Return the action that led to the start's last frame, so that a target does not jump."""
        starts = self._workload.starts
        index = seed % len(starts)
        if starts.actions.shape[1]:
            return np.array(starts.actions[index, -1])
        length = int(starts.prefix_lengths[index])
        return np.array(starts.prefix[index, length - 1]) if length else None

    def _anchor(self) -> bool:
        if self._true_picture is None or self._replay is not None:
            raise WorldlineError("Re-anchoring needs the true world beside the imagined one.")
        begun = time.perf_counter_ns()
        frame = self._playing.anchor(self._true_picture)
        self._show(frame, begun, Flag.ANCHORED)
        return True

    def _record(self, on: bool) -> None:
        if on and self._replay is not None:
            raise WorldlineError("A replay cannot be recorded; leave it first.")
        if on and self.engine.recording is None:
            self.engine.start_recording(new_recording(self.recordings, self._spec.name + self._label))
            self._record_first = self.engine.id
        elif not on and (path := self.engine.recording) is not None:
            frames = self.engine.stop_recording()
            self._last, self._record_first = path.name, None
            self._notify({"t": "saved", "name": path.name, "frames": frames})

    def _open(self, recording: Recording) -> None:
        self._record(False)
        self._playing = Engine(self._workload, outer_stages=OUTER_STAGES)
        if self._playing.layout != recording.header.layout:
            self._playing = self.engine
            self._tell(f"{recording.path.name} was recorded with another kind of world; open it with that checkpoint.")
            return
        theirs, ours = (made.get("slot", "") for made in (recording.header.fingerprint, self.engine.fingerprint))
        if theirs != ours:
            self._playing = self.engine
            self._tell(
                f"{recording.path.name} was recorded in {f'slot {theirs}' if theirs else 'a session by itself'}, whose "
                "last bits are others than this session's; worldline replay FILE --verify plays it there."
            )
            return
        self._true_picture = None
        self._replay, self._replay_name = recording.records(), recording.path.name

    def _leave_replay(self) -> None:
        self._replay, self._replay_name = None, ""
        self._playing, self._true_picture = self.engine, None

    def _replay_one(self, records: Iterator[Record]) -> None:
        """Play the next frame of the recording; after the last one, live again."""
        begun = time.perf_counter_ns()
        for record in records:
            if record.kind is Kind.SNAPSHOT and self._playing.id < 0:
                self._playing.restore(record.id, record.chain, record.body)
            elif record.kind in PICTURES:
                self._replay_record(record, begun)
                return
        self._tell(f"{self._replay_name}: played to its end. Live again.")
        self._leave_replay()
        self._reset(self._seed)
        self._notify(self.status())

    def _replay_record(self, record: Record, begun: int) -> None:
        flags = Flag(0)
        if record.kind is Kind.RESET:
            self._follow(lambda truth: truth.ask_begin(record.seed))
            frame, flags = self._playing.reset(record.seed, record.prompt), Flag.FIRST
        elif record.kind is Kind.ANCHOR:
            picture = np.frombuffer(record.body, dtype=np.uint8).reshape(self._playing.layout.frame_shape)
            frame, flags = self._playing.anchor(picture), Flag.ANCHORED
        else:
            action = np.frombuffer(record.body, dtype="<f4")
            if self._true_picture is not None:
                self._follow(lambda truth: truth.ask_step(action))
            frame = self._playing.step(action, begun_ns=begun)
            self._hands.begin(action)
        if frame.chain != record.chain:
            name, number = self._replay_name, record.id
            self._leave_replay()
            self._reset(self._seed)
            self._notify({"t": "verified", "equal": False, "text": f"{name} differs at frame {number}"})
            self._notify(self.status())
            return
        self._show(frame, begun, flags)

    def _follow(self, ask: Callable[[TrueWorld], None]) -> None:
        """Let the true world begin on its next picture, where there is one to look at."""
        if self._truth is not None and self._truth_on:
            try:
                ask(self._truth)
            except WorldlineError as error:
                self._lose_truth(error)

    def _lose_truth(self, error: WorldlineError) -> None:
        self._truth, self._truth_on, self._true_picture = None, False, None
        self._tell(str(error))
        self._notify(self.status())

    def _show(self, frame: Frame, begun: int, flags: Flag) -> None:
        """Wait for the true world's picture, then pack and publish the frame; each is a span of its own."""
        ledger, clock = self._playing.ledger, time.perf_counter_ns
        started = clock()
        if self._truth is not None and self._truth.asked:
            try:
                self._true_picture = self._truth.answer()
            except WorldlineError as gone:
                self._lose_truth(gone)
        error = math.nan if self._true_picture is None else picture_error(frame.picture, self._true_picture)
        ledger.extend(frame.id, "truth", started, stopped := clock())
        message = self._message(frame, begun, flags, error)
        if self._encoder is None:
            packed_message = protocol.pack(message)
            ledger.extend(frame.id, "encode", stopped, packed := clock())
            self._publish(packed_message)
        else:
            self._encoder.hand(message)
            ledger.extend(frame.id, "encode", stopped, packed := clock())
        ledger.extend(frame.id, "send", packed, clock())

    def _message(self, frame: Frame, begun: int, flags: Flag, error: float) -> protocol.FrameMessage:
        # A given action has the frame to itself: an edge that came before it acts in the next one.
        if self._given is None and not math.isnan(edge := self._hands.edge_ms) and edge != self._edge_ms:
            self._edge_ms, self._edge_frame = edge, frame.id
        before = self._playing.ledger.row(frame.id - 1)
        if before is not None and 0 < before.deadline_ns < before.end_ns:
            flags |= Flag.MISSED
            self._missed += 1
        if self.engine.recording is not None:
            flags |= Flag.RECORDING
        if self._replay is not None:
            flags |= Flag.REPLAYING
        region = frame.gauge.get("region", math.nan)
        if region > 1.0:
            flags |= Flag.OUTSIDE
        period, self._began_ns = begun - self._began_ns if self._began_ns else 0, begun
        return protocol.FrameMessage(
            flags=flags,
            frame_id=frame.id,
            chain=frame.chain,
            input_time_ms=self._edge_ms,
            input_frame=self._edge_frame,
            busy_us=0 if before is None else before.busy_ns // 1000,
            period_us=min(period // 1000, 2**32 - 1),
            unattributed_us=0 if before is None else max(0, before.unattributed_ns) // 1000,
            dropped=0,
            missed=self._missed + (self._pace.skipped if self._pace else 0),
            spans_us=tuple(0 if before is None else before.spans[name] // 1000 for name in self.stages),
            radius=region,
            cycle=frame.gauge.get("cycle", math.nan),
            error=error,
            target=self._hands.place(),
            picture=frame.picture,
            truth=self._true_picture,
        )

    def _answer(self, command: Command, frame_id: int | None, why: str = "") -> None:
        if not isinstance(command, Pause | Play) and (event := protocol.answer(command, frame_id, why)) is not None:
            self._notify(event)

    def _tell(self, text: str) -> None:
        self._notify({"t": "note", "text": text})
