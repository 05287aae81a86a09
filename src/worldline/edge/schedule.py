"""In what order a chain is computed, and where in the arena everything lies meanwhile.

Streamed by rows, a chain keeps the last few rows of each grid and never the picture. In tiles, the picture is kept,
and the first stages are computed piece by piece, what pieces share more than once; with no stage in tiles, that is
layer by layer. All give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from worldline.edge.graph import Average, Chain, Flatten, Pixels, Rows, Stage

ROW_ALIGN, BLOCK = 16, 4
_ALIGN = 8


class Ring(NamedTuple):
    """Where a stage's input, or what is kept of it, lies."""

    at: int
    rows: int
    columns: int
    size: int
    """Bytes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where a chain keeps what it needs, in bytes of the arena."""

    kind: int
    """1: rows, 2: tiles."""
    num_tiled: int = 0
    tile: tuple[int, int] = (1, 1)
    """Rows and columns of the last tiled stage's grid."""
    rings: tuple[Ring, ...]
    """What is kept of each stage's input."""
    scratch: int
    piece: int
    sums: int
    start: int
    end: int
    """The first byte behind."""
    macs: int
    """Multiplications for one picture, those made twice counted twice."""

    @property
    def size(self) -> int:
        """Bytes of the arena, the picture among them where it is kept."""
        return self.end - self.start


def padded(n: int, to: int) -> int:
    return -(-n // to) * to


def plan_rows(chain: Chain, start: int = 0) -> Plan:
    """Lay out a chain that is streamed row by row."""
    at, rings = padded(start, _ALIGN), []
    for stage in chain.stages:
        rows = min(stage.kernel // 2 + 1 if stage.upsample else stage.kernel, stage.size_in[0])
        _, columns, channels = stage.size_in
        rings.append(Ring(at, rows, columns, rows * columns * channels))
        at = padded(at + rings[-1].size, _ALIGN)
    return _finish(chain, start, at, rings, kind=1, macs=chain.macs)


def plan_tiles(chain: Chain, num_tiled: int = 0, tile: tuple[int, int] = (1, 1), start: int = 0) -> Plan:
    """Lay out a chain with its first `num_tiled` stages in tiles and the others one after the other.

    A grid's bytes are given to others as soon as the last stage that reads it is done.
    """
    stages, (rows, columns) = chain.stages, tile
    kept: list[tuple[int, int]] = [stage.size_in[:2] for stage in stages]
    for i in range(num_tiled - 1, 0, -1):
        rows, columns = (_reach(stages[i], n, of) for n, of in zip((rows, columns), stages[i].size_in[:2], strict=True))
        kept[i] = (rows, columns)
    sizes = [r * c * stage.size_in[2] for (r, c), stage in zip(kept, stages, strict=True)]
    places = pack(sizes, lives(len(stages), num_tiled))
    base = padded(start, _ALIGN)
    rings = [Ring(base + at, r, c, size) for at, (r, c), size in zip(places, kept, sizes, strict=True)]
    behind = padded(max((ring.at + ring.size for ring in rings), default=base), _ALIGN)
    macs = chain.macs + _again(chain, num_tiled, tile)
    return _finish(chain, start, behind, rings, kind=2, num_tiled=num_tiled, tile=tile, macs=macs)


def lives(num_stages: int, num_tiled: int) -> list[tuple[int, int]]:
    """Return the first and the last stage that each stage's input is alive for.

    Grid i is written while stage i - 1 runs and read while stage i does; where tiles are joined is written by all of
    them, and the picture is read by all.
    """
    spans = [(max(0, i - 1), i) for i in range(num_stages)]
    if num_tiled > 1:
        spans[0], spans[num_tiled] = (0, num_tiled - 1), (0, num_tiled)
    return spans


def pack(sizes: list[int], spans: list[tuple[int, int]]) -> list[int]:
    """Return a place for each of some buffers, so that those alive at the same time do not overlap: largest first, each
    as low as it can lie."""
    places = [0] * len(sizes)
    done: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        others = sorted(
            (places[j], places[j] + sizes[j]) for j in done if spans[i][0] <= spans[j][1] and spans[j][0] <= spans[i][1]
        )
        at = 0
        for low, high in others:
            if at + sizes[i] <= low:
                break
            at = max(at, padded(high, _ALIGN))
        places[i] = at
        done.append(i)
    return places


def pareto(chain: Chain, keep_picture: bool = False) -> list[Plan]:
    """Return every plan that no other beats in both bytes and multiplications, smallest first.

    With `keep_picture`, of those that keep the picture only: for sources that cannot wait for rows.
    """
    plans = [plan_tiles(chain)] if keep_picture else [plan_rows(chain), plan_tiles(chain)]
    for num_tiled in range(1, len(chain.stages)):
        rows, columns, _ = chain.stages[num_tiled - 1].size
        side = 1
        while side < max(rows, columns):
            plans.append(plan_tiles(chain, num_tiled, (min(side, rows), min(side, columns))))
            side *= 2
    best: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.size, plan.macs)):
        if not best or plan.macs < best[-1].macs:
            best.append(plan)
    return best


