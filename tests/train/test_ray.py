"""One worker of Ray Train is killed; Ray starts all again, and the run ends as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from pretrain_curve import CURVE, read_curve


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install -c constraints.txt 'worldline[ray]'")
def test_a_killed_worker_is_started_again_and_sees_the_same_batches(tmp_path: Path) -> None:
    run, script = tmp_path / "run", Path(__file__).parent / "ray_process.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(run)], env=environment, stdout=log, stderr=subprocess.STDOUT
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
    record = json.loads(CURVE.read_text())
    found = [json.loads(line)["batch"] for line in (run / "batches.jsonl").read_text().splitlines()]
    assert found == record["batches"]
    assert read_curve(run) == pytest.approx(record["loss"], rel=record["relative_tolerance"])
    timing = json.loads((run / "result.json").read_text())["timing"]
    assert (timing["ranks"], timing["resumed_at"] % 8) == (2, 0)
    assert timing["resumed_at"] > 0
