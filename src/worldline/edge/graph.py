"""What is computed, in integers: chains of stages over grids, each with its plain reference.

Shape legend: b batch, h = rows, w = columns, c channels, o outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int8, Int32, Int64, Integer, UInt8

from worldline.core.errors import WorldlineError
from worldline.edge import integer
from worldline.edge.integer import Scaling

MAX_KERNEL, MAX_STAGES = 5, 16

Size = tuple[int, int, int]
"""Rows, columns, channels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine:
    """Weights of a stage or matrix, and what becomes of its accumulators."""

    weight: Int8[np.ndarray, ...]
    bias: Int32[np.ndarray, " o"]
    by: Scaling
    zero_out: int = 0
    low: int = -128
    high: int = 127
    scale: float = 1.0
    """What a step of the output is worth; nothing is computed with it."""

    def __post_init__(self) -> None:
        if (self.by.shift < 1).any() or (self.by.shift > integer.MAX_SHIFT).any():
            raise WorldlineError("the factors of a stage must be below 1/2; widen its output's scale")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One layer over a grid, or a depthwise one and the 1x1 one behind it (`separable`)."""

    kind: Literal["conv", "depthwise", "separable", "average", "max"]
    size_in: Size
    size: Size
    kernel: int = 1
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    """Rows above, columns before; what lies below and behind follows from `size`."""
    upsample: bool = False
    """Double the input's rows and columns first (conv only)."""
    zero_in: int = 0
    depthwise: Affine | None = None
    """(k, k, c)."""
    conv: Affine | None = None
    """(o, k, k, c); (o, 1, 1, c) where separable."""

    def __post_init__(self) -> None:
        top, left = self.padding
        rows, columns = (n * (2 if self.upsample else 1) for n in self.size_in[:2])
        if not 1 <= self.kernel <= MAX_KERNEL or self.stride < 1 or max(top, left) >= self.kernel:
            raise WorldlineError(
                f"a stage's kernel is 1 to {MAX_KERNEL}, its padding less, got {self.kernel}, {self.padding}"
            )
        for count, n, before in ((self.size[0], rows, top), (self.size[1], columns, left)):
            if count < 1 or (count - 1) * self.stride - before >= n:
                raise WorldlineError(f"a grid of {rows} x {columns} gives no {self.size[0]} x {self.size[1]}")

    @property
    def depth(self) -> int:
        """Values in a patch of the dot products; 0 if there are none."""
        if self.conv is None:
            return 0
        return int(np.prod(self.conv.weight.shape[1:]))

    @property
    def macs(self) -> int:
        """Multiplications for one picture."""
        pixels = self.size[0] * self.size[1]
        taps = 0 if self.depthwise is None else self.kernel**2 * self.size_in[2]
        return pixels * (taps + self.depth * self.size[2] * (self.conv is not None))

    def run(self, x: Int8[np.ndarray, "b h w c"]) -> Int8[np.ndarray, "b H W o"]:
        """Compute the stage by the plain reference."""
        if x.shape[1:] != self.size_in:
            raise WorldlineError(f"this stage takes a grid of {self.size_in}, got {x.shape[1:]}")
        x, zero, kernel = integer.upsample(x) if self.upsample else x, self.zero_in, self.kernel
        stride, padding = self.stride, self.padding
        if self.kind in ("average", "max"):
            return integer.pool(x, self.kind, kernel=kernel, stride=stride, size=self.size[:2])
        if self.depthwise is not None:
            a = self.depthwise
            x = integer.depthwise(
                x, a.weight, a.bias, a.by, stride=stride, padding=padding, size=self.size[:2], zero_in=zero,
                zero_out=a.zero_out, low=a.low, high=a.high,
            )  # fmt: skip
            zero, stride, padding = a.zero_out, 1, (0, 0)
        if self.conv is not None:
            a = self.conv
            x = integer.conv2d(
                x, a.weight, a.bias, a.by, stride=stride, padding=padding, size=self.size[:2], zero_in=zero,
                zero_out=a.zero_out, low=a.low, high=a.high,
            )  # fmt: skip
        return x


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Leave the last grid as it is."""

    def run(self, x: Int8[np.ndarray, "b h w c"]) -> Int8[np.ndarray, "b h w c"]:
        return x


@dataclass(frozen=True, kw_only=True, eq=False)
class Pixels:
    """Spread 12 channels over 2 x 2 pixels, and look every value's shade up."""

    shades: UInt8[np.ndarray, " 256"]

    def run(self, x: Int8[np.ndarray, "b h w c"]) -> UInt8[np.ndarray, "b H W 3"]:
        return integer.pixels(integer.shuffle(x), self.shades)


@dataclass(frozen=True, kw_only=True, eq=False)
class Flatten:
    """Apply one matrix to the whole grid."""

    matrix: Affine
    """(o, h w c)."""
    zero_in: int

    def run(self, x: Int8[np.ndarray, "b h w c"]) -> Int64[np.ndarray, "b o"]:
        m = self.matrix
        flat = x.reshape(len(x), -1)
        return integer.linear(
            flat, m.weight, m.bias, m.by, zero_in=self.zero_in, zero_out=m.zero_out, low=m.low, high=m.high
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Average:
    """Average each channel over the grid, scale the means, and apply a matrix to them."""

    mean_by: Scaling
    """One factor for all; shifts to the left allowed."""
    mean_zero_in: int
    mean_zero_out: int
    matrix: Affine
    """(o, c)."""

    def run(self, x: Int8[np.ndarray, "b h w c"]) -> Int64[np.ndarray, "b o"]:
        means = integer.average(x.astype(np.int64).sum(axis=(1, 2)), x.shape[1] * x.shape[2]).astype(np.int8)
        means = integer.requantise_values(means, self.mean_by, zero_in=self.mean_zero_in, zero_out=self.mean_zero_out)
        m = self.matrix
        return integer.linear(
            means, m.weight, m.bias, m.by, zero_in=self.mean_zero_out, zero_out=m.zero_out, low=m.low, high=m.high
        )


End = Rows | Pixels | Flatten | Average


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """Stages one behind the other, and what becomes of the last grid."""

    stages: tuple[Stage, ...]
    end: End

    def __post_init__(self) -> None:
        if not 1 <= len(self.stages) <= MAX_STAGES:
            raise WorldlineError(f"a chain has 1 to {MAX_STAGES} stages, got {len(self.stages)}")
        for before, after in zip(self.stages, self.stages[1:]):  # noqa: B905 - zip strict wants equal lengths
            if before.size != after.size_in:
                raise WorldlineError(f"a stage that makes {before.size} cannot feed one that takes {after.size_in}")

    @property
    def macs(self) -> int:
        """Multiplications for one picture."""
        matrix = self.end.matrix.weight.size if isinstance(self.end, (Flatten, Average)) else 0
        return sum(stage.macs for stage in self.stages) + matrix

    def run(self, x: Int8[np.ndarray, "b h w c"]) -> Integer[np.ndarray, "b ..."]:
        """Compute everything by the plain reference."""
        for stage in self.stages:
            x = stage.run(x)
        return self.end.run(x)
