"""The engine: runs a workload frame by frame, times every stage, chains a hash over the result, and records."""

from __future__ import annotations

import hashlib
import json
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from worldline.core.errors import WorldlineError
from worldline.engine import determinism as levels
from worldline.engine.contracts import Contracts, Level
from worldline.engine.ledger import Ledger
from worldline.engine.recording import HASH_BYTES, PROMPT_BYTES, Header, Kind, Layout, Recorder
from worldline.engine.workload import Anchorable, Workload

_EVENT = struct.Struct("<BQI")  # kind, frame id, bytes of the cause
_LARGEST = np.finfo(np.float32).max


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame as it was shown."""

    id: int
    """0 for the first; every reset, step and anchor takes the next."""
    picture: UInt8[np.ndarray, "h w 3"]
    """A read-only view of the workload's buffer: copy it before the next frame if it is to be kept."""
    picture_hash: bytes
    """This and the hashes below are empty, or stand still, with determinism=off."""
    chain: bytes
    """Hash over everything since the session began: causes, pictures and states."""
    marks: bytes
    """Hash of every state tensor, in the order of `Engine.layout`."""
    spans: dict[str, int]
    """Leaf spans, nanoseconds; those added later (sending) are in the ledger only."""
    gauge: dict[str, float]


class Engine:
    """Plays a workload; one frame at a time, from any thread.

    Args:
        workload: what to play; it belongs to this engine alone.
        record: a new file to record into from the first reset on; see also `start_recording`.
        snapshot_every: frames between two snapshots in a recording.
        outer_stages: names of spans that the caller adds to the ledger itself, such as sending.
        contracts: whether some frames are audited, and whether a broken contract ends the run; see `contracts.py`.
        determinism: what is promised about bits; see `determinism.py`.
    """

    def __init__(
        self,
        workload: Workload,
        record: str | Path | None = None,
        snapshot_every: int = 300,
        outer_stages: Sequence[str] = (),
        ledger_frames: int = 4096,
        contracts: Level = "off",
        determinism: levels.Level = "machine",
    ) -> None:
        if snapshot_every < 1:
            raise WorldlineError(f"snapshots need at least 1 frame between them, got {snapshot_every}")
        self.workload = workload
        self.snapshot_every = snapshot_every
        self.determinism = determinism
        self.fingerprint = {**workload.fingerprint(), "determinism": determinism}
        self._cuda = self.fingerprint.get("device", "cpu") != "cpu"
        levels.prepare(determinism, self._cuda)
        inner = tuple(stage.name for stage in workload.stages)
        self.ledger = Ledger(("input", "event", *inner, "hash", "record", *outer_stages), ledger_frames)
        self.contracts = Contracts(contracts)
        self._spans = [(0, 0)] * (len(self.ledger.stages) - 1)  # (start, duration), ns; the ledger keeps its own
        self._state = workload.state()
        self._views = {name: _bytes_of(name, tensor) for name, tensor in self._state.items()}
        self._picture = workload.frame.view()
        self._picture.flags.writeable = False
        self.layout = _layout(workload)
        self._id, self._chain = -1, _genesis(self.layout)
        self._ready = False
        self._lock = threading.Lock()
        self._recorder: Recorder | None = None
        if record is not None:
            self._recorder = self._open(record)

    @property
    def id(self) -> int:
        """The last frame's id, -1 before the first."""
        return self._id

    @property
    def chain(self) -> bytes:
        """The last frame's chain hash."""
        return self._chain

    @property
    def recording(self) -> Path | None:
        """The file that is being recorded into."""
        return self._recorder.path if self._recorder else None

    def reset(self, seed: int, prompt: str = "") -> Frame:
        """Begin again from `seed`; the first frame is the workload's own, no action leads to it."""
        if not 0 <= seed < 1 << 63:
            raise WorldlineError(f"a seed is a whole number from 0 to 2^63 - 1, got {seed}")
        text = prompt.encode()
        if len(text) > PROMPT_BYTES:
            raise WorldlineError(f"a prompt has at most {PROMPT_BYTES} bytes, got {len(text)}")
        with self._lock:
            begin = time.perf_counter_ns()
            self._ready = False
            with self._arithmetic():
                started = time.perf_counter_ns()
                self.workload.reset(seed, prompt)
                stopped = time.perf_counter_ns()
                self._clear_spans()
                self._spans[1] = (started, stopped - started)
                frame = self._finish(Kind.RESET, struct.pack("<q", seed) + text, begin, 0, stopped)
            self.ledger.close()
            return frame

    def step(self, action: Float32[np.ndarray, " a"], begun_ns: int | None = None, deadline_ns: int = 0) -> Frame:
        """Advance by one frame.

        Args:
            action: native units, finite.
            begun_ns: when the caller began to turn input into this action (`time.perf_counter_ns`); the input span
                reaches from there to the action's arrival in the buffer.
            deadline_ns: the frame counts as missed if it ends later; 0 for none.

        Raises:
            WorldlineError: no reset before, or an action of the wrong shape or not finite.
            ContractViolation: this frame broke a contract, and contracts are strict. The frame itself is whole.
        """
        with self._lock:
            begin = time.perf_counter_ns() if begun_ns is None else begun_ns
            cause = self._take(action)
            self._clear_spans()
            self._ready = False
            with self._arithmetic():
                started = time.perf_counter_ns()
                self._spans[0] = (begin, started - begin)
                audited = self.contracts.due()
                for column, stage in enumerate(self.workload.stages, start=2):
                    if audited:
                        self.contracts.run(stage, self._id + 1)
                    else:
                        stage.run()
                    stopped = time.perf_counter_ns()
                    self._spans[column] = (started, stopped - started)
                    started = stopped
                frame = self._finish(Kind.STEP, cause, begin, deadline_ns, started)
            busy = self.ledger.close()
            self.contracts.frame_done(frame.id, busy)
            return frame

    def anchor(self, frame: UInt8[np.ndarray, "h w 3"]) -> Frame:
        """Correct the imagined state with a real frame; the corrected picture is a frame of its own.

        Raises:
            WorldlineError: the workload cannot be anchored, no reset before, or a frame of the wrong shape.
        """
        workload = self.workload
        if not isinstance(workload, Anchorable):
            raise WorldlineError("this workload takes no real frames: it has no encoder to anchor it with")
        if frame.shape != self.layout.frame_shape or frame.dtype != np.uint8:
            raise WorldlineError(
                f"anchor wants a uint8 frame {self.layout.frame_shape}, got {frame.dtype} {frame.shape}"
            )
        with self._lock:
            self._require_ready()
            begin = time.perf_counter_ns()
            self._ready = False
            with self._arithmetic():
                started = time.perf_counter_ns()
                workload.anchor(frame)
                stopped = time.perf_counter_ns()
                self._clear_spans()
                self._spans[1] = (started, stopped - started)
                corrected = self._finish(Kind.ANCHOR, frame.tobytes(), begin, 0, stopped)
            self.ledger.close()
            return corrected

    def start_recording(self, path: str | Path) -> None:
        """Record into a new file from here on; its first record is a snapshot of the present state."""
        with self._lock:
            self._require_ready()
            if self._recorder is not None:
                raise WorldlineError(f"recording into {self._recorder.path} already; stop that one first")
            self._recorder = self._open(path)
            self._recorder.snapshot(self._id, self._chain, self.snapshot())

    def stop_recording(self) -> int:
        """Close the recording in order and return how many frames it holds; 0 if there was none.

        The ledger of its frames, as far as the ring holds them, is written beside it.
        """
        with self._lock:
            recorder, self._recorder = self._recorder, None
            if recorder is None:
                return 0
            recorder.close(max(self._id, 0), self._chain)
            if self.ledger.count:
                info = {"fps": self.workload.fps, "fingerprint": self.fingerprint, "recording": recorder.path.name}
                self.ledger.save(ledger_path(recorder.path), info, max(0, self._id + 1 - recorder.pictures))
            return recorder.pictures

    def close(self) -> None:
        """End the session; a recording is closed in order."""
        self.stop_recording()

    def snapshot(self) -> bytes:
        """Return all that the next frame depends on: state tensors in order, then the picture."""
        return b"".join(view.tobytes() for view in self._views.values()) + self._picture.tobytes()

    def restore(self, frame_id: int, chain: bytes, snapshot: bytes) -> None:
        """Continue after frame `frame_id` from a snapshot's bytes: state tensors in order, then the picture."""
        with self._lock:
            if self._recorder is not None:
                raise WorldlineError("a session that is being recorded cannot jump; stop the recording first")
            expected = self.layout.state_bytes + self.layout.frame_bytes
            if len(snapshot) != expected:
                raise WorldlineError(f"a snapshot of this workload has {expected} bytes, got {len(snapshot)}")
            offset = 0
            for view in self._views.values():
                view[:] = snapshot[offset : offset + len(view)]
                offset += len(view)
            self.workload.frame[...] = np.frombuffer(snapshot, np.uint8, offset=offset).reshape(self.layout.frame_shape)
            self._id, self._chain, self._ready = frame_id, chain, True

    def differing_tensor(self, snapshot: bytes) -> str | None:
        """Return the first state tensor that differs from a snapshot's, or None if all are equal."""
        offset = 0
        for name, view in self._views.items():
            if view.tobytes() != snapshot[offset : offset + len(view)]:
                return name
            offset += len(view)
        return None if self._picture.tobytes() == snapshot[offset:] else "frame"

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, path: str | Path) -> Recorder:
        if self.determinism == "off":
            raise WorldlineError("determinism=off takes no hashes, so there is nothing to record; give run or machine")
        header = Header(
            fingerprint=self.fingerprint,
            layout=self.layout,
            fps=self.workload.fps,
            snapshot_every=self.snapshot_every,
        )
        return Recorder(path, header)

    def _take(self, action: Float32[np.ndarray, " a"]) -> bytes:
        """Put an action into the workload's buffer and return its bytes."""
        self._require_ready()
        buffer = self.workload.action
        values = np.asarray(action)
        if values.shape != buffer.shape:
            raise WorldlineError(f"an action of this world has shape {buffer.shape}, got {values.shape}")
        if not (np.abs(values) <= _LARGEST).all():  # NaN is not either
            raise WorldlineError(f"an action must be finite in float32, got {values.tolist()}")
        buffer[:] = values
        return buffer.tobytes()

    def _require_ready(self) -> None:
        if not self._ready:
            raise WorldlineError("the engine has no frame to go on from; call reset(seed) first")

    def _clear_spans(self) -> None:
        for column in range(len(self._spans)):
            self._spans[column] = (0, 0)

    def _arithmetic(self) -> AbstractContextManager[None]:
        return levels.arithmetic(self.determinism, self.workload.threads, self._cuda)

    def _finish(self, kind: Kind, cause: bytes, begin: int, deadline: int, started: int) -> Frame:
        """Hash, record and account for the frame in the buffers, from `started` on; the caller closes the ledger."""
        clock, column = time.perf_counter_ns, 2 + len(self.workload.stages)
        self._id += 1
        picture = marks = b""
        if self.determinism != "off":
            picture = hashlib.blake2b(self._picture.data, digest_size=HASH_BYTES).digest()
            marks = b"".join(hashlib.blake2b(view, digest_size=HASH_BYTES).digest() for view in self._views.values())
            event = _EVENT.pack(kind, self._id, len(cause)) + cause + picture + marks
            self._chain = hashlib.blake2b(self._chain + event, digest_size=HASH_BYTES).digest()
        self._ready = True
        self._spans[column] = (started, clock() - started)
        if self._recorder is not None:
            started = clock()
            self._record(self._recorder, kind, cause, picture, marks)
            self._spans[column + 1] = (started, clock() - started)
        readings = self.workload.gauge.tolist()
        self.ledger.write(self._id, begin, deadline, self._spans)
        spans = {name: span[1] for name, span in zip(self.ledger.stages, self._spans, strict=False)}
        gauge = dict(zip(self.workload.gauge_names, readings, strict=True))
        return Frame(self._id, self._picture, picture, self._chain, marks, spans, gauge)

    def _record(self, recorder: Recorder, kind: Kind, cause: bytes, picture: bytes, marks: bytes) -> None:
        try:
            recorder.frame(kind, self._id, picture, self._chain, marks, cause)
            if recorder.pictures % self.snapshot_every == 0:
                recorder.snapshot(self._id, self._chain, self.snapshot())
        except WorldlineError:
            self._recorder = None  # play goes on; the caller hears of it once
            recorder.abandon()
            raise


def ledger_path(recording: Path) -> Path:
    """Return where the ledger of a recording lies."""
    return recording.with_suffix(".ledger.npz")


def _layout(workload: Workload) -> Layout:
    state = tuple(
        (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.nbytes)
        for name, tensor in workload.state().items()
    )
    height, width, channels = workload.frame.shape
    return Layout(workload.action.shape[0], (height, width, channels), state)


def _genesis(layout: Layout) -> bytes:
    """Return the chain before the first frame."""
    return hashlib.blake2b(json.dumps(layout.to_json()).encode(), digest_size=HASH_BYTES, person=b"worldline").digest()


def _bytes_of(name: str, tensor: torch.Tensor) -> memoryview:
    """Return a writable view of a tensor's bytes."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise WorldlineError(f"state tensor {name!r} must be contiguous and in CPU memory, got {tensor.device}")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