def _finish(
    chain: Chain,
    start: int,
    at: int,
    rings: list[Ring],
    *,
    kind: int,
    macs: int,
    num_tiled: int = 0,
    tile: tuple[int, int] = (1, 1),
) -> Plan:
    scratch = at
    at += max((BLOCK + (s.kind == "conv" and s.kernel > 1)) * padded(s.depth, ROW_ALIGN) for s in chain.stages)
    piece = at
    _, columns, channels = chain.stages[-1].size
    if isinstance(chain.end, (Rows, Pixels)):
        at += padded(columns * channels, 4) + (columns * 6 if isinstance(chain.end, Pixels) else 0)
    else:
        at += BLOCK * channels
    sums = at = padded(at, _ALIGN)
    if isinstance(chain.end, (Flatten, Average)):
        at += 4 * (len(chain.end.matrix.weight) if isinstance(chain.end, Flatten) else channels)
    return Plan(
        kind=kind, num_tiled=num_tiled, tile=tile, rings=tuple(rings), scratch=scratch, piece=piece, sums=sums,
        start=start, end=at, macs=macs,
    )  # fmt: skip


def _reach(stage: Stage, out: int, of: int) -> int:
    """Return the most input rows (or columns) that `out` neighbouring ones of the output need."""
    last = (out - 1) * stage.stride + stage.kernel
    return min(of, (last - 1) // 2 + 2 if stage.upsample else last)


def _again(chain: Chain, num_tiled: int, tile: tuple[int, int]) -> int:
    """Return the multiplications that tiles make beyond the first time."""
    if num_tiled < 2:
        return 0
    total = 0
    joint = chain.stages[num_tiled - 1]
    spans = [
        [_spans(chain, num_tiled, axis, begin, min(begin + tile[axis], joint.size[axis]))
         for begin in range(0, joint.size[axis], tile[axis])]
        for axis in (0, 1)
    ]  # fmt: skip
    for i in range(num_tiled - 1):
        stage = chain.stages[i]
        computed = sum(span[i] for span in spans[0]) * sum(span[i] for span in spans[1])
        total += stage.macs * (computed - stage.size[0] * stage.size[1]) // (stage.size[0] * stage.size[1])
    return total


def _spans(chain: Chain, num_tiled: int, axis: int, begin: int, end: int) -> list[int]:
    """Return how many rows (or columns) of each tiled stage's grid a tile computes."""
    counts = [0] * num_tiled
    counts[num_tiled - 1] = end - begin
    for i in range(num_tiled - 1, 0, -1):
        stage, up = chain.stages[i], chain.stages[i].upsample
        first = begin * stage.stride - stage.padding[axis]
        last = (end - 1) * stage.stride - stage.padding[axis] + stage.kernel - 1
        begin, end = max(0, first >> up), min(stage.size_in[axis], (last >> up) + 1)
        counts[i - 1] = end - begin
    return counts
