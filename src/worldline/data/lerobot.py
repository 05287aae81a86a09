"""LeRobot v3.0 datasets, written and read with pyarrow and PyAV alone.

Source of the format: https://huggingface.co/docs/lerobot, "LeRobotDataset v3.0". One file more, `meta/worldline.json`,
carries the `WorldSpec`, how the data came about, and the SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, sha256_file, write_json
from worldline.core.seeding import seed_for
from worldline.core.types import Episode, WorldSpec
from worldline.data.video import Decoder, decode_frames

VERSION = "v3.0"
SIDECAR = "meta/worldline.json"
SPLITS = ("train", "validation", "test")
_HELD_OUT_SHARE = 0.1


def open_dataset(path: str | Path, camera: str | None = None, decoder: Decoder = "pyav") -> Dataset:
    """Open a LeRobot v3.0 dataset for reading.

    Args:
        camera: which camera to read where there are several, by its feature's name or the last part of it.
        decoder: what decodes its videos.

    Raises:
        WorldlineError: not a LeRobot v3.0 dataset, or its files are damaged or incomplete, or hold numbers
            that are not finite.
    """
    return Dataset(path, camera, decoder)


class Dataset:
    """Episodes of one world. Numbers are held in memory; frames are decoded from video on request.

    `split` is decided by whole episodes, each by a hash of the dataset's seed and its own index, so that an episode
    keeps its place when the same world is collected again with more episodes.
    """

    def __init__(self, path: str | Path, camera: str | None = None, decoder: Decoder = "pyav") -> None:
        self.path, self._decoder = Path(path), decoder
        info_path = self.path / "meta/info.json"
        if not info_path.exists():
            raise WorldlineError(
                f"{self.path}: no LeRobot dataset here (expected meta/info.json); make one with `worldline collect`"
            )
        self.info = _read_object(info_path, ("codebase_version", "fps", "features", "total_episodes", "data_path"))
        self._check_info(info_path)
        self.camera = self._find_camera(camera)
        self._sidecar: dict[str, Any] | None = None
        if (self.path / SIDECAR).exists():
            self._sidecar = _read_object(self.path / SIDECAR, ("spec", "split_key", "files"))
        self._verified: set[str] = set()
        self._episodes = self._read_episode_table()
        self.lengths: list[int] = [int(row["length"]) for row in self._episodes]
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self._actions, self._state, self._images = self._read_numbers()
        self.spec = self._sidecar_spec() if self._sidecar is not None else self._derive_spec()
        self.fingerprint = self._fingerprint()

    @property
    def num_episodes(self) -> int:
        return len(self.lengths)

    @property
    def num_frames(self) -> int:
        return int(self._starts[-1])

    @property
    def collected_with(self) -> dict[str, Any] | None:
        """The configuration that `worldline collect` made this dataset with, if it did."""
        return None if self._sidecar is None else self._sidecar.get("collect")

    def actions(self, episode: int) -> Float32[np.ndarray, "t a"]:
        """Return an episode's actions in native units."""
        return self._actions[self._rows(episode)]

    def state(self, episode: int) -> Float32[np.ndarray, "t s"] | None:
        """Return an episode's true states, or None where the dataset has none."""
        return None if self._state is None else self._state[self._rows(episode)]

    def read_episode(self, episode: int) -> Episode:
        """Decode one episode, its frames at their native size.

        Raises:
            WorldlineError: the video is missing, damaged, cut short, or not the one that was written.
        """
        row, rows = self._episodes[self._check_index(episode)], self._rows(episode)
        if self._images is not None:
            frames = np.stack([_decode_image(cell) for cell in self._images[rows]])
        else:
            key = f"videos/{self.camera}"
            relative = self.info["video_path"].format(
                video_key=self.camera, chunk_index=row[f"{key}/chunk_index"], file_index=row[f"{key}/file_index"]
            )
            self._verify(relative)
            start = float(row[f"{key}/from_timestamp"])
            rate = float(self.info["fps"])
            frames = decode_frames(self.path / relative, start, self.lengths[episode], rate, self._decoder)
        tasks = row.get("tasks") or [""]
        return Episode(
            index=episode, frames=frames, actions=self.actions(episode), state=self.state(episode), task=tasks[0]
        )

    def split(self, name: str) -> list[int]:
        """Return the episodes of `train`, `validation` or `test`: about 80, 10 and 10 of 100.

        From three episodes on, none is empty.
        """
        if name not in SPLITS:
            raise WorldlineError(f"no split called {name!r}; there are {', '.join(SPLITS)}")
        key = self.fingerprint if self._sidecar is None else str(self._sidecar["split_key"])
        return split_episodes(key, self.num_episodes)[name]

    def _check_index(self, episode: int) -> int:
        if not 0 <= episode < self.num_episodes:
            raise WorldlineError(f"{self.path}: no episode {episode}; there are {self.num_episodes}, counted from 0")
        return episode

    def _rows(self, episode: int) -> slice:
        self._check_index(episode)
        return slice(int(self._starts[episode]), int(self._starts[episode + 1]))

    def _check_info(self, path: Path) -> None:
        version = self.info["codebase_version"]
        if version != VERSION:
            hint = (
                "convert it with lerobot: python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --repo-id=..."
                if str(version).startswith("v2")
                else "this reader knows that version only"
            )
            raise WorldlineError(f"{self.path}: expected LeRobot {VERSION}, got {version}; {hint}")
        fps, features = self.info["fps"], self.info["features"]
        if not isinstance(fps, int | float) or not fps > 0:
            raise WorldlineError(f"{path}: expected a positive number as fps, got {fps!r}; mend it")
        if not isinstance(features, dict) or not all(
            isinstance(feature, dict) and {"dtype", "shape"} <= feature.keys() for feature in features.values()
        ):
            raise WorldlineError(f"{path}: expected features, each with dtype and shape; mend it, or copy it again")

    def _find_camera(self, wanted: str | None) -> str:
        cameras: list[str] = [
            name for name, feature in self.info["features"].items() if feature["dtype"] in ("video", "image")
        ]
        if not cameras:
            raise WorldlineError(f"{self.path}: this dataset has no camera; a world model learns from pictures")
        if wanted is not None:
            found = [name for name in cameras if name == wanted or name.rsplit(".", 1)[-1] == wanted]
            if len(found) != 1:
                raise WorldlineError(f"{self.path}: no camera called {wanted!r}; there are {', '.join(cameras)}")
            return found[0]
        if len(cameras) > 1:
            raise WorldlineError(f"{self.path}: several cameras, choose one with camera=NAME: {', '.join(cameras)}")
        return cameras[0]

    def _read_episode_table(self) -> list[dict[str, Any]]:
        paths = sorted((self.path / "meta/episodes").glob("*/*.parquet"))
        if not paths:
            raise WorldlineError(f"{self.path}: meta/episodes holds no parquet file; the dataset is incomplete")
        rows: list[dict[str, Any]] = []
        for path in paths:
            self._verify(path.relative_to(self.path).as_posix())
            wanted = [name for name in _columns(path) if not name.startswith("stats/")]
            needed = ["episode_index", "length", "data/chunk_index", "data/file_index"]
            if self.info["features"][self.camera]["dtype"] == "video":
                places = ("chunk_index", "file_index", "from_timestamp")
                needed += [f"videos/{self.camera}/{place}" for place in places]
            _require_columns(path, needed, wanted)
            with _reading(path):
                rows += _read_table(path, wanted).to_pylist()
        rows.sort(key=lambda row: row["episode_index"])
        if len(rows) != self.info["total_episodes"]:
            raise WorldlineError(
                f"{self.path}: info.json tells of {self.info['total_episodes']} episodes, meta/episodes of {len(rows)}"
            )
        return rows

    def _read_numbers(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Return actions, states and, where the tables hold pictures, those encoded; all in episode order."""
        features = self.info["features"]
        if "action" not in features:
            raise WorldlineError(f"{self.path}: no feature `action`; got {', '.join(features)}")
        in_table = features[self.camera]["dtype"] == "image"
        has_state = "observation.state" in features
        names = ["episode_index", "frame_index", "action"]
        names += (["observation.state"] if has_state else []) + ([self.camera] if in_table else [])
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        files = sorted({(row["data/chunk_index"], row["data/file_index"]) for row in self._episodes})
        for chunk, index in files:
            relative = self.info["data_path"].format(chunk_index=chunk, file_index=index)
            self._verify(relative)
            _require_columns(self.path / relative, names, _columns(self.path / relative))
            table = _read_table(self.path / relative, names)
            for name in names:
                parts[name].append(_column(table[name], f"{relative}: {name}"))
        columns = {name: np.concatenate(part) for name, part in parts.items()}
        order = np.lexsort((columns["frame_index"], columns["episode_index"]))
        indices = np.array([row["episode_index"] for row in self._episodes])
        expected = np.repeat(indices, self.lengths)
        if not np.array_equal(columns["episode_index"][order], expected):
            raise WorldlineError(
                f"{self.path}: the data files hold {len(order)} frames that do not match the {len(expected)} of "
                "meta/episodes; the dataset is incomplete, copy it again"
            )
        if in_table:
            images = columns[self.camera][order]
        actions = self._checked("action", columns["action"][order])
        state = self._checked("observation.state", columns["observation.state"][order]) if has_state else None
        return actions, state, images if in_table else None

    def _checked(self, name: str, values: np.ndarray) -> Float32[np.ndarray, "n d"]:
        if values.dtype.kind not in "iufb":
            raise WorldlineError(f"{self.path}: {name}: expected numbers, got values such as {values.flat[0]!r}")
        values = values.astype(np.float32).reshape(len(values), -1)
        shape = tuple(self.info["features"][name]["shape"])
        if shape != values.shape[1:]:
            raise WorldlineError(f"{self.path}: {name}: info.json says shape {shape}, the data has {values.shape[1:]}")
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            episode = int(np.searchsorted(self._starts, bad[0], side="right")) - 1
            raise WorldlineError(
                f"{self.path}: {name} of episode {episode}, frame {bad[0] - self._starts[episode]} is "
                f"{values[bad[0]].tolist()}; expected finite numbers ({len(bad)} bad frames in all); "
                "remove or mend them"
            )
        return values

    def _sidecar_spec(self) -> WorldSpec:
        assert self._sidecar is not None
        try:
            spec = WorldSpec.from_json(self._sidecar["spec"])
        except (TypeError, KeyError, AttributeError) as error:
            raise WorldlineError(
                f"{self.path / SIDECAR}: its spec is not one that this version reads ({error}); copy it again"
            ) from None
        got = (self._actions.shape[1], 0 if self._state is None else self._state.shape[1])
        if got != (spec.action_dim, spec.state_dim):
            raise WorldlineError(
                f"{self.path / SIDECAR}: the world has {spec.action_dim} actions and {spec.state_dim} state columns, "
                f"the data {got[0]} and {got[1]}"
            )
        return spec

    def _derive_spec(self) -> WorldSpec:
        features = self.info["features"]
        height, width = _height_width(features[self.camera])
        low, high = self._actions.min(0), self._actions.max(0)
        high = np.where(high > low, high, low + 1.0)  # an action that never moves still needs a range
        num_state = 0 if self._state is None else self._state.shape[1]
        return WorldSpec(
            name=self.path.name,
            image_size=min(height, width),
            step_seconds=1.0 / float(self.info["fps"]),
            action_names=_names(features["action"], self._actions.shape[1], "action"),
            action_low=tuple(low.tolist()),
            action_high=tuple(high.tolist()),
            state_names=_names(features.get("observation.state", {}), num_state, "state"),
        )

    def _verify(self, relative: str) -> None:
        """Compare a file with the hash it was written with, once, where there is one."""
        if self._sidecar is None or relative in self._verified:
            return
        path, expected = self.path / relative, self._sidecar["files"].get(relative)
        if not path.exists():
            raise WorldlineError(f"{path}: missing, though the dataset was written with it; copy the dataset again")
        if (got := sha256_file(path)) != expected:
            raise WorldlineError(
                f"{path}: checksum differs from the one it was written with (expected {str(expected)[:12]}, got "
                f"{got[:12]}); the file is damaged or was changed, copy it again"
            )
        self._verified.add(relative)

    def _fingerprint(self) -> str:
        if self._sidecar is not None:
            return _digest([self._sidecar["spec"], self._sidecar["files"]])
        return _digest([self.camera, self._hash_foreign_files()])

    def _hash_foreign_files(self) -> dict[str, str]:
        """Hash files that came without hashes, and remember the answers by size and time of change."""
        memory_path = self.path / ".cache/fingerprint.json"
        memory: dict[str, list[Any]] = read_json(memory_path) if memory_path.exists() else {}
        found: dict[str, list[Any]] = {}
        for path in sorted(p for folder in ("meta", "data", "videos") for p in (self.path / folder).rglob("*")):
            if path.is_file():
                relative, status = path.relative_to(self.path).as_posix(), path.stat()
                mark = [status.st_size, status.st_mtime_ns]
                known = memory.get(relative)
                found[relative] = known if known and known[:2] == mark else [*mark, sha256_file(path)]
        if found != memory and os.access(self.path, os.W_OK):
            write_json(memory_path, found)
        return {relative: entry[2] for relative, entry in found.items()}


def split_episodes(key: str, num_episodes: int) -> dict[str, list[int]]:
    """Divide episodes between the splits, as a pure function of `key` and each episode's index.

    From three episodes on each split has at least one; with fewer, all are for training.
    """
    draw = np.array([seed_for(key, "split", episode) / 2**63 for episode in range(num_episodes)])
    by_draw = np.argsort(draw, kind="stable")
    num_test = num_validation = 0
    if num_episodes >= 3:
        num_test = min(max(int((draw < _HELD_OUT_SHARE).sum()), 1), num_episodes - 2)
        num_held_out = int((draw < 2 * _HELD_OUT_SHARE).sum())
        num_validation = min(max(num_held_out - num_test, 1), num_episodes - num_test - 1)
    parts = np.split(by_draw, [num_test, num_test + num_validation])
    return {name: sorted(part.tolist()) for name, part in zip(("test", "validation", "train"), parts, strict=True)}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_object(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Read a JSON object that has these keys."""
    data = read_json(path)
    if not isinstance(data, dict) or (missing := [key for key in keys if key not in data]):
        lacking = f"one without {', '.join(missing)}" if isinstance(data, dict) else type(data).__name__
        raise WorldlineError(f"{path}: expected a JSON object with {', '.join(keys)}, got {lacking}; copy it again")
    return data


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong; pyarrow tells of some kinds of damage by OSError."""
    try:
        yield
    except FileNotFoundError:
        raise WorldlineError(f"{path}: missing; the dataset is incomplete, copy it again") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise WorldlineError(f"{path}: not a readable parquet file ({reason}); copy it again") from None


def _columns(path: Path) -> list[str]:
    with _reading(path):
        return list(pq.read_schema(path).names)


def _read_table(path: Path, names: list[str]) -> pa.Table:
    with _reading(path):
        return pq.ParquetFile(path).read(names)


def _require_columns(path: Path, needed: list[str], there: list[str]) -> None:
    if missing := [name for name in needed if name not in there]:
        raise WorldlineError(f"{path}: expected the columns {missing}, which are not there; copy it again")


def _column(column: pa.ChunkedArray, label: str) -> np.ndarray:
    """Return a numeric column as (n,) or (n, d), or a column of encoded pictures as an object array of bytes."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if array.null_count:
        raise WorldlineError(f"{label}: {array.null_count} rows are empty; expected a number in each")
    if pa.types.is_struct(array.type):
        return np.array([cell["bytes"] for cell in array.to_pylist()], dtype=object)
    if not pa.types.is_nested(array.type):
        values: np.ndarray = array.to_numpy(zero_copy_only=False)
        return values
    lengths = pc.unique(pc.list_value_length(array)).to_pylist()
    if len(lengths) != 1:
        raise WorldlineError(f"{label}: expected rows of one length, got {lengths}")
    values = array.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, lengths[0])


def _decode_image(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _height_width(feature: dict[str, Any]) -> tuple[int, int]:
    """Read a camera's size, whose axes may come in either order."""
    shape, names = list(feature["shape"]), feature.get("names")
    if isinstance(names, list) and {"height", "width"} <= set(names):
        return int(shape[names.index("height")]), int(shape[names.index("width")])
    return (int(shape[1]), int(shape[2])) if shape[0] in (1, 3) else (int(shape[0]), int(shape[1]))


def _names(feature: dict[str, Any], count: int, prefix: str) -> tuple[str, ...]:
    """Read the names of a vector's columns, which LeRobot keeps as a list, or as a list within a dictionary."""
    names = feature.get("names")
    if isinstance(names, dict):
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    if isinstance(names, list) and len(names) == count:
        return tuple(str(name) for name in names)
    return tuple(f"{prefix}_{column}" for column in range(count))
