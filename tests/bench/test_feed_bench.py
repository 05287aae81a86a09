"""The feed benchmark reads the same batches every way, counts the CPU time of other processes, and tells the ratios."""

import subprocess
import sys

import numpy as np
import pytest

from worldline.bench import stall
from worldline.bench.feed import FeedBenchConfig, cpu_seconds, measure, render
from worldline.data.clips import Record

HEAT = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"


class FewClips:
    num_clips, fingerprint, num_frames, image_size = 24, "few", 4, 16

    def read(self, ids: np.ndarray) -> np.ndarray:
        return np.stack([np.full((4, 16, 16, 3), clip, np.uint8) for clip in ids.tolist()])

    def record(self) -> Record:
        raise NotImplementedError


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_and_processes_give_the_same_batches() -> None:
    before = cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", HEAT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert cpu_seconds() - before >= 0.45  # told in hundredths
        child.communicate(b"\n")
    config = FeedBenchConfig(batch=8, batches=4, rounds=3, ray=False)
    rows = measure(FewClips(), config)
    assert [row["name"] for row in rows] == ["1 thread", "2 threads", "1 process", "2 processes"]
    assert rows[0]["cpu_ratio"] == [1.0, 1.0, 1.0]
    made = {"machine": {"processor": "p", "cores": 1}, "versions": {}, "commit": "c", "command": "x"}
    result = {"image_size": 16, "num_frames": 4, "batch": 8, "batches": 4, "rounds": 3, "provenance": made}
    rows[2]["cpu_ratio"] = [2.5, 2.0, 3.0]
    text = render({**result, "timing": {"raw": rows}})
    assert text.startswith("# Who reads ahead: CPU time beside one thread; raw: 1 process 2.50\n")
    assert "| 2.50 (2.00 to 3.00) |" in text
    row = {"training": "t", "updates": 4, "step_ms": 5.0, "overall": 0.0213, "p50": 0.0, "p95": 0.1, "max": 0.2}
    text = render({**result, "timing": {"raw": rows, "stall": [{**row, "kept": False}]}})
    assert "; training on PushT waits 2.1% of its time at most\n" in text
    assert "| t | 4 | 5 | 2.13% | 0.00% | 10.00% | 20.00% | no |" in text


def test_what_training_waits_is_judged_by_all_of_its_time() -> None:
    """Nine updates of 10 ms that wait for nothing, and one of 110 ms that waited 50."""
    lines = [{"updates_per_second": 100.0, "loader_share": 0.0}] * 9
    found = stall.sum_up([{"updates_per_second": 1 / 0.11, "loader_share": 5 / 11}, *lines])
    assert found["overall"] == pytest.approx(0.05 / 0.2)
    assert (found["updates"], found["step_ms"], found["p50"]) == (10, pytest.approx(10), 0.0)
    assert 0 < found["p95"] < found["max"] == pytest.approx(5 / 11)
