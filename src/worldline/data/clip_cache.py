"""Clips in Parquet files, one a row group, each found by its place in the file without reading any table.

    clips.json         what they are; the SHA-256 of every other file, and the fingerprint
    shards/*.parquet   one row a clip: `item`, `start` (frame), `time` (seconds), `frames` (bytes)
    index.npy          (n,) of `offset`, `size`, `crc`: where a clip's bytes lie in its shard, and their CRC-32
    shards.npy         (s + 1,) number of the first clip of each shard
    episodes.parquet   one row a file, or episode, that gave clips: source, label, time, statistics, checksum
    ledger.parquet     one row for each clip or file that was rejected or shortened

`frames` is, for `raw`, the pixels; for `jpeg`, the pictures one after the other behind their end positions (uint32,
little endian). The column is plain and uncompressed, so that the bytes of a clip are one piece of the file: any Parquet
reader gets them, and `CachedClips` reads just that piece.
"""

from __future__ import annotations

import io
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8
from PIL import Image

from worldline.core.errors import WorldlineError
from worldline.core.files import atomic_path
from worldline.data.clips import Clips, Record, check_ids, load_array, open_clips, read_record, without_files

INDEX = np.dtype([("offset", "<u4"), ("size", "<u4"), ("crc", "<u4")])
"""12 bytes a clip, all that a reader holds of it."""
SCHEMA = pa.schema(
    [
        pa.field("item", pa.int64(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("time", pa.float64(), nullable=False),
        pa.field("frames", pa.binary(), nullable=False),  # not null: else levels would lie before the bytes
    ]
)
_MAX_SHARD_BYTES = 2**32
_MOST_AROUND_A_CLIP = 2000
"""Bytes that the other columns and the pages' headers take, generously."""
_MAX_OPEN = 128


def shard_path(root: Path, shard: int) -> Path:
    return root / "shards" / f"{shard // 1000:03d}" / f"{shard % 1000:03d}.parquet"


def encode_frame(frame: UInt8[np.ndarray, "h w 3"], codec: str, quality: int) -> bytes:
    """Return one picture's bytes in a cache."""
    if codec == "raw":
        return frame.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def pack(frames: list[bytes], codec: str) -> bytes:
    """Return a clip's bytes in a cache, of its encoded pictures."""
    ends = b"" if codec == "raw" else np.cumsum([len(frame) for frame in frames]).astype("<u4").tobytes()
    return ends + b"".join(frames)


class ShardWriter:
    """Write one shard; it appears, whole, when the `with` block ends without an error. Same clips, same bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._atomic = atomic_path(path)
        self._crcs: list[int] = []
        self._sizes: list[int] = []
        self._num_bytes = 0
        self.index = np.empty(0, dtype=INDEX)
        """Where each clip lies, once the block has ended."""

    def __enter__(self) -> ShardWriter:
        self._temporary = self._atomic.__enter__()
        self._writer = pq.ParquetWriter(
            self._temporary, SCHEMA, compression="none", use_dictionary=False, write_statistics=False
        )
        return self

    def add(self, item: int, start: int, time: float, frames: bytes) -> None:
        self._crcs.append(zlib.crc32(frames))
        self._sizes.append(len(frames))
        self._num_bytes += len(frames) + _MOST_AROUND_A_CLIP
        if self._num_bytes > _MAX_SHARD_BYTES:
            raise WorldlineError(
                f"{self.path}: a shard would take over 4 GiB; ingest with fewer items_per_shard, or codec=jpeg"
            )
        columns = [[item], [start], [time], [frames]]
        self._writer.write_table(pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if kind is None:
            self.index = self._locate()
        self._atomic.__exit__(kind, error, trace)

    def _locate(self) -> np.ndarray:
        """Return the index, each piece read back and compared with what was written."""
        index = np.empty(len(self._sizes), dtype=INDEX)
        metadata = pq.read_metadata(self._temporary)
        with open(self._temporary, "rb") as file:
            for row, (size, crc) in enumerate(zip(self._sizes, self._crcs, strict=True)):
                column = metadata.row_group(row).column(SCHEMA.get_field_index("frames"))
                offset = column.data_page_offset + column.total_compressed_size - size
                file.seek(offset)
                assert zlib.crc32(file.read(size)) == crc, "this version of pyarrow lays pages out otherwise"
                index[row] = (offset, size, crc)
        return index


class CachedClips:
    """What `worldline ingest` wrote into Parquet. Memory holds 12 bytes a clip, mapped from the file."""

    def __init__(self, path: Path, card: dict[str, Any]) -> None:
        self.path, self.card = path, without_files(card)
        self.num_clips, self.fingerprint = int(card["num_clips"]), str(card["fingerprint"])
        self.num_frames, self.image_size = int(card["num_frames"]), int(card["image_size"])
        self._raw = card["codec"] == "raw"
        self._index = load_array(path / "index.npy", mapped=True)
        self._firsts = load_array(path / "shards.npy", mapped=False)
        if len(self._index) != self.num_clips or self._firsts[-1] != self.num_clips:
            raise WorldlineError(f"{path}: index and card tell of different numbers of clips; copy it again")
        self._verified = np.zeros(-(-self.num_clips // 8), dtype=np.uint8)
        self._files = _OpenFiles(_MAX_OPEN)

    def __reduce__(self) -> tuple[Callable[[Path], Clips], tuple[Path]]:
        return open_clips, (self.path.absolute(),)

    def read(self, ids: Int64[np.ndarray, " b"]) -> UInt8[np.ndarray, "b t h w 3"]:
        """Return clips; the bytes of each are compared with their checksum when first read.

        Raises:
            WorldlineError: no such clip, or its shard is missing or damaged.
        """
        check_ids(ids, self.num_clips, self.path)
        size = self.image_size
        clips = np.empty((len(ids), self.num_frames, size, size, 3), dtype=np.uint8)
        entries = self._index[ids]
        shards = np.searchsorted(self._firsts, ids, side="right") - 1
        for row, (clip, shard) in enumerate(zip(ids.tolist(), shards.tolist(), strict=True)):
            offset, length, crc = entries[row].tolist()
            if self._raw:
                target = memoryview(clips[row].reshape(-1))
                if length != len(target):
                    raise self._damaged(shard, clip)
            else:
                target = memoryview(bytearray(length))
            got = self._files.read(shard_path(self.path, shard), target, offset)
            if got != length or not self._intact(clip, target, crc):
                raise self._damaged(shard, clip)
            if not self._raw:
                self._decode(target, clips[row])
        return clips

    def record(self) -> Record:
        return read_record(self.path)

    def pieces(self, ids: Int64[np.ndarray, " b"]) -> list[tuple[Path, int, int]]:
        """Return where the bytes of each clip lie: file, offset, size."""
        check_ids(ids, self.num_clips, self.path)
        shards = np.searchsorted(self._firsts, ids, side="right") - 1
        places = zip(shards.tolist(), self._index[ids].tolist(), strict=True)
        return [(shard_path(self.path, shard), offset, size) for shard, (offset, size, _) in places]

    def _decode(self, data: memoryview, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
        start = 4 * self.num_frames
        for frame, end in zip(frames, np.frombuffer(data[:start], "<u4").tolist(), strict=True):
            picture = Image.open(io.BytesIO(data[start : 4 * self.num_frames + end]))
            frame[:] = np.asarray(picture)
            start = 4 * self.num_frames + end

    def _intact(self, clip: int, data: memoryview, crc: int) -> bool:
        byte, bit = clip >> 3, 1 << (clip & 7)
        if self._verified[byte] & bit:
            return True
        if zlib.crc32(data) != crc:
            return False
        self._verified[byte] |= bit
        return True

    def _damaged(self, shard: int, clip: int) -> WorldlineError:
        return WorldlineError(
            f"{shard_path(self.path, shard)}: clip {clip} is not the one that was written; copy the file again"
        )


class _OpenFiles:
    """Files kept open, the least recently used closed first; safe to use from several threads."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._files: OrderedDict[Path, _File] = OrderedDict()

    def read(self, path: Path, target: memoryview, offset: int) -> int:
        """Fill `target` from `offset` on; return how many bytes there were."""
        with self._lock:
            file = self._files.pop(path, None) or _File(path)
            self._files[path] = file
            while len(self._files) > self._most:
                self._files.popitem(last=False)
        return os.preadv(file.descriptor, [target], offset)


class _File:
    """A descriptor that is closed when nobody reads from it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise WorldlineError(f"{path}: the shard is missing; copy the clips again") from None

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
