"""Clips for each update, read ahead by threads; one that cannot be read leaves its place empty and is written down."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from worldline.core.errors import WorldlineError, require_at_least
from worldline.core.seeding import rng_for
from worldline.data.clips import Clips
from worldline.data.order import Order
from worldline.data.sampler import Prefetcher


@dataclass(frozen=True, kw_only=True)
class FeedConfig:
    """How batches are made ahead of their use."""

    depth: int = 3
    """Batches that are ready or in the making."""
    threads: int = 1
    """Threads that make them."""
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
    read_seconds: float


class Feed:
    """Iterate over a rank's batches of updates `start` to `stop`; use it in a `with` block.

    Pictures larger than `image_size` are cut at a place that only (seed, step, id) decides. On CUDA, batches are staged
    in pinned memory and copied on a stream of their own, while the updates before them are computed.
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
        seed: int,
        device: str,
    ) -> None:
        self._clips, self._order, self._config = clips, order, config
        self._rank, self._ranks, self._size, self._seed = rank, ranks, image_size, seed
        self._device = torch.device(device)
        self._stream = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._ahead = Prefetcher(self._make, start, stop, config.depth, config.threads)

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
        self._ahead.close()

    def __iter__(self) -> Iterator[Batch]:
        for batch, copied in self._ahead:
            if copied is not None:
                torch.cuda.current_stream().wait_event(copied)
                for tensor in (batch.clips, batch.weight):
                    tensor.record_stream(torch.cuda.current_stream())
            yield batch

    def _make(self, step: int) -> tuple[Batch, torch.cuda.Event | None]:
        started = time.perf_counter()
        ids = self._order.share(step, self._rank, self._ranks)
        pictures, lost = self._read(step, ids)
        clips = torch.from_numpy(self._cut(step, ids, pictures))
        weight = torch.from_numpy(~np.isin(ids, [each.clip for each in lost])).float()
        copied = None
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                clips = clips.pin_memory().to(self._device, non_blocking=True)
                weight = weight.pin_memory().to(self._device, non_blocking=True)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record()
        return Batch(step, ids, clips, weight, lost, time.perf_counter() - started), copied

    def _read(self, step: int, ids: np.ndarray) -> tuple[np.ndarray, tuple[Lost, ...]]:
        """Read all at once; if that fails, one by one, so that only what is broken is lost."""
        try:
            return self._clips.read(ids), ()
        except (WorldlineError, OSError):
            found = [self._read_one(step, clip) for clip in ids.tolist()]
        lost = tuple(each for each in found if isinstance(each, Lost))
        black = np.zeros((self._clips.num_frames, self._clips.image_size, self._clips.image_size, 3), np.uint8)
        return np.stack([black if isinstance(each, Lost) else each for each in found]), lost

    def _read_one(self, step: int, clip: int) -> np.ndarray | Lost:
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

    def _cut(self, step: int, ids: np.ndarray, pictures: np.ndarray) -> np.ndarray:
        size, room = self._size, pictures.shape[2] - self._size
        if room == 0:
            return pictures
        cut = np.empty((*pictures.shape[:2], size, size, 3), np.uint8)
        for i, clip in enumerate(ids.tolist()):
            top, left = rng_for(self._seed, "cut", step, clip).integers(room + 1, size=2)
            cut[i] = pictures[i, :, top : top + size, left : left + size]
        return cut
