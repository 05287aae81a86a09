"""What the machine itself can do: products, copies, element-wise work, and what a call costs before it does anything.

Every case declares its bytes and operations, and what its author expected before it was ever run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from worldline.bench.harness import Comparison, compare
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.core.result import write_result
from worldline.engine.arena import Tape

LINKS = 100
"""Operations of a chain."""
WIDTH = 448
"""Hidden units of the worlds: their GRU multiplies 1 x 448 by 448 x 1344."""
_TURN_NS = 200_000  # a turn lasts at least this long, so that reading the clock weighs nothing
_KIB, _MIB = 2**10, 2**20

Kind = Literal["call", "gemm", "copy", "elementwise", "chain", "transfer", "synchronise"]
Unit = Literal["GFLOP/s", "GB/s", "us", "ratio"]
Make = Callable[[torch.device], Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class MicroConfig:
    """How long to measure, on what, and where to write."""

    seconds: float = 0.5
    """Time for each case."""
    warmup_seconds: float = 0.2
    """Time before it that does not count."""
    largest_mib: int = 256
    """Largest buffer of a copy or element-wise case, in MiB; three of them are held at once."""
    largest_gemm: int = 1024
    """Rows and columns of the largest product, at least 64."""
    threads: int = 1
    """Threads of torch, as the engine has one."""
    reports: str = "reports"
    """Where `DATE-micro/` is written, or `DATE-micro-cuda/` where there is such a device, which is measured, too."""
    publish: str | None = None
    """Where the written answers go besides, such as docs/phases."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a case was expected to do on a CPU, and why; it is right within `factor` either way."""

    value: float
    unit: Unit
    factor: float
    because: str

    def holds(self, measured: float) -> bool:
        return self.value / self.factor <= measured <= self.value * self.factor


@dataclass(frozen=True, kw_only=True)
class Case:
    """A piece of work: what it must move and compute, a buffer once for every call that reads or writes it."""

    name: str
    kind: Kind
    bytes: int
    operations: int
    """Floating-point; a multiply-add is two, a sigmoid of one element counts as one."""
    calls: int
    """Calls of torch."""
    make: Make
    expected: Prediction | None = None
    """None where a case needs a device on which nothing has been measured yet."""

    def declared(self) -> dict[str, Any]:
        """Return all but the work itself."""
        return {key: getattr(self, key) for key in ("name", "kind", "bytes", "operations", "calls")} | {
            "expected": asdict(self.expected) if self.expected else None
        }


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Nanoseconds of a call: the median over turns, and the quartiles."""

    median: float
    quartiles: tuple[float, float]
    turns: int
    calls_a_turn: int


def run(config: MicroConfig) -> Path:
    """Time every case, and write `result.json`, `report.md` and `roofline.svg`; return the report's path.

    Raises:
        WorldlineError: no time to measure, or sizes too small to have a largest.
    """
    if config.seconds <= 0 or config.warmup_seconds < 0 or config.largest_gemm < 64 or config.largest_mib < 1:
        raise WorldlineError(
            "bench micro needs seconds > 0, warmup_seconds >= 0, largest_gemm >= 64 and largest_mib >= 1, got "
            f"{config.seconds}, {config.warmup_seconds}, {config.largest_gemm} and {config.largest_mib}"
        )
    from worldline.bench.micro_report import write_report

    todo, before = cases(config), os.getloadavg()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.inference_mode():
            timing: dict[str, Any] = {"cpu": measure(todo, torch.device("cpu"), config), "cuda": None}
            timing["chain"] = chains(config).to_json()
            if torch.cuda.is_available():
                timing["cuda"] = measure(todo + cuda_cases(config), torch.device("cuda"), config)
    finally:
        torch.set_num_threads(threads)
    timing["load"] = {"before": before, "after": os.getloadavg(), "cores": os.cpu_count()}
    figures = {
        "config": asdict(config),
        "cases": [case.declared() for case in todo],
        "cuda_cases": [case.declared() for case in cuda_cases(config)],
        "chain_expected": asdict(CHAIN_EXPECTED),
    }
    folder = Path(config.reports) / f"{date.today():%Y-%m-%d}-micro{'-cuda' if timing['cuda'] else ''}"
    write_result(folder / "result.json", "micro", figures, timing)
    return write_report(folder, read_json(folder / "result.json"), Path(config.publish) if config.publish else None)


def measure(todo: list[Case], device: torch.device, config: MicroConfig) -> dict[str, Any]:
    """Time each case on `device`. On CUDA by events, and beside them the host's clock until the call came back."""
    found: dict[str, Any] = {}
    for case in todo:
        call = case.make(device)
        timed = time_host(call, config.seconds, config.warmup_seconds, synchronise=device.type == "cuda")
        row: dict[str, Any] = {"host": asdict(timed)}
        if device.type == "cuda":
            row["events"] = asdict(time_events(call, config.seconds, config.warmup_seconds))
        found[case.name] = row
    return found


