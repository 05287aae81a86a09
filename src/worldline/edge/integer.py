"""The integer operators in NumPy: what docs/integer_spec.md says, to the bit, and what every C++ build must give.

Dot products run in float64, where they are exact: every one is proven or checked to stay below 2^30.

Shape legend: b batch, h = rows, w = columns, c channels in, o channels out, k kernel, n values in, d latent,
e hidden, g = 3 e (gates).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int8, Int16, Int32, Int64, Integer, UInt8
from numpy.typing import NDArray

from worldline.core.errors import WorldlineError

LIMIT = 2**30
"""Accumulators stay below it; the exporter proves it from the weights."""
MAX_SHIFT = 31
LUT_SIZE = 513
"""Entries of a table for int16: one every 128 values, and the end."""


class Scaling(NamedTuple):
    """A factor for each channel: multiplier / 2^31 >> shift."""

    multiplier: Int32[np.ndarray, " o"]
    """In [2^30, 2^31), or 0."""
    shift: Int32[np.ndarray, " o"]
    """To the right, up to 31; a negative one is to the left, and goes before."""


class WideScaling(NamedTuple):
    """A factor for each channel, of int16 operators: multiplier >> shift."""

    multiplier: Int32[np.ndarray, " o"]
    """In [2^14, 2^15), or 0."""
    shift: Int32[np.ndarray, " o"]
    """To the right, 1 to 46."""


def scaling(factor: NDArray[np.float64]) -> Scaling:
    """Return the fixed-point form of factors.

    Raises:
        WorldlineError: a factor is negative or not finite.
    """
    mantissa, exponent = _normalised(factor)
    lost = exponent < -MAX_SHIFT
    return Scaling(np.where(lost, 0, mantissa).astype(np.int32), np.where(lost, 0, -exponent).astype(np.int32))


def wide_scaling(factor: NDArray[np.float64]) -> WideScaling:
    """Return the fixed-point form of factors in [0, 2^14).

    Raises:
        WorldlineError: a factor is negative, not finite, or 2^14 or more.
    """
    mantissa, exponent = _normalised(factor)
    if (exponent > 14).any():
        raise WorldlineError(f"an int16 operator's factor must be below 2^14, got {factor.max()}")
    lost = exponent < -MAX_SHIFT
    reduced = np.where(mantissa < 0x7FFF0000, (mantissa + 2**15) >> 16, 0x7FFF)
    return WideScaling(np.where(lost, 0, reduced).astype(np.int32), np.where(lost, 15, 15 - exponent).astype(np.int32))


def requantise(acc: Int64[np.ndarray, "*b o"], by: Scaling) -> Int64[np.ndarray, "*b o"]:
    """Scale accumulators: the product with the multiplier over 2^31, rounded half up, then over 2^shift, half away."""
    right, left = np.maximum(by.shift, 0).astype(np.int64), np.maximum(-by.shift, 0).astype(np.int64)
    product = ((acc << left) * by.multiplier.astype(np.int64) + 2**30) >> 31
    half = (np.int64(1) << right) >> 1
    return (product + half - ((product < 0) & (right > 0))) >> right


def requantise_wide(acc: Int64[np.ndarray, "*b o"], by: WideScaling) -> Int64[np.ndarray, "*b o"]:
    """Scale accumulators of int16 operators: the product over 2^shift, rounded half up."""
    shift = by.shift.astype(np.int64)
    return (acc * by.multiplier + (np.int64(1) << (shift - 1))) >> shift


def saturate(x: Int64[np.ndarray, "*b"], bits: int) -> Int64[np.ndarray, "*b"]:
    """Clamp to the range of a signed integer."""
    return np.clip(x, -(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def conv2d(
    x: Int8[np.ndarray, "b h w c"],
    weight: Int8[np.ndarray, "o k k c"],
    bias: Int32[np.ndarray, " o"],
    by: Scaling,
    *,
    stride: int,
    padding: tuple[int, int],
    size: tuple[int, int],
    zero_in: int,
    zero_out: int,
    low: int = -128,
    high: int = 127,
) -> Int8[np.ndarray, "b H W o"]:
    """Convolve; `padding` counts rows above and columns before the picture, `size` is the output's."""
    patches = _patches(x, weight.shape[1], stride, padding, size, zero_in)  # (b, H, W, k k, c)
    taps = weight.reshape(len(weight), -1)
    acc = dot(patches.reshape(*patches.shape[:3], -1), taps) - zero_in * taps.astype(np.int64).sum(axis=1) + bias
    return _finish(acc, by, zero_out, low, high)


