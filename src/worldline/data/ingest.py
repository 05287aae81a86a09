"""`worldline ingest`: video, as it comes, into clips that training reads fast, with a ledger of what was lost.

Entries of a source are listed once and dealt into shards, in order. A shard depends on its entries and the options
only, whoever makes it, so that the result is the same for any number of processes or machines, and any number of
interruptions. Until it is whole it lies in `PATH.partial`; see `clip_cache` for what is in it then.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from worldline.core.errors import WorldlineError, differing, require_at_least
from worldline.core.files import atomic_path, fsync_directory, read_json, sha256_file, write_json
from worldline.core.progress import progress
from worldline.data.clip_cache import INDEX
from worldline.data.clip_videos import VIDEO_FILES, Video, video_path, write_videos
from worldline.data.clips import CARD, IN_TABLES, VERSION
from worldline.data.shard_work import ShardMaker, notes_path, plan_path
from worldline.data.sources import Layout, list_source, printable

_TEXT, _INT, _COLOUR = pa.string(), pa.int64(), pa.list_(pa.float64(), 3)
EPISODES = pa.schema(
    {
        "item": _INT, "path": _TEXT, "episode": _TEXT, "id": _TEXT, "label": _TEXT, "split": _TEXT,
        "first_clip": _INT, "num_clips": _INT, "num_frames": _INT, "rate": pa.float64(), "width": _INT, "height": _INT,
        "seekable": pa.bool_(), "size_bytes": _INT, "sha256": _TEXT, "mean": _COLOUR, "std": _COLOUR,
    }
)  # fmt: skip
"""`mean` and `std` are of the pixels seen for clips, each colour, in [0, 1]; `sha256` is of an episode's file."""
LEDGER = pa.schema(
    {
        "item": _INT, "path": _TEXT, "episode": _TEXT, "id": _TEXT, "label": _TEXT, "split": _TEXT, "reason": _TEXT,
        "detail": _TEXT, "size_bytes": _INT, "sha256": _TEXT, "decodable_frames": _INT, "clips_kept": _INT,
        "clips_lost": _INT,
    }
)  # fmt: skip
"""`clips_lost` is what the header promised less what was kept; null where nothing tells how long it was to be."""
_ROWS = 50_000


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """What to ingest, and into what. `workers` and `ray` change how fast, never what."""

    source: str
    """A folder of videos, Kinetics as it comes, a list of `path label` lines, a LeRobot v3 dataset, or HDF5 files."""
    path: str
    """The folder to write; a finished one is never overwritten."""
    layout: Layout = "auto"
    """How the source is laid out: cvdf is SPLIT/*.mp4 with annotations, folders has a folder for each class."""
    camera: str | None = None
    """Which camera of a dataset that has several."""
    codec: Literal["jpeg", "raw", "h264", "source"] = "jpeg"
    """How clips are kept: pictures or pixels in Parquet, videos encoded again, or an index into the source itself."""
    num_frames: int = 16
    """Frames in a clip."""
    stride: int = 4
    """Frames of the source from one frame of a clip to the next."""
    hop: int | None = None
    """Frames of the source from the start of a clip to that of the next; null is a whole clip, so that none overlap."""
    image_size: int = 224
    """Height and width: the short edge is scaled to it, the long one cut to its middle."""
    quality: int = 90
    """Of codec=jpeg, 1 to 95."""
    gop: int = 12
    """Of codec=h264: frames from one key frame to the next."""
    crf: int = 18
    """Of codec=h264: 0 is without loss but for the colours' halved resolution, 51 the worst."""
    items_per_shard: int = 32
    """Files, or episodes, whose clips lie in one Parquet file."""
    workers: int = 2
    """Processes."""
    ray: str | None = None
    """A Ray cluster to do it: its address, auto, or local for one on this machine. It must see both folders."""

    def __post_init__(self) -> None:
        least = {"num_frames": 1, "stride": 1, "image_size": 16, "quality": 1, "gop": 1, "crf": 0, "items_per_shard": 1}
        require_at_least(self, {**least, "workers": 1}, "ingest: ")
        for name, most in {"quality": 95, "crf": 51, "image_size": 1024}.items():
            if getattr(self, name) > most:
                raise WorldlineError(f"ingest: {name} must be at most {most}, got {getattr(self, name)}")
        if self.hop is not None and self.hop < 1:
            raise WorldlineError(f"ingest: hop must be at least 1, got {self.hop}")
        if self.codec == "h264" and self.image_size % 2:
            raise WorldlineError(f"ingest: codec=h264 wants an even image_size, got {self.image_size}")

    def identity(self) -> dict[str, Any]:
        """Return what decides the content."""
        return {key: value for key, value in asdict(self).items() if key not in ("path", "workers", "ray")}


