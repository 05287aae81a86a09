"""Replay: a recorded session again, compared hash by hash; or taken up at any of its frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from worldline.core.errors import WorldlineError
from worldline.engine.recording import HASH_BYTES, PICTURES, Kind, Record, Recording
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
    stage: str = ""
    """Of the first bad frame, the first stage that wrote something else; `reset` or `anchor` where no stage ran."""
    tensor: str = ""
    """What it wrote: a state tensor, or `frame`."""
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


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a bisection found: the first bad frame, tried again from the last snapshot before it."""

    verdict: Verdict
    """Of the first verification that failed, or of the last one."""
    verifications: int
    outcomes: tuple[str, ...] = ()
    """What each try ended with: a hash of all it wrote, or the earlier frame at which it already differed."""
    recorded: str = ""
    """The same hash of what was recorded."""

    @property
    def repeats(self) -> bool:
        """Every try ended with the same bits."""
        return len(set(self.outcomes)) == 1

    def __str__(self) -> str:
        if self.verdict.ok:
            return f"{self.verdict}; so in {self.verifications} of {self.verifications} verifications"
        tries, right = len(self.outcomes), self.outcomes.count(self.recorded)
        again = f"{self.verdict}\ntried {tries} times from the last snapshot before it: "
        if self.repeats and right:
            return again + "as recorded each time, so the workload carries something that its state does not hold"
        if self.repeats:
            return again + "the same other bits each time, so the arithmetic is another, and not chance"
        return again + (
            f"{len(set(self.outcomes))} different outcomes, {right} of them as recorded, so something decides that "
            "neither state nor action holds"
        )


def bisect(path: str | Path, make: Callable[[], Workload], tries: int = 5) -> Finding:
    """Find the first frame, stage and tensor that differ, and whether they differ in the same way each time.

    Args:
        make: makes a workload for each try, so that none carries anything over.

    Raises:
        WorldlineError: as `verify`.
    """
    verdicts = [verify(path, make())]
    while verdicts[-1].ok and len(verdicts) < tries:
        verdicts.append(verify(path, make()))
    verdict, bad = verdicts[-1], verdicts[-1].first_bad_frame
    if verdict.ok or not verdict.stage:
        return Finding(verdict=verdict, verifications=len(verdicts))
    recording = Recording(path)
    wanted = next(record for record in recording.records() if record.kind in PICTURES and record.id == bad)
    outcomes = [_outcome(recording, make(), wanted) for _ in range(tries)]
    recorded = (wanted.picture + wanted.marks).hex()
    return Finding(verdict=verdict, verifications=len(verdicts), outcomes=tuple(outcomes), recorded=recorded)


def _outcome(recording: Recording, workload: Workload, record: Record) -> str:
    """Play one frame from the last snapshot before it."""
    engine = _engine_for(recording, workload)
    if record.kind is not Kind.RESET:
        try:
            engine = seek(recording.path, workload, record.id - 1)
        except WorldlineError as error:
            return str(error)
    frame = _play(engine, record)
    return (frame.picture_hash + frame.marks).hex()


def verify(
    path: str | Path,
    workload: Workload,
    progress: Callable[[int, int], None] | None = None,
    other: Workload | None = None,
) -> Verdict:
    """Replay a recording on `workload` and compare every hash, stopping at the first frame that differs.

    Args:
        progress: called as (frames done, frames in the file).
        other: a second workload of the same kind. After every frame the state is saved, loaded into the one that did
            not make it, and the next frame is made there: what the state does not hold is lost, and shows.

    Raises:
        WorldlineError: the file is foreign, damaged or holds no frame, or this workload has other buffers than the one
            recorded.
    """
    recording = Recording(path)
    if not recording.frames:
        raise WorldlineError(f"{path}: holds no frame, so there is nothing to verify; record another session")
    engine = _engine_for(recording, workload)
    resting = None if other is None else _engine_for(recording, other)
    here, there = engine.fingerprint, {"determinism": engine.determinism, **recording.header.fingerprint}
    differs = {
        key: (there.get(key, ""), here.get(key, "")) for key in {**there, **here} if there.get(key) != here.get(key)
    }
    other_identity = [key for key in IDENTITY if key in differs]

    def bad(frame: int, reason: str, stage: str = "", tensor: str = "") -> Verdict:
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
            stage=stage,
            tensor=tensor,
            reason=reason + because + (_RUN if engine.determinism == "run" else ""),
            differs=differs,
        )

    frames, first = 0, 0
    for number, record in enumerate(recording.records()):
        if number == 0:
            first = record.id
        if record.kind is Kind.SNAPSHOT and number == 0:
            engine.restore(record.id, record.chain, record.body)
        elif record.kind in PICTURES:
            if resting is not None:
                resting.restore(engine.id, engine.chain, engine.snapshot())
                engine, resting = resting, engine
            if found := _difference(engine, record, _play(engine, record)):
                return bad(record.id, *found)
            frames += 1
            if progress is not None:
                progress(frames, recording.frames)
        elif record.chain != engine.chain:
            return bad(record.id, f"the {record.kind.name.lower()} record after it holds another chain hash")
        elif record.kind is Kind.SNAPSHOT and (tensor := engine.differing_tensor(record.body)):
            return bad(record.id, f"the snapshot after it holds another {tensor}")
    if other_identity:
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
        elif found := _difference(engine, record, _play(engine, record)):
            raise WorldlineError(f"{path}: does not repeat here from frame {record.id} on ({found[0]}); verify it")
        if engine.id == frame_id:
            return engine
    raise WorldlineError(f"{path}: holds no frame {frame_id}; it has {recording.frames} frames")


_RUN = "; recorded with determinism=run, which promises equal bits within one process only"


def _engine_for(recording: Recording, workload: Workload) -> Engine:
    promised = recording.header.fingerprint.get("determinism")
    engine = Engine(workload, determinism="run" if promised == "run" else "machine")
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


def _difference(engine: Engine, record: Record, frame: Frame) -> tuple[str, str, str] | None:
    """Return in words how a frame differs from its record, with the stage and the tensor to blame; None if equal."""
    names = [name for name, *_ in engine.layout.state]
    marks = zip(names, *(_hashes(marks) for marks in (record.marks, frame.marks)), strict=True)
    changed = {name for name, theirs, ours in marks if theirs != ours}
    if frame.picture_hash != record.picture:
        changed.add("frame")
    if not changed:
        return (
            None if frame.chain == record.chain else ("its picture and state are equal, what led to it is not", "", "")
        )
    # in the order in which a frame is made, so that the cause comes before its consequences
    written = [(stage.name, tensor) for stage in engine.workload.stages for tensor in stage.writes]
    if record.kind is not Kind.STEP:
        written = [(record.kind.name.lower(), tensor) for _, tensor in written]
    written += [("no stage that says so", tensor) for tensor in (*names, "frame")]
    stage, tensor = next(each for each in written if each[1] in changed)
    return f"{stage} wrote another {tensor}", stage, tensor


def _hashes(marks: bytes) -> list[bytes]:
    return [marks[at : at + HASH_BYTES] for at in range(0, len(marks), HASH_BYTES)]
