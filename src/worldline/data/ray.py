"""Shards made by a Ray cluster; the only file of `data` that knows Ray. Every node must see the source and the result.

A row is the number of a shard, whose plan lists paths; decoding happens in `map_batches`, in the same processes as
without Ray, and clips go straight to the shared file system. A node that is lost takes nothing with it that is
finished: its other shards are made again elsewhere, to the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from worldline.core.errors import WorldlineError
from worldline.data.shard_work import ShardMaker, notes_path

INSTALL = 'pip install "worldline[ray]"'


def make_with_ray(root: Path, shards: list[int], address: str, done: Callable[[int], None]) -> None:
    """Make shards of the staging folder `root`; `done` is told each that is finished.

    Raises:
        WorldlineError: Ray is not installed, or there is no cluster at that address.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError:
        raise WorldlineError(f"ray={address} needs Ray, which is not installed; run: {INSTALL}") from None
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise WorldlineError(f"ray={address}: no cluster there ({error}); start one, or take ray=local") from None
    try:
        context: Any = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = [{"root": str(root.absolute()), "shard": shard} for shard in shards]
        # a block a shard, so that each is a task of its own, tried again wherever it was lost
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(_make, batch_size=1, num_cpus=1)
        for row in made.iter_rows():
            done(int(row["shard"]))
    finally:
        if ours:
            ray.shutdown()


def _make(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for root, shard in zip(batch["root"].tolist(), batch["shard"].tolist(), strict=True):
        if notes_path(Path(root), shard).exists():
            continue  # finished by the task that was lost
        maker = ShardMaker(Path(root))
        try:
            maker(shard)
        finally:
            maker.close()
    return {"shard": batch["shard"]}
