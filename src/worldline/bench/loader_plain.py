"""Readers as one writes them down first: what `worldline bench loader` compares with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import Int64, UInt8


class PlainVideoReader:
    """Windows out of a LeRobot v3 dataset's mp4: open, seek to the key frame before, decode until the last is there."""

    def __init__(self, dataset: Any, num_frames: int) -> None:
        self._dataset, self._num_frames = dataset, num_frames
        self._rate = float(dataset.info["fps"])

    def read(self, windows: Int64[np.ndarray, "b 2"]) -> UInt8[np.ndarray, "b t h w 3"]:
        """Return the windows that begin at (episode, frame)."""
        return np.stack([self._window(episode, start) for episode, start in windows.tolist()])

    def _window(self, episode: int, start: int) -> UInt8[np.ndarray, "t h w 3"]:
        row = self._dataset._episodes[episode]
        key = f"videos/{self._dataset.camera}"
        path = self._dataset.path / self._dataset.info["video_path"].format(
            video_key=self._dataset.camera, chunk_index=row[f"{key}/chunk_index"], file_index=row[f"{key}/file_index"]
        )
        first = float(row[f"{key}/from_timestamp"]) + start / self._rate
        frames: list[np.ndarray] = []
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.time_base is not None
            container.seek(int(first / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time is not None and frame.time > first - 0.5 / self._rate:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == self._num_frames:
                    break
        return np.stack(frames)


class PlainHDF5Reader:
    """Windows out of one column of pictures, a chunk a frame, uncompressed, as trajectories are often kept."""

    def __init__(self, path: Path, starts: Int64[np.ndarray, " e"], num_frames: int) -> None:
        import h5py

        self._pixels = h5py.File(path, "r")["pixels"]
        self._starts, self._num_frames = starts, num_frames

    @staticmethod
    def write(path: Path, dataset: Any) -> None:
        import h5py

        with h5py.File(path, "w") as file:
            size = dataset.spec.image_size
            shape = (dataset.num_frames, size, size, 3)
            pixels = file.create_dataset("pixels", shape, dtype=np.uint8, chunks=(1, *shape[1:]))
            row = 0
            for episode in range(dataset.num_episodes):
                frames = dataset.read_episode(episode).frames
                pixels[row : row + len(frames)] = frames
                row += len(frames)

    def read(self, windows: Int64[np.ndarray, "b 2"]) -> UInt8[np.ndarray, "b t h w 3"]:
        rows = [int(self._starts[episode]) + start for episode, start in windows.tolist()]
        return np.stack([self._pixels[row : row + self._num_frames] for row in rows])
