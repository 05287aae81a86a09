"""Clips decoded out of videos when they are read: straight from the source, or from one encoded for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.files import atomic_path, sha256_file
from worldline.data.clips import Clips, Record, check_ids, load_array, open_clips, read_record, without_files
from worldline.data.footage import Fit, Unusable, VideoFootage, check_file
from worldline.data.sources import as_on_disk

VIDEO_FILES = _LINES, _TABLE = "videos.jsonl", "videos.npy"


class Video(NamedTuple):
    """What a reader must know of a video; a line of `videos.jsonl`."""

    path: str
    """Below the source's root, or (`h264`) below the clips' own folder."""
    sha256: str
    seekable: bool
    """Whether the container finds a time stamp."""


def write_videos(root: Path, videos: Iterable[tuple[int, Video]], num_clips: int) -> None:
    """Write `videos.jsonl`, and `videos.npy` (2, v + 1): number of each video's first clip, and where its line begins.

    `videos` gives that number with each video, and it rises.
    """
    firsts, places = [], [0]
    with atomic_path(root / _LINES) as temporary, open(temporary, "wb") as file:
        for first, video in videos:
            firsts.append(first)
            places.append(places[-1] + file.write(json.dumps(video._asdict()).encode() + b"\n"))
    with atomic_path(root / _TABLE) as temporary, open(temporary, "wb") as file:
        np.save(file, np.array([[*firsts, num_clips], places], dtype="<i8"))


def video_path(root: Path, item: int) -> Path:
    """Return where an entry's video lies that was encoded again."""
    return root / "videos" / f"{item // 1000:06d}" / f"{item % 1000:03d}.mp4"


class VideoClips:
    """What `worldline ingest codec=source` or `codec=h264` wrote: a time stamp of each clip's first frame.

    Memory holds 8 bytes a clip and 16 bytes a video, mapped from files, and a byte a video.
    """

    def __init__(self, path: Path, card: dict[str, Any]) -> None:
        self.path, self.card = path, without_files(card)
        self.num_clips, self.fingerprint = int(card["num_clips"]), str(card["fingerprint"])
        self.num_frames, self.image_size = int(card["num_frames"]), int(card["image_size"])
        self._stride = int(card["stride"])
        self._hop = int(card["ingest"]["hop"] or self.num_frames * self._stride)
        self._stamps = load_array(path / "index.npy", mapped=True)
        table = load_array(path / _TABLE, mapped=True)
        if table.shape[:-1] != (2,):
            raise WorldlineError(f"{path / _TABLE}: not an index (its shape is {table.shape}); copy the clips again")
        self._firsts, self._places = table
        if len(self._stamps) != self.num_clips or self._firsts[-1] != self.num_clips:
            raise WorldlineError(f"{path}: index and card tell of different numbers of clips; copy it again")
        self._verified = np.zeros(len(self._places) - 1, dtype=bool)

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
            video = self._video(episode)
            path = self._path_of(video)
            start = (clip - int(self._firsts[episode])) * self._hop
            try:
                self._verify(episode, path, video.sha256)
                found = video.seekable and self._read_from(path, int(self._stamps[clip]), clips[row], fit)
                if not found and not self._read_counting(path, start, clips[row], fit):
                    raise Unusable("truncated", f"clip {clip} begins at frame {start}")
            except Unusable as error:
                raise WorldlineError(f"{path}: not as it was when ingested ({error}); copy it again") from None
        return clips

    def record(self) -> Record:
        return read_record(self.path)

    def _video(self, episode: int) -> Video:
        here, end = self._places[episode : episode + 2].tolist()
        path = self.path / _LINES
        try:
            with open(path, "rb") as file:
                file.seek(here)
                return Video(**json.loads(file.read(end - here)))
        except FileNotFoundError:
            raise WorldlineError(f"{path}: missing; copy the clips again") from None
        except (ValueError, TypeError):
            raise WorldlineError(f"{path}: not a list of videos (byte {here}); copy the clips again") from None

    def _path_of(self, video: Video) -> Path:
        if self.card["codec"] == "h264":
            return self.path / video.path
        path = Path(self.card["root"]) / video.path
        return path if path.exists() else Path(self.card["root"]) / as_on_disk(video.path)

    def _verify(self, episode: int, path: Path, sha256: str) -> None:
        """Compare a video's bytes with their checksum, once."""
        if self._verified[episode]:
            return
        check_file(path)
        try:
            digest = sha256_file(path)
        except OSError as error:
            raise Unusable("unreadable", error.strerror or "") from None
        if digest != sha256:
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
