"""Every frame decoded once, into an array on disk that batches are copied from."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.files import atomic_path, read_json, write_json
from worldline.core.progress import progress
from worldline.data.lerobot import Dataset


class FrameCache:
    """A dataset's frames at `image_size` pixels square, memory-mapped: (n, h, w, 3) uint8, episode after episode.

    The array lies in the dataset's folder, `.cache/frames-SIZE.npy`, and is made again when the dataset has changed.
    Pictures of another size are averaged down by area; those that are not square are squeezed to it.

    Raises:
        WorldlineError: the dataset's folder cannot be written to, or a video is damaged.
    """

    def __init__(self, dataset: Dataset, image_size: int | None = None) -> None:
        self.dataset = dataset
        self.image_size = image_size or dataset.spec.image_size
        self.path = dataset.path / ".cache" / f"frames-{self.image_size}.npy"
        self._starts = np.concatenate([[0], np.cumsum(dataset.lengths)]).astype(np.int64)
        key: dict[str, Any] = {
            "fingerprint": dataset.fingerprint,
            "camera": dataset.camera,
            "shape": [dataset.num_frames, self.image_size, self.image_size, 3],
        }
        self._memory = self._open(key)

    def frames(self, episode: int, start: int = 0, count: int | None = None) -> UInt8[np.ndarray, "t h w 3"]:
        """Return a read-only view of `count` frames of an episode (all that follow `start`, if None)."""
        length = self.dataset.lengths[episode]
        count = length - start if count is None else count
        if not 0 <= start <= start + count <= length:
            raise WorldlineError(f"episode {episode} has {length} frames; asked for {count} from {start} on")
        first = int(self._starts[episode]) + start
        return self._memory[first : first + count]

    def gather(self, indices: Int64[np.ndarray, "b 2"], window: int) -> UInt8[np.ndarray, "b t h w 3"]:
        """Copy the windows that start at (episode, start) into one array."""
        episodes, starts = indices[:, 0], indices[:, 1]
        ends = self._starts[episodes] + starts + window
        if (starts < 0).any() or (ends > self._starts[episodes + 1]).any():
            raise WorldlineError(f"a window of {window} frames reaches beyond its episode")
        batch = np.empty((len(indices), window, *self._memory.shape[1:]), dtype=np.uint8)
        for row, end in enumerate(ends.tolist()):
            batch[row] = self._memory[end - window : end]
        return batch

    def _open(self, key: dict[str, Any]) -> UInt8[np.ndarray, "n h w 3"]:
        if not self._is_fresh(key):
            folder = self.path.parent
            if not os.access(folder if folder.exists() else self.dataset.path, os.W_OK):
                raise WorldlineError(f"{folder}: not writable; decoded frames are kept there, copy the dataset")
            folder.mkdir(exist_ok=True)
            with open(folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process decodes, others wait for it and use what it made
                if not self._is_fresh(key):
                    for left_over in folder.glob(f".{self.path.name}.*.tmp"):  # by a build that was killed
                        left_over.unlink()
                    self._key_path.unlink(missing_ok=True)  # so that a half-renewed pair is never taken for a whole one
                    self._build()
                    write_json(self._key_path, key)
        # a plain array over the mapping: slicing np.memmap objects costs several microseconds each
        return np.asarray(np.load(self.path, mmap_mode="r"))

    @property
    def _key_path(self) -> Path:
        return self.path.with_suffix(".json")

    def _is_fresh(self, key: dict[str, Any]) -> bool:
        return self.path.exists() and self._key_path.exists() and read_json(self._key_path) == key

    def _build(self) -> None:
        dataset, size = self.dataset, self.image_size
        shape = (dataset.num_frames, size, size, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        # written from end to end, since a full disk under a memory-mapped file would kill the process
        with (
            atomic_path(self.path) as temporary,
            open(temporary, "wb") as file,
            progress(f"decode {dataset.spec.name}", dataset.num_frames) as task,
        ):
            np.lib.format.write_array_header_1_0(file, header)
            for episode in range(dataset.num_episodes):
                frames = resize(dataset.read_episode(episode).frames, size)
                file.write(np.ascontiguousarray(frames).data)
                task.advance(len(frames))


def resize(frames: UInt8[np.ndarray, "t h w 3"], size: int) -> UInt8[np.ndarray, "t s s 3"]:
    """Average frames by area to `size` pixels square; a smaller picture is enlarged by repeating its pixels' shares."""
    _, height, width, _ = frames.shape
    if (height, width) == (size, size):
        return frames
    down, across = _area_weights(height, size), _area_weights(width, size)
    resized = np.empty((len(frames), size, size, 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        rows = (down @ frame.reshape(height, -1).astype(np.float32)).reshape(size, width, 3)
        resized[index] = np.einsum("xw,ywc->yxc", across, rows, optimize=True) + 0.5
    return resized


def _area_weights(source: int, target: int) -> Float32[np.ndarray, "t s"]:
    """Return (target, source): how much of each source pixel lies in each target pixel, as shares of the latter."""
    edges = np.arange(target + 1) * (source / target)
    pixel = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    weights: Float32[np.ndarray, "t s"] = (np.clip(overlap, 0.0, 1.0) * (target / source)).astype(np.float32)
    return weights
