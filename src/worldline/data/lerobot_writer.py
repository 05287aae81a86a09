"""The writing half of `lerobot`: episodes in, a LeRobot v3.0 dataset out, in memory that one episode fills."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Float64

from worldline.core.errors import WorldlineError
from worldline.core.files import fsync_directory, sha256_file, write_json
from worldline.core.types import Episode, WorldSpec
from worldline.data.lerobot import SIDECAR, VERSION
from worldline.data.video import CODEC, PIXEL_FORMAT, Segment, SegmentJoiner, encode_segment, frame_rate

CAMERA = "observation.images.camera"
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
_CHUNK_FILES = 1000
_DATA_FILE_MB, _VIDEO_FILE_MB = 100.0, 200.0
_INDEX_FEATURES = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
_INDEX_FEATURES |= {"task_index": "int64"}
_STATISTICS = ("min", "max", "mean", "std")


class DatasetWriter:
    """Write episodes to `path`, which appears, whole, when the `with` block ends without an error.

    Until then the files grow in `path` + ".assembling"; what an earlier, killed writer left there is removed.

    Args:
        split_key: what decides the split of episodes, beside their index.
        collect: how the data came about, kept in the sidecar.
        video_file_mb: size at which the next video and data file begin.

    Raises:
        WorldlineError: `path` exists already; it is never overwritten.
    """

    def __init__(
        self,
        path: str | Path,
        spec: WorldSpec,
        split_key: str,
        collect: dict[str, Any] | None = None,
        video_file_mb: float = _VIDEO_FILE_MB,
    ) -> None:
        self.path, self.spec = Path(path), spec
        if self.path.exists():
            raise WorldlineError(f"{self.path}: exists already; remove it or choose another path")
        self._root = self.path.with_name(self.path.name + ".assembling")
        shutil.rmtree(self._root, ignore_errors=True)
        self._rate = frame_rate(spec.step_seconds)
        self._split_key, self._collect, self._video_file_mb = split_key, collect, video_file_mb
        self._rows: list[dict[str, Any]] = []
        self._tasks: dict[str, int] = {}
        self._num_frames, self._file = 0, -1
        self._size: tuple[int, int] | None = None
        self._video: SegmentJoiner | None = None
        self._table: pq.ParquetWriter | None = None

    def add_episode(self, episode: Episode) -> None:
        """Encode and append one episode; its index is the next one, whatever `episode.index` says."""
        self.add_encoded(encode_segment(episode.frames, self._rate), episode.actions, episode.state, episode.task)

    def add_encoded(
        self,
        segment: Segment,
        actions: Float32[np.ndarray, "t a"],
        state: Float32[np.ndarray, "t s"] | None,
        task: str = "",
    ) -> None:
        """Append one episode whose frames `encode_segment` has already encoded."""
        self._check(segment, actions, state)
        episode, length = len(self._rows), segment.num_frames
        if self._video is None or self._video.size_bytes >= self._video_file_mb * 1e6:
            self._next_file()
        assert self._video is not None
        assert self._table is not None
        task_index = self._tasks.setdefault(task, len(self._tasks))
        chunk = {"chunk_index": self._file // _CHUNK_FILES, "file_index": self._file % _CHUNK_FILES}
        columns = {"action": actions} | ({} if state is None else {"observation.state": state})
        columns |= {
            "timestamp": (np.arange(length) / float(self._rate)).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, episode),
            "index": np.arange(self._num_frames, self._num_frames + length),
            "task_index": np.full(length, task_index),
        }
        self._table.write_table(pa.table([_arrow(values) for values in columns.values()], self._table.schema))
        row: dict[str, Any] = {
            "episode_index": episode,
            "tasks": [task],
            "length": length,
            "data/chunk_index": chunk["chunk_index"],
            "data/file_index": chunk["file_index"],
            "dataset_from_index": self._num_frames,
            "dataset_to_index": self._num_frames + length,
            f"videos/{CAMERA}/chunk_index": chunk["chunk_index"],
            f"videos/{CAMERA}/file_index": chunk["file_index"],
            f"videos/{CAMERA}/from_timestamp": self._video.num_frames / float(self._rate),
            f"videos/{CAMERA}/to_timestamp": (self._video.num_frames + length) / float(self._rate),
        }
        statistics = {name: _statistics(values) for name, values in columns.items()} | {CAMERA: segment.statistics}
        for name, table in statistics.items():
            for kind, values in zip(_STATISTICS, table, strict=True):
                row[f"stats/{name}/{kind}"] = _nested(name, values)
            row[f"stats/{name}/count"] = [length]
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        self._video.append(segment)
        self._num_frames += length
        self._rows.append(row)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close_file()
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._root, ignore_errors=True)

    def _check(self, segment: Segment, actions: np.ndarray, state: np.ndarray | None) -> None:
        episode, length = len(self._rows), segment.num_frames
        wanted = (length, self.spec.action_dim)
        if actions.shape != wanted or actions.dtype != np.float32:
            raise WorldlineError(
                f"episode {episode}: expected actions {wanted} float32, got {actions.shape} {actions.dtype}"
            )
        got = None if state is None else (state.shape, state.dtype.name)
        expected = ((length, self.spec.state_dim), "float32") if self.spec.state_dim else None
        if got != expected:
            raise WorldlineError(f"episode {episode}: expected state {expected}, got {got}")
        for name, values in (("action", actions), ("state", state)):
            if values is not None and len(bad := np.flatnonzero(~np.isfinite(values).all(1))):
                raise WorldlineError(
                    f"episode {episode}, frame {bad[0]}: {name} is not finite: {values[bad[0]].tolist()}"
                )
        self._size = self._size or (segment.height, segment.width)
        if (segment.height, segment.width) != self._size:
            raise WorldlineError(
                f"episode {episode}: expected frames of {self._size}, got {(segment.height, segment.width)}"
            )

    def _next_file(self) -> None:
        self._close_file()
        self._file += 1
        place = {"chunk_index": self._file // _CHUNK_FILES, "file_index": self._file % _CHUNK_FILES}
        video = self._root / _VIDEO_PATH.format(video_key=CAMERA, **place)
        table = self._root / _DATA_PATH.format(**place)
        video.parent.mkdir(parents=True, exist_ok=True)
        table.parent.mkdir(parents=True, exist_ok=True)
        self._video = SegmentJoiner(video, self._rate)
        vectors = {"action": self.spec.action_dim}
        vectors |= {"observation.state": self.spec.state_dim} if self.spec.state_dim else {}
        fields = [(name, _vector_type(size)) for name, size in vectors.items()]
        fields += [(name, pa.from_numpy_dtype(np.dtype(kind))) for name, kind in _INDEX_FEATURES.items()]
        self._table = pq.ParquetWriter(table, pa.schema(fields), compression="snappy")

    def _close_file(self) -> None:
        if self._video is not None:
            self._video.close()
        if self._table is not None:
            self._table.close()
        self._video = self._table = None

    def _finish(self) -> None:
        if not self._rows:
            raise WorldlineError(f"{self.path}: no episodes were added; a dataset needs at least one")
        root = self._root
        episodes = root / _EPISODES_PATH
        episodes.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._rows), episodes, compression="snappy")
        pq.write_table(_task_table(list(self._tasks)), root / "meta/tasks.parquet")
        write_json(root / "meta/info.json", self._info())
        write_json(root / "meta/stats.json", self._total_statistics())
        files = sorted(path for path in root.rglob("*") if path.is_file())
        hashes = {path.relative_to(root).as_posix(): sha256_file(path) for path in files}
        sidecar = {"format": 1, "spec": self.spec.to_json(), "split_key": self._split_key}
        write_json(root / SIDECAR, sidecar | {"collect": self._collect, "files": hashes})
        for path in files:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.rename(root, self.path)
        fsync_directory(self.path.parent)

    def _info(self) -> dict[str, Any]:
        assert self._size is not None
        height, width = self._size
        rate = int(self._rate) if self._rate.denominator == 1 else float(self._rate)
        features: dict[str, Any] = {
            CAMERA: {
                "dtype": "video",
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
                "info": {
                    "video.height": height,
                    "video.width": width,
                    "video.codec": "h264",
                    "video.pix_fmt": PIXEL_FORMAT,
                    "video.encoder": CODEC,
                    "video.is_depth_map": False,
                    "video.fps": rate,
                    "video.channels": 3,
                    "has_audio": False,
                },
            },
            "action": {
                "dtype": "float32",
                "shape": [self.spec.action_dim],
                "names": list(self.spec.action_names),
            },
        }
        if self.spec.state_dim:
            names = list(self.spec.state_names)
            features["observation.state"] = {"dtype": "float32", "shape": [self.spec.state_dim], "names": names}
        for name, kind in _INDEX_FEATURES.items():
            features[name] = {"dtype": kind, "shape": [1], "names": None}
        return {
            "codebase_version": VERSION,
            "robot_type": self.spec.name,
            "total_episodes": len(self._rows),
            "total_frames": self._num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": _CHUNK_FILES,
            "data_files_size_in_mb": _DATA_FILE_MB,
            "video_files_size_in_mb": _VIDEO_FILE_MB,
            "fps": rate,
            "splits": {"train": f"0:{len(self._rows)}"},
            "data_path": _DATA_PATH,
            "video_path": _VIDEO_PATH,
            "features": features,
        }

    def _total_statistics(self) -> dict[str, Any]:
        """Join the episodes' statistics: means and variances weighted by length, about the common mean."""
        share = np.array([row["length"] for row in self._rows]) / self._num_frames
        total: dict[str, Any] = {}
        for name in [key.split("/")[1] for key in self._rows[0] if key.startswith("stats/") and key.endswith("/min")]:
            low, high, mean, deviation = (
                np.array([np.ravel(row[f"stats/{name}/{kind}"]) for row in self._rows]) for kind in _STATISTICS
            )
            common = share @ mean
            spread = np.sqrt(share @ (deviation**2 + (mean - common) ** 2))
            joined = zip(_STATISTICS, (low.min(0), high.max(0), common, spread), strict=True)
            total[name] = {kind: _nested(name, values) for kind, values in joined} | {"count": [self._num_frames]}
        return total


