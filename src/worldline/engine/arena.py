"""Programs over one piece of memory: calls noted down once, their buffers laid out by lifetime, then replayed.

What a CUDA graph is on a GPU this is on a CPU: the calls of a stage are a flat list whose arguments are bound, every
result goes to a place that was planned before the first frame, and nothing is allocated afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from worldline.core.errors import WorldlineError

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass(eq=False)
class Slot:
    """A buffer of a tape, before it has an address. Arguments of calls may be slots or views of them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    keep: bool
    """It holds its value from frame to frame, so it shares its place with nothing. It begins as zeros."""
    first: int = -1
    last: int = -1
    """The calls between which it is used."""
    offset: int = -1

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def view(self, how: Callable[[Tensor], Tensor]) -> View:
        """Return a part or another shape of it; `how` makes a view of the tensor, never a copy."""
        return View(self, how)


@dataclass(frozen=True, eq=False)
class View:
    """A slot as a call sees it."""

    slot: Slot
    how: Callable[[Tensor], Tensor]


@dataclass
class Tape:
    """Calls noted down, stage by stage, in the order of a frame."""

    slots: list[Slot] = field(default_factory=list)
    calls: list[tuple[str, Call]] = field(default_factory=list)
    stage: str = ""

    def slot(self, name: str, *shape: int, dtype: torch.dtype = torch.float32, keep: bool = False) -> Slot:
        """Declare a buffer. Unless it is kept, it holds a value from its first call to its last one only."""
        self.slots.append(Slot(name, shape, dtype, keep))
        return self.slots[-1]

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Note a call down. It must write only into slots, or tensors of the caller's, by `out=` or in place."""
        for each in (*args, *kwargs.values()):
            slot = each.slot if isinstance(each, View) else each
            if isinstance(slot, Slot):
                slot.first = len(self.calls) if slot.first < 0 else slot.first
                slot.last = len(self.calls)
        self.calls.append((self.stage, (function, args, kwargs)))

    def build(self) -> Program:
        """Lay the slots out, bind the calls, and return what can be run."""
        return Program(self)


class Program:
    """A tape with its memory: `run(stage)` replays the calls of a stage and allocates nothing."""

    def __init__(self, tape: Tape) -> None:
        self.slots = tuple(tape.slots)
        unused = [slot.name for slot in self.slots if slot.first < 0]
        if unused:
            raise WorldlineError(f"no call of this program uses {', '.join(unused)}")
        self.nbytes = _lay_out(self.slots, len(tape.calls))
        self.memory = torch.zeros(self.nbytes, dtype=torch.uint8)
        self._tensors = {slot: self._bind(slot) for slot in self.slots}
        self._stages: dict[str, list[Call]] = {}
        for stage, (function, args, kwargs) in tape.calls:
            bound = tuple(self.tensor(arg) for arg in args), {key: self.tensor(arg) for key, arg in kwargs.items()}
            self._stages.setdefault(stage, []).append((function, *bound))

    def tensor(self, argument: Any) -> Any:
        """Return a slot or view as a tensor in this program's memory; anything else is returned as it is."""
        if isinstance(argument, View):
            tensor = self._tensors[argument.slot]
            found = argument.how(tensor)
            if found.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                raise WorldlineError(f"a view of {argument.slot.name} is a copy; give a function that makes a view")
            return found
        return self._tensors[argument] if isinstance(argument, Slot) else argument

    def run(self, stage: str) -> None:
        """Replay the calls of a stage, in inference mode."""
        for function, args, kwargs in self._stages[stage]:
            function(*args, **kwargs)

    def runner(self, stage: str) -> Callable[[], None]:
        """Return `run` for one stage."""
        calls = self._stages[stage]

        def run() -> None:
            for function, args, kwargs in calls:
                function(*args, **kwargs)

        return run

    def map(self) -> str:
        """Return the memory's map as text: every buffer with its place and the calls it lives through."""
        rows = [f"{'offset':>9} {'bytes':>9}  {'calls':<11} buffer"]
        for slot in sorted(self.slots, key=lambda slot: (slot.offset, slot.first)):
            lives = "always" if slot.keep else f"{slot.first} to {slot.last}"
            rows.append(f"{slot.offset:>9,} {slot.nbytes:>9,}  {lives:<11} {slot.name} {list(slot.shape)}")
        apart = sum(_padded(slot.nbytes) for slot in self.slots)
        return "\n".join([*rows, f"{self.nbytes:,} bytes; each buffer for itself would take {apart:,}"])

    def _bind(self, slot: Slot) -> Tensor:
        return self.memory[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.shape)


def _lay_out(slots: tuple[Slot, ...], calls: int) -> int:
    """Give slots their offsets, the largest first, each in the lowest gap among those it lives with; return the end."""
    placed: list[tuple[Slot, int, int]] = []
    for slot in sorted(slots, key=lambda slot: -slot.nbytes):
        begin, end = (0, calls) if slot.keep else (slot.first, slot.last)
        taken = sorted(
            (other.offset, other.offset + _padded(other.nbytes))
            for other, first, last in placed
            if first <= end and begin <= last
        )
        offset = 0
        for start, stop in taken:
            if offset + _padded(slot.nbytes) <= start:
                break
            offset = max(offset, stop)
        slot.offset = offset
        placed.append((slot, begin, end))
    return max((slot.offset + _padded(slot.nbytes) for slot in slots), default=0)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
