"""Each contract with a workload that breaks it: the breach is named by stage, call site and frame."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engine_world import SmallWorld, actions
from torch.utils._pytree import tree_map_only

from worldline.core.errors import WorldlineError
from worldline.engine import contracts
from worldline.engine.contracts import Contracts, ContractViolation, slope, synchronises
from worldline.engine.runtime import Engine
from worldline.engine.workload import Stage


class Planted(SmallWorld):
    """Does one thing more while it draws."""

    def __init__(self, also: Callable[[], Any], allocates: bool = True) -> None:
        super().__init__()
        step, draw = self.stages
        self.also = also
        self.stages = (step, Stage("decode", self._draw_and_more, draw.writes, allocates))

    def _draw_and_more(self) -> None:
        self._draw()
        self.also()


def play(world: SmallWorld, frames: int = 600) -> Engine:
    engine = Engine(world, contracts="strict")
    engine.reset(0)
    for action in actions(frames):
        engine.step(action)
    return engine


def test_a_clean_workload_keeps_every_contract() -> None:
    assert play(SmallWorld(), 1100).contracts.found == []


def test_a_tensor_that_a_captured_stage_makes_is_named() -> None:
    def also() -> None:
        torch.ones(3)

    with pytest.raises(ContractViolation, match=r"allocation in stage 'decode' at frame 17: aten\.") as told:
        play(Planted(also, allocates=False))
    assert "(engine_world.py:" in str(told.value)  # the drawing itself makes some before


def test_an_unbounded_cache_is_named_by_the_line_that_fills_it() -> None:
    cache = []

    def also() -> None:
        cache.append(torch.ones(3))

    with pytest.raises(ContractViolation, match="hoarding in stage 'decode'") as told:
        play(Planted(also))
    assert "in also)" in str(told.value)
    assert "are still alive" in str(told.value)


def test_a_ring_of_the_last_frames_is_no_hoard() -> None:
    ring: list[torch.Tensor] = []

    def also() -> None:
        ring.append(torch.ones(3))
        del ring[:-8]

    assert play(Planted(also)).contracts.found == []


def test_a_planted_sleep_is_named() -> None:
    with pytest.raises(
        ContractViolation, match="wait in stage 'decode' at frame 65: it gave the processor away for"
    ) as t:
        play(Planted(lambda: time.sleep(0.003)), 100)
    assert float(re.findall(r"away for ([\d.]+) ms", str(t.value))[0]) >= 3


def test_work_is_no_waiting() -> None:
    def also() -> None:
        end = time.thread_time_ns() + 2_000_000
        while time.thread_time_ns() < end:
            pass

    assert play(Planted(also), 140).contracts.found == []


def count_frames(contracts: Contracts, busy: np.ndarray, hoard: list[bytes] | None = None) -> None:
    for frame, nanoseconds in enumerate(busy.tolist()):
        if hoard is not None:
            hoard.append(bytes(400))
        contracts.frame_done(frame, int(nanoseconds))


def test_growing_memory_and_time_are_told() -> None:
    noise = np.random.default_rng(0).normal(1000, 50, 20_000)
    with pytest.warns(UserWarning, match=r"growth of memory at frame \d+: \d+ KiB every 1,000 frames"):
        count_frames(Contracts("warn"), noise[:11_000], [])
    with pytest.warns(UserWarning, match=r"growth of time at frame \d+: \d+\.\d us every 1,000 frames"):
        count_frames(Contracts("warn"), noise + 0.05 * np.arange(20_000))
    count_frames(steady := Contracts("warn"), noise)  # a warning would be an error here
    assert steady.found == []


def test_the_interval_of_a_trend_holds_the_truth() -> None:
    rng, held = np.random.default_rng(2), 0
    for _ in range(400):
        low, middle, high = slope([(t, 3.0 * t + float(e)) for t, e in enumerate(rng.standard_t(3, 24))])
        assert low <= middle <= high
        held += low <= 3.0 <= high
    assert 388 <= held < 400  # 99%


class OnDevice(torch.Tensor):
    """Says that it lies on a device."""

    device = torch.device("cuda", 0)


def test_what_waits_for_a_device() -> None:
    """Told from the operations alone, with tensors that stand for those of a device."""
    device, cpu = torch.zeros(3, device="meta"), torch.zeros(3)
    there = torch.zeros(3).as_subclass(OnDevice)
    assert synchronises("aten._local_scalar_dense.default", (there,), {}) != ""
    assert synchronises("aten._local_scalar_dense.default", (cpu,), {}) == ""
    assert "waits for the copy" in synchronises("aten.copy_.default", (cpu, there), {})
    assert "waits for the copy" in synchronises("aten.to.device", (there, torch.device("cpu"), torch.float32), {})
    copied = (there, torch.device("cpu"), torch.float32, False, True)  # a copy wanted, and waited for
    assert "waits for the copy" in synchronises("aten.to.device", copied, {})
    assert "pageable memory" in synchronises("aten.copy_.default", (there, cpu, True), {})
    assert synchronises("aten.copy_.default", (there, there), {}) == ""
    assert synchronises("aten.to.dtype", (there, torch.float64), {}) == ""
    assert synchronises("aten.add.Tensor", (device, 1.0), {}) == ""


@pytest.mark.parametrize(
    "read",
    [torch.Tensor.item, float, bool, torch.nonzero, lambda x: torch.where(x > 0), lambda x: x[x > 0]],
    ids=["item", "float", "bool", "nonzero", "where", "mask"],
)
@pytest.mark.parametrize("inference", [False, True])
def test_what_reads_values_is_known_by_the_name_that_an_audit_sees(
    read: Callable[[torch.Tensor], Any], inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In inference mode, where frames are played, operations come with other names."""
    reasons = []

    def on_a_device(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        args = tree_map_only(torch.Tensor, lambda each: each.as_subclass(OnDevice), args)
        reasons.append(synchronises(name, args, kwargs))
        return ""

    monkeypatch.setattr(contracts, "synchronises", on_a_device)
    with torch.inference_mode(inference), contracts._Audit():
        read(torch.ones(1))
    assert any(reasons)


@pytest.mark.gpu
def test_a_hidden_synchronisation_is_named() -> None:
    number = torch.ones(1, device="cuda")
    with pytest.raises(ContractViolation, match="synchronisation in stage 'decode'"):
        play(Planted(lambda: number.item()))


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(WorldlineError, match="strict, warn or off"):
        Engine(SmallWorld(), contracts="loud")  # type: ignore[arg-type]
