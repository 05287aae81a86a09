"""Frames of one source, each decoded once, and what is wrong with it; how a frame becomes a square picture."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

REASONS = {
    "malformed_entry": "a line of a list or annotation that cannot be read",
    "missing": "listed, and not there; or gone when its turn came",
    "symlink_loop": "a link that leads back to itself, or to a folder above it",
    "not_a_file": "a folder, pipe or device with a video's name",
    "unreadable": "the file system refuses it, or fails",
    "duplicate_id": "an earlier entry has the same id",
    "empty": "no bytes",
    "not_a_video": "its bytes are no video container",
    "broken_index": "a video container that cannot be opened: its index is missing, cut off or nonsense",
    "no_video_stream": "a container without moving pictures",
    "unknown_codec": "FFmpeg has no decoder for its pictures",
    "too_large": "its header, or a frame, claims more than 67 million pixels",
    "no_frames": "not one frame can be decoded",
    "truncated": "it ends before its last frame",
    "damaged": "a frame cannot be decoded, though others follow",
    "size_changes": "its pictures change their size",
    "crashes_decoder": "the decoder dies of it, twice",
    "too_short": "whole, but with fewer frames than a clip needs",
}
"""The closed list of what the ledger says, and what it means."""
MAX_PIXELS = 1 << 26
_BROKEN = (av.error.FFmpegError, ValueError, IndexError, MemoryError)
"""What PyAV raises at damaged bytes; IndexError where a stream turns up that was not announced."""
_NOT_VIDEO = ("tty", "image2", "ico", "ass", "srt", "webvtt", "tiertexseq")
_INDEXED = ("mov", "matroska", "avi")
"""Containers that know their key frames; in others a seek may lead between two, and the decoder makes pictures up."""
_MAGIC = (
    (4, (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
    (0, (b"RIFF", b"\x1aE\xdf\xa3", b"OggS", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"FLV", b"0&\xb2u")),
)
"""How the containers that hold video begin, and where."""


class Unusable(Exception):
    """A source, or what is left of it, gives no more frames."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, " ".join(detail.split())


@dataclass
class Footage:
    """What is known of a source; `VideoFootage` finds it out by decoding."""

    declared: int | None = None
    """Frames that there should be."""
    num_frames: int = 0
    """Frames decoded so far, all whole."""
    rate: float = 0.0
    """Frames a second, on average."""
    width: int = 0
    height: int = 0
    seekable: bool = True
    """Whether a frame is found by its time stamp: each is later than the one before, and the container has an index."""

    def frames(self) -> Iterator[tuple[float, int, av.VideoFrame]]:
        """Yield time in seconds, time stamp in the stream's own units, and picture.

        Raises:
            Unusable: in place of the first frame that cannot be had.
        """
        raise NotImplementedError


class ArrayFootage(Footage):
    """Frames that somebody else has decoded."""

    def __init__(self, pictures: UInt8[np.ndarray, "t h w 3"], rate: float) -> None:
        super().__init__(declared=len(pictures), rate=rate, height=pictures.shape[1], width=pictures.shape[2])
        self._pictures = pictures

    def frames(self) -> Iterator[tuple[float, int, av.VideoFrame]]:
        for index, picture in enumerate(self._pictures):
            self.num_frames += 1
            yield index / self.rate, index, av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")


