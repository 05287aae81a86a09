"""Programs over laid-out memory compute what the same calls compute with a buffer for each value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldline.core.errors import WorldlineError
from worldline.engine.arena import Program, Slot, Tape


@st.composite
def recipes(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Return calls on values so far: value i is made from two earlier ones; value 0 is the input."""
    count = draw(st.integers(1, 12))
    return [
        (draw(st.sampled_from(("add", "mul", "cat"))), draw(st.integers(0, i)), draw(st.integers(0, i)))
        for i in range(count)
    ]


@settings(max_examples=60, deadline=None)
@given(recipes(), st.integers(0, 2**31))
def test_sharing_memory_changes_no_value(recipe: list[tuple[str, int, int]], seed: int) -> None:
    given_values = torch.randn(5, generator=torch.Generator().manual_seed(seed))
    tape, values = Tape(stage="only"), [given_values]
    slots: list[Slot | torch.Tensor] = [given_values]
    for number, (kind, a, b) in enumerate(recipe):
        left, right = values[a][:5], values[b][:5]
        both = [slot.view(lambda t: t[:5]) if isinstance(slot, Slot) else slot for slot in (slots[a], slots[b])]
        if kind == "cat":
            values.append(torch.cat((left, right)))
            slots.append(tape.slot(str(number), 10))
            tape.call(torch.mul, both[0], 1.0, out=slots[-1].view(lambda t: t[:5]))
            tape.call(torch.mul, both[1], 1.0, out=slots[-1].view(lambda t: t[5:]))
        else:
            function = getattr(torch, kind)
            values.append(function(left, right))
            slots.append(tape.slot(str(number), 5))
            tape.call(function, *both, out=slots[-1])
    result = tape.slot("result", len(values[-1]), keep=True)
    tape.call(torch.mul, slots[-1], 1.0, out=result)
    program = tape.build()
    for _ in range(2):
        spoil(program)
        program.run("only")
        assert torch.equal(program.tensor(result), values[-1])
    assert_nothing_overlaps(program)


def spoil(program: Program) -> None:
    """Put NaN wherever no value is kept from frame to frame: who reads what it did not write shows it."""
    for slot in program.slots:
        if not slot.keep:
            program.tensor(slot).view(torch.uint8).fill_(255)


def assert_nothing_overlaps(program: Program) -> None:
    for i, a in enumerate(program.slots):
        assert a.offset >= 0
        assert a.offset + a.nbytes <= program.nbytes
        for b in program.slots[:i]:
            together = a.keep or b.keep or (a.first <= b.last and b.first <= a.last)
            assert not together or a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset


def test_values_of_different_times_share_a_place() -> None:
    tape = Tape(stage="only")
    x = torch.ones(1000)
    first, second, third = (tape.slot(name, 1000) for name in "abc")
    kept = tape.slot("kept", 1000, keep=True)
    tape.call(torch.add, x, 1.0, out=first)
    tape.call(torch.add, first, 1.0, out=second)
    tape.call(torch.add, second, 1.0, out=third)
    tape.call(torch.add, third, 1.0, out=kept)
    program = tape.build()
    program.run("only")
    assert program.tensor(kept)[0] == 5
    assert first.offset == third.offset
    assert program.nbytes == 3 * 4032
    assert "12,096 bytes; each buffer for itself would take 16,128" in program.map()


def test_mistakes_are_told() -> None:
    tape = Tape(stage="only")
    slot = tape.slot("square", 4, 4)
    tape.call(torch.relu_, slot.view(lambda t: t.T.contiguous()))
    with pytest.raises(WorldlineError, match="a view of square is a copy"):
        tape.build()
    tape.slot("idle", 3)
    with pytest.raises(WorldlineError, match="no call of this program uses idle"):
        tape.build()
