"""Replay: a recorded session again, compared hash by hash; or taken up at any of its frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from worldline.core.errors import WorldlineError
from worldline.engine.recording import PICTURES, Kind, Record, Recording
from worldline.engine.runtime import Engine, Frame
from worldline.engine.workload import IDENTITY, PLACE, Workload


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a verification found."""

    ok: bool
    frames: int
    """Frames that were compared and equal."""
    recorded: int
    """Frames in the file."""
    complete: bool
    """The file was closed in order; otherwise its torn tail was left out."""
    first_bad_frame: int | None = None
    reason: str = ""
    differs: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Fingerprint fields that differ: (in the file, here). They fail a verdict only if they say which world it is."""

    def __str__(self) -> str:
        tail = "" if self.complete else f" (incomplete, {self.recorded} frames)"
        if self.ok:
            others = [key for key in self.differs if key != PLACE]
            note = f"; though not with the same {', '.join(others)}" if others else ""
            if PLACE in self.differs:
                there, here = self.differs[PLACE]
                note += f"; the same weights, recorded as {there!r}, opened as {here!r}"
            return f"{self.frames} frames, equal to the bit{tail}{note}"
        return f"differs at frame {self.first_bad_frame}{tail}: {self.reason}"


def verify(path: str | Path, workload: Workload, progress: Callable[[int, int], None] | None = None) -> Verdict:
    """Replay a recording on `workload` and compare every hash, stopping at the first frame that differs.

    Args:
        progress: called as (frames done, frames in the file).

    Raises:
        WorldlineError: the file is foreign, damaged or holds no frame, or this workload has other buffers than the one
            recorded.
    """
    recording = Recording(path)
    if not recording.frames:
        raise WorldlineError(f"{path}: holds no frame, so there is nothing to verify; record another session")
    engine = _engine_for(recording, workload)
    here, there = engine.fingerprint, recording.header.fingerprint
    differs = {
        key: (there.get(key, ""), here.get(key, "")) for key in {**there, **here} if there.get(key) != here.get(key)
    }
    other = [key for key in IDENTITY if key in differs]

    def bad(frame: int, reason: str) -> Verdict:
        because = "".join(
            f"; other {key}: {there[:16]} in the file, {here[:16]} here"
            for key, (there, here) in differs.items()
            if key != PLACE or "weights" in differs
        )
        return Verdict(
            ok=False,
            frames=frames,
            recorded=recording.frames,
            complete=recording.complete,
            first_bad_frame=frame,
            reason=reason + because,
            differs=differs,
        )

    frames, first = 0, 0
    for number, record in enumerate(recording.records()):
        if number == 0:
            first = record.id
        if record.kind is Kind.SNAPSHOT and number == 0:
            engine.restore(record.id, record.chain, record.body)
        elif record.kind in PICTURES:
            if reason := _difference(record, _play(engine, record)):
                return bad(record.id, reason)
            frames += 1
            if progress is not None:
                progress(frames, recording.frames)
        elif record.chain != engine.chain:
            return bad(record.id, f"the {record.kind.name.lower()} record after it holds another chain hash")
        elif record.kind is Kind.SNAPSHOT and (tensor := engine.differing_tensor(record.body)):
            return bad(record.id, f"the snapshot after it holds another {tensor}")
    if other:
        return bad(first, "recorded with another world, though every hash is equal")
    return Verdict(ok=True, frames=frames, recorded=frames, complete=recording.complete, differs=differs)


def seek(path: str | Path, workload: Workload, frame_id: int) -> Engine:
    """Return an engine that stands at frame `frame_id` of a recording, from the nearest snapshot before it.

    Going on from there with the recorded actions gives the recorded bits.

    Raises:
        WorldlineError: the file is foreign or damaged, does not hold the frame, or does not repeat on this workload.
    """
    recording = Recording(path)
    engine = _engine_for(recording, workload)
    start = max((kept for kept in recording.snapshots if kept <= frame_id), default=None)
    for record in recording.records():
        if record.kind is Kind.SNAPSHOT and record.id == start:
            engine.restore(record.id, record.chain, record.body)
        elif record.kind not in PICTURES or (start is not None and record.id <= start):
            continue
        elif reason := _difference(record, _play(engine, record)):
            raise WorldlineError(f"{path}: does not repeat here from frame {record.id} on ({reason}); verify it")
        if engine.id == frame_id:
            return engine
    raise WorldlineError(f"{path}: holds no frame {frame_id}; it has {recording.frames} frames")


def _engine_for(recording: Recording, workload: Workload) -> Engine:
    engine = Engine(workload)
    if engine.layout != recording.header.layout:
        raise WorldlineError(
            f"{recording.path}: recorded with another kind of world (fingerprint "
            f"{recording.header.fingerprint.get('config', 'unknown')}); open it with the checkpoint it was made with"
        )
    return engine


def _play(engine: Engine, record: Record) -> Frame:
    if record.kind is Kind.RESET:
        return engine.reset(record.seed, record.prompt)
    if record.kind is Kind.STEP:
        return engine.step(np.frombuffer(record.body, dtype="<f4"))
    return engine.anchor(np.frombuffer(record.body, dtype=np.uint8).reshape(engine.layout.frame_shape))


def _difference(record: Record, frame: Frame) -> str:
    if frame.picture_hash != record.picture:
        return "its picture differs"
    if frame.chain != record.chain:
        return "its picture is equal, its state or what led to it is not"
    return ""
