"""Clips decoded out of videos when they are read: straight from the source, or from one encoded for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.files import sha256_file
from worldline.data.clips import (
    Clips,
    Record,
    check_ids,
    load_array,
    open_clips,
    read_record,
    read_table,
    without_files,
)
from worldline.data.footage import Fit, Unusable, VideoFootage, check_file
from worldline.data.sources import as_on_disk

_DIGITS = 16
"""Of a SHA-256 in hex that are kept in memory: damage that goes unnoticed is one case in 2^64."""


def video_path(root: Path, item: int) -> Path:
    """Return where an entry's video lies that was encoded again."""
    return root / "videos" / f"{item // 1000:06d}" / f"{item % 1000:03d}.mp4"


class VideoClips:
    """What `worldline ingest codec=source` or `codec=h264` wrote: a time stamp of each clip's first frame.

    Memory holds 8 bytes a clip, mapped from the file, and up to 200 bytes a video.
    """

    def __init__(self, path: Path, card: dict[str, Any]) -> None:
        self.path, self.card = path, without_files(card)
        self.num_clips, self.fingerprint = int(card["num_clips"]), str(card["fingerprint"])
        self.num_frames, self.image_size = int(card["num_frames"]), int(card["image_size"])
        self._stride = int(card["stride"])
        self._hop = int(card["ingest"]["hop"] or self.num_frames * self._stride)
        self._stamps = load_array(path / "index.npy", mapped=True)
        columns = ["first_clip", "item", "seekable", "path", "sha256"]
        table = read_table(path / "episodes.parquet", columns)
        self._firsts, self._items, self._seekable = (table[name].to_numpy() for name in columns[:3])
        self._paths = table["path"]
        if len(self._stamps) != self.num_clips:
            raise WorldlineError(f"{path}: index and card tell of different numbers of clips; copy it again")
        digests = pc.utf8_slice_codeunits(table["sha256"], 0, _DIGITS)
        if self.card["codec"] == "h264":  # of what lies here, and not of its source
            files, self._paths = card["files"], None
            digests = [files[video_path(Path(), item).as_posix()][:_DIGITS] for item in self._items.tolist()]
        self._digests = np.array(digests, dtype=f"S{_DIGITS}")
        self._verified = np.zeros(len(table), dtype=bool)
        del table
        pa.default_memory_pool().release_unused()

    def __reduce__(self) -> tuple[Callable[[Path], Clips], tuple[Path]]:
        return open_clips, (self.path.absolute(),)

    def read(self, ids: Int64[np.ndarray, " b"]) -> UInt8[np.ndarray, "b t h w 3"]:
        """Return clips; the bytes of each video are compared with their checksum when first read.

        Raises:
            WorldlineError: no such clip, or its video is missing, damaged, or not the one that was ingested.
        """
        check_ids(ids, self.num_clips, self.path)
        size, fit = self.image_size, Fit(self.image_size)
        clips = np.empty((len(ids), self.num_frames, size, size, 3), dtype=np.uint8)
        episodes = np.searchsorted(self._firsts, ids, side="right") - 1
        for row, (clip, episode) in enumerate(zip(ids.tolist(), episodes.tolist(), strict=True)):
            path = self._path_of(episode)
            start = (clip - int(self._firsts[episode])) * self._hop
            try:
                self._verify(episode, path)
                found = self._seekable[episode] and self._read_from(path, int(self._stamps[clip]), clips[row], fit)
                if not found and not self._read_counting(path, start, clips[row], fit):
                    raise Unusable("truncated", f"clip {clip} begins at frame {start}")
            except Unusable as error:
                raise WorldlineError(f"{path}: not as it was when ingested ({error}); copy it again") from None
        return clips

    def record(self) -> Record:
        return read_record(self.path)

    def _path_of(self, episode: int) -> Path:
        if self.card["codec"] == "h264":
            return video_path(self.path, int(self._items[episode]))
        told = str(self._paths[episode].as_py())
        path = Path(self.card["root"]) / told
        return path if path.exists() else Path(self.card["root"]) / as_on_disk(told)

    def _verify(self, episode: int, path: Path) -> None:
        """Compare a video's bytes with their checksum, once."""
        if self._verified[episode]:
            return
        check_file(path)
        try:
            digest = sha256_file(path)
        except OSError as error:
            raise Unusable("unreadable", error.strerror or "") from None
        if not digest.startswith(self._digests[episode].decode()):
            raise Unusable("damaged", "its bytes are others")
        self._verified[episode] = True

    def _read_from(self, path: Path, stamp: int, clip: UInt8[np.ndarray, "t h w 3"], fit: Fit) -> bool:
        """Read from the key frame before a time stamp on; say whether that led to the frame with this very stamp."""
        footage = VideoFootage(path)
        taken = -1
        try:
            for _, here, frame in footage.frames(since=stamp):
                if taken < 0 and here < stamp:
                    continue
                if taken < 0 and here > stamp:
                    return False  # the container cannot find it
                taken += 1
                if taken % self._stride == 0:
                    clip[taken // self._stride] = fit(frame)
                    if taken // self._stride == self.num_frames - 1:
                        return True
        except Unusable:  # what follows a seek may look damaged, and be whole from the start on
            return False
        return False

    def _read_counting(self, path: Path, start: int, clip: UInt8[np.ndarray, "t h w 3"], fit: Fit) -> bool:
        for index, (_, _, frame) in enumerate(VideoFootage(path).frames()):
            place, between = divmod(index - start, self._stride)
            if place >= 0 and between == 0:
                clip[place] = fit(frame)
                if place == self.num_frames - 1:
                    return True
        return False
