"""The replay file (`.wlr`): written while a session runs, readable at every moment. `docs/engine.md` documents it.

    file   = magic (7 bytes), version (1 byte), record*
    record = kind u8, 3 zero bytes, length u32, sequence u32, CRC-32 of these 12 bytes u32,
             payload (length bytes), CRC-32 of the 12 bytes and the payload u32

All numbers are little-endian. The head has a checksum of its own, so that a damaged length is told from a torn tail.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import IO, Any, NamedTuple

from worldline.core.errors import WorldlineError
from worldline.core.files import fsync_directory

MAGIC = b"\x89WLR\r\n\x1a"
VERSION = 2
HASH_BYTES = 16
FLUSH_SECONDS = 0.5
PROMPT_BYTES = 4096

_HEAD = struct.Struct("<B3xII")
_CRC = struct.Struct("<I")
_HEAD_BYTES = _HEAD.size + _CRC.size
_PICTURE = struct.Struct(f"<Q{HASH_BYTES}s{HASH_BYTES}s")  # id, hash of the picture, chain hash
_SEED = struct.Struct("<q")
_POINT = struct.Struct(f"<Q{HASH_BYTES}s")  # id, chain hash
_HEADER_LIMIT = 1 << 20
_BACKLOG_LIMIT = 64 << 20


class Kind(IntEnum):
    HEADER = 0
    RESET = 1
    STEP = 2
    ANCHOR = 3
    SNAPSHOT = 4
    END = 5


PICTURES = (Kind.RESET, Kind.STEP, Kind.ANCHOR)
"""Records that stand for a frame that was shown."""


class Layout(NamedTuple):
    """Sizes of a session's buffers: what lengths its records may have."""

    action_dim: int
    frame_shape: tuple[int, int, int]
    state: tuple[tuple[str, str, tuple[int, ...], int], ...]
    """Name, dtype, shape and bytes of every state tensor, in order."""

    @property
    def frame_bytes(self) -> int:
        height, width, channels = self.frame_shape
        return height * width * channels

    @property
    def marks_bytes(self) -> int:
        return HASH_BYTES * len(self.state)

    @property
    def state_bytes(self) -> int:
        return sum(size for *_, size in self.state)

    def to_json(self) -> dict[str, Any]:
        state = [{"name": n, "dtype": d, "shape": list(s), "bytes": b} for n, d, s, b in self.state]
        return {"action_dim": self.action_dim, "frame_shape": list(self.frame_shape), "state": state}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Layout:
        """Read a layout. Raises ValueError, KeyError or TypeError if it is not one."""
        state = tuple(
            (str(t["name"]), str(t["dtype"]), tuple(_size(n) for n in t["shape"]), _size(t["bytes"]))
            for t in data["state"]
        )
        height, width, channels = (_size(n) for n in data["frame_shape"])
        return cls(_size(data["action_dim"]), (height, width, channels), state)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a recording says about itself."""

    fingerprint: dict[str, str]
    layout: Layout
    fps: float
    snapshot_every: int

    def to_bytes(self) -> bytes:
        fields = {"fps": self.fps, "snapshot_every": self.snapshot_every, **self.layout.to_json()}
        return json.dumps({"fingerprint": self.fingerprint, **fields}).encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Header:
        data = json.loads(payload)
        fingerprint = {str(k): str(v) for k, v in data["fingerprint"].items()}
        return cls(
            fingerprint=fingerprint,
            layout=Layout.from_json(data),
            fps=float(data["fps"]),
            snapshot_every=_size(data["snapshot_every"]),
        )


class Record(NamedTuple):
    """One record, decoded. Fields that its kind does not have are empty."""

    kind: Kind
    id: int
    chain: bytes
    picture: bytes = b""
    """Hash of the picture."""
    marks: bytes = b""
    """Hash of every state tensor, in the layout's order."""
    seed: int = 0
    prompt: str = ""
    body: bytes = b""
    """STEP: the action, float32. ANCHOR: the real frame. SNAPSHOT: state tensors in order, then the picture."""