def _vector_type(size: int) -> pa.DataType:
    """LeRobot keeps a vector of one number as a plain number."""
    return pa.float32() if size == 1 else pa.list_(pa.float32(), size)


def _arrow(values: np.ndarray) -> pa.Array:
    if values.ndim == 2 and values.shape[1] > 1:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.array(values.ravel())


def _statistics(values: np.ndarray) -> Float64[np.ndarray, "4 d"]:
    values = values.astype(np.float64).reshape(len(values), -1)
    return np.stack([values.min(0), values.max(0), values.mean(0), values.std(0)])


def _nested(name: str, values: np.ndarray) -> list[Any]:
    """Shape statistics as LeRobot does: (d,) for vectors, (3, 1, 1) for pictures."""
    return values.reshape(3, 1, 1).tolist() if name == CAMERA else values.tolist()


def _task_table(tasks: list[str]) -> pa.Table:
    """Lay tasks out as pandas writes a frame indexed by `task`, which is what LeRobot loads."""
    column = {"field_name": None, "metadata": None, "numpy_type": "int64", "pandas_type": "int64"}
    index = {"field_name": "task", "metadata": None, "name": "task", "numpy_type": "object", "pandas_type": "unicode"}
    header = {"name": None, "numpy_type": "object", "pandas_type": "unicode", "metadata": {"encoding": "UTF-8"}}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [{"field_name": None, **header}],
        "columns": [column | {"name": "task_index", "field_name": "task_index"}, index],
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
