"""Which windows of which episodes make batch number `step`: a pure function, so that any batch can be had again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Int64, UInt64

from worldline.core.errors import WorldlineError
from worldline.core.seeding import seed_for

Item = TypeVar("Item")


class Sampler:
    """Every window start of every episode once an epoch, in an order that only (seed, epoch) decides.

    Batches are consecutive pieces of the endless sequence of epochs, so one may straddle two. Nothing is stored between
    calls: to resume, ask for the next step.

    Args:
        lengths: frames of each episode that may be drawn from, by its number.
        window: frames in a window; shorter episodes are passed over.

    Raises:
        WorldlineError: no episode is as long as the window.
    """

    def __init__(
        self, lengths: Mapping[int, int] | Iterable[tuple[int, int]], window: int, batch: int, seed: int
    ) -> None:
        pairs = sorted(dict(lengths).items())
        if window < 1 or batch < 1:
            raise WorldlineError(f"window and batch must be at least 1, got {window} and {batch}")
        starts = [max(0, length - window + 1) for _, length in pairs]
        self.window, self.batch, self.seed = window, batch, seed
        self._episodes = np.array([episode for episode, _ in pairs], dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(starts)]).astype(np.int64)
        self.num_windows = int(self._offsets[-1])
        if self.num_windows == 0:
            longest = max((length for _, length in pairs), default=0)
            raise WorldlineError(
                f"no episode has {window} frames (of {len(pairs)}, the longest has {longest}); "
                "take a shorter window or collect longer episodes"
            )
        self._orders: dict[int, Int64[np.ndarray, " n"]] = {}

    @property
    def steps_per_epoch(self) -> float:
        return self.num_windows / self.batch

    def indices(self, step: int) -> Int64[np.ndarray, "batch 2"]:
        """Return (episode, start) of each window of batch number `step`, counted from 0."""
        places = step * self.batch + np.arange(self.batch, dtype=np.int64)
        epochs, within = np.divmod(places, self.num_windows)
        chosen = np.empty(self.batch, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            chosen[here] = self._order(epoch)[within[here]]
        rank = np.searchsorted(self._offsets, chosen, side="right") - 1
        return np.stack([self._episodes[rank], chosen - self._offsets[rank]], axis=1)

    def _order(self, epoch: int) -> Int64[np.ndarray, " n"]:
        """Sort the windows by a hash of their number. NumPy's own shuffles may change between its versions."""
        order = self._orders.get(epoch)
        if order is None:
            keys = mix(np.arange(self.num_windows, dtype=np.uint64), seed_for(self.seed, "epoch", epoch))
            order = np.argsort(keys, kind="stable")
            # neighbours only: a batch straddles two epochs at most, unless it is larger than one
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) <= 1} | {epoch: order}
        return order


def mix(counter: UInt64[np.ndarray, " n"], seed: int | UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Scramble 64-bit counters; one seed for all, or one for each. Source: SplitMix64, Steele et al., OOPSLA 2014."""
    value = counter * np.uint64(0x9E3779B97F4A7C15) + np.asarray(seed, dtype=np.uint64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class Prefetcher(Generic[Item]):
    """Iterate over `produce(step)` for steps from `start` to `stop`, made ahead of time by threads, in order.

    At most `depth` items are ready or in the making. An exception in `produce` is raised where its item would have
    come. Use it in a `with` block, so that the threads end with the loop.
    """

    def __init__(
        self, produce: Callable[[int], Item], start: int, stop: int, depth: int = 3, num_threads: int = 1
    ) -> None:
        self._produce, self._next, self._stop = produce, start, stop
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="prefetch")
        self._ahead: deque[Future[Item]] = deque()
        self.waited_seconds = 0.0
        """Time that the consumer spent waiting, in all; over its own time, the share that the loader costs."""
        for _ in range(max(1, depth)):
            self._submit()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if not self._ahead:
            raise StopIteration
        started = time.perf_counter()
        item = self._ahead.popleft().result()
        self.waited_seconds += time.perf_counter() - started
        self._submit()
        return item

    @property
    def ready(self) -> int:
        """Items that are made and wait to be taken."""
        return sum(item.done() for item in self._ahead)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self) -> None:
        if self._next < self._stop:
            self._ahead.append(self._pool.submit(self._produce, self._next))
            self._next += 1