def ingest(config: IngestConfig) -> Path:
    """Make the clips at `config.path`, or finish what an interrupted run began there.

    Raises:
        WorldlineError: the source gives not one clip, the path holds something else, or another run is at work on it.
    """
    path = Path(config.path)
    staging = path.with_name(path.name + ".partial")
    if _complete(path, staging, config):
        return path
    staging.mkdir(parents=True, exist_ok=True)
    with _locked(staging / "lock", path):
        if _complete(path, staging, config):  # by another run, while this one waited
            return path
        if not (staging / CARD).exists():
            plan = _plan(staging, config)
            shards = range(plan["shards"])
            missing = [shard for shard in shards if not notes_path(staging, shard).exists()]
            if missing:
                done = (len(shards) - len(missing)) * config.items_per_shard
                with progress(f"ingest {config.source}", plan["entries"], done) as task:
                    _make(config, staging, missing, lambda shard: task.advance(plan["sizes"][shard]))
            _assemble(staging, config, plan)
        for leftover in ("notes", "plan"):
            shutil.rmtree(staging / leftover, ignore_errors=True)
        (staging / "plan.json").unlink(missing_ok=True)
        (staging / "lock").unlink()
        staging.rename(path)
        fsync_directory(path.parent)
    return path


def read_ledger(path: str | Path) -> list[dict[str, Any]]:
    """Return what was rejected or shortened, row by row."""
    rows: list[dict[str, Any]] = pq.read_table(Path(path) / "ledger.parquet").to_pylist()
    return rows


def told_by_ledger(rows: Sequence[dict[str, Any]]) -> str:
    """Sum a ledger up in one line."""
    counts = Counter(row["reason"] for row in rows)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "nothing"


def _plan(staging: Path, config: IngestConfig) -> dict[str, Any]:
    """List the source and deal its entries, once; what is listed then holds until the end."""
    card = staging / "plan.json"
    if card.exists():
        plan: dict[str, Any] = read_json(card)
        _compare(staging, plan["identity"], config)
        return plan
    listing = list_source(config.source, config.layout, config.camera)
    if config.codec == "source" and listing.layout in ("lerobot", "hdf5"):
        raise WorldlineError(f"ingest: codec=source reads video files, not layout={listing.layout}; take another codec")
    entries = [asdict(entry) for entry in listing.entries]
    dealt = [entries[i : i + config.items_per_shard] for i in range(0, len(entries), config.items_per_shard)]
    for shard, part in enumerate(dealt):
        write_json(plan_path(staging, shard), part)
    plan = {
        "identity": config.identity(),
        "layout": listing.layout,
        "root": str(listing.root.absolute()),
        "entries": len(entries),
        "passed_over": listing.passed_over,
        "shards": len(dealt),
        "sizes": [len(part) for part in dealt],
    }
    write_json(card, plan)
    return plan


