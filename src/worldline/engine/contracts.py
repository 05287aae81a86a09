"""What a frame must not do once it is warm: allocate, wait, make the processor and the device wait for each other, or
keep more from frame to frame. Some frames are audited operation by operation, the others run untouched.

A violation names the contract, the stage, the call site and the frame.
"""

from __future__ import annotations

import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from worldline.core.errors import WorldlineError
from worldline.engine.workload import Stage

Level = Literal["strict", "warn", "off"]
Contract = Literal["allocation", "synchronisation", "wait", "hoarding", "growth of memory", "growth of time"]
FIRST = 16
"""The first frame that is audited; what came before is warm-up."""
LONGEST = 1024
"""Most frames between two audits; the first ones come at 16, 32, 64, ..."""
_GENERATIONS = 3  # audits whose tensors must all be alive before they count as hoarded, and that must all have waited
_WAIT_MS = 0.5  # less is what threads of Python wait for each other
_SAMPLES = 8  # audits before growth is judged
_MOST_SAMPLES = 64  # of a long session; every other one is dropped when there are more, or the judge itself would grow
_GROWTH = 64 * 1024 / 1000  # bytes a frame; allocators grow by less for a while
_SLOWER = 0.2  # share of the first frames' time
_HERE = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
_SYNCHRONISING = tuple(
    f"aten.{name}"
    for name in ("_local_scalar_dense", "item", "nonzero", "where.default", "masked_select", "equal", "is_nonzero")
)
"""Operations that read values, under the names that they have in inference mode, too, where nothing is taken apart."""


