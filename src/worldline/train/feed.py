"""Clips for each update, read ahead; one that cannot be read leaves its place empty and is written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from worldline.core.errors import WorldlineError, require_at_least
from worldline.core.files import read_json, write_json
from worldline.data.clips import Clips
from worldline.data.deadly import DEATHS, InHand, find_deadly, left_in_hand
from worldline.data.order import Order
from worldline.data.sampler import Prefetcher
from worldline.train.parallel import Ranks

IN_HAND, DEADLY = "in_hand", "deadly.json"
"""Of a run's directory: what is being read, and the clips that a process dies of."""


@dataclass(frozen=True, kw_only=True)
class FeedConfig:
    """How batches are made ahead of their use."""

    by: Literal["threads", "ray"] = "threads"
    """Who reads: threads of each rank, or tasks of Ray Data, anywhere in the cluster that ray.workers train on. Both
    give the same batches."""
    depth: int = 3
    """Batches that are ready or in the making."""
    threads: int = 1
    """Threads that make them; of Ray Data, tasks at a time for each rank, a core each."""
    attempts: int = 3
    """Times that a clip is tried before it is given up."""
    pause_s: float = 0.1
    """Before the second attempt, seconds; twice as long before each one after."""

    def __post_init__(self) -> None:
        require_at_least(self, {"depth": 1, "threads": 1, "attempts": 1}, "feed.")


class Lost(NamedTuple):
    """A clip that an update should have seen and did not."""

    step: int
    clip: int
    attempts: int
    reason: str


class Batch(NamedTuple):
    """A rank's share of an update's clips."""

    step: int
    ids: Int64[np.ndarray, " b"]
    clips: UInt8[Tensor, "b t h w 3"]
    weight: Float[Tensor, " b"]
    """1 for a clip, 0 for the black one in the place of a lost one."""
    lost: tuple[Lost, ...]


