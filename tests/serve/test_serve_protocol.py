from __future__ import annotations

import contextlib
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from worldline.serve.protocol import Codec, Flag, FrameMessage, Key, ProtocolError, for_client, pack, parse, unpack

u32 = st.integers(0, 2**32 - 1)
f32 = st.floats(width=32, allow_nan=True)
sides = st.integers(1, 5)


@st.composite
def frames(draw: st.DrawFn) -> FrameMessage:
    side = draw(sides)
    truth = draw(st.none() | arrays(np.uint8, (side, side, 3)))
    flags = Flag(draw(st.integers(0, 127))) & ~Flag.TRUTH
    return FrameMessage(
        flags=flags | Flag.TRUTH if truth is not None else flags,
        frame_id=draw(st.integers(0, 2**64 - 1)),
        chain=draw(st.binary(min_size=16, max_size=16)),
        input_time_ms=draw(st.floats()),
        input_frame=draw(st.integers(0, 2**64 - 1)),
        busy_us=draw(u32),
        period_us=draw(u32),
        unattributed_us=draw(u32),
        dropped=draw(u32),
        missed=draw(u32),
        spans_us=tuple(draw(st.lists(u32, max_size=12))),
        radius=draw(f32),
        cycle=draw(f32),
        error=draw(f32),
        target=(draw(f32), draw(f32)),
        picture=draw(arrays(np.uint8, st.tuples(sides, sides, st.just(3)))),
        truth=truth,
    )


FRAME = FrameMessage(
    flags=Flag(0),
    frame_id=3,
    chain=bytes(16),
    input_time_ms=0.0,
    input_frame=0,
    busy_us=0,
    period_us=0,
    unattributed_us=0,
    dropped=0,
    missed=0,
    spans_us=(),
    radius=0.0,
    cycle=0.0,
    error=0.0,
    target=(0.0, 0.0),
    picture=np.zeros((1, 1, 3), np.uint8),
)


def same(a: FrameMessage, b: FrameMessage) -> None:
    for field in dataclasses.fields(FrameMessage):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


@given(frames())
def test_a_frame_comes_back_as_it_was_sent(frame: FrameMessage) -> None:
    same(unpack(pack(frame)), frame)


@given(frames(), u32)
def test_an_onlooker_gets_its_own_drops_and_nobody_elses_clock(frame: FrameMessage, dropped: int) -> None:
    message = pack(frame)
    same(unpack(for_client(message, dropped, True)), dataclasses.replace(frame, dropped=dropped))
    onlooker = unpack(for_client(message, dropped, False))
    same(onlooker, dataclasses.replace(frame, dropped=dropped, input_time_ms=math.nan))
    same(unpack(message), frame)  # the shared message is not touched


@given(frames())
def test_webp_loses_nothing_and_jpeg_a_little(frame: FrameMessage) -> None:
    found = unpack(pack(frame, "webp"))
    same(dataclasses.replace(found, encode_us=0), frame)
    smooth = np.linspace(0, 255, 24 * 24 * 3).reshape(24, 24, 3).astype(np.uint8)
    lossy = unpack(pack(dataclasses.replace(frame, picture=smooth), "jpeg"))
    assert lossy.picture.shape == smooth.shape
    assert 0 < np.abs(lossy.picture.astype(int) - smooth).mean() < 4


@pytest.mark.parametrize("codec", ["webp", "jpeg"])
def test_an_encoded_picture_that_is_damaged_or_of_another_size_is_refused(codec: Codec) -> None:
    frame = dataclasses.replace(FRAME, picture=np.zeros((8, 8, 3), np.uint8))
    message = pack(frame, codec)
    for damaged in (
        message[: len(message) - 40] + bytes(40),
        bytes(message).replace((8).to_bytes(2, "little") * 2, (9).to_bytes(2, "little") * 2),
    ):
        assert damaged != message
        with pytest.raises(ProtocolError):
            unpack(damaged)


@given(frames(), st.integers(0, 400))
def test_a_cut_message_is_refused(frame: FrameMessage, length: int) -> None:
    message = pack(frame)
    if length < len(message):
        with pytest.raises(ProtocolError):
            unpack(message[:length])


def test_a_key_edge_is_read() -> None:
    text = '{"t": "key", "code": "KeyW", "down": true, "time": 12.5}'
    assert parse(text) == Key(code="KeyW", down=True, time_ms=12.5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "7",
        "{}",
        '{"t": "launch"}',
        '{"t": ["key"]}',
        '{"t": "key", "code": ["KeyW"], "down": true, "time": 1}',
        '{"t": "key", "code": "F13", "down": true, "time": 1}',
        '{"t": "key", "code": "KeyW", "down": 1, "time": 1}',
        '{"t": "key", "code": "KeyW", "down": true, "time": NaN}',
        '{"t": "pointer", "x": 1.5, "y": 0, "down": true, "time": 1}',
        '{"t": "pointer", "x": Infinity, "y": 0, "down": true, "time": 1}',
        '{"t": "reset", "seed": -1}',
        '{"t": "reset", "seed": true}',
        '{"t": "reset", "seed": 99999999999999999999}',
        '{"t": "reset", "seed": 1, "id": "x"}',
        '{"t": "action", "values": [0, 1]}',
        '{"t": "action", "values": 1, "id": 1}',
        '{"t": "action", "values": [true], "id": 1}',
        '{"t": "action", "values": [NaN], "id": 1}',
        f'{{"t": "action", "values": [1{"0" * 400}], "id": 1}}',
        f'{{"t": "action", "values": {[0] * 65}, "id": 1}}',
        '{"t": "pace", "fps": 1e9}',
        '{"t": "open", "name": 3}',
        "[" * 3000,
    ],
)
def test_garbage_is_named_as_such(text: str) -> None:
    with pytest.raises(ProtocolError):
        parse(text)


@given(st.text() | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(repr))
def test_no_text_breaks_the_parser(text: str) -> None:
    with contextlib.suppress(ProtocolError):
        parse(text)
