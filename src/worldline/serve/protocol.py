"""What travels over the WebSocket: one binary message a frame down, small JSON messages up, JSON events down.

A frame message is the header `_HEADER`, then one u32 a span (microseconds, in the order that `hello` announced), then
the imagined picture, then the true world's picture where the flag says that one is there: RGB rows, or what the codec
made of them. All numbers are little-endian. `static/protocol.js` is the other half of this file.
"""

from __future__ import annotations

import io
import json
import math
import struct
import time
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import UInt8
from PIL import Image

VERSION = 2
MAGIC = b"WL"
MAX_UP_BYTES = 4096
"""Longest message that a client may send."""

KEYS = frozenset({"ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "KeyA", "KeyD", "KeyW", "KeyS"})
MAX_FPS = 240.0
MAX_ACTION_DIM = 64
Codec = Literal["raw", "webp", "jpeg"]
"""How pictures travel: as they are, without loss in a twentieth of the bytes, or with some in even fewer."""
CODECS: tuple[Codec, ...] = get_args(Codec)
_SEED_LIMIT = 2**31
_ID_LIMIT = 2**53  # what a number of JavaScript holds

_HEADER = struct.Struct("<2sBBHQ16sdQIIIIHHHfffffB3xIII")
_DROPPED = struct.Struct("<I")
_ECHO = struct.Struct("<d")
_ECHO_OFFSET = struct.calcsize("<2sBBHQ16s")
_DROPPED_OFFSET = struct.calcsize("<2sBBHQ16sdQII")


class ProtocolError(Exception):
    """A client sent something that is not this protocol; the text is the close reason, at most 120 characters."""


class Flag(IntFlag):
    """What is true of one frame."""

    TRUTH = 1
    """The true world's picture follows the imagined one."""
    RECORDING = 2
    REPLAYING = 4
    MISSED = 8
    """The frame was ready only after its deadline."""
    OUTSIDE = 16
    """The gauge has left its calibrated region."""
    ANCHORED = 32
    """This frame begins from a latent corrected with the true world's frame."""
    FIRST = 64
    """A reset: this frame begins from real frames, no action led to it."""


@dataclass(frozen=True, kw_only=True)
class FrameMessage:
    """One frame as a client sees it. Times in microseconds unless the name says otherwise."""

    flags: Flag
    frame_id: int
    chain: bytes
    """First 16 bytes of the hash chain after this frame."""
    input_time_ms: float
    """The client's own time of the newest input edge applied so far, NaN before the first (and for onlookers)."""
    input_frame: int
    """Id of the frame that first applied that edge."""
    busy_us: int
    """Busy time of the frame before this one: a frame ends when it has been sent, so its own is not known yet."""
    period_us: int
    """From the start of the previous frame to the start of this one, the pacing sleep included."""
    unattributed_us: int
    """What no span of the frame before this one explains."""
    dropped: int
    """Pictures that this client was too slow to take."""
    missed: int
    """Deadlines missed since the last reset or change of pace."""
    spans_us: tuple[int, ...]
    """Leaf spans of the frame before this one; with `unattributed_us` they add up to its busy time."""
    radius: float
    """Gauge: distance from the latents seen in training, 1 = the edge of the calibrated region; NaN unknown."""
    cycle: float
    """Gauge: |E(D(z)) - z|, in units of its real 99% value; NaN unknown."""
    error: float
    """Root mean squared difference from the true picture, 0 to 1; NaN where the truth is not known."""
    target: tuple[float, float]
    """Where the action points, as a share of the picture's width and height; NaN where it has no place."""
    picture: UInt8[np.ndarray, "h w 3"]
    truth: UInt8[np.ndarray, "h2 w2 3"] | None = None
    encode_us: int = 0
    """What encoding this frame's pictures took, beside the frames and not in them; 0 where they travel raw."""


def pack(frame: FrameMessage, codec: Codec = "raw") -> bytearray:
    """Return the bytes of `frame`: pictures as they are, as WebP without loss, or as JPEG with some."""
    flags = (frame.flags | Flag.TRUTH) if frame.truth is not None else (frame.flags & ~Flag.TRUTH)
    height, width = frame.picture.shape[:2]
    truth_height, truth_width = frame.truth.shape[:2] if frame.truth is not None else (0, 0)
    if truth_height != truth_width:
        raise ValueError(f"expected a square true picture, got {truth_height} x {truth_width}")
    started = time.perf_counter_ns()
    picture = _encoded(frame.picture, codec)
    truth = b"" if frame.truth is None else _encoded(frame.truth, codec)
    took = 0 if codec == "raw" else min((time.perf_counter_ns() - started) // 1000, 2**32 - 1)
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        int(flags),
        len(frame.spans_us),
        frame.frame_id,
        frame.chain[:16],
        frame.input_time_ms,
        frame.input_frame,
        frame.busy_us,
        frame.period_us,
        frame.dropped,
        frame.missed,
        width,
        height,
        truth_width,
        frame.radius,
        frame.cycle,
        frame.error,
        *frame.target,
        CODECS.index(codec),
        len(picture),
        len(truth),
        took,
    )
    # The unattributed span travels last among the spans, so that they add up to the busy time on the page too.
    spans = struct.pack(f"<{len(frame.spans_us) + 1}I", *frame.spans_us, frame.unattributed_us)
    message = bytearray(header + spans)
    message += picture
    message += truth
    return message


def must_be_seen(message: bytearray) -> bool:
    """Return whether a packed frame begins something: a page that passes over some must not pass over this one."""
    return bool(Flag(message[3]) & (Flag.FIRST | Flag.ANCHORED))


def for_client(message: bytearray, dropped: int, own_input: bool) -> bytes:
    """Return a copy of a packed frame for one client.

    It carries the client's own count of dropped pictures. The echoed input time is on the clock of the player's
    browser, so an onlooker gets NaN.
    """
    copy = bytearray(message)
    _DROPPED.pack_into(copy, _DROPPED_OFFSET, dropped)
    if not own_input:
        _ECHO.pack_into(copy, _ECHO_OFFSET, math.nan)
    return bytes(copy)


def unpack(data: bytes | bytearray) -> FrameMessage:
    """Return the frame in `data`; the inverse of `pack`.

    Raises:
        ProtocolError: not a frame message of this version.
    """
    if len(data) < _HEADER.size:
        raise ProtocolError(f"expected at least {_HEADER.size} bytes, got {len(data)}")
    values = _HEADER.unpack_from(data)
    magic, version, flags, num_spans = values[:4]
    if magic != MAGIC or version != VERSION:
        raise ProtocolError(f"expected a frame message of version {VERSION}, got {magic!r} version {version}")
    frame_id, chain, input_time, input_frame, busy, period, dropped, missed = values[4:12]
    width, height, truth_side, radius, cycle, error, target_x, target_y, codec, *sizes, encode = values[12:]
    start = _HEADER.size + 4 * (num_spans + 1)
    if len(data) != start + sum(sizes):
        raise ProtocolError(f"expected {start + sum(sizes)} bytes, got {len(data)}")
    if codec >= len(CODECS):
        raise ProtocolError(f"expected a codec from 0 to {len(CODECS) - 1}, got {codec}")
    spans = struct.unpack_from(f"<{num_spans + 1}I", data, _HEADER.size)
    parts = memoryview(data)[start : start + sizes[0]], memoryview(data)[start + sizes[0] :]
    return FrameMessage(
        flags=Flag(flags),
        frame_id=frame_id,
        chain=chain,
        input_time_ms=input_time,
        input_frame=input_frame,
        busy_us=busy,
        period_us=period,
        unattributed_us=spans[-1],
        dropped=dropped,
        missed=missed,
        spans_us=spans[:-1],
        radius=radius,
        cycle=cycle,
        error=error,
        target=(target_x, target_y),
        picture=_decoded(parts[0], codec, height, width),
        truth=_decoded(parts[1], codec, truth_side, truth_side) if flags & Flag.TRUTH else None,
        encode_us=encode,
    )


def _encoded(picture: UInt8[np.ndarray, "h w 3"], codec: Codec) -> bytes | memoryview:
    if codec == "raw":
        return np.ascontiguousarray(picture).data.cast("B")
    data = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(picture))
    if codec == "webp":
        image.save(data, "WEBP", lossless=True, exact=True, method=0, quality=0)
    else:
        image.save(data, "JPEG", quality=90, subsampling=0)
    return data.getvalue()


def _decoded(data: memoryview, codec: int, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    if CODECS[codec] == "raw":
        if len(data) != 3 * width * height:
            raise ProtocolError(f"expected a picture of {3 * width * height} bytes, got {len(data)}")
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    try:
        with Image.open(io.BytesIO(data), formats=[CODECS[codec].upper()]) as image:
            if image.size != (width, height):
                raise ProtocolError(f"expected a picture of {width} x {height}, got {image.size}")
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise ProtocolError(f"a picture is no {CODECS[codec]}: {error}"[:120]) from None


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key went down or up at `time_ms` of the client's clock."""

    code: str
    down: bool
    time_ms: float


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """The pointer pressed, moved or let go on the picture; `x` and `y` are shares of its width and height."""

    x: float
    y: float
    down: bool
    time_ms: float


@dataclass(frozen=True, kw_only=True)
class Blur:
    """The page lost the focus: every key and the pointer count as let go."""


@dataclass(frozen=True, kw_only=True)
class Action:
    """What to do in one frame, native units, whatever keys and pointer say."""

    values: tuple[float, ...]
    id: int


@dataclass(frozen=True, kw_only=True)
class Reset:
    seed: int
    id: int | None = None
    """A message with an id is answered with the frame it acted in; see `answer`."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    fps: float | None
    """Frames per second; None = the world's real time, 0 = as fast as it goes."""


@dataclass(frozen=True, kw_only=True)
class Record:
    on: bool
    id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Truth:
    on: bool


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """Correct the imagined state with the true world's frame."""

    id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Visible:
    """The page's tab is shown or hidden, and how many pictures a second it can make use of."""

    on: bool
    most: float | None = None


@dataclass(frozen=True, kw_only=True)
class Open:
    """Play a recording of the recordings folder."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Replay a recording in another process and compare; "" means the newest."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Live:
    """Leave a replay and play on, from a reset."""


@dataclass(frozen=True, kw_only=True)
class ListRecordings:
    """Ask which recordings there are."""


Edge = Key | Pointer | Blur
Message = Edge | Action | Reset | Pace | Record | Truth | Anchor | Visible | Open | Verify | Live | ListRecordings


def answer(message: Message, frame_id: int | None, why: str = "") -> dict[str, Any] | None:
    """Return the event that answers a message with an id, None where it has none.

    Args:
        frame_id: the frame that it acted in; None says that it did not act.
        why: why it did not.
    """
    if not isinstance(message, Action | Reset | Record | Anchor) or message.id is None:
        return None
    return {"t": "answer", "id": message.id, "frame": frame_id, "why": why}


def parse(text: str) -> Message:
    """Return the message in `text`.

    Raises:
        ProtocolError: not JSON, an unknown kind, or a field that is missing, of the wrong type or out of range.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError("expected a JSON object") from None
    if not isinstance(data, dict):
        raise ProtocolError("expected a JSON object")
    fields = _Fields(data)
    kind = data.get("t")
    message: Message
    if kind == "key":
        message = Key(code=fields.key("code"), down=fields.boolean("down"), time_ms=fields.number("time", 0, 1e15))
    elif kind == "pointer":
        message = Pointer(
            x=fields.number("x", 0, 1),
            y=fields.number("y", 0, 1),
            down=fields.boolean("down"),
            time_ms=fields.number("time", 0, 1e15),
        )
    elif kind == "blur":
        message = Blur()
    elif kind == "action":
        message = Action(values=fields.numbers("values", MAX_ACTION_DIM), id=fields.integer("id", _ID_LIMIT))
    elif kind == "reset":
        message = Reset(seed=fields.integer("seed", _SEED_LIMIT), id=fields.id())
    elif kind == "pace":
        message = Pace(fps=None if data.get("fps") is None else fields.number("fps", 0, MAX_FPS))
    elif kind == "record":
        message = Record(on=fields.boolean("on"), id=fields.id())
    elif kind == "truth":
        message = Truth(on=fields.boolean("on"))
    elif kind == "anchor":
        message = Anchor(id=fields.id())
    elif kind == "visible":
        message = Visible(on=fields.boolean("on"), most=fields.number("most", 1, 1000) if "most" in data else None)
    elif kind == "open":
        message = Open(name=fields.name("name"))
    elif kind == "verify":
        message = Verify(name=fields.name("name"))
    elif kind == "live":
        message = Live()
    elif kind == "list":
        message = ListRecordings()
    else:
        raise ProtocolError(f"unknown message {str(kind)[:40]!r}")
    return message


class _Fields:
    """Reads typed fields, so that nothing of the wrong type gets past `parse`."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    def boolean(self, name: str) -> bool:
        value = self._data.get(name)
        if not isinstance(value, bool):
            raise ProtocolError(f"{name}: expected true or false")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        value = self._data.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ProtocolError(f"{name}: expected a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, limit: int) -> int:
        value = self._data.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
            raise ProtocolError(f"{name}: expected a whole number from 0 to {limit - 1}")
        return value

    def id(self) -> int | None:
        return self.integer("id", _ID_LIMIT) if "id" in self._data else None

    def numbers(self, name: str, limit: int) -> tuple[float, ...]:
        values = self._data.get(name)
        if not isinstance(values, list) or len(values) > limit:
            raise ProtocolError(f"{name}: expected a list of at most {limit} numbers")
        # Written so that NaN and whole numbers beyond a float's range are refused too.
        if any(isinstance(v, bool) or not isinstance(v, int | float) or not abs(v) <= 1e30 for v in values):
            raise ProtocolError(f"{name}: expected finite numbers")
        return tuple(float(value) for value in values)

    def name(self, name: str) -> str:
        value = self._data.get(name)
        if not isinstance(value, str) or len(value) > 120:
            raise ProtocolError(f"{name}: expected at most 120 characters")
        return value

    def key(self, name: str) -> str:
        value = self._data.get(name)
        if not isinstance(value, str) or value not in KEYS:
            raise ProtocolError(f"{name}: expected one of the arrow keys or W, A, S, D")
        return value