class Reader:
    """Read a rank's share of an update: the same from whatever thread, process or machine it is called.

    Pictures larger than `image_size` are cut at a place that hangs on the order's seed, the epoch and the clip alone.
    Clips that are `deadly` are lost, for the reason given, and not tried.
    """

    def __init__(
        self,
        clips: Clips,
        order: Order,
        config: FeedConfig,
        *,
        rank: int,
        ranks: int,
        image_size: int,
        deadly: Mapping[int, str] | None = None,
    ) -> None:
        self._clips, self._order, self._config, self._deadly = clips, order, config, dict(deadly or {})
        self._rank, self._ranks, self._size = rank, ranks, image_size

    @property
    def batch_bytes(self) -> int:
        """Size of a batch's pictures, at most."""
        most = -(-self._order.batch_size // self._ranks)
        return most * self._clips.num_frames * self._size**2 * 3

    def ids(self, step: int) -> Int64[np.ndarray, " b"]:
        """Return the clips of update `step`."""
        return self._order.share(step, self._rank, self._ranks)

    def __call__(self, step: int) -> Batch:
        """Return the batch of update `step`, on the CPU: read at once, or if that fails, clip by clip."""
        ids = self.ids(step)
        if self._deadly.keys().isdisjoint(ids.tolist()):
            with suppress(WorldlineError, OSError):
                return self._batch(step, ids, self._clips.read(ids), ())
        return self.gather(step, [self.read_one(step, clip) for clip in ids.tolist()])

    def read_one(self, step: int, clip: int) -> UInt8[np.ndarray, "t h w 3"] | Lost:
        """Return one clip of update `step`, or what became of it."""
        if clip in self._deadly:
            return Lost(step, clip, DEATHS, self._deadly[clip])
        pause, reason = self._config.pause_s, ""
        for attempt in range(self._config.attempts):
            if attempt:
                time.sleep(pause)
                pause *= 2
            try:
                pictures: np.ndarray = self._clips.read(np.array([clip], dtype=np.int64))[0]
                return pictures
            except (WorldlineError, OSError) as error:
                reason = f"{type(error).__name__}: {error}"
        return Lost(step, clip, self._config.attempts, reason)

    def gather(self, step: int, found: Sequence[np.ndarray | Lost]) -> Batch:
        """Return the batch of update `step` out of its clips, black in the place of those that are lost."""
        lost = tuple(each for each in found if isinstance(each, Lost))
        black = np.zeros((self._clips.num_frames, self._clips.image_size, self._clips.image_size, 3), np.uint8)
        pictures = np.stack([black if isinstance(each, Lost) else each for each in found])
        return self._batch(step, self.ids(step), pictures, lost)

    def _batch(self, step: int, ids: np.ndarray, pictures: np.ndarray, lost: tuple[Lost, ...]) -> Batch:
        clips = torch.from_numpy(self._cut(step, pictures))
        weight = torch.from_numpy(~np.isin(ids, [each.clip for each in lost])).float()
        return Batch(step, ids, clips, weight, lost)

    def _cut(self, step: int, pictures: np.ndarray) -> np.ndarray:
        size, room = self._size, pictures.shape[2] - self._size
        if room == 0:
            return pictures
        cut = np.empty((*pictures.shape[:2], size, size, 3), np.uint8)
        seeds = self._order.seeds(step, self._rank, self._ranks)
        halves = np.stack([seeds >> np.uint64(32), seeds & np.uint64(0xFFFFFFFF)], axis=1)
        for target, clip, (top, left) in zip(cut, pictures, (halves % np.uint64(room + 1)).tolist(), strict=True):
            target[:] = clip[:, top : top + size, left : left + size]
        return cut


class Feed:
    """Iterate over a rank's batches of updates `start` to `stop`; use it in a `with` block.

    In the folder `in_hand` threads note what they read, for `data/deadly.py`; a task of Ray that dies takes no rank
    with it.

    On CUDA, batches are staged in pinned memory and copied on a stream of their own, while the updates before them are
    computed.

    Raises:
        WorldlineError: `by="ray"` outside of a Ray cluster.
    """

    def __init__(
        self,
        clips: Clips,
        order: Order,
        config: FeedConfig,
        *,
        start: int,
        stop: int,
        rank: int,
        ranks: int,
        image_size: int,
        device: str,
        deadly: Mapping[int, str] | None = None,
        in_hand: Path | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._stream = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        options: dict[str, Any] = {"rank": rank, "ranks": ranks, "image_size": image_size}
        self._reader = Reader(clips, order, config, deadly=deadly, **options)
        self._read: Callable[[int], Batch] = self._reader
        self._in_hand = None if in_hand is None or config.by == "ray" else InHand(in_hand, rank)
        self._closing = ExitStack()
        threads = config.threads
        if config.by == "ray":
            from worldline.train.ray_feed import RayReader

            self._read = self._closing.enter_context(closing(RayReader(self._reader, start, stop, config)))
            threads = 1  # it hands out one batch after the other
        self._ahead = self._closing.enter_context(Prefetcher(self._make, start, stop, config.depth, threads))

    @property
    def waited_seconds(self) -> float:
        """Time that training spent waiting for batches, in all."""
        return self._ahead.waited_seconds

    @property
    def ready(self) -> int:
        """Batches that lie ready."""
        return self._ahead.ready

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    def __iter__(self) -> Iterator[Batch]:
        for batch, copied in self._ahead:
            if copied is not None:
                torch.cuda.current_stream().wait_event(copied)
                for tensor in (batch.clips, batch.weight):
                    tensor.record_stream(torch.cuda.current_stream())
            yield batch

    def _make(self, step: int) -> tuple[Batch, torch.cuda.Event | None]:
        with self._in_hand.note(step, self._reader.ids(step).tolist()) if self._in_hand else nullcontext():
            batch = self._read(step)
        if self._stream is None:
            return batch, None
        with torch.cuda.stream(self._stream):
            clips, weight = (
                tensor.pin_memory().to(self._device, non_blocking=True) for tensor in (batch.clips, batch.weight)
            )
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        return batch._replace(clips=clips, weight=weight), copied


def know_deadly(run: Path, clips: Clips, ranks: Ranks) -> dict[int, str]:
    """Try what was in hand when a rank died, each rank its part; return all deadly clips of a run so far, and how."""
    deadly: dict[int, str] = {}
    left: list[int] = []
    if ranks.rank == 0:
        left = left_in_hand(run / IN_HAND)
        if (run / DEADLY).exists():
            deadly = {int(clip): reason for clip, reason in read_json(run / DEADLY).items()}
    deadly, left = ranks.gather((deadly, left))[0]
    for found in ranks.gather(find_deadly(clips, left[ranks.rank :: ranks.count])):
        deadly |= found
    if ranks.rank == 0 and left:
        write_json(run / DEADLY, deadly)
    return deadly