def time_host(
    call: Callable[[], object],
    seconds: float,
    warmup_seconds: float,
    clock: Callable[[], int] = time.perf_counter_ns,
    synchronise: bool = False,
) -> Timing:
    """Time `call` by the host's monotonic clock, in turns of as many calls as fill 0.2 ms; at least nine turns.

    With `synchronise` the device is idle before each turn, and what it still has to do after is not in the time.
    """
    count, until = 0, clock() + round(warmup_seconds * 1e9)
    started = clock()
    while count == 0 or clock() < until:
        call()
        count += 1
    each = (clock() - started) / count
    calls = 1 if synchronise else max(1, round(_TURN_NS / max(each, 1.0)))
    turns: list[float] = []
    until = clock() + round(seconds * 1e9)
    while len(turns) < 9 or clock() < until:
        if synchronise:
            torch.cuda.synchronize()
        started = clock()
        for _ in range(calls):
            call()
        turns.append((clock() - started) / calls)
    return _timing(turns, calls)


def time_events(call: Callable[[], object], seconds: float, warmup_seconds: float) -> Timing:
    """Time `call` on the current CUDA stream by events around single calls; at least nine."""
    until = time.perf_counter_ns() + round(warmup_seconds * 1e9)
    while time.perf_counter_ns() < until:
        call()
    turns: list[float] = []
    until = time.perf_counter_ns() + round(seconds * 1e9)
    while len(turns) < 9 or time.perf_counter_ns() < until:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        turns.append(begin.elapsed_time(end) * 1e6)
    return _timing(turns, 1)


def _timing(turns: list[float], calls: int) -> Timing:
    low, median, high = np.percentile(np.array(turns), (25, 50, 75))
    return Timing(median=float(median), quartiles=(float(low), float(high)), turns=len(turns), calls_a_turn=calls)


# The cases. Their expectations were written before the first run and stay as they are; the report says which held.


def cases(config: MicroConfig) -> list[Case]:
    """Return what is timed on every device, up to the configured sizes."""
    tiny = Prediction(value=0.05, unit="us", factor=2, because="a Python call of a function without a body")
    empty = Prediction(value=0.7, unit="us", factor=1.6, because="argument parsing and dispatch, then nothing to do")
    todo = [
        Case(name="nothing", kind="call", bytes=0, operations=0, calls=0, make=lambda _: _nothing, expected=tiny),
        Case(name="empty operation", kind="call", bytes=0, operations=0, calls=1, make=_empty, expected=empty),
    ]
    todo += [gemm(n, n, n, expected) for n, expected in _GEMM.items() if n <= config.largest_gemm]
    todo.append(gemm(1, WIDTH, 3 * WIDTH, _GEMV))
    todo += [copy(nbytes, expected) for nbytes, expected in _COPY.items() if nbytes <= config.largest_mib * _MIB]
    todo += [elementwise("add", n, expected) for n, expected in _ADD.items() if n <= config.largest_mib * _MIB]
    todo.append(elementwise("add", _MIB, _FRESH, fresh=True))
    todo += [elementwise("sigmoid", n, expected) for n, expected in _SIGMOID.items() if n <= config.largest_mib * _MIB]
    return [*todo, chain(bound=False), chain(bound=True)]


def _rate(unit: Unit, value: float, factor: float, because: str) -> Prediction:
    return Prediction(value=value, unit=unit, factor=factor, because=because)


