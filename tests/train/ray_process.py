"""The toy pre-training on two workers of Ray, updates slowed down so that one can be killed: `ray_process.py RUN`."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from toy_clips import ToyClips, toy_config

from worldline.train import ray as launcher
from worldline.train.pretrain import RayConfig

work = launcher._work


class SlowClips(ToyClips):
    def read(self, ids: np.ndarray) -> np.ndarray:
        time.sleep(0.05)
        return super().read(ids)


def work_on_toys(given: dict[str, object]) -> None:
    from worldline.train import pretrain as module

    module.open_clips = lambda path: SlowClips()  # type: ignore[assignment]
    work(given)


if __name__ == "__main__":
    launcher._work = work_on_toys
    launcher.launch(replace(toy_config(Path(sys.argv[1])), ray=RayConfig(workers=2)))