class VideoFootage(Footage):
    """A video file. What follows the first damage is not used: decoders make up what they cannot read."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def frames(self, since: int | None = None) -> Iterator[tuple[float, int, av.VideoFrame]]:
        """Yield frames; with a time stamp, those from the last key frame before it on."""
        check_file(self._path)
        try:
            container = av.open(str(self._path))
        except _BROKEN as error:
            looks = looks_like_video(self._path)
            raise Unusable("broken_index" if looks else "not_a_video", _told(error)) from None
        with container:
            yield from self._decode(container, since)

    def _decode(self, container: Any, since: int | None) -> Iterator[tuple[float, int, av.VideoFrame]]:
        name = container.format.name
        if name in _NOT_VIDEO or name.endswith("_pipe"):
            raise Unusable("not_a_video", f"it is read as {container.format.long_name or name}")
        stream = next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)
        if stream is None:
            others = len(container.streams.video) + len(container.streams.audio) + len(container.streams.subtitles)
            raise Unusable("no_video_stream" if others else "broken_index", f"{others} other streams in {name}")
        context = stream.codec_context
        if context is None:
            raise Unusable("unknown_codec", f"stream {stream.index} of {name}")
        self.declared, self.width, self.height = stream.frames or None, context.width, context.height
        self.rate = float(stream.average_rate or stream.guessed_rate or 0)
        if self.width * self.height > MAX_PIXELS:
            raise Unusable("too_large", f"{self.width} x {self.height}")
        context.options = {"max_pixels": str(MAX_PIXELS)}
        context.thread_type, context.thread_count = "SLICE", 1  # the cores have other files to decode
        if since is not None:
            try:
                container.seek(since, stream=stream, backward=True)
            except _BROKEN as error:
                raise Unusable("damaged", _told(error)) from None
        self.seekable = name.startswith(_INDEXED)
        unit = float(stream.time_base)
        last, packets = -np.inf, 0
        damage: Unusable | None = None
        demuxer = container.demux(stream)
        while damage is None:
            try:
                packet = next(demuxer, None)
                if packet is None:
                    break
                if not packet.size and packet.dts is not None:
                    continue  # no picture of its own: the one before is shown longer
                packets += packet.size > 0
                if packet.is_corrupt:
                    raise Unusable("damaged", f"packet {packets} is not whole")
                for frame in packet.decode():
                    stamp = -1 if frame.pts is None else frame.pts
                    if frame.is_corrupt:
                        raise Unusable("damaged", f"frame {self.num_frames} is not whole")
                    if self.num_frames == 0:
                        self.width, self.height = frame.width, frame.height
                    elif (frame.width, frame.height) != (self.width, self.height):
                        raise Unusable(
                            "size_changes",
                            f"{self.width} x {self.height} to {frame.width} x {frame.height} at {self.num_frames}",
                        )
                    self.seekable &= frame.pts is not None and stamp > last
                    last = stamp
                    self.num_frames += 1
                    yield stamp * unit, stamp, frame
            except Unusable as found:
                damage = found
            except _BROKEN as error:
                damage = Unusable("damaged", _told(error))
        self._judge(container, stream, damage, packets, last)

    def _judge(self, container: Any, stream: Any, damage: Unusable | None, packets: int, last: float | int) -> None:
        """Say how a stream ended, if it did not end well."""
        if damage is not None and damage.reason == "damaged" and not _goes_on(container, stream):
            damage = Unusable("truncated", damage.detail)
        if damage is None:
            damage = self._cut_short(container, stream, packets, last)
        if damage is not None:
            raise damage if self.num_frames else Unusable("no_frames", f"{damage.reason}: {damage.detail}")
        if not self.num_frames:
            raise Unusable("no_frames", f"{packets} packets")

    def _cut_short(self, container: Any, stream: Any, packets: int, last: float | int) -> Unusable | None:
        """Compare a stream that ended quietly with what its header promised."""
        name = container.format.name
        if name == "avi":  # it counts in frames, and frames without bytes are not delivered
            seen, declared = int(last) + 1 if np.isfinite(last) else 0, stream.frames
        elif name.startswith("mov"):
            seen, declared = packets, stream.frames
        elif name.startswith("matroska"):
            seen, declared = self.num_frames, _matroska_frames(container, stream)
        else:
            return None  # their lengths are guesses made from their ends
        tolerated = 2 if name.startswith("matroska") else 1
        if declared and seen < declared - tolerated:
            return Unusable("truncated", f"{seen} of {declared} frames")
        return None


def check_file(path: Path) -> None:
    """Look at a file before any decoder does, which a pipe, for one, would stop for good.

    Raises:
        Unusable: it is no file with bytes in it.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Unusable("not_a_file", stat.filemode(status.st_mode))
        if not status.st_size:
            raise Unusable("empty")
        with open(path, "rb") as file:
            file.read(1)
    except FileNotFoundError:
        raise Unusable("missing", "a link to nowhere" if path.is_symlink() else "") from None
    except (OSError, RuntimeError) as error:  # before Python 3.13 a loop is a RuntimeError in some places
        loops = isinstance(error, RuntimeError) or error.errno == 40
        raise Unusable("symlink_loop" if loops else "unreadable", _told(error)) from None


def looks_like_video(path: Path) -> bool:
    """Tell a container that holds video by its first bytes, whatever its name."""
    with open(path, "rb") as file:
        head = file.read(16)
    return any(head[at:].startswith(magic) for at, magic in _MAGIC)


class Fit:
    """Makes frames square: the short edge to `size`, then the middle of the long one. One for each thread."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._reformatter = VideoReformatter()  # making it costs more than using it

    def scaled(self, frame: av.VideoFrame, even: bool = False) -> tuple[int, int]:
        """Return width and height once the short edge is right."""
        short = min(frame.width, frame.height)
        width, height = (max(self._size, round(edge * self._size / short)) for edge in (frame.width, frame.height))
        return (width + width % 2, height + height % 2) if even else (width, height)

    def reformat(self, frame: av.VideoFrame, width: int, height: int, pixels: str) -> av.VideoFrame:
        """Return a frame in another size and format of pixels; a smaller one is averaged by area."""
        return self._reformatter.reformat(frame, width=width, height=height, format=pixels, interpolation="AREA")

    def __call__(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "s s 3"]:
        width, height = self.scaled(frame)
        picture = self.reformat(frame, width, height, "rgb24").to_ndarray()
        top, left = (height - self._size) // 2, (width - self._size) // 2
        return np.ascontiguousarray(picture[top : top + self._size, left : left + self._size])


def _goes_on(container: Any, stream: Any) -> bool:
    """Say whether whole packets follow the one that failed; a last one may be what a parser had left over."""
    whole = 0
    try:
        for packet in container.demux(stream):
            whole += packet.size > 0 and not packet.is_corrupt
            if whole > 1:
                return True
    except _BROKEN:
        pass
    return False


def _matroska_frames(container: Any, stream: Any) -> int | None:
    """Return how many frames the header's length stands for: the stream's own where it is told."""
    hours, _, rest = str(stream.metadata.get("DURATION", "")).partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        length = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        if len(container.streams) > 1 or not container.duration:
            return None  # the sound may be longer
        length = container.duration / 1e6
    rate = stream.average_rate or stream.guessed_rate
    return round(length * float(rate)) if rate else None


def _told(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)  # without its path
