"""Several ranks as processes under torchrun: their gradients, killed ones, and other numbers of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks_process import first_gradients
from toy_clips import MODEL, toy_config

from worldline.bench.bottleneck import read_waiting
from worldline.train.masks import MaskConfig
from worldline.train.memory import measuring
from worldline.train.parallel import ParallelConfig, Ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from pretrain_curve import CURVE, read_curve

SCRIPT = Path(__file__).parent / "ranks_process.py"


def start(run: Path, *kills: int, ranks: int = 0, restarts: int = 0) -> int:
    """Run the script on so many ranks (0: a plain process); return the exit status."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        launcher += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    words = [*launcher, str(SCRIPT), str(run), str(run.parent), *map(str, kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run(words, env=environment, capture_output=True, check=False, timeout=300).returncode


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that two ranks begin, one goes on with and four end; killed twice under torchrun, then once alone."""
    run = tmp_path_factory.mktemp("ranks") / "run"
    # the first time torchrun starts both again by itself, the second time it gives up
    assert start(run, 10, 1, 19, 0, ranks=2, restarts=1) == 1
    assert (run / "last").is_symlink()
    assert not (run / "result.json").exists()
    assert start(run, 27, 0) == -signal.SIGKILL
    assert start(run, ranks=4) == 0
    return run


@pytest.mark.slow
def test_killed_and_resharded_it_saw_the_same_batches_and_learned_the_same(run: Path) -> None:
    record = json.loads(CURVE.read_text())
    found = [json.loads(line) for line in (run / "batches.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in found] == record["batches"]
    assert [line["step"] for line in found] == list(range(1, 33))
    assert read_curve(run) == pytest.approx(record["loss"], rel=record["relative_tolerance"])
    ranks = [json.loads(line)["ranks"] for line in (run / "timing.jsonl").read_text().splitlines()]
    assert sorted(set(ranks), key=ranks.index) == [2, 1, 4]
    waited = read_waiting(run)
    assert waited["ranks"] == 4
    assert waited["updates"] % 8 == 0
    assert 0.0 < waited["stall_over_ranks"]["p50"] <= waited["stall"]["max"] <= 1.0
    assert len(list(run.parent.glob("*.killed"))) == 3


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one(run: Path) -> None:
    alone = first_gradients(Ranks(0, 1, None, None))
    with np.load(run.parent / "gradients.npz") as shared:
        for name, gradient in shared.items():
            wanted = alone["ema" if name == "offloaded" else name]
            scale = np.abs(wanted).max()
            assert scale > 1e-3
            allowed = 1e-2 if name == "bfloat16" else 2e-6  # norms' weights, too, are gathered in bfloat16
            np.testing.assert_allclose(gradient, wanted, atol=allowed * scale, err_msg=name)


@pytest.mark.slow
def test_planned_memory_of_a_rank_is_what_its_allocator_gave_out(run: Path) -> None:
    config = toy_config(Path("none"))
    with measuring(MODEL, MaskConfig(), config.learner, ParallelConfig(), ranks=2) as measure:
        need = measure(4)
    measured = json.loads((run.parent / "allocated.json").read_text())
    assert need.total == pytest.approx(measured, rel=0.1)
