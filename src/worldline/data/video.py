"""Frames to H.264 and back: short segments that are joined without being encoded again, and random access by frame."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float64, UInt8

from worldline.core.errors import WorldlineError

Decoder = Literal["pyav", "torchcodec"]
CODEC, PIXEL_FORMAT = "libx264rgb", "gbrp"
_OPTIONS = {"qp": "0", "preset": "medium", "g": "12", "bf": "0", "threads": "1"}
"""Lossless in RGB, so that frames come back exactly; one thread, so that the same frames give the same bytes."""


_SMALL_PIXELS = 128 * 128
"""Up to this size handing frames between decoder threads costs more than decoding them."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One episode's frames as a small MP4, with what a dataset's statistics need of them."""

    data: bytes
    num_frames: int
    height: int
    width: int
    statistics: Float64[np.ndarray, "4 3"]
    """Minimum, maximum, mean and standard deviation of each colour, in [0, 1]."""


def frame_rate(step_seconds: float) -> Fraction:
    """Return frames a second as a fraction that video containers can hold."""
    return Fraction(1.0 / step_seconds).limit_denominator(1001)


def encode_segment(frames: np.ndarray, rate: Fraction) -> Segment:
    """Encode frames, (t, h, w, 3) uint8, without loss; the bytes depend on the frames and the encoder's version only.

    Raises:
        WorldlineError: frames that are not (t, h, w, 3) uint8, or none.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise WorldlineError(f"frames must be (t, h, w, 3) uint8 with t > 0, got {frames.shape} {frames.dtype}")
    num_frames, height, width, _ = frames.shape
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream(CODEC, rate=rate, options=_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return Segment(
        data=buffer.getvalue(),
        num_frames=num_frames,
        height=height,
        width=width,
        statistics=_colour_statistics(frames),
    )


def _colour_statistics(frames: UInt8[np.ndarray, "t h w 3"]) -> Float64[np.ndarray, "4 3"]:
    counts = np.stack([np.bincount(frames[..., colour].ravel(), minlength=256) for colour in range(3)])
    values = np.arange(256) / 255.0
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    deviation = np.sqrt(np.maximum(share @ values**2 - mean**2, 0.0))
    present = [np.flatnonzero(row) for row in counts]
    low, high = (np.array([values[seen[end]] for seen in present]) for end in (0, -1))
    return np.stack([low, high, mean, deviation])


class SegmentJoiner:
    """Appends segments to one MP4 by copying their packets."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        self._output = av.open(str(path), "w", format="mp4")
        self._rate = rate
        self._stream: Any = None
        self.num_frames = 0
        self.size_bytes = 0

    def append(self, segment: Segment) -> None:
        with av.open(io.BytesIO(segment.data), "r") as source:
            stream = source.streams.video[0]
            if self._stream is None:
                self._stream = self._output.add_stream_from_template(stream)
            offset = round(self.num_frames / self._rate / stream.time_base)  # type: ignore[operator]
            for packet in source.demux(stream):
                if packet.pts is None or packet.dts is None:
                    continue  # the demuxer's end mark
                packet.pts += offset
                packet.dts += offset
                packet.stream = self._stream
                self._output.mux(packet)
        self.num_frames += segment.num_frames
        self.size_bytes += len(segment.data)

    def close(self) -> None:
        """Write the container's index; the file is readable only after this."""
        self._output.close()


def decode_frames(
    path: Path, start_seconds: float, count: int, rate: float, decoder: Decoder = "pyav"
) -> UInt8[np.ndarray, "t h w 3"]:
    """Return `count` frames from `start_seconds` on, at the video's own size.

    A frame belongs to the slot of the `rate` grid that its time stamp is nearest to.

    Raises:
        WorldlineError: the file is missing or damaged, ends before the last frame wanted, or there is no such decoder.
    """
    if not path.exists():
        raise WorldlineError(f"{path}: the video is missing")
    first = round(start_seconds * rate)
    begin, end = max(0.0, (first - 0.5) / rate), (first + count - 0.5) / rate
    frames: UInt8[np.ndarray, "t h w 3"] | None = None
    seen = np.zeros(count, dtype=bool)
    pictures = {"pyav": _by_pyav, "torchcodec": _by_torchcodec}[decoder]
    try:
        for seconds, picture in pictures(path, begin, end):
            slot = round(seconds * rate) - first
            if slot >= count:
                break
            if slot >= 0 and not seen[slot]:
                pixels = picture()
                if frames is None:
                    frames = np.empty((count, *pixels.shape), dtype=np.uint8)
                frames[slot] = pixels
                seen[slot] = True
            if seen[-1] and seen.all():
                break
    except (av.error.FFmpegError, IndexError, _Undecodable) as error:
        raise WorldlineError(
            f"{path}: the video cannot be decoded ({error}); copy it again or collect it anew"
        ) from None
    if frames is None or not seen.all():
        raise WorldlineError(
            f"{path}: expected {count} frames from {start_seconds:.3f} s on, got {int(seen.sum())}; "
            "the video is cut short or was recorded at another rate; copy it again or collect it anew"
        )
    return frames


def _by_pyav(path: Path, begin: float, end: float) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
    """Yield time in seconds and pixels, from the last key frame before `begin` on."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        small = stream.codec_context.width * stream.codec_context.height <= _SMALL_PIXELS
        stream.thread_type, stream.thread_count = ("SLICE", 1) if small else ("AUTO", 0)
        reformatter = VideoReformatter()  # one for all frames: making it costs more than using it
        time_base = stream.time_base or Fraction(1, 90_000)

        def pixels(frame: av.VideoFrame) -> np.ndarray:
            planar = frame.format.name == PIXEL_FORMAT
            return (frame if planar else reformatter.reformat(frame, format="rgb24")).to_ndarray()

        container.seek(int(begin / time_base), stream=stream, backward=True)
        for frame in container.decode(stream):
            yield float((frame.pts or 0) * time_base), partial(pixels, frame)


def _by_torchcodec(path: Path, begin: float, end: float) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
    """Yield the same of all frames between `begin` and `end`, decoded at once."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WorldlineError(
            f"torchcodec cannot be imported ({reason}); install it and FFmpeg's libraries, or take decoder=pyav"
        ) from None
    try:
        video = VideoDecoder(str(path), dimension_order="NHWC")
        there = video.metadata.begin_stream_seconds, video.metadata.end_stream_seconds
        found = video.get_frames_played_in_range(max(begin, there[0]), min(end, there[1]))
    except (RuntimeError, ValueError) as error:
        raise _Undecodable(str(error).strip().splitlines()[0]) from None
    for seconds, picture in zip(found.pts_seconds.tolist(), found.data.numpy(), strict=True):
        yield seconds, partial(np.asarray, picture)


class _Undecodable(Exception):
    """What torchcodec says of a damaged file."""
