"""A clip that kills whoever reads it costs a run one restart, and is lost like any that cannot be read."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from deadly_clips import DEADLY, DeadlyClips

from worldline.core.errors import WorldlineError
from worldline.data.deadly import InHand, find_deadly, left_in_hand


def test_what_was_in_hand_is_tried_apart(tmp_path: Path) -> None:
    hand = InHand(tmp_path / "in_hand", rank=1)
    with hand.note(7, [9, 3]):
        assert [path.read_text() for path in (tmp_path / "in_hand").iterdir()] == ["[9, 3]"]
    with pytest.raises(OSError, match="gone"), hand.note(8, [1]):
        raise OSError("gone")
    assert left_in_hand(tmp_path / "in_hand") == []  # whoever is still there has let go of it
    (tmp_path / "in_hand/0-3.json").write_text("[5, 4, 3")
    held = [hand.note(8, [6, DEADLY]), hand.note(9, [5, 6])]
    for note in held:
        note.__enter__()
    assert left_in_hand(tmp_path / "in_hand") == [DEADLY, 5, 6]
    assert left_in_hand(tmp_path / "in_hand") == []
    assert find_deadly(DeadlyClips(), [3, 5, DEADLY, 6]) == {DEADLY: "2 processes that read it ended by signal 9"}


class Unopenable(DeadlyClips):
    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (3,)


def test_a_process_that_cannot_begin_is_told() -> None:
    with pytest.raises(WorldlineError, match="dies at its start with status 3"):
        find_deadly(Unopenable(), [1])
    assert find_deadly(Unopenable(), []) == {}


@pytest.mark.slow
def test_training_goes_on_without_it_when_it_is_started_again(tmp_path: Path) -> None:
    here, run = Path(__file__).parent, tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / "deadly_clips.py"), str(run), "6"]  # two epochs
    first, second = (subprocess.run(command, env=environment, capture_output=True, check=False) for _ in range(2))
    assert first.returncode == -signal.SIGKILL
    assert second.returncode == 0, second.stderr.decode()
    lost = [json.loads(line) for line in (run / "lost.jsonl").read_text().splitlines()]
    assert sorted(each["clip"] for each in lost) == [DEADLY, DEADLY, 5, 5]
    assert {each["reason"] for each in lost if each["clip"] == DEADLY} == {"2 processes that read it ended by signal 9"}
    assert json.loads((run / "deadly.json").read_text()).keys() == {str(DEADLY)}
    assert not (run / "in_hand").exists()


FED_BY_RAY = """
import json, sys
import numpy as np, ray
from deadly_clips import DeadlyClips
from worldline.data.order import Order
from worldline.train.feed import Feed, FeedConfig
ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=80_000_000)
config = FeedConfig(by="ray", attempts=2, pause_s=0.0)
found, order = [], Order(24, 8, 5)
where = dict(start=2, stop=8, rank=0, ranks=1, image_size=32, device="cpu")
with Feed(DeadlyClips(), order, config, **where) as feed:
    for step, batch in enumerate(feed, 2):
        assert np.array_equal(batch.ids, order.batch(step))
        shown = batch.clips[:, 0, 0, 0, 0].numpy()
        assert np.array_equal(shown, batch.ids * 10 % 256 * batch.weight.numpy())
        found += [each for each in batch.lost]
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install -c constraints.txt 'worldline[ray]'")
def test_ray_gives_it_up_and_goes_on(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "PYTHONPATH": paths}
    command = [sys.executable, "-c", FED_BY_RAY, str(tmp_path / "lost.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lost = json.loads((tmp_path / "lost.json").read_text())
    assert sorted(clip for _, clip, _, _ in lost) == [DEADLY, DEADLY, 5, 5]
    assert {tuple(told) for _, clip, *told in lost if clip == DEADLY} == {(2, "every process that read it died")}
