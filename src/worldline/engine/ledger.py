"""Where the time of every frame went: leaf spans that must add up."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from worldline.core.errors import WorldlineError
from worldline.core.files import write_bytes

FORMAT = 1
OWN = "ledger"
"""The stage in which the row itself is written."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a duration is distributed over frames, in nanoseconds."""

    p50: float
    p95: float
    p99: float
    max: float
    mean: float

    @classmethod
    def of(cls, values: Int64[np.ndarray, " n"]) -> Spread:
        p50, p95, p99 = (float(v) for v in np.percentile(values, (50, 95, 99)))
        return cls(p50=p50, p95=p95, p99=p99, max=float(values.max()), mean=float(values.mean()))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The ledger's frames together."""

    frames: int
    busy: Spread
    stages: dict[str, Spread]
    unattributed: Spread
    coverage: float
    """Sum of the leaf spans over the busy time."""
    paced: int
    """Frames that had a deadline."""
    missed: int
    """Frames that ended after it."""

    @property
    def attainment(self) -> float:
        """The share of deadlines that were kept; 1 without deadlines."""
        return 1.0 - self.missed / self.paced if self.paced else 1.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "attainment": self.attainment}


class Row:
    """One frame of the ledger, nanoseconds of `time.perf_counter_ns`."""

    def __init__(self, names: tuple[str, ...], times: Int64[np.ndarray, " 4"], spans: Int64[np.ndarray, "n 2"]) -> None:
        self.id, self.begin_ns, self.end_ns, self.deadline_ns = (int(value) for value in times)
        self.starts = dict(zip(names, spans[:, 0].tolist(), strict=True))
        self.spans = dict(zip(names, spans[:, 1].tolist(), strict=True))

    @property
    def busy_ns(self) -> int:
        return self.end_ns - self.begin_ns

    @property
    def unattributed_ns(self) -> int:
        """Busy time that no leaf span covers; below 0 if spans overlap, which would be a mistake."""
        return self.busy_ns - sum(self.spans.values())


class Ledger:
    """A ring of the last `capacity` frames; it allocates nothing while frames are written.

    A frame is busy from its begin to its end. Leaf spans are measured one by one, each with its own start and stop,
    never as the rest of something: what lies between them is `unattributed`.
    """

    def __init__(self, stages: Sequence[str], capacity: int = 4096) -> None:
        if len({*stages, OWN}) != len(stages) + 1:
            raise WorldlineError(f"stages need different names, none of them {OWN!r}; got {', '.join(stages)}")
        self.stages = (*stages, OWN)
        self.capacity = capacity
        self.count = 0
        self._times = np.zeros((capacity, 4), dtype=np.int64)  # id, begin, end, deadline
        self._spans = np.zeros((capacity, len(self.stages), 2), dtype=np.int64)  # start, duration
        self._column = {name: column for column, name in enumerate(self.stages)}
        self._own_start = 0

    def write(self, frame_id: int, begin_ns: int, deadline_ns: int, spans: Sequence[tuple[int, int]]) -> None:
        """Write a frame's row; `spans` are (start, duration) of all stages but the last, the ledger's own."""
        self._own_start = time.perf_counter_ns()
        row = self.count % self.capacity
        self._times[row] = (frame_id, begin_ns, begin_ns, deadline_ns)
        self._spans[row, :-1] = spans

    def close(self) -> int:
        """End the frame that was written last and return its busy time; the time since `write` is the ledger's own."""
        row = self.count % self.capacity
        self.count += 1
        end = time.perf_counter_ns()
        self._spans[row, -1] = (self._own_start, end - self._own_start)
        self._times[row, 2] = end
        return end - int(self._times[row, 1])

    def extend(self, frame_id: int, stage: str, start_ns: int, stop_ns: int) -> None:
        """Add a span that came after `close`, such as sending; the frame's busy time then lasts until `stop_ns`.

        Spans of one stage in one frame add up. A frame that has left the ring is passed over.
        """
        row = self._find(frame_id)
        if row is None:
            return
        span = self._spans[row, self._column[stage]]
        if span[0] == 0:
            span[0] = start_ns
        span[1] += stop_ns - start_ns
        self._times[row, 2] = max(int(self._times[row, 2]), stop_ns)

    def row(self, frame_id: int) -> Row | None:
        """Return a frame's row, or None if it is not in the ring."""
        row = self._find(frame_id)
        return None if row is None else Row(self.stages, self._times[row], self._spans[row])

    def rows(self, last: int | None = None) -> list[Row]:
        """Return the last rows, oldest first."""
        return [Row(self.stages, self._times[row], self._spans[row]) for row in self._last(last)]

    def summary(self, last: int | None = None, ids_from: int = 0) -> Summary:
        """Summarise the last frames of the ring, all of them by default, that have an id of at least `ids_from`.

        Raises:
            WorldlineError: there is no such frame.
        """
        rows = self._last(last)
        rows = rows[self._times[rows, 0] >= ids_from]
        if not len(rows):
            raise WorldlineError("the ledger has no frames yet; step the engine first")
        times, spans = self._times[rows], self._spans[rows, :, 1]
        busy, leaves = times[:, 2] - times[:, 1], spans.sum(axis=1)
        paced = times[:, 3] > 0
        return Summary(
            frames=len(rows),
            busy=Spread.of(busy),
            stages={name: Spread.of(spans[:, column]) for column, name in enumerate(self.stages)},
            unattributed=Spread.of(busy - leaves),
            coverage=float(leaves.sum() / max(1, int(busy.sum()))),
            paced=int(paced.sum()),
            missed=int((times[paced, 2] > times[paced, 3]).sum()),
        )

    def save(self, path: str | Path, info: dict[str, Any], ids_from: int = 0) -> None:
        """Write the ring's frames with ids from `ids_from` on, and what JSON says of them, as an `.npz`."""
        rows = self._last(None)
        rows = rows[self._times[rows, 0] >= ids_from]
        data = io.BytesIO()
        told = json.dumps({"format": FORMAT, "stages": self.stages, **info})
        np.savez_compressed(data, info=np.array(told), times=self._times[rows], spans=self._spans[rows])
        write_bytes(path, data.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> tuple[Ledger, dict[str, Any]]:
        """Return a saved ledger and what was said of it.

        Raises:
            WorldlineError: no such file, or not a ledger of this version.
        """
        try:
            with np.load(path, allow_pickle=False) as saved:
                info, times, spans = json.loads(str(saved["info"])), saved["times"], saved["spans"]
            stages = tuple(info["stages"])
            whole = info["format"] == FORMAT and times.shape == (len(times), 4) and times.dtype == np.int64
            if not whole or spans.shape != (len(times), len(stages), 2) or not len(times):
                raise ValueError("it has other contents")
            ledger = cls(stages[:-1], len(times))
        except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise WorldlineError(f"{path}: not a frame ledger ({error}); one lies beside each recording") from None
        ledger._times[:], ledger._spans[:], ledger.count = times, spans, len(times)
        return ledger, info

    def _last(self, last: int | None) -> Int64[np.ndarray, " n"]:
        kept = min(self.count, self.capacity, last if last is not None else self.count)
        return np.arange(self.count - kept, self.count, dtype=np.int64) % self.capacity

    def _find(self, frame_id: int) -> int | None:
        if not self.count:
            return None
        newest = int(self._times[(self.count - 1) % self.capacity, 0])
        back = newest - frame_id  # ids of a ledger are consecutive
        if not 0 <= back < min(self.count, self.capacity):
            return None
        return (self.count - 1 - back) % self.capacity
