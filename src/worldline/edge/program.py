"""A program: everything TinyEngine needs to know of a world, in one block of bytes that it reads where it lies.

The layout is that of the structures in `tinyengine/program.hpp`, `chain.hpp` and `stage.hpp`: little-endian 32-bit
words; places are bytes from the beginning, those of rings, scratch, piece and sums from that of the arena.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from worldline.edge import integer
from worldline.edge.graph import Affine, Average, Chain, Flatten, Pixels, Rows, Stage
from worldline.edge.schedule import ROW_ALIGN, Plan, padded, plan_rows
from worldline.edge.world import Dense, IntegerWorld

MAGIC, VERSION = b"worldtin", 1
HEADER = struct.Struct("<8s14I")
_KINDS = {"conv": 1, "depthwise": 2, "separable": 3, "average": 4, "max": 5}


class Writer:
    """Bytes with places: what is written can be pointed to."""

    def __init__(self) -> None:
        self.data = bytearray(HEADER.size)

    def put(self, values: bytes | NDArray[Any], align: int = 16) -> int:
        """Append bytes or an array (little-endian, as it is), and return where it lies."""
        self.data += bytes(-len(self.data) % align)
        at = len(self.data)
        self.data += values if isinstance(values, bytes) else np.ascontiguousarray(values).tobytes()
        return at

    def put_words(self, *words: int) -> int:
        return self.put(b"".join(struct.pack("<I", word & 0xFFFFFFFF) for word in words), align=4)


def write_chain(out: Writer, chain: Chain, plan: Plan) -> int:
    """Append a chain, and return where its record lies."""
    records = b"".join(
        _stage(out, stage, ring.at, ring.rows) for stage, ring in zip(chain.stages, plan.rings, strict=True)
    )
    stages_at, end = out.put(records), chain.end
    matrix, mean, zeros, shades_at = None, (0, 0, 0), (0, 0), 0
    if isinstance(end, Flatten):
        matrix, zero_in = end.matrix, end.zero_in
    elif isinstance(end, Average):
        matrix, zero_in = end.matrix, end.mean_zero_out
        mean = (0, int(end.mean_by.multiplier[0]), int(end.mean_by.shift[0]))
        zeros = (end.mean_zero_in, end.mean_zero_out)
    elif isinstance(end, Pixels):
        shades_at = out.put(end.shades)
    kind = {Rows: 1, Pixels: 2, Flatten: 3, Average: 4}[type(end)]
    weights_at = by_at = num_outputs = 0
    finish = (0, 0, 0)
    if matrix is not None:
        num_outputs, finish = len(matrix.weight), (matrix.zero_out, matrix.low, matrix.high)
        weights_at, by_at = out.put(rows_of(matrix.weight)), out.put(channels_of(matrix, zero_in))
    return out.put_words(
        len(chain.stages), stages_at, kind, plan.kind, plan.num_tiled, *plan.tile, plan.scratch, plan.piece, plan.sums,
        num_outputs, weights_at, by_at, shades_at, *finish, *mean, *zeros,
    )  # fmt: skip


def rows_of(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """Return a matrix with each row filled up with zeros."""
    flat = weight.reshape(len(weight), -1)
    return np.pad(flat, ((0, 0), (0, -flat.shape[1] % ROW_ALIGN)))


def channels_of(affine: Affine, zero_in: int, axes: tuple[int, ...] = (1,)) -> NDArray[np.int32]:
    """Return bias (the input's zero point accounted for), multiplier and shift of every channel."""
    weight = affine.weight.reshape(len(affine.weight), -1) if axes == (1,) else affine.weight
    bias = affine.bias.astype(np.int64) - zero_in * weight.astype(np.int64).sum(axis=axes)
    return np.stack((bias, affine.by.multiplier, affine.by.shift), axis=1).astype("<i4")


def finish_program(out: Writer, arena_bytes: int, places: tuple[int, ...]) -> bytes:
    """Fill the header in and return the program."""
    out.put(b"")
    body = zlib.crc32(out.data[HEADER.size :])
    words = (VERSION, len(out.data), body, arena_bytes, *places)
    HEADER.pack_into(out.data, 0, MAGIC, *words, *([0] * (14 - len(words))))
    return bytes(out.data)


class Arena(NamedTuple):
    """Where a world keeps what it needs, in bytes of its arena."""

    encoder: Plan
    decoder: Plan
    buffers: dict[str, tuple[int, int]]
    """Place and bytes of those of predictor and gauge."""
    size: int


def lay_out(world: IntegerWorld, encoder: bool = True, decoder: bool = True) -> Arena:
    """Return where everything lies; parts that are not wanted take nothing."""
    latent, hidden, action = len(world.predictor.change.weight), world.hidden, len(world.actions.mean)
    encoder_plan = plan_rows(world.encoder)
    decoder_plan = plan_rows(world.decoder, encoder_plan.end if encoder else 0)
    at, buffers = padded(decoder_plan.end if decoder else encoder_plan.end if encoder else 0, 16), {}
    counts = {
        "state": padded(latent, ROW_ALIGN) + hidden, "joined": latent + action, "x": hidden, "next": hidden,
        "mixed": hidden, "white": latent, "offset": latent,
    }  # fmt: skip
    for name, count in counts.items():
        buffers[name] = (at, 2 * padded(count, ROW_ALIGN))
        at += buffers[name][1]
    return Arena(encoder_plan, decoder_plan, buffers, at)


def write_world(world: IntegerWorld, encoder: bool = True, decoder: bool = True) -> tuple[bytes, int]:
    """Return a world as a program, and the bytes of the arena that it wants; parts that are not wanted are left out."""
    out, p, arena = Writer(), world.predictor, lay_out(world, encoder, decoder)
    places = [at for at, _ in arena.buffers.values()]
    encoder_at = write_chain(out, world.encoder, arena.encoder) if encoder else 0
    tables = [np.append(integer.table(name), 0).astype("<i2") for name in ("sigmoid", "tanh")]
    tables_at = out.put(np.concatenate(tables))
    matrices = (p.embed, p.input_gates, p.hidden_gates, p.from_hidden, p.from_input, p.change)
    dense = [word for matrix in matrices for word in _dense(out, matrix)]
    a = world.actions
    actions_at = out.put(np.stack((a.low, a.high, a.mean, a.factor), axis=1).astype("<f4"))
    predictor_at = out.put_words(
        len(p.change.weight), len(a.mean), world.hidden, actions_at, p.radius, tables_at, *dense, *places[:5]
    )
    drawing_at = out.put_words(*_dense(out, world.drawing.matrix), world.drawing.zero_out) if decoder else 0
    decoder_at = write_chain(out, world.decoder, arena.decoder) if decoder else 0
    mean_at = out.put(world.gauge.mean.astype("<i2"))
    gauge_at = out.put_words(mean_at, *_dense(out, world.gauge.whiten), world.gauge.radius99, *places[5:])
    return finish_program(out, arena.size, (encoder_at, predictor_at, drawing_at, decoder_at, gauge_at)), arena.size


def _dense(out: Writer, dense: Dense) -> tuple[int, ...]:
    channels = np.stack((dense.bias, dense.by.multiplier, dense.by.shift), axis=1).astype("<i4")
    rows, inputs = dense.weight.shape
    weight = rows_of(dense.weight)
    if dense.bits == 4:
        halves = weight.view(np.uint8).reshape(rows, -1, 2, 8)
        weight = (halves[:, :, 0] | (halves[:, :, 1] >> 4)).view(np.int8)
    return inputs, rows, dense.bits, out.put(weight), out.put(channels)


def _stage(out: Writer, stage: Stage, ring_at: int, ring_rows: int) -> bytes:
    middle, outer = (0, 0, 0), (0, 0, 0)
    middle_weights_at = middle_by_at = weights_at = by_at = 0
    zero = stage.zero_in
    if stage.depthwise is not None:
        a = stage.depthwise
        middle, zero = (a.zero_out, a.low, a.high), a.zero_out
        middle_weights_at = out.put(a.weight.astype("<i2"))
        middle_by_at = out.put(channels_of(a, stage.zero_in, axes=(0, 1)))
    if stage.conv is not None:
        a = stage.conv
        outer = (a.zero_out, a.low, a.high)
        weights_at, by_at = out.put(rows_of(a.weight)), out.put(channels_of(a, zero))
    padding_at = out.put(np.full(stage.size_in[2], stage.zero_in, dtype=np.int8))
    words = (
        _KINDS[stage.kind], *stage.size_in, *stage.size, stage.kernel, stage.stride, *stage.padding,
        int(stage.upsample), stage.zero_in, *middle, *outer, middle_weights_at, middle_by_at, weights_at, by_at,
        stage.depth, padding_at, ring_at, ring_rows,
    )  # fmt: skip
    return struct.pack(f"<{len(words)}I", *(word & 0xFFFFFFFF for word in words))
