"""The toy pre-training on workers of Ray: `ray_process.py CASE RUN`.

CASE killed: two workers, slowed down so that one can be killed.
CASE fed: two workers for whom tasks of Ray Data read; the first clip that is read kills its reader.
CASE elastic: a cluster with room for one worker, then for two, then for one again.
"""

import atexit
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster
from toy_clips import ToyClips, toy_config

from worldline.train import ray as launcher
from worldline.train.pretrain import PretrainConfig, RayConfig

work = launcher._work


class SlowClips(ToyClips):
    def read(self, ids: np.ndarray) -> np.ndarray:
        time.sleep(0.05)
        return super().read(ids)


class DeadlyClips(ToyClips):
    def __init__(self, killed: Path) -> None:
        super().__init__()
        self.killed = killed

    def read(self, ids: np.ndarray) -> np.ndarray:
        if not self.killed.exists():
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(ids)


class WaitingClips(ToyClips):
    """No process reads more than 12 batches before the cluster has been changed as it was meant to, the last slowly."""

    def __init__(self, changed: Path) -> None:
        super().__init__()
        self.changed, self.count = changed, 0

    def read(self, ids: np.ndarray) -> np.ndarray:
        self.count += 1
        if self.count > 8 and not self.changed.exists():
            time.sleep(1.0)  # the checkpoint of the 8th is on its way
        while self.count > 12 and not self.changed.exists():
            time.sleep(0.1)
        return super().read(ids)


def change(cluster: Cluster, run: Path) -> None:
    """Add a node when there is a checkpoint, and kill it when there is one that two ranks wrote."""
    while not (run / "last").is_symlink():
        time.sleep(0.1)
    node = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    while (run / "last").resolve().name != "00000016" or '"ranks": 2' not in (run / "timing.jsonl").read_text():
        time.sleep(0.1)
    cluster.remove_node(node, allow_graceful=False)
    (run.with_name("changed")).touch()


def work_on_toys(given: dict[str, object]) -> None:
    from worldline.train import pretrain as module

    config = given["config"]
    assert isinstance(config, PretrainConfig)
    clips = SlowClips()
    if config.feed.by == "ray":
        clips = DeadlyClips(config.path.with_name("reader-killed"))
    elif config.ray.least:
        clips = WaitingClips(config.path.with_name("changed"))
    module.open_clips = lambda path: clips  # type: ignore[assignment]
    work(given)


if __name__ == "__main__":
    case, run = sys.argv[1:]
    launcher._work = work_on_toys
    config = replace(toy_config(Path(run)), ray=RayConfig(workers=2))
    if case == "killed":
        ray.init("local", num_cpus=2, include_dashboard=False)
    if case == "fed":
        ray.init("local", num_cpus=3, include_dashboard=False)
        config = replace(config, feed=replace(config.feed, by="ray"))
    if case == "elastic":
        head = {"num_cpus": 1, "object_store_memory": 80_000_000}
        cluster = Cluster(
            initialize_head=True, head_node_args=head, shutdown_at_exit=False
        )  # else no thread adds nodes
        atexit.register(lambda: (ray.shutdown(), cluster.shutdown()))
        ray.init(address=cluster.address)
        config = replace(config, ray=RayConfig(workers=2, least=1, look_every_s=2))
        threading.Thread(target=change, args=(cluster, config.path), daemon=True).start()
    launcher.launch(config)
