"""kill -9 around the change from the joint to the frozen stage, in a real process, at moments that are hit exactly."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tiny_run import tiny_config

from worldline.train.loop import train

KILLED = """
import os, signal, sys
from importlib import import_module
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny_run import tiny_config
from worldline.train.loop import train
module, name, left = import_module(sys.argv[4]), sys.argv[5], int(sys.argv[6])
original = getattr(module, name)
def fatal(*args, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)
setattr(module, name, fatal)
train(tiny_config(Path(sys.argv[2]), Path(sys.argv[3])))
"""


def train_until_call(module: str, name: str, nth: int, data: Path, run: Path) -> None:
    """Train in a process of its own that is killed as it calls a function for the nth time."""
    words = [str(Path(__file__).parent), str(data), str(run), f"worldline.train.{module}", name, str(nth)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (run / "result.json").exists()


MOMENTS = (
    ("loop", "joint_terms", 27, 24),  # in the joint stage, one checkpoint before its last
    ("checkpoint", "write_json", 1, 24),  # half of that checkpoint is written
    ("checkpoint", "_point", 3, 30),  # `last` points at it, `best` at the one before
    ("windows", "encode_frames", 3, 30),  # the frozen stage's latents are being encoded
    ("loop", "frozen_terms", 4, 30),  # three frozen updates are done and in the metrics
    ("loop", "write_result", 1, 50),  # all is done but the result
)
"""Module, function, which call of it is the last, and the step at which the next start goes on."""


def test_killed_at_every_moment_of_the_change_it_finishes_with_the_same_bytes(
    finished_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for module, name, nth, step in MOMENTS:
        train_until_call(module, name, nth, tiny_data, run)
        assert os.readlink(run / "last") == f"checkpoints/{step:08d}", (module, name)
    train(tiny_config(tiny_data, run))
    assert (run / "metrics.jsonl").read_bytes() == (finished_run / "metrics.jsonl").read_bytes()
    for link in ("last", "best"):
        assert os.readlink(run / link) == os.readlink(finished_run / link)
        for file in ("model.safetensors", "training.safetensors", "training.json"):
            assert (run / link / file).read_bytes() == (finished_run / link / file).read_bytes(), (link, file)
    left, wanted = ([p.name for p in (place / "checkpoints").iterdir()] for place in (run, finished_run))
    assert sorted(left) == sorted(wanted)
    # what it took is counted through all of its ends
    spent = [json.loads(line)["cpu_seconds"] for line in (run / "timing.jsonl").read_text().splitlines()]
    assert spent == sorted(spent)
    assert json.loads((run / "result.json").read_text())["timing"]["cpu_seconds"] > spent[-1] > 2 * spent[0]