class ContractViolation(WorldlineError):
    """A frame broke a contract, and contracts are strict."""


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One breach."""

    contract: Contract
    frame: int
    stage: str
    """Empty for a growth that no stage could be found for."""
    site: str
    """File, line and function of the workload, or what was measured."""
    what: str

    def __str__(self) -> str:
        where = f" in stage {self.stage!r}" if self.stage else ""
        return f"{self.contract}{where} at frame {self.frame}: {self.what} ({self.site})"


class Contracts:
    """Audits some frames of a workload and judges what it sees.

    Args:
        level: `strict` raises at the end of the frame that broke a contract, `warn` warns once for each call site,
            `off` looks at nothing and costs nothing.
    """

    def __init__(self, level: Level = "off") -> None:
        if level not in get_args(Level):
            raise WorldlineError(f"contracts are strict, warn or off, got {level!r}")
        self.level = level
        self.found: list[Violation] = []
        """Every breach so far, each call site once a contract."""
        self._frames = 0
        self._new: list[Violation] = []
        self._alive: dict[tuple[str, str], list[tuple[int, StorageWeakRef]]] = {}
        self._waits: dict[str, int] = {}
        self._memory: list[tuple[int, float]] = []
        self._times: list[tuple[int, float]] = []
        self._recent: list[int] = []

    def due(self) -> bool:
        """Whether the next frame is to be audited."""
        n = self._frames
        return self.level != "off" and n >= FIRST and (n % LONGEST == 0 or (n < LONGEST and n & (n - 1) == 0))

    def run(self, stage: Stage, frame: int) -> None:
        """Run a stage of a frame that is audited."""
        audit, switches = _Audit(), _switches()
        began, worked = time.perf_counter_ns(), time.thread_time_ns()
        with audit:
            stage.run()
        waited = (time.perf_counter_ns() - began - time.thread_time_ns() + worked) / 1e6
        gave_away = _switches() > switches and waited > _WAIT_MS
        self._waits[stage.name] = self._waits.get(stage.name, 0) + 1 if gave_away else 0
        if self._waits[stage.name] == _GENERATIONS and not stage.waits:
            what = f"it gave the processor away for {waited:.1f} ms, as in the audits before: a sleep, a lock or a disk"
            self._note("wait", frame, stage.name, "by the clock", what)
        for operation, site, storage in audit.made:
            if not stage.allocates:
                self._note("allocation", frame, stage.name, site, f"{operation} made a new tensor")
            self._alive.setdefault((stage.name, site), []).append((self._frames, storage))
        for what, site in () if stage.waits else audit.waits:
            self._note("synchronisation", frame, stage.name, site, what)

    def frame_done(self, frame: int, busy_ns: int) -> None:
        """Count a frame; after an audited one, judge what is still alive and what grew.

        Raises:
            ContractViolation: a contract was broken, and contracts are strict.
        """
        if self.level == "off":
            return
        audited = self.due()
        self._frames += 1
        if not audited:
            self._recent.append(busy_ns)  # an audit slows its own frame
            return
        self._judge_hoards(frame)
        self._times.append((self._frames, float(np.median(self._recent))))
        self._memory.append((self._frames, float(resident_bytes())))
        self._recent.clear()
        if len(self._memory) > _MOST_SAMPLES:
            del self._memory[1::2], self._times[1::2]
        self._judge_growth(frame)
        new, self._new = self._new, []
        self.found += new
        for violation in new:
            if self.level == "strict":
                raise ContractViolation(f"contract broken: {violation}")
            warnings.warn(f"contract broken: {violation}", stacklevel=3)

    def _judge_hoards(self, frame: int) -> None:
        for (stage, site), kept in self._alive.items():
            kept[:] = [(made, storage) for made, storage in kept if not storage.expired()]
            generations = sorted({made for made, _ in kept if made < self._frames - 2})
            if len(generations) >= _GENERATIONS:
                frames = ", ".join(map(str, generations[-_GENERATIONS:]))
                self._note("hoarding", frame, stage, site, f"tensors of frames {frames} are still alive")

    def _judge_growth(self, frame: int) -> None:
        settled = [(at, value) for at, value in self._memory if at > LONGEST]
        if len(settled) >= _SAMPLES:
            low, middle, _ = slope(settled)
            if low > _GROWTH:
                more = f"{1000 * middle / 1024:.0f} KiB every 1,000 frames"
                self._note("growth of memory", frame, "", "resident memory", more)
        settled = [(at, value) for at, value in self._times if at > LONGEST]
        if len(settled) >= _SAMPLES:
            low, middle, _ = slope(settled)
            first = float(np.median([value for _, value in settled[: _SAMPLES // 2]]))
            if low * (settled[-1][0] - settled[0][0]) > _SLOWER * first:
                more = f"{middle:.1f} us every 1,000 frames"
                self._note("growth of time", frame, "", "median frame time", more)

    def _note(self, contract: Contract, frame: int, stage: str, site: str, what: str) -> None:
        known = {(each.contract, each.stage, each.site) for each in (*self.found, *self._new)}
        if (contract, stage, site) not in known:
            self._new.append(Violation(contract=contract, frame=frame, stage=stage, site=site, what=what))


class _Audit(TorchDispatchMode):
    """Notes down operations that make new storage, and those that make processor and device wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, str, StorageWeakRef]] = []
        self.waits: list[tuple[str, str]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(function)
        if reason := synchronises(name, args, kwargs):
            self.waits.append((reason, _site()))
        given = {_storage(each) for each in _tensors((*args, *kwargs.values()))}
        result = function(*args, **kwargs)
        for each in _tensors(result if isinstance(result, tuple | list) else (result,)):
            if each.numel() and _storage(each) not in given:
                self.made.append((name, _site(), StorageWeakRef(each.untyped_storage())))
        return result


def synchronises(operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return why an operation makes the processor wait for the device, or nothing."""
    tensors = list(_tensors((*args, *kwargs.values())))
    on_device = [each for each in tensors if each.device.type not in ("cpu", "meta")]
    if on_device and operation.startswith(_SYNCHRONISING):
        return f"{operation} reads a value of the device"
    if operation.startswith("aten.index") and any(each.dtype == torch.bool for each in on_device):
        return f"{operation} by a mask reads how many of it are set"
    if operation.startswith(("aten._to_copy", "aten.to.")) and tensors:
        given = [kwargs.get("device"), *(each for each in args if isinstance(each, torch.device)), tensors[0].device]
        source, target = tensors[0], torch.device(next(device for device in given if device is not None))
        place = 3  # of non_blocking; a copy may be asked for after it
    elif operation.startswith("aten.copy_") and len(tensors) > 1:
        source, target, place = tensors[1], tensors[0].device, 2
    else:
        return ""
    if source.device.type == target.type:
        return ""
    quick = kwargs.get("non_blocking", False) or True in args[place : place + 1]
    if not quick:
        return f"{operation} from {source.device.type} to {target.type} waits for the copy"
    if source.device.type == "cpu" and not source.is_pinned():
        return f"{operation} is called non-blocking from pageable memory, so it waits all the same"
    return ""


def _tensors(values: Any) -> Iterator[Tensor]:
    for each in values:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors(each)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _site() -> str:
    """Return where the workload called from: the innermost frame outside of torch and the engine's own modules."""
    for frame in reversed(traceback.extract_stack()):
        inside = frame.filename.startswith(_HERE) and "workloads" not in frame.filename
        if not inside:
            return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
    return "unknown"


class Trend(NamedTuple):
    """A slope with its 99% interval."""

    low: float
    middle: float
    high: float


def slope(points: Sequence[tuple[float, float]]) -> Trend:
    """Return the trend of (x, y), at least two: the median of pairwise slopes (Theil and Sen, doi:10.2307/2285891)."""
    x, y = np.array(points, dtype=float).T
    i, j = np.triu_indices(len(x), 1)
    slopes: Float[np.ndarray, " pairs"] = np.sort((y[j] - y[i]) / (x[j] - x[i]))
    n, pairs = len(x), len(slopes)
    half = 2.576 * np.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    low, high = max(0, int((pairs - half) / 2)), min(pairs - 1, int((pairs + half) / 2))
    return Trend(float(slopes[low]), float(np.median(slopes)), float(slopes[high]))


def resident_bytes() -> int:
    """Return this process's resident memory; where the system does not say, its peak so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _switches() -> int:
    """Return how often this thread gave the processor away of its own accord."""
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_nvcsw
