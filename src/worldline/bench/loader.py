"""What reading clips costs: beside plain readers on the same windows, by way of keeping them, and in memory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from worldline.bench.harness import compare
from worldline.bench.loader_plain import PlainHDF5Reader, PlainVideoReader
from worldline.bench.loader_report import draw, render
from worldline.bench.real_videos import INSTALL, real_videos
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, write_bytes, write_json
from worldline.core.progress import progress
from worldline.core.result import write_result
from worldline.data.clip_cache import INDEX, SCHEMA, shard_path
from worldline.data.clip_videos import Video, VideoClips, video_path, write_videos
from worldline.data.clips import CARD, IN_TABLES, Clips, open_clips, read_card
from worldline.data.collect import CollectConfig, collect
from worldline.data.ingest import IngestConfig, ingest
from worldline.data.lerobot import Dataset, open_dataset
from worldline.data.order import Order

_ENV, _EPISODE = "pusht", 160
_NUM_FRAMES, _BATCH = 16, 16
_VIDEOS = ("bikes.mp4", "cup.mp4", "vtest.avi")
_GOPS = (1, 4, 12, 250)
_STRIDES = (1, 4)
_GROUPS = (1, 4, 16)


@dataclass(frozen=True, kw_only=True)
class LoaderBenchConfig:
    """How much to read, and of what."""

    sizes: tuple[int, ...] = (64, 224)
    """Picture sizes of the simulated episodes that all readers read."""
    episodes: int = 12
    """Simulated episodes, of 160 frames."""
    compare_seconds: float = 4.0
    """CPU time for each comparison in turns."""
    curve: bool = True
    """Also the cost curve, on real videos where they are installed, which takes minutes of encoding."""
    rounds: int = 15
    """Turns of the cost curve; each way of keeping clips reads four in each."""
    index_clips: int = 10_000_000
    """Clips of the index whose memory is measured."""
    video_clips: int = 10_000_000
    """The same where they are decoded out of videos, four out of each."""
    reports: str = "reports"
    """Where `DATE-loader/` is written."""


def run(config: LoaderBenchConfig) -> Path:
    """Measure all, write `result.json`, `report.md` and the plot, and return the report's path.

    Raises:
        WorldlineError: h5py is not installed.
    """
    try:
        import h5py  # noqa: F401
    except ModuleNotFoundError:
        raise WorldlineError('the HDF5 reader needs h5py: pip install "worldline[hdf5]"') from None
    figures: dict[str, Any] = {"num_frames": _NUM_FRAMES, "batch": _BATCH}
    timing: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        timing["readers"] = [measure_readers(Path(folder), size, config) for size in config.sizes]
        figures["index"] = measure_index(Path(folder), config.index_clips)
        figures["video_index"] = [
            measure_video_index(Path(folder), config.video_clips, codec) for codec in ("h264", "source")
        ]
        figures["order"] = measure_order()
        videos = real_videos(Path(folder))
        if config.curve and all(name in videos for name in _VIDEOS):
            source = Path(folder) / "real"
            source.mkdir()
            for name in _VIDEOS:
                (source / name).symlink_to(videos[name])
            timing["curve"] = measure_curve(source, Path(folder), config.rounds)
        figures["curve"] = (
            "yes" if "curve" in timing else f"real videos are missing: {INSTALL}" if config.curve else "no"
        )
    target = Path(config.reports) / f"{date.today():%Y-%m-%d}-loader"
    write_result(target / "result.json", "bench-loader", figures, timing)
    result = read_json(target / "result.json")
    if "curve" in timing:
        write_bytes(target / "curve.svg", draw(result).encode())
    report = target / "report.md"
    write_bytes(report, render(result).encode())
    return report


def measure_readers(folder: Path, size: int, config: LoaderBenchConfig) -> dict[str, Any]:
    """Compare three readers on the same windows of the same episodes, after checking that all give the same pixels."""
    data = collect(
        CollectConfig(
            env=_ENV, path=str(folder / f"data{size}"), episodes=config.episodes, steps=_EPISODE, image_size=size
        )
    )
    dataset = open_dataset(data)
    options: dict[str, Any] = {"num_frames": _NUM_FRAMES, "stride": 1, "image_size": size, "workers": 1}
    caches = {
        codec: open_clips(
            ingest(IngestConfig(source=str(data), path=str(folder / f"{codec}{size}"), codec=codec, **options))
        )
        for codec in ("raw", "jpeg")
    }
    PlainHDF5Reader.write(folder / f"plain{size}.h5", dataset)
    starts = np.concatenate([[0], np.cumsum(dataset.lengths)[:-1]]).astype(np.int64)
    video = PlainVideoReader(dataset, _NUM_FRAMES)
    hdf5 = PlainHDF5Reader(folder / f"plain{size}.h5", starts, _NUM_FRAMES)
    windows = _windows(dataset)
    raw = caches["raw"]
    assert raw.num_clips == len(windows)
    everything = np.arange(len(windows))
    for reader in (video, hdf5):
        assert np.array_equal(reader.read(windows), raw.read(everything)), "the readers differ"
    order = Order(len(windows), _BATCH, seed=0)
    takes: dict[str, Callable[[], object]] = {
        "mp4, PyAV": _stepper(order, lambda ids: video.read(windows[ids])),
        "HDF5, a chunk a frame": _stepper(order, lambda ids: hdf5.read(windows[ids])),
        "worldline, raw": _stepper(order, raw.read),
        "worldline, jpeg": _stepper(order, caches["jpeg"].read),
    }
    pairs = [
        ("mp4, PyAV", "worldline, raw"),
        ("mp4, PyAV", "worldline, jpeg"),
        ("HDF5, a chunk a frame", "worldline, raw"),
    ]
    # CPU time of all threads: what a reader costs, whatever else runs here
    found = [
        compare((a, takes[a]), (b, takes[b]), config.compare_seconds, clock=time.process_time_ns).to_json()
        for a, b in pairs
    ]
    sizes = {name: _bytes_under(folder / f"{name}{size}") for name in ("data", "raw", "jpeg")}
    sizes["hdf5"] = (folder / f"plain{size}.h5").stat().st_size
    return {"image_size": size, "episodes": config.episodes, "comparisons": found, "size_bytes": sizes}


def _windows(dataset: Dataset) -> Int64[np.ndarray, "n 2"]:
    """Return (episode, start) of each clip that ingest cuts, in the order of their ids."""
    rows = [
        (episode, start)
        for episode, length in enumerate(dataset.lengths)
        for start in range(0, length - _NUM_FRAMES + 1, _NUM_FRAMES)
    ]
    return np.array(rows, dtype=np.int64)


def _stepper(order: Order, read: Callable[[np.ndarray], object]) -> Callable[[], object]:
    steps = iter(range(10**9))
    return lambda: read(order.batch(next(steps)))


def _bytes_under(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and ".cache" not in file.parts)


def measure_curve(source: Path, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Return CPU time a clip and bytes a frame of every way to keep the clips of `source`, read in turns."""
    rows: list[dict[str, Any]] = []
    readers: list[Callable[[np.ndarray], object]] = []
    ways = [("jpeg", 0), ("raw", 0), ("source", 0), *(("h264", gop) for gop in _GOPS)]
    hop = _NUM_FRAMES * max(_STRIDES)
    with progress("encode", len(ways)) as task:
        for codec, gop in ways:
            path = folder / f"curve-{codec}-{gop}"
            options: dict[str, Any] = {"codec": codec, "gop": gop or 12, "stride": max(_STRIDES), "hop": hop}
            ingest(IngestConfig(source=str(source), path=str(path), items_per_shard=1, **options))
            clips = open_clips(path)
            size = _bytes_under(source) if codec == "source" else _bytes_under(path)
            row: dict[str, Any] = {"codec": codec, "gop": gop, "row_group": 1, "stride": 0, "clips": clips.num_clips}
            row["bytes_a_frame"] = size / clips.num_clips / _NUM_FRAMES
            if codec in IN_TABLES:
                rows.append(row)
                readers.append(clips.read)
            else:  # the same videos, and clips that begin at the same frames, at every stride
                for stride in _STRIDES:
                    rows.append({**row, "stride": stride})
                    readers.append(VideoClips(path, {**read_card(path), "stride": stride}).read)
            if codec == "jpeg":
                for group in _GROUPS:
                    rows.append({**row, "row_group": group, "codec": "jpeg by pyarrow"})
                    readers.append(_ByRowGroup(path, clips, group, folder / f"groups-{group}.parquet").read)
            task.advance()
    order = Order(rows[0]["clips"], 4, seed=1)
    times = np.empty((rounds, len(rows)))
    with progress("read in turns", rounds) as task:
        for turn in range(-1, rounds):  # the first is not counted
            ids = order.batch(max(turn, 0))
            for which, read in enumerate(readers):
                started = time.process_time_ns()
                read(ids)
                times[max(turn, 0), which] = (time.process_time_ns() - started) / len(ids)
            task.advance(int(turn >= 0))
    for row, taken in zip(rows, times.T, strict=True):
        low, middle, high = (float(value) / 1e6 for value in np.percentile(taken, (25, 50, 75)))
        row["cpu_ms_a_clip"], row["quartiles_ms"] = middle, [low, high]
    return rows