def depthwise(
    x: Int8[np.ndarray, "b h w c"],
    weight: Int8[np.ndarray, "k k c"],
    bias: Int32[np.ndarray, " c"],
    by: Scaling,
    *,
    stride: int,
    padding: tuple[int, int],
    size: tuple[int, int],
    zero_in: int,
    zero_out: int,
    low: int = -128,
    high: int = 127,
) -> Int8[np.ndarray, "b H W c"]:
    """Convolve every channel by itself."""
    patches = _patches(x, len(weight), stride, padding, size, zero_in).astype(np.int64) - zero_in
    acc = _checked((patches * weight.reshape(-1, weight.shape[-1]).astype(np.int64)).sum(axis=3) + bias)
    return _finish(acc, by, zero_out, low, high)


def linear(
    x: Int8[np.ndarray, "*b n"],
    weight: Int8[np.ndarray, "o n"],
    bias: Int32[np.ndarray, " o"],
    by: Scaling,
    *,
    zero_in: int,
    zero_out: int,
    low: int = -128,
    high: int = 127,
) -> Int64[np.ndarray, "*b o"]:
    """Apply a matrix to int8 values. The result may have any width that `low` and `high` say."""
    acc = dot(x, weight) - zero_in * weight.astype(np.int64).sum(axis=1) + bias
    return np.clip(requantise(_checked(acc), by) + zero_out, low, high)


def linear_wide(
    x: Int16[np.ndarray, "*b n"], weight: Int8[np.ndarray, "o n"], bias: Int32[np.ndarray, " o"], by: WideScaling
) -> Int64[np.ndarray, "*b o"]:
    """Apply a matrix to int16 values. Not saturated: callers add first."""
    return requantise_wide(_checked(dot(x, weight) + bias), by)


def requantise_values(x: Int8[np.ndarray, "*b"], by: Scaling, *, zero_in: int, zero_out: int) -> Int8[np.ndarray, "*b"]:
    """Give int8 values another scale and zero point, one factor for all."""
    return saturate(requantise(x.astype(np.int64) - zero_in, by) + zero_out, 8).astype(np.int8)