class Recorder:
    """Appends records to a new file; a thread of its own writes and fsyncs twice a second.

    A process that dies loses at most what came since. Failures to write are raised by the next `append` or `close`.

    Raises:
        WorldlineError: the file exists already or cannot be created.
    """

    def __init__(self, path: str | Path, header: Header) -> None:
        self.path = Path(path)
        self.pictures = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except OSError as error:
            if self.path.exists():
                raise WorldlineError(
                    f"{path}: exists already; recordings are never overwritten, choose another"
                ) from None
            raise WorldlineError(f"{path}: cannot record there ({error.strerror})") from None
        self._sequence = 0
        self._pending = bytearray(MAGIC + bytes([VERSION]))
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: OSError | None = None
        self._append(Kind.HEADER, header.to_bytes())
        self._flush()
        fsync_directory(self.path.parent)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def frame(self, kind: Kind, frame_id: int, picture: bytes, chain: bytes, marks: bytes, cause: bytes) -> None:
        """Append a frame that was shown. Its cause: seed i64 and the prompt, the action, or the real frame."""
        self._append(kind, _PICTURE.pack(frame_id, picture, chain) + marks + cause)

    def snapshot(self, frame_id: int, chain: bytes, body: bytes) -> None:
        """Append the state after frame `frame_id`: the tensors' bytes in order, then the picture's."""
        self._append(Kind.SNAPSHOT, _POINT.pack(frame_id, chain) + body)

    def close(self, frame_id: int, chain: bytes) -> None:
        """Write the end record and close the file."""
        self._stop.set()
        self._thread.join()
        try:
            if self._failure is None:
                self._append(Kind.END, _POINT.pack(frame_id, chain))
                self._flush()
        finally:
            os.close(self._file)
        self._check()

    def abandon(self) -> None:
        """Close the file without an end record, as a crash would; what was appended is kept."""
        self._stop.set()
        self._thread.join()
        os.close(self._file)

    def _append(self, kind: Kind, payload: bytes) -> None:
        self._check()
        head = _HEAD.pack(kind, len(payload), self._sequence)
        self._sequence += 1
        self.pictures += kind in PICTURES
        with self._lock:
            if len(self._pending) > _BACKLOG_LIMIT:
                raise WorldlineError(f"{self.path}: the disk does not keep up with the recording; it was stopped")
            self._pending += head + _CRC.pack(zlib.crc32(head)) + payload
            self._pending += _CRC.pack(zlib.crc32(payload, zlib.crc32(head)))

    def _check(self) -> None:
        if self._failure is not None:
            raise WorldlineError(f"{self.path}: the recording stopped ({self._failure.strerror})")

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_SECONDS):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            data, self._pending = self._pending, bytearray()
        if not data or self._failure is not None:
            return
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._file, view) :]
            os.fsync(self._file)
        except OSError as error:
            self._failure = error