_GEMM = {
    64: _rate("GFLOP/s", 50, 1.5, "5 us of arithmetic under 1.5 us of call and packing"),
    128: _rate("GFLOP/s", 75, 1.4, "the call is small by now, packing is not"),
    256: _rate("GFLOP/s", 85, 1.4, "all three matrices lie in the second cache"),
    512: _rate("GFLOP/s", 90, 1.4, "as good as the largest"),
    1024: _rate("GFLOP/s", 90, 1.4, "two 8-wide multiply-adds a cycle at 3 GHz would be 96"),
}
_GEMV = _rate("GFLOP/s", 15, 1.5, "half an operation a byte: 2.4 MB of weights from the third cache at 30 GB/s")
_COPY = {
    4 * _KIB: _rate("GB/s", 10, 1.5, "the call's own cost"),
    64 * _KIB: _rate("GB/s", 50, 1.5, "the second cache, with a call to pay"),
    _MIB: _rate("GB/s", 35, 1.5, "the third cache: both buffers are more than the second holds"),
    16 * _MIB: _rate("GB/s", 20, 1.5, "more than the third cache holds, and others use it"),
    256 * _MIB: _rate("GB/s", 18, 1.5, "memory, one core"),
}
_ADD = {
    4 * _KIB: _rate("GB/s", 12, 1.5, "the call's own cost"),
    _MIB: _rate("GB/s", 35, 1.5, "as the copy of this size: one addition an element is free"),
    64 * _MIB: _rate("GB/s", 18, 1.5, "as the largest copy: memory"),
}
_FRESH = _rate("GB/s", 20, 1.5, "256 pages taken from the system, 0.25 us each, where the system gets them back")
_SIGMOID = {
    4 * _KIB: _rate("GB/s", 5, 1.5, "the call, and an exponential an element"),
    _MIB: _rate("GB/s", 12, 1.5, "the exponential, some 6 cycles for 8 elements with a division"),
    64 * _MIB: _rate("GB/s", 10, 1.5, "the exponential still, memory would give twice that"),
}
_CHAIN = {
    False: _rate("us", 120, 1.5, "100 calls that also make their results, 1.2 us each"),
    True: _rate("us", 80, 1.5, "100 calls, 0.8 us each: the arithmetic of 448 elements is 0.1 us"),
}
CHAIN_EXPECTED = Prediction(
    value=0.67, unit="ratio", factor=1.2, because="bound calls save the making of results, not the dispatch"
)
"""Of the bound chain's time over the eager one's, timed in turns."""


def gemm(m: int, k: int, n: int, expected: Prediction | None = None) -> Case:
    """Return the product of (m, k) and (k, n) in float32."""

    def make(device: torch.device) -> Callable[[], object]:
        a, b, out = torch.rand(m, k, device=device), torch.rand(k, n, device=device), torch.empty(m, n, device=device)
        return lambda: torch.mm(a, b, out=out)

    moved = 4 * (m * k + k * n + m * n)
    return Case(
        name=f"gemm {m} x {k} x {n}",
        kind="gemm",
        bytes=moved,
        operations=2 * m * k * n,
        calls=1,
        make=make,
        expected=expected,
    )