def average(total: Int64[np.ndarray, "*b"], count: int) -> Int64[np.ndarray, "*b"]:
    """Return sums over counts, rounded half away from zero."""
    return np.sign(total) * ((np.abs(total) + count // 2) // count)


def pool(
    x: Int8[np.ndarray, "b h w c"], kind: str, *, kernel: int, stride: int, size: tuple[int, int]
) -> Int8[np.ndarray, "b H W c"]:
    """Pool by `average` or `max` over windows that lie wholly inside."""
    patches = _patches(x, kernel, stride, (0, 0), size, 0).astype(np.int64)
    pooled = average(patches.sum(axis=3), kernel * kernel) if kind == "average" else patches.max(axis=3)
    return pooled.astype(np.int8)


def upsample(x: Int8[np.ndarray, "b h w c"]) -> Int8[np.ndarray, "b 2*h 2*w c"]:
    """Double every row and column."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def lookup(x: Integer[np.ndarray, "*b"], table: Int16[np.ndarray, " 513"]) -> Int64[np.ndarray, "*b"]:
    """Read a function of int16 values off a table, straight lines between its entries."""
    wide, steps = x.astype(np.int64), table.astype(np.int64)
    index, offset = (wide >> 7) + 256, wide & 127
    return steps[index] + (((steps[index + 1] - steps[index]) * offset + 64) >> 7)


def table(function: str) -> Int16[np.ndarray, " 513"]:
    """Return the table of `sigmoid` or `tanh`: arguments in 1/4096, results in 1/32768."""
    arguments = (np.arange(LUT_SIZE) - 256) * 128 / 4096
    values = np.array([math.tanh(x) if function == "tanh" else 1 / (1 + math.exp(-x)) for x in arguments])
    return saturate(np.floor(values * 32768 + 0.5).astype(np.int64), 16).astype(np.int16)


def gru(
    gates_x: Int64[np.ndarray, "*b g"], gates_h: Int64[np.ndarray, "*b g"], h: Int16[np.ndarray, "*b e"]
) -> Int16[np.ndarray, "*b e"]:
    """Return the next hidden state from both halves of the gates' arguments (reset, update, new) in 1/4096.

    h in 1/32768. h' = n + u (h - n), n = tanh(x_n + r h_n).
    """
    (x_r, x_u, x_n), (h_r, h_u, h_n) = (np.split(gates, 3, axis=-1) for gates in (gates_x, gates_h))
    sigmoid, tanh = table("sigmoid"), table("tanh")
    r = lookup(saturate(x_r + h_r, 16), sigmoid)
    u = lookup(saturate(x_u + h_u, 16), sigmoid)
    n = lookup(saturate(x_n + ((r * saturate(h_n, 16) + 2**14) >> 15), 16), tanh)
    return saturate(n + ((u * (h.astype(np.int64) - n) + 2**14) >> 15), 16).astype(np.int16)


def root(x: int) -> int:
    """Return the largest integer whose square is at most x."""
    return math.isqrt(x)


def normalise(z: Int16[np.ndarray, "*b d"], radius: int) -> Int16[np.ndarray, "*b d"]:
    """Put latents onto the sphere of `radius` (in the latents' unit, below 2^23); 0 stays 0. Rounded half away."""
    flat = z.reshape(-1, z.shape[-1]).astype(np.int64)
    lengths = np.array([math.isqrt(int((row * row).sum()) << 16) for row in flat], dtype=np.int64)[:, None]
    product = flat * (radius << 8)
    quotient = np.sign(product) * ((np.abs(product) + lengths // 2) // np.maximum(lengths, 1))
    return saturate(np.where(lengths == 0, flat, quotient), 16).astype(np.int16).reshape(z.shape)


def dot(x: Integer[np.ndarray, "*b n"], weight: Int8[np.ndarray, "o n"]) -> Int64[np.ndarray, "*b o"]:
    """Return exact dot products."""
    acc = (x.astype(np.float64) @ weight.T.astype(np.float64)).astype(np.int64)
    return _checked(acc)


def pixels(x: Int8[np.ndarray, "*b c"], shades: UInt8[np.ndarray, " 256"]) -> UInt8[np.ndarray, "*b c"]:
    """Return the shade of every value."""
    return shades[x.astype(np.int64) + 128]


def shuffle(x: Integer[np.ndarray, "b h w c"]) -> Integer[np.ndarray, "b 2*h 2*w 3"]:
    """Spread 12 channels over 2 x 2 pixels of 3, in the order of PyTorch's pixel shuffle: colour, row, column."""
    b, h, w, _ = x.shape
    return x.reshape(b, h, w, 3, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, 3)


def _patches(
    x: Int8[np.ndarray, "b h w c"], kernel: int, stride: int, padding: tuple[int, int], size: tuple[int, int], fill: int
) -> Int8[np.ndarray, "b H W kk c"]:
    (top, left), (rows, columns) = padding, size
    b, h, w, c = x.shape
    bottom = max(0, (rows - 1) * stride + kernel - top - h)
    right = max(0, (columns - 1) * stride + kernel - left - w)
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(1, 2))  # (b, ., ., c, k, k)
    chosen = windows[:, : (rows - 1) * stride + 1 : stride, : (columns - 1) * stride + 1 : stride]
    return chosen.transpose(0, 1, 2, 4, 5, 3).reshape(b, rows, columns, kernel * kernel, c)


def _finish(acc: Int[np.ndarray, "*b o"], by: Scaling, zero_out: int, low: int, high: int) -> Int8[np.ndarray, "*b o"]:
    return np.clip(requantise(_checked(acc), by) + zero_out, low, high).astype(np.int8)


def _checked(acc: Int64[np.ndarray, "*b"]) -> Int64[np.ndarray, "*b"]:
    if acc.size and max(int(acc.max()), -int(acc.min())) >= LIMIT:
        raise WorldlineError("an accumulator reached 2^30; the weights' scales were chosen too small")
    return acc


def _normalised(factor: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return mantissas in [2^30, 2^31) and exponents, rounded to nearest."""
    factor = np.asarray(factor, dtype=np.float64)
    if not np.isfinite(factor).all() or (factor < 0).any():
        raise WorldlineError("scales must be finite and not negative")
    fraction, exponent = np.frexp(factor)
    mantissa = np.floor(fraction * 2**31 + 0.5).astype(np.int64)
    over = mantissa == 2**31
    return np.where(over, 2**30, mantissa), np.where(over, exponent + 1, exponent).astype(np.int64)
