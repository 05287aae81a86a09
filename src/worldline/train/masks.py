"""Which tubelets of a clip are hidden: blocks that reach through all of its time.

Every mask of one kind keeps equally many tubelets, so that a sample's mask hangs on nothing but (seed, step, id): not
on the batch it lies in, nor on how many ranks share that batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.seeding import rng_for


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Kinds of masks; each clip of an update is seen through one of every kind. Source: V-JEPA, arXiv 2404.08471."""

    block: tuple[float, ...] = (0.15, 0.7)
    """Share of the picture that one block hides, by kind: many short-range blocks, few long-range ones."""
    visible: tuple[float, ...] = (0.25, 0.15)
    """Share of the picture that stays visible under all blocks, by kind."""
    aspect: tuple[float, float] = (0.75, 1.5)
    """Least and largest height of a block over its width."""

    def __post_init__(self) -> None:
        shares = (*self.block, *self.visible)
        if len(self.block) != len(self.visible) or not shares or not all(0.0 < share < 1.0 for share in shares):
            raise WorldlineError(
                "mask.block and mask.visible must be equally many shares between 0 and 1, got "
                f"{list(self.block)} and {list(self.visible)}"
            )
        if not 0.0 < self.aspect[0] <= self.aspect[1]:
            raise WorldlineError(f"mask.aspect must be two rising positive numbers, got {list(self.aspect)}")


def visible_cells(rows: int, cols: int, share: float) -> int:
    """Return how many cells of the picture a mask leaves visible: at least one, and never all."""
    return min(max(1, round(share * rows * cols)), rows * cols - 1)


def masks(
    config: MaskConfig, kind: int, grid: tuple[int, int, int], ids: Int64[np.ndarray, " b"], step: int, seed: int
) -> tuple[Int64[np.ndarray, "b k"], Int64[np.ndarray, "b m"]]:
    """Return the kept and the hidden tokens of each clip under its mask of one kind, both in rising order."""
    times, rows, cols = grid
    cells = np.arange(rows * cols)
    kept, hidden = [], []
    for clip in ids.tolist():
        seen = _visible(config, kind, rows, cols, rng_for(seed, "mask", step, kind, clip))
        tokens = np.arange(times)[:, None] * (rows * cols)
        kept.append((tokens + cells[seen]).ravel())
        hidden.append((tokens + cells[~seen]).ravel())
    return np.stack(kept).astype(np.int64), np.stack(hidden).astype(np.int64)


def shade(
    clip: UInt8[np.ndarray, "t h w 3"], hidden: Int64[np.ndarray, " m"], grid: tuple[int, int, int]
) -> UInt8[np.ndarray, "t h w 3"]:
    """Return a clip whose hidden tubelets are dark."""
    light = np.full(grid, 4, dtype=np.uint8)
    light.flat[hidden] = 1
    for axis, count in enumerate(grid):
        light = light.repeat(clip.shape[axis] // count, axis=axis)
    return clip // 4 * light[..., None]


def _visible(config: MaskConfig, kind: int, rows: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    """Hide block after block until exactly as many cells are visible as shall be; the last block may be cut short."""
    seen = np.ones((rows, cols), dtype=bool)
    wanted = visible_cells(rows, cols, config.visible[kind])
    area = config.block[kind] * rows * cols
    while (surplus := int(seen.sum()) - wanted) > 0:
        aspect = math.exp(rng.uniform(math.log(config.aspect[0]), math.log(config.aspect[1])))
        height = min(max(1, round(math.sqrt(area * aspect))), rows)
        width = min(max(1, round(math.sqrt(area / aspect))), cols)
        top, left = rng.integers(rows - height + 1), rng.integers(cols - width + 1)
        block = np.zeros_like(seen)
        block[top : top + height, left : left + width] = True
        seen.flat[np.flatnonzero(block & seen)[:surplus]] = False
    return seen.ravel()
