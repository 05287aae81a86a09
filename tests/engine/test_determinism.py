"""Levels of determinism: what each takes, puts back, and finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_world import SmallWorld, actions

from worldline.core.errors import WorldlineError
from worldline.engine.determinism import Level, arithmetic, prepare
from worldline.engine.recording import Recording
from worldline.engine.replay import verify
from worldline.engine.runtime import Engine
from worldline.engine.workload import Stage


def settings() -> tuple[object, ...]:
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.is_inference_mode_enabled(),
    )


@pytest.mark.parametrize(
    ("level", "inside"), [("off", (3, False, True)), ("run", (1, False, True)), ("machine", (1, True, False))]
)
def test_settings_are_made_and_put_back(level: Level, inside: tuple[object, ...]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        before = settings()
        with arithmetic(level, threads=1):
            assert settings() == (*inside, True)
        assert settings() == before
        with pytest.raises(ZeroDivisionError), arithmetic(level, threads=1):
            _ = 1 / 0
        assert settings() == before
        torch.use_deterministic_algorithms(True)
        with arithmetic(level, threads=1):
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()  # whoever had set it keeps it
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def tf32() -> tuple[str, ...]:
    """Of cuDNN, its convolutions, its recurrent layers, and cuBLAS; torch keeps these without a GPU too."""
    cudnn = torch.backends.cudnn
    return tuple(part.fp32_precision for part in (cudnn, cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul))


def test_machine_turns_off_tf32_that_someone_asked_for() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    untouched = tf32()
    with arithmetic("machine", threads=1, cuda=True):
        assert tf32() == ("ieee",) * 4
    assert tf32() == untouched
    cudnn.fp32_precision = "ieee"
    assert tf32() == ("ieee",) * 4  # still following: being put back did not make their own of what they followed
    cudnn.fp32_precision = "none"
    rest = matmul.fp32_precision
    try:
        cudnn.conv.fp32_precision = matmul.fp32_precision = "tf32"  # a choice of their own, deaf to the parent's
        asked = tf32()
        with arithmetic("machine", threads=1, cuda=True):
            assert tf32() == ("ieee",) * 4
        assert tf32() == asked
    finally:
        cudnn.conv.fp32_precision, matmul.fp32_precision = "none", rest


def play(level: Level, record: Path | None = None) -> tuple[list[np.ndarray], Engine]:
    with Engine(SmallWorld(), record=record, determinism=level) as engine:
        pictures = [engine.reset(3).picture.copy()]
        pictures += [engine.step(action).picture.copy() for action in actions(20)]
    return pictures, engine


def test_off_takes_no_hash_and_cannot_be_recorded(tmp_path: Path) -> None:
    with pytest.raises(WorldlineError, match="nothing to record"):
        play("off", record=tmp_path / "a.wlr")
    (plain, off), (sure, machine) = play("off"), play("machine")
    assert all(np.array_equal(a, b) for a, b in zip(plain, sure, strict=True))
    begun = Engine(SmallWorld()).chain
    assert off.chain == begun != machine.chain
    with pytest.raises(WorldlineError, match="nothing to record"):
        off.start_recording(tmp_path / "a.wlr")


def test_the_level_goes_with_the_recording(tmp_path: Path) -> None:
    play("run", record=tmp_path / "run.wlr")
    assert Recording(tmp_path / "run.wlr").header.fingerprint["determinism"] == "run"
    verdict = verify(tmp_path / "run.wlr", SmallWorld())
    assert verdict.ok
    assert not verdict.differs
    other = SmallWorld()
    other.frame_noise = 1
    assert "within one process only" in str(verify(tmp_path / "run.wlr", other))
    play("machine", record=tmp_path / "machine.wlr")
    assert "within one process only" not in str(verify(tmp_path / "machine.wlr", other))


class Careless(SmallWorld):
    """Its step adds up in whatever order the system likes: an operation that torch refuses where bits are promised."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = (Stage("step", self._scatter, ("z", "memory")), *self.stages[1:])

    def _scatter(self) -> None:
        torch.ops.aten.put_(self.memory, torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_an_operation_without_a_fixed_result_is_found_at_machine() -> None:
    for level in ("off", "run"):
        engine = Engine(Careless(), determinism=level)
        engine.reset(0)
        engine.step(actions(1)[0])
    engine = Engine(Careless(), determinism="machine")
    engine.reset(0)
    with pytest.raises(RuntimeError, match="deterministic"):
        engine.step(actions(1)[0])


def test_a_process_that_only_warns_is_made_to_refuse() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        engine = Engine(Careless(), determinism="machine")
        engine.reset(0)
        with pytest.raises(RuntimeError, match="deterministic"):
            engine.step(actions(1)[0])
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


TWIN = """
import sys; sys.path.insert(0, sys.argv[1])
from test_determinism import play
print(play("machine")[1].chain.hex())
"""


def test_two_processes_give_the_same_chain_at_machine() -> None:
    command = [sys.executable, "-c", TWIN, str(Path(__file__).parent)]
    chains = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert chains == {play("machine")[1].chain.hex() + "\n"}


def test_cuda_at_machine_wants_its_workspace_settled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(WorldlineError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        prepare("machine", cuda=True)
    prepare("run", cuda=True)
    prepare("machine", cuda=False)