def _make(config: IngestConfig, staging: Path, missing: list[int], done: Callable[[int], None]) -> None:
    if config.ray is not None:
        from worldline.data.ray import make_with_ray

        make_with_ray(staging, missing, config.ray, done)
        return
    from concurrent.futures import ThreadPoolExecutor, as_completed
    from queue import SimpleQueue

    makers: SimpleQueue[ShardMaker] = SimpleQueue()
    all_makers = [ShardMaker(staging) for _ in range(min(config.workers, len(missing)))]
    for maker in all_makers:
        makers.put(maker)

    def make(shard: int) -> int:
        maker = makers.get()
        try:
            maker(shard)
        finally:
            makers.put(maker)
        return shard

    try:
        with ThreadPoolExecutor(len(all_makers)) as pool:
            try:
                for future in as_completed([pool.submit(make, shard) for shard in missing]):
                    done(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for maker in all_makers:
                    maker.stop()
                raise
    finally:
        for maker in all_makers:
            maker.close()


def _assemble(staging: Path, config: IngestConfig, plan: dict[str, Any]) -> None:
    """Number the clips and write index, tables and, last of all, the card."""
    for leftover in staging.rglob(".*.tmp"):  # of workers that were killed
        leftover.unlink()
    ledger = _write_rows(staging / "ledger.parquet", LEDGER, _rows(staging, plan, "ledger"))
    counts = [
        sum(row["num_clips"] for row in read_json(notes_path(staging, s))["episodes"]) for s in range(plan["shards"])
    ]
    firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    num_clips = int(firsts[-1])
    if not num_clips:
        told = told_by_ledger(pq.read_table(staging / "ledger.parquet").to_pylist())
        raise WorldlineError(
            f"{config.source}: not one clip of {config.num_frames} frames at stride {config.stride} could be had from "
            f"{plan['entries']} entries ({told}); {staging / 'ledger.parquet'} says why"
        )
    dtype = INDEX if config.codec in IN_TABLES else np.dtype("<i8")
    with atomic_path(staging / "index.npy") as temporary, open(temporary, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_clips,)}
        np.lib.format.write_array_header_1_0(file, header)
        for shard in range(plan["shards"]):
            index = read_json(notes_path(staging, shard))["index"]
            rows = [tuple(row) for row in index] if config.codec in IN_TABLES else index
            file.write(np.array(rows, dtype=dtype).tobytes())
    with atomic_path(staging / "shards.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, firsts)
    _write_rows(staging / "episodes.parquet", EPISODES, _rows(staging, plan, "episodes"))
    paths = [p for p in sorted((staging / "shards").rglob("*")) if p.is_file() and p.name[0] != "."]
    paths += [staging / name for name in ("index.npy", "shards.npy", "episodes.parquet", "ledger.parquet")]
    if config.codec not in IN_TABLES:  # these files have the hash of each video
        write_videos(staging, _videos(staging, config.codec, _rows(staging, plan, "episodes")), num_clips)
        paths += [staging / name for name in VIDEO_FILES]
    files = {file.relative_to(staging).as_posix(): sha256_file(file) for file in paths}
    identity = config.identity()
    decisive = {key: value for key, value in identity.items() if key not in ("source", "items_per_shard")}
    content = json.dumps([VERSION, decisive, files], sort_keys=True)
    write_json(
        staging / CARD,
        {
            "version": VERSION,
            "codec": config.codec,
            "num_clips": num_clips,
            "num_frames": config.num_frames,
            "stride": config.stride,
            "image_size": config.image_size,
            "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
            "layout": plan["layout"],
            "root": plan["root"],
            "entries": plan["entries"],
            "rejected_or_shortened": ledger,
            "passed_over": plan["passed_over"],
            "ingest": identity,
            "files": files,
        },
    )


def _rows(staging: Path, plan: dict[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    first = 0
    for shard in range(plan["shards"]):
        for row in read_json(notes_path(staging, shard))[kind]:
            if kind == "episodes":
                row["first_clip"] = first
                first += row["num_clips"]
            yield {key: printable(value) if isinstance(value, str) else value for key, value in row.items()}


def _videos(root: Path, codec: str, episodes: Iterator[dict[str, Any]]) -> Iterator[tuple[int, Video]]:
    for row in episodes:
        path, sha256 = row["path"], row["sha256"]
        if codec == "h264":  # of what lies here, and not of its source
            path = video_path(Path(), row["item"]).as_posix()
            sha256 = sha256_file(root / path)
        yield row["first_clip"], Video(path, sha256, row["seekable"])


def _write_rows(path: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> int:
    count, batch = 0, []
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for row in rows:
            batch.append(row)
            count += 1
            if len(batch) == _ROWS:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        writer.write_table(pa.Table.from_pylist(batch, schema))
    return count


@contextmanager
def _locked(lock: Path, path: Path) -> Iterator[None]:
    with open(lock, "w") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorldlineError(
                f"{path}: another ingest is at work on it; wait for it or choose another path"
            ) from None
        yield


def _complete(path: Path, staging: Path, config: IngestConfig) -> bool:
    """Say whether the clips are there, and are those asked for."""
    if not path.exists():
        return False
    if not (path / CARD).exists():
        raise WorldlineError(f"{path}: exists and was not made by `worldline ingest`; choose another path")
    _compare(path, read_json(path / CARD)["ingest"], config)
    shutil.rmtree(staging, ignore_errors=True)
    return True


def _compare(path: Path, there: dict[str, Any], config: IngestConfig) -> None:
    if differences := differing(there, config.identity()):
        raise WorldlineError(
            f"{path}: holds other clips ({differences}); they are never overwritten: "
            "remove them, or choose another path"
        )
