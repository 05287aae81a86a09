"""Batches read by tasks of Ray Data for the ranks of Ray Train, in the order that every other feed has.

Each rank runs datasets of its own, whose rows are the numbers of the updates from where it begins, a block each: each
is a task that runs anywhere in the cluster and calls the very `Reader` that a thread would call. Ray Data hands results
out in the order of the rows (`preserve_order`), does a task again whose process has died, and leaves out the row of one
that has died `attempts` times: that update is then read clip by clip, a task each, and a clip whose task dies as often
is lost. There is no split of one dataset among ranks: which clips are whose is for `Order.share` to say, for any number
of them.
"""

from __future__ import annotations

import pickle
from collections.abc import Generator
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from worldline.core.errors import WorldlineError
from worldline.train.feed import Batch, FeedConfig, Lost, Reader

_ROWS = 1000
"""Of one dataset, which Ray holds a block and a task for each of."""
_AHEAD = 4
"""Batches in the object store for each that may be ready or in the making: Ray keeps some for each of its stages."""


class RayReader:
    """Return the batches of updates `start` to `stop`, to be asked for in this order; `close` it in the end.

    Raises:
        WorldlineError: this is not a process of a Ray cluster.
    """

    def __init__(self, reader: Reader, start: int, stop: int, config: FeedConfig) -> None:
        import ray

        if not ray.is_initialized():
            raise WorldlineError("feed.by=ray reads on the Ray cluster that trains; give ray.workers=N with it")
        pickler: Any = ray.cloudpickle
        self._reader, self._pickled, self._attempts = reader, pickler.dumps(reader), config.attempts
        self._rows = _rows(self._pickled, reader.batch_bytes, start, stop, config)
        self._next: Batch | None = None

    def __call__(self, step: int) -> Batch:
        if self._next is None and (row := next(self._rows, None)) is not None:
            told: Batch = pickle.loads(row["batch"][0])
            self._next = told._replace(clips=torch.from_numpy(row["clips"][0].copy()))  # out of memory that Ray shares
        if self._next is None or self._next.step > step:
            return self._one_by_one(step)
        batch, self._next = self._next, None
        assert batch.step == step, f"Ray Data gave update {batch.step} in the place of {step}"
        return batch

    def close(self) -> None:
        """Stop reading ahead."""
        self._rows.close()

    def _one_by_one(self, step: int) -> Batch:
        """Read a batch whose task has died again and again."""
        import ray

        make: Any = ray.remote(num_cpus=1, max_retries=self._attempts - 1, scheduling_strategy="DEFAULT")
        read, ids = make(_read_one), self._reader.ids(step).tolist()
        tasks = [read.remote(self._pickled, step, clip) for clip in ids]
        found = [self._outcome(task, step, clip) for task, clip in zip(tasks, ids, strict=True)]
        return self._reader.gather(step, found)

    def _outcome(self, task: Any, step: int, clip: int) -> np.ndarray | Lost:
        import ray

        try:
            found: np.ndarray | Lost = ray.get(task)
            return found
        except ray.exceptions.WorkerCrashedError:
            return Lost(step, clip, self._attempts, "every process that read it died")


def _rows(
    reader: bytes, batch_bytes: int, start: int, stop: int, config: FeedConfig
) -> Generator[dict[str, np.ndarray], None, None]:
    import ray.data

    do: Any = _read  # Ray's types leave `fn_args` out
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # `RayReader` sees which are missing
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=_AHEAD * (config.depth + config.threads) * batch_bytes
    )
    for first in range(start, stop, _ROWS):
        rows = [{"step": step} for step in range(first, min(stop, first + _ROWS))]
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            do,
            fn_args=(reader,),
            batch_size=1,
            num_cpus=1,
            max_retries=config.attempts - 1,
            compute=ray.data.TaskPoolStrategy(size=config.threads),
        )
        yield from made.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=config.depth)


def _read(row: dict[str, np.ndarray], reader: bytes) -> dict[str, np.ndarray]:
    batch = _opened(reader)(int(row["step"][0]))
    told = pickle.dumps(batch._replace(clips=torch.empty(0)))
    return {"clips": batch.clips.numpy()[None], "batch": np.array([told], dtype=object)}


def _read_one(reader: bytes, step: int, clip: int) -> np.ndarray | Lost:
    return _opened(reader).read_one(step, clip)


@lru_cache(maxsize=1)
def _opened(reader: bytes) -> Reader:
    """Open clips once in a process, which does many tasks."""
    opened: Reader = pickle.loads(reader)
    return opened
