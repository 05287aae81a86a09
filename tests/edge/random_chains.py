"""Chains of every kind at random, with a picture for each; all choices come from one function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from worldline.edge.graph import Affine, Average, Chain, Flatten, Pixels, Rows, Size, Stage
from worldline.edge.integer import Scaling

Pick = Callable[[int, int], int]
"""A whole number from the first to the second, both included."""


def random_chain(pick: Pick, channels: int = 20) -> tuple[Chain, np.ndarray]:
    """Return a chain of 1 to 4 stages and a picture, (1, h, w, c)."""
    rng = np.random.default_rng(pick(0, 2**31))
    size: Size = (pick(1, 13), pick(1, 13), pick(1, channels))
    stages = [_stage(pick, rng, size, channels)]
    for _ in range(pick(0, 3)):
        stages.append(_stage(pick, rng, stages[-1].size, channels))
    rows, columns, depth = stages[-1].size
    end = (Rows, Flatten, Average, Pixels)[pick(0, 3)]
    if end is Flatten:
        n = rows * columns * depth
        matrix = _affine(pick, rng, (pick(1, 9), n), 0, n, 16)
        return Chain(stages=tuple(stages), end=Flatten(matrix=matrix, zero_in=pick(-128, 127))), _picture(rng, size)
    if end is Average:
        mean_by = Scaling(rng.integers(2**30, 2**31, 1).astype(np.int32), np.array([pick(-3, 3)], dtype=np.int32))
        matrix = _affine(pick, rng, (pick(1, 9), depth), 0, depth, 8)
        average = Average(mean_by=mean_by, mean_zero_in=pick(-128, 127), mean_zero_out=pick(-128, 127), matrix=matrix)
        return Chain(stages=tuple(stages), end=average), _picture(rng, size)
    if end is Pixels:
        conv = _affine(pick, rng, (12, 1, 1, depth), 0, depth, 8)
        stages.append(Stage(kind="conv", size_in=stages[-1].size, size=(rows, columns, 12), conv=conv))
        return Chain(stages=tuple(stages), end=Pixels(shades=rng.integers(0, 256, 256).astype(np.uint8))), _picture(
            rng, size
        )
    return Chain(stages=tuple(stages), end=Rows()), _picture(rng, size)


def _picture(rng: np.random.Generator, size: Size) -> np.ndarray:
    if rng.random() < 0.2:  # both ends of the range
        return np.where(rng.random((1, *size)) < 0.5, -128, 127).astype(np.int8)
    return rng.integers(-128, 128, (1, *size)).astype(np.int8)


def _stage(pick: Pick, rng: np.random.Generator, size_in: Size, channels: int) -> Stage:
    rows, columns, depth = size_in
    kind = ("conv", "depthwise", "separable", "average", "max")[pick(0, 4)]
    stride = pick(1, 3)
    if kind in ("average", "max"):
        kernel = pick(1, min(5, rows, columns))
        size = ((rows - kernel) // stride + 1, (columns - kernel) // stride + 1, depth)
        return Stage(kind=kind, size_in=size_in, size=size, kernel=kernel, stride=stride)
    kernel, upsample = pick(1, 5), kind == "conv" and pick(0, 2) == 0
    padding = (pick(0, kernel - 1), pick(0, kernel - 1))
    most = [(n * (1 + upsample) + before - 1) // stride + 1 for n, before in zip(size_in[:2], padding, strict=True)]
    out = depth if kind == "depthwise" else pick(1, channels)
    size = (most[0] if pick(0, 4) else pick(1, most[0]), most[1] if pick(0, 4) else pick(1, most[1]), out)
    depthwise = conv = None
    if kind != "conv":
        depthwise = _affine(pick, rng, (kernel, kernel, depth), 2, kernel**2, 8)
    if kind == "conv":
        conv = _affine(pick, rng, (out, kernel, kernel, depth), 0, kernel**2 * depth, 8)
    elif kind == "separable":
        conv = _affine(pick, rng, (out, 1, 1, depth), 0, depth, 8)
    return Stage(
        kind=kind, size_in=size_in, size=size, kernel=kernel, stride=stride, padding=padding, upsample=upsample,
        zero_in=pick(-128, 127), depthwise=depthwise, conv=conv,
    )  # fmt: skip


def _affine(pick: Pick, rng: np.random.Generator, shape: tuple[int, ...], axis: int, depth: int, bits: int) -> Affine:
    """Return weights whose outputs use their range: some lie still, some saturate."""
    channels = shape[axis]
    usual = np.log2(73 * 73 * np.sqrt(depth) / (60 << (bits - 8)))
    shift = np.clip(np.round(usual + rng.integers(-2, 3, channels)), 1, 31).astype(np.int32)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    zero = pick(-128, 127)
    if pick(0, 1):
        low = zero  # as a ReLU has it
    return Affine(
        weight=rng.integers(-127, 128, shape).astype(np.int8),
        bias=rng.integers(-30000, 30000, channels).astype(np.int32),
        by=Scaling(rng.integers(2**30, 2**31, channels).astype(np.int32), shift),
        zero_out=zero, low=low, high=high,
    )  # fmt: skip
