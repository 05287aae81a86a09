"""What an update of a training costs, measured before it runs, so that recipes can be given equal time."""

from __future__ import annotations

import math
import statistics
import time
from typing import NamedTuple

from torch.utils.flop_counter import FlopCounterMode

from worldline.data.lerobot import open_dataset
from worldline.train.config import TrainConfig
from worldline.train.loop import Training, threads

_WARM_UP = 3


class Cost(NamedTuple):
    """Of one stage, on this machine and its threads."""

    prepare_seconds: float
    """What the stage takes before its first update."""
    update_seconds: float
    """Mean over updates spread over the stage, so that a growing rollout counts as it grows, batches included. CPU
    seconds: what the wall-clock shows on one core where nothing else runs, whatever else does run now."""
    update_flops: float
    """Mean over the same updates: multiplications and additions of matrix products and convolutions, backward included
    (`torch.utils.flop_counter`)."""


def measure_costs(config: TrainConfig, updates: int = 12) -> dict[str, Cost]:
    """Do a few updates of each stage that has steps, without a run directory; return what they cost.

    Raises:
        WorldlineError: the data do not fit.
    """
    found = {}
    with threads(config.threads):
        training = Training(config, open_dataset(config.data))
        for name, stage in (("joint", config.joint), ("frozen", config.frozen)):
            if not stage.steps:
                continue
            started = time.thread_time()
            produce = training.enter(name, stage)
            prepared = time.thread_time() - started
            places = [min(stage.steps - 1, math.floor((i + 0.5) * stage.steps / updates)) for i in range(updates)]
            spent, flops = [], []
            for count, place in enumerate([places[-1]] * _WARM_UP + places):
                begun = time.thread_time()
                training.update(name, stage, place, produce(place))
                if count >= _WARM_UP:
                    spent.append(time.thread_time() - begun)
            for place in places[:: max(1, updates // 4)]:
                with FlopCounterMode(display=False) as counter:
                    training.update(name, stage, place, produce(place))
                flops.append(counter.get_total_flops())
            found[name] = Cost(prepared, statistics.fmean(spent), statistics.fmean(flops))
    return found
