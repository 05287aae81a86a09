"""The feed benchmark reads the same batches every way, counts the CPU time of other processes, and tells the ratios."""

import subprocess
import sys

import numpy as np
import pytest

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