class _ByRowGroup:
    """The same JPEG clips in row groups of several, read by pyarrow as any program would."""

    def __init__(self, path: Path, clips: Clips, group: int, target: Path) -> None:
        shards = sorted((path / "shards").rglob("*.parquet"))
        table = pa.concat_tables([pq.read_table(shard, schema=SCHEMA) for shard in shards])
        pq.write_table(table, target, row_group_size=group, compression="none", use_dictionary=False)
        self._file, self._group, self._clips = pq.ParquetFile(target), group, clips

    def read(self, ids: Int64[np.ndarray, " b"]) -> list[np.ndarray]:
        found = []
        for clip in ids.tolist():
            column = self._file.read_row_group(clip // self._group, columns=["frames"])["frames"]
            frames = np.empty((_NUM_FRAMES, self._clips.image_size, self._clips.image_size, 3), dtype=np.uint8)
            self._clips._decode(memoryview(column[clip % self._group].as_buffer()), frames)  # type: ignore[attr-defined]
            found.append(frames)
        return found


_OPEN_INDEX = """
import json, sys, time
from worldline.data.clips import open_clips
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
open_clips(sys.argv[2])
before = resident()
started = time.perf_counter()
clips = open_clips(sys.argv[1])
opened = time.perf_counter() - started
arrays = [clips._index] if hasattr(clips, "_index") else [clips._stamps, clips._firsts, clips._places]
total = sum(int(array.view("u4").sum(dtype="u8")) for array in arrays)
clips._verified[:] = 1
print(json.dumps({"bytes": resident() - before, "opened_seconds": opened, "total": total}))
"""


def measure_index(folder: Path, num_clips: int, shard_clips: int = 128) -> dict[str, Any] | None:
    """Return what an index of that many clips takes of a fresh process's memory, all of it touched; Linux only."""
    if not Path("/proc/self/status").exists():
        return None
    for name, count in (("large", num_clips), ("small", shard_clips)):
        shards = -(-count // shard_clips)
        path = _made(folder / f"index-{name}", "raw", count, [shard_path(Path(), shard) for shard in range(shards)])
        index = np.lib.format.open_memmap(path / "index.npy", mode="w+", dtype=INDEX, shape=(count,))
        index["offset"], index["size"] = np.arange(count) % shard_clips * 200_000, 200_000
        index["crc"] = np.arange(count)
        index.flush()
        np.save(path / "shards.npy", np.minimum(np.arange(0, count + shard_clips, shard_clips), count))
    return {"clips": num_clips, "shard_clips": shard_clips, **_opened(folder / "index", num_clips)}


def measure_video_index(folder: Path, num_clips: int, codec: str, clips_each: int = 4) -> dict[str, Any] | None:
    """Return the same of clips that are decoded out of videos, under names as long as Kinetics has them."""
    if not Path("/proc/self/status").exists():
        return None
    for name, count in (("large", num_clips // clips_each), ("small", 1)):
        path = _made(folder / f"{codec}-{name}", codec, count * clips_each, [])
        np.save(path / "index.npy", np.arange(count * clips_each))
        kinetics = "train/playing harmonica/abcdefg{:04x}_000012_000022.mp4"
        paths = (str(video_path(Path(), item)) if codec == "h264" else kinetics.format(item) for item in range(count))
        videos = (Video(path, hashlib.sha256(path.encode()).hexdigest(), True) for path in paths)
        write_videos(path, ((item * clips_each, video) for item, video in enumerate(videos)), count * clips_each)
    return {"codec": codec, "clips": num_clips, "clips_each": clips_each, **_opened(folder / codec, num_clips)}


def _made(path: Path, codec: str, num_clips: int, files: list[Path]) -> Path:
    """Write the card of clips that are not there, with a hash for each file."""
    path.mkdir()
    card = {"version": 1, "codec": codec, "num_clips": num_clips, "num_frames": 16, "image_size": 64}
    card |= {"stride": 4, "root": "", "ingest": {"hop": None}, "fingerprint": "none"}
    hashes = {file.as_posix(): hashlib.sha256(str(file).encode()).hexdigest() for file in files}
    write_json(path / CARD, {**card, "files": hashes})
    return path


def _opened(path: Path, num_clips: int) -> dict[str, Any]:
    command = [sys.executable, "-c", _OPEN_INDEX, f"{path}-large", f"{path}-small"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return {**found, "bytes_a_clip": found["bytes"] / num_clips}


def measure_order(num_clips: int = 100_000_000, batch: int = 256) -> dict[str, Any]:
    """Return the CPU time of a global batch's ids, of one dataset and of a mixture of three."""
    found = {}
    for name, order in {
        "one dataset": Order(num_clips, batch, seed=0),
        "three datasets": Order([num_clips, num_clips // 3, 1000], batch, seed=0, weights=[0.6, 0.3, 0.1]),
    }.items():
        started = time.process_time()
        for step in range(200):
            order.batch(step * 1_000_003)
        found[name] = (time.process_time() - started) / 200 * 1e6
    return {"clips": num_clips, "batch": batch, "cpu_us_a_batch": found}
