"""One worker of Ray Train is killed; Ray starts all again, and the run ends as if nothing had been.

The same where a reader of Ray Data is killed, and where nodes come and go.
"""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from toy_clips import ToyClips, toy_config

from worldline.train import pretrain as module
from worldline.train.learner import Learner

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from pretrain_curve import CURVE, read_curve

SCRIPT = Path(__file__).parent / "ray_process.py"
# Ray would let everything else on the machine go before its workers
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install -c constraints.txt 'worldline[ray]'"),
]


def check(run: Path, ranks: int) -> None:
    """The log of batches is that of one undisturbed process, and the losses are within rounding."""
    record = json.loads(CURVE.read_text())
    found = [json.loads(line)["batch"] for line in (run / "batches.jsonl").read_text().splitlines()]
    assert found == record["batches"]
    assert read_curve(run) == pytest.approx(record["loss"], rel=record["relative_tolerance"])
    timing = json.loads((run / "result.json").read_text())["timing"]
    assert (timing["ranks"], timing["resumed_at"] % 8) == (ranks, 0)
    assert timing["resumed_at"] > 0


def finish(case: str, run: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), case, str(run)], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_a_killed_worker_is_started_again_and_sees_the_same_batches(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "killed", str(run)], env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while not (run / "last").is_symlink():
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
            os.kill(int((run / ".lock").read_text()), signal.SIGKILL)  # rank 0, wherever Ray has put it
            status = process.wait(timeout=400)
        finally:
            process.terminate()  # if it is still there; Ray's own processes end with it
            process.wait(timeout=60)
    assert status == 0, (tmp_path / "log").read_text()
    check(run, ranks=2)


def test_ray_data_goes_on_with_the_same_batches_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, run = Learner.update, tmp_path / "run"

    def stop(self: Learner, batch: object) -> object:
        if batch.step == 17:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return original(self, batch)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:  # threads of one process read the first 16 of 3 updates an epoch
        patch.setattr(module, "open_clips", lambda path: ToyClips())
        patch.setattr(Learner, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            module.pretrain(toy_config(run))
    finish("fed", run)
    assert (tmp_path / "reader-killed").exists()
    check(run, ranks=2)


def test_it_takes_a_second_worker_when_there_is_room_and_goes_on_without_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish("elastic", run)
    check(run, ranks=1)
    ranks = [json.loads(line)["ranks"] for line in (run / "timing.jsonl").read_text().splitlines()]
    assert [ranks[0], 2 in ranks, ranks[-1]] == [1, True, 1]
    assert json.loads((run / "result.json").read_text())["timing"]["resumed_at"] >= 16
