"""Clips decoded out of videos when they are read: straight from the source, or from one encoded for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8

from worldline.core.errors import WorldlineError
from worldline.data.clips import Record, check_ids, read_record
from worldline.data.footage import Fit, Unusable, VideoFootage
from worldline.data.sources import as_on_disk


class VideoClips:
    """What `worldline ingest codec=source` or `codec=h264` wrote: a time stamp of each clip's first frame.

    Memory holds 8 bytes a clip, mapped from the file, and about 100 bytes a video.
    """

    def __init__(self, path: Path, card: dict[str, Any]) -> None:
        self.path, self.card = path, card
        self.num_clips, self.fingerprint = int(card["num_clips"]), str(card["fingerprint"])
        self.num_frames, self.image_size = int(card["num_frames"]), int(card["image_size"])
        self._stride = int(card["stride"])
        self._hop = int(card["ingest"]["hop"] or self.num_frames * self._stride)
        self._stamps = np.asarray(np.load(path / "index.npy", mmap_mode="r"))
        columns = ["first_clip", "item", "seekable", "size_bytes", "path"]
        table = pq.read_table(path / "episodes.parquet", columns=columns)
        self._firsts, self._items, self._seekable, self._sizes = (table[name].to_numpy() for name in columns[:4])
        self._paths = table["path"]

    def __reduce__(self) -> tuple[type[VideoClips], tuple[Path, dict[str, Any]]]:
        return VideoClips, (self.path.absolute(), self.card)

    def read(self, ids: Int64[np.ndarray, " b"]) -> UInt8[np.ndarray, "b t h w 3"]:
        """Return clips.

        Raises:
            WorldlineError: no such clip, or its video is missing, damaged, or not the one that was ingested.
        """
        check_ids(ids, self.num_clips, self.path)
        size, fit = self.image_size, Fit(self.image_size)
        clips = np.empty((len(ids), self.num_frames, size, size, 3), dtype=np.uint8)
        episodes = np.searchsorted(self._firsts, ids, side="right") - 1
        for row, (clip, episode) in enumerate(zip(ids.tolist(), episodes.tolist(), strict=True)):
            path = self._video(episode)
            start = (clip - int(self._firsts[episode])) * self._hop
            try:
                found = self._seekable[episode] and self._read_from(path, int(self._stamps[clip]), clips[row], fit)
                if not found and not self._read_counting(path, start, clips[row], fit):
                    raise Unusable("truncated", f"clip {clip} begins at frame {start}")
            except Unusable as error:
                raise WorldlineError(f"{path}: not as it was when ingested ({error}); copy it again") from None
        return clips

    def record(self) -> Record:
        return read_record(self.path)

    def _video(self, episode: int) -> Path:
        if self.card["codec"] == "h264":
            from worldline.data.shard_work import video_path

            return video_path(self.path, int(self._items[episode]))
        told = str(self._paths[episode].as_py())
        path = Path(self.card["root"]) / told
        if not path.exists():
            path = Path(self.card["root"]) / as_on_disk(told)
        if path.exists() and path.stat().st_size != self._sizes[episode]:
            raise WorldlineError(f"{path}: its size is not what it was when ingested; ingest again")
        return path

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
