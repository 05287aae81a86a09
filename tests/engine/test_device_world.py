"""A frame in five stages over a device's buffers: on a CPU the same code, without anything to pin or capture."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_latent_workload import actions, make_world

from worldline.core.errors import WorldlineError
from worldline.engine.recording import Recording
from worldline.engine.replay import verify
from worldline.engine.runtime import Engine
from worldline.engine.workloads.device_world import DeviceWorld, Dtype
from worldline.engine.workloads.latent import LatentWorkload, Mode, Starts, make_starts, save_starts
from worldline.model.checkpoint import save_world


@pytest.fixture(scope="module")
def starts() -> Starts:
    return make_starts("two_room", context=4, count=3)


@pytest.fixture(scope="module")
def checkpoint(starts: Starts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_world(tmp_path_factory.mktemp("worlds") / "small", make_world(), training={})
    save_starts(path, starts)
    return path


def play(workload: LatentWorkload, record: Path | None = None, frames: int = 25) -> tuple[list[np.ndarray], Engine]:
    with Engine(workload, record=record, snapshot_every=10, contracts="strict") as engine:
        pictures = [engine.reset(1).picture.copy()]
        for number, action in enumerate(actions(frames)):
            pictures.append(engine.step(action).picture.copy())
            if number == 12:
                pictures.append(engine.anchor(pictures[3]).picture.copy())
    return pictures, engine

    def __init__(self, starts: Starts) -> None:
        super().__init__(make_world(), starts, mode="eager")
        self._play_on(DeviceWorld(self.world, self._begin(0), len(self.gauge_names), "cpu", "eager", "float32"))


@pytest.mark.parametrize("predictor", ["gru", "transformer"])
def test_on_a_cpu_it_gives_the_bits_of_plain_calls(starts: Starts, predictor: str) -> None:
    world = make_world(predictor=predictor)
    plain, way = LatentWorkload(world, starts, mode="eager"), LatentWorkload(world, starts, mode="eager")
    way._play_on(DeviceWorld(world, way._begin(0), len(way.gauge_names), "cpu", "eager", "float32"))
    (pictures, one), (others, two) = play(plain), play(way)
    assert one.chain == two.chain
    assert all(np.array_equal(a, b) for a, b in zip(pictures, others, strict=True))
    assert np.allclose(plain.gauge, way.gauge, rtol=1e-5)
    assert [stage.name for stage in way.stages] == ["h2d", "step", "decode", "gauge", "d2h"]
    assert (pictures[0] != pictures[-1]).any()


COMPILED = """
import sys
from worldline.engine.recording import Recording
from worldline.engine.replay import verify
from worldline.engine.runtime import Engine
from worldline.engine.workloads.latent import LatentWorkload
checkpoint, path = sys.argv[1:]
compiled = LatentWorkload.open(checkpoint, "compile")
engines = [Engine(compiled, path), Engine(LatentWorkload.open(checkpoint, "eager"))]
for engine in engines:
    engine.reset(1)
for step in range(20):
    ours, plain = (engine.step([0.3, 1.0 - 0.1 * step]) for engine in engines)
    assert abs(ours.picture.astype(int) - plain.picture).max() <= 1, step
assert ours.chain != plain.chain, "the same bits: was anything compiled?"
engines[0].close()
assert Recording(path).header.fingerprint["mode"] == "compile"
print(verify(path, compiled).ok)
"""


KEY = """
import sys
import torch._inductor.config
from worldline.engine.workloads.latent import LatentWorkload
torch._inductor.config.epilogue_fusion = sys.argv[2] == "fused"
print(LatentWorkload.open(sys.argv[1], "compile").fingerprint()["compiled"])
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="apt-get install g++")
def test_the_fingerprint_tells_what_was_compiled(checkpoint: Path) -> None:
    """The same in another process, and not the same where the compiler was set otherwise."""
    keys = [
        subprocess.run([sys.executable, "-c", KEY, checkpoint, how], capture_output=True, text=True, check=True).stdout
        for how in ("fused", "fused", "apart")
    ]
    assert len(keys[0].strip()) == 64
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.skipif(not shutil.which("g++"), reason="apt-get install g++")
def test_compiled_it_is_near_and_replays_to_the_bit(checkpoint: Path, tmp_path: Path) -> None:
    """In a process of its own: torch's compiler does not see through the tests' type checks."""
    command = [sys.executable, "-c", COMPILED, str(checkpoint), str(tmp_path / "session.wlr")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"


def test_what_a_machine_lacks_is_told(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorldlineError, match="for device=cuda"):
        LatentWorkload.open(checkpoint, dtype="bfloat16")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(WorldlineError, match="apt-get install"):
        LatentWorkload.open(checkpoint, mode="compile")
    if not torch.cuda.is_available():
        with pytest.raises(WorldlineError, match="no such device"):
            LatentWorkload.open(checkpoint, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "dtype"), [("eager", "float32"), ("graph", "float32"), ("graph", "bfloat16")])
def test_on_cuda_it_plays_without_a_hidden_wait_and_replays_to_the_bit(
    checkpoint: Path, tmp_path: Path, mode: Mode, dtype: Dtype
) -> None:
    path = tmp_path / "session.wlr"
    workload = LatentWorkload.open(checkpoint, mode=mode, device="cuda", dtype=dtype)
    pictures, _ = play(workload, record=path)
    plain, _ = play(LatentWorkload.open(checkpoint, mode="eager"))
    assert np.abs(np.stack(pictures).astype(int) - np.stack(plain)).mean() < 3.0
    assert workload.on_device.spans_ns.keys() == {stage.name for stage in workload.stages}
    assert verify(path, LatentWorkload.open_for(Recording(path), checkpoint)).ok