class Recording:
    """A replay file, checked from end to end when it is opened.

    A tail that stops in the middle of a record, or was never written (zeros), is what a crash leaves: it is cut off,
    and `complete` is False. It is also False while the file is still being written.

    Raises:
        WorldlineError: not a replay file, of another version, or damaged anywhere else.
    """

    header: Header
    complete: bool
    """The recording was closed in order."""
    frames: int
    """Pictures in it: resets, steps and anchors."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.frames, self.complete = 0, False
        with self._open() as file:
            self._size = file.seek(0, os.SEEK_END)  # a file that still grows is read up to here
        self.snapshots: list[int] = []
        """Ids of the frames after which the state is kept."""
        for record in self.records():
            self.frames += record.kind in PICTURES
            self.complete = record.kind is Kind.END
            if record.kind is Kind.SNAPSHOT:
                self.snapshots.append(record.id)

    def records(self) -> Iterator[Record]:
        """Yield the records after the header, in order; memory does not grow with the file."""
        with self._open() as file:
            yield from self._decode(file, self._size)

    def _open(self) -> IO[bytes]:
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise WorldlineError(
                f"{self.path}: cannot be read ({error.strerror}); give the path of a .wlr file"
            ) from None

    def _decode(self, file: IO[bytes], size: int) -> Iterator[Record]:
        magic = file.read(len(MAGIC) + 1)
        if magic[: len(MAGIC)] != MAGIC:
            raise WorldlineError(f"{self.path}: not a replay file; expected one that `worldline play` recorded")
        if magic[len(MAGIC) :] != bytes([VERSION]):
            found = magic[-1] if len(magic) > len(MAGIC) else "missing"
            raise WorldlineError(f"{self.path}: version {found} of the replay format, this worldline reads {VERSION}")
        payload = self._next(file, size, 0, None)
        if payload is None:
            raise WorldlineError(f"{self.path}: ends within its header; nothing was recorded")
        try:
            self.header = Header.from_bytes(payload[1])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WorldlineError(f"{self.path}: its header is not one of a replay file ({error!r})") from None
        sequence, last = 1, None
        while (item := self._next(file, size, sequence, last)) is not None:
            record = self._record(*item, last)
            if record.kind is Kind.END:
                if file.tell() != size:
                    raise self._damage(last, "there is more after its end record")
                yield record
                return
            yield record
            sequence, last = sequence + 1, record.id

    def _next(self, file: IO[bytes], size: int, sequence: int, last: int | None) -> tuple[Kind, bytes] | None:
        """Return the next record's kind and payload, or None where the file was torn."""
        start = file.tell()
        head = file.read(_HEAD_BYTES)
        if len(head) < _HEAD_BYTES:
            return None
        if zlib.crc32(head[: _HEAD.size]) != _CRC.unpack(head[_HEAD.size :])[0]:
            if self._zeros_to_end(file, start + len(head.rstrip(b"\0"))) and head[-1] == 0:
                return None
            raise self._damage(last, f"checksum of the record head at byte {start}")
        code, length, found = _HEAD.unpack(head[: _HEAD.size])
        if found != sequence:
            raise self._damage(last, f"record {sequence} expected at byte {start}, got {found}")
        self._check_length(code, length, last)
        if length + _CRC.size > size - file.tell():
            return None
        payload, tail = file.read(length), file.read(_CRC.size)
        expected = _CRC.pack(zlib.crc32(payload, zlib.crc32(head[: _HEAD.size])))
        if tail != expected:
            if expected.startswith(tail.rstrip(b"\0")) and self._zeros_to_end(file, file.tell()):
                return None
            raise self._damage(last, f"checksum of the record at byte {start}")
        return Kind(code), payload

    def _check_length(self, code: int, length: int, last: int | None) -> None:
        if code == Kind.HEADER:
            low, high = 2, _HEADER_LIMIT
        elif not hasattr(self, "header"):
            raise self._damage(last, "it does not begin with a header")
        elif code == Kind.RESET:
            low = _PICTURE.size + self.header.layout.marks_bytes + _SEED.size
            high = low + PROMPT_BYTES
        elif code in (Kind.STEP, Kind.ANCHOR):
            layout = self.header.layout
            cause = 4 * layout.action_dim if code == Kind.STEP else layout.frame_bytes
            low = high = _PICTURE.size + layout.marks_bytes + cause
        elif code == Kind.SNAPSHOT:
            low = high = _POINT.size + self.header.layout.state_bytes + self.header.layout.frame_bytes
        elif code == Kind.END:
            low = high = _POINT.size
        else:
            raise self._damage(last, f"unknown kind of record {code}")
        if not low <= length <= high:
            raise self._damage(last, f"a record of kind {code} has {length} bytes, expected {low} to {high}")

    def _record(self, kind: Kind, payload: bytes, last: int | None) -> Record:
        if kind is Kind.HEADER:
            raise self._damage(last, "a second header")
        if kind in (Kind.SNAPSHOT, Kind.END):
            frame_id, chain = _POINT.unpack_from(payload)
            if last is not None and frame_id != last:
                raise self._damage(last, f"a record of kind {int(kind)} names frame {frame_id} after frame {last}")
            return Record(kind, frame_id, chain, body=payload[_POINT.size :])
        frame_id, picture, chain = _PICTURE.unpack_from(payload)
        if last is None and kind is not Kind.RESET:
            raise self._damage(last, "it begins with neither a reset nor a snapshot")
        if frame_id != (0 if last is None else last + 1):
            raise self._damage(last, f"frame {frame_id} follows frame {last}")
        cause = _PICTURE.size + self.header.layout.marks_bytes
        marks, body = payload[_PICTURE.size : cause], payload[cause:]
        if kind is not Kind.RESET:
            return Record(kind, frame_id, chain, picture, marks, body=body)
        try:
            prompt = body[_SEED.size :].decode()
        except UnicodeDecodeError:
            raise self._damage(last, "a prompt that is not text") from None
        return Record(kind, frame_id, chain, picture, marks, seed=_SEED.unpack_from(body)[0], prompt=prompt)

    def _damage(self, last: int | None, what: str) -> WorldlineError:
        where = "before its first frame" if last is None else f"at frame {last + 1}"
        return WorldlineError(f"{self.path}: damaged {where}: {what}; get another copy of the file")

    @staticmethod
    def _zeros_to_end(file: IO[bytes], start: int) -> bool:
        file.seek(start)
        while block := file.read(1 << 16):
            if block.strip(b"\0"):
                return False
        return True


def _size(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise ValueError(f"a size must be a whole number below 2^32, got {value!r}")
    return value