def copy(nbytes: int, expected: Prediction | None = None) -> Case:
    """Return the copy of `nbytes` from one buffer to another: read once, written once."""

    def make(device: torch.device) -> Callable[[], object]:
        source, target = (torch.ones(nbytes // 4, device=device) for _ in range(2))
        return lambda: target.copy_(source)

    name = f"copy {size(nbytes)}"
    return Case(name=name, kind="copy", bytes=2 * nbytes, operations=0, calls=1, make=make, expected=expected)


def elementwise(
    name: Literal["add", "sigmoid"], nbytes: int, expected: Prediction | None = None, fresh: bool = False
) -> Case:
    """Return `add` of two buffers of `nbytes`, or `sigmoid` of one, into another: kept, or `fresh` for every call."""
    function: Callable[..., Tensor]
    inputs, function = (2, torch.add) if name == "add" else (1, torch.sigmoid)

    def make(device: torch.device) -> Callable[[], object]:
        buffers = [torch.rand(nbytes // 4, device=device) for _ in range(inputs)]
        if fresh:
            return lambda: function(*buffers)
        out = torch.empty(nbytes // 4, device=device)
        return lambda: function(*buffers, out=out)

    return Case(
        name=f"{'fresh ' if fresh else ''}{name} {size(nbytes)}",
        kind="elementwise",
        bytes=(inputs + 1) * nbytes,
        operations=nbytes // 4,
        calls=1,
        make=make,
        expected=expected,
    )


def chain(bound: bool) -> Case:
    """Return additions and products of (1, 448) in turns, each of the last result: eager, or bound calls with `out=`.

    On CUDA the bound chain is a captured graph.
    """

    def make(device: torch.device) -> Callable[[], object]:
        if not bound:
            return _eager_chain(device)
        return _graph(_eager_chain(device)) if device.type == "cuda" else bound_chain()[0]

    return Case(
        name=f"chain of {LINKS}, {'bound' if bound else 'eager'}",
        kind="chain",
        bytes=LINKS * 3 * 4 * WIDTH,
        operations=LINKS * WIDTH,
        calls=LINKS,
        make=make,
        expected=_CHAIN[bound],
    )


def cuda_cases(config: MicroConfig) -> list[Case]:
    """Return what only a CUDA device has: host-device copies, pageable and pinned, and an empty synchronisation."""
    todo = []
    for nbytes in (nbytes for nbytes in _COPY if nbytes <= config.largest_mib * _MIB):
        for to_device in (True, False):
            for pinned in (False, True):
                way = f"{'H2D' if to_device else 'D2H'}, {'pinned' if pinned else 'pageable'}"
                make = _transfer(nbytes, to_device, pinned)
                name = f"{way}, {size(nbytes)}"
                todo.append(Case(name=name, kind="transfer", bytes=nbytes, operations=0, calls=1, make=make))
    make_sync: Make = lambda _: torch.cuda.synchronize  # noqa: E731
    return [*todo, Case(name="synchronise", kind="synchronise", bytes=0, operations=0, calls=1, make=make_sync)]


def chains(config: MicroConfig) -> Comparison:
    """Compare the eager chain with the bound one on the CPU, in turns."""
    pair = ("eager", _eager_chain(torch.device("cpu"))), ("bound", bound_chain()[0])
    return compare(*pair, budget_s=4 * config.seconds, warmup_s=config.warmup_seconds)


def bound_chain() -> tuple[Callable[[], None], Tensor]:
    """Return the chain as bound calls over planned memory, and where its result lies."""
    tape, (x, a, b) = Tape(stage="chain"), _chain_inputs(torch.device("cpu"))
    links = [tape.slot(f"link {i}", 1, WIDTH) for i in range(LINKS - 1)] + [tape.slot("result", 1, WIDTH, keep=True)]
    for i, link in enumerate(links):
        function, other = (torch.add, a) if i % 2 == 0 else (torch.mul, b)
        tape.call(function, links[i - 1] if i else x, other, out=link)
    program = tape.build()
    return program.runner("chain"), program.tensor(links[-1])


def size(nbytes: int) -> str:
    """Return a size as one reads it: 4 KiB, 256 MiB."""
    return f"{nbytes // _MIB} MiB" if nbytes >= _MIB else f"{nbytes // _KIB} KiB"


def _eager_chain(device: torch.device) -> Callable[[], Tensor]:
    x, a, b = _chain_inputs(device)

    def run() -> Tensor:
        y = x
        for i in range(LINKS):
            y = y + a if i % 2 == 0 else y * b
        return y

    return run


def _chain_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Values that stay near 1 for any number of links, so that no subnormal slows them."""
    return tuple(torch.full((1, WIDTH), value, device=device) for value in (1.0, 0.5, 0.5))  # type: ignore[return-value]


def _graph(call: Callable[[], object]) -> Callable[[], None]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):  # capture wants its libraries loaded and its memory taken before
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return lambda: graph.replay()


def _transfer(nbytes: int, to_device: bool, pinned: bool) -> Make:
    def make(device: torch.device) -> Callable[[], object]:
        host, there = torch.ones(nbytes // 4, pin_memory=pinned), torch.ones(nbytes // 4, device=device)
        target, source = (there, host) if to_device else (host, there)
        return lambda: target.copy_(source, non_blocking=pinned)

    return make


def _nothing() -> None:
    pass


def _empty(device: torch.device) -> Callable[[], object]:
    none = torch.empty(0, device=device)
    return lambda: torch.neg(none, out=none)
