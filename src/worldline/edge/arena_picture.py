"""A static arena plan as a picture: bytes upwards, time to the right, a rectangle for each buffer's life."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from worldline.edge.graph import Chain
from worldline.edge.program import Arena
from worldline.edge.schedule import Plan, lives

_COLOURS = {"grid": "#0072b2", "work": "#e69f00", "state": "#009e73"}
_HEIGHT, _LEFT, _TOP, _LETTER = 420.0, 20.0, 40.0, 6.2


class Buffer(NamedTuple):
    """What lies at a place, from the first to the last of some phases."""

    name: str
    at: int
    size: int
    first: int
    last: int
    kind: str


class Panel(NamedTuple):
    """One plan: its phases in order, and its buffers."""

    title: str
    phases: Sequence[str]
    buffers: Sequence[Buffer]
    size: int
    column: int
    """Width of a phase."""


def chain_panel(title: str, chain: Chain, plan: Plan) -> Panel:
    """Return a chain's plan: a phase for each stage, or one for all where rows stream."""
    streamed, count = plan.kind == 1, len(chain.stages)
    phases = [f"stage {i + 1}{', tile' if i < plan.num_tiled > 1 else ''}" for i in range(count)]
    spans = [(0, 0)] * count if streamed else lives(count, plan.num_tiled)
    phases = ["while rows come"] if streamed else phases
    buffers = []
    for i, ring in enumerate(plan.rings):
        rows, columns, channels = chain.stages[i].size_in
        kept = "all" if (ring.rows, ring.columns) == (rows, columns) else f"{ring.rows} x {ring.columns}"
        name = f"grid {i}: {kept} of {rows} x {columns} x {channels}"
        buffers.append(Buffer(name, ring.at, ring.size, *spans[i], "grid"))
    last = len(phases) - 1
    work = [("patches", plan.scratch, plan.piece), ("results", plan.piece, plan.sums)]
    work.append(("sums", plan.sums, plan.end))
    buffers += [Buffer(name, at, end - at, 0, last, "work") for name, at, end in work if end > at]
    return Panel(title, phases, buffers, plan.size, 260 if streamed else 92)


def world_panel(title: str, encoder: Chain, decoder: Chain, arena: Arena) -> Panel:
    """Return a whole world's arena: what each call uses."""
    phases = ["push_row", "step", "decode", "region, drift"]
    buffers = []
    for name, chain, plan, at in (("encoder", encoder, arena.encoder, 0), ("decoder", decoder, arena.decoder, 2)):
        named = chain_panel("", chain, plan).buffers
        buffers += [of._replace(name=f"{name}, {of.name}", first=at, last=at) for of in named]
    uses = {"state": (0, 3), "white": (3, 3), "offset": (3, 3)}
    for name, (at, size) in arena.buffers.items():
        buffers.append(Buffer(name, at, size, *uses.get(name, (1, 1)), "state"))
    return Panel(title, phases, buffers, arena.size, 210)


def draw(panels: Sequence[Panel]) -> str:
    """Return plans beside each other as SVG, all to the scale of the largest."""
    most, left, parts = max(panel.size for panel in panels), _LEFT, []
    for panel in panels:
        wide = panel.column * len(panel.phases)
        base = _TOP + _HEIGHT
        parts.append(_text(left, 18.0, panel.title, "bold"))
        parts.append(_text(left, 33.0, f"{panel.size:,} bytes"))
        top = base - panel.size / most * _HEIGHT
        parts.append(f'<path d="M{left} {top:.1f}h{wide}" stroke="#888" stroke-dasharray="4 3"/>')
        for i, phase in enumerate(panel.phases):
            parts.append(_text(left + i * panel.column + 4, base + 15, phase))
        for of in panel.buffers:
            high = of.size / most * _HEIGHT
            y, x = base - of.at / most * _HEIGHT - high, left + of.first * panel.column
            span = (of.last - of.first + 1) * panel.column
            told = f"{of.name}: {of.size:,} bytes at {of.at:,}"
            parts.append(
                f'<rect x="{x + 1}" y="{y:.1f}" width="{span - 2}" height="{max(high - 0.6, 0.6):.1f}" '
                f'fill="{_COLOURS[of.kind]}" fill-opacity="0.75"><title>{escape(told)}</title></rect>'
            )
            label = f"{of.name}: {of.size:,}"
            label = label if len(label) * _LETTER < span else f"{of.name.split(':')[0]}: {of.size:,}"
            if high >= 10 and len(label) * _LETTER < span:
                parts.append(_text(x + 5, y + high / 2 + 4, label))
        left += wide + 50
    high = _TOP + _HEIGHT + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left:.0f} {high:.0f}" width="{left:.0f}" '
        f'height="{high:.0f}" '
        f'font-family="sans-serif" font-size="11"><rect width="{left:.0f}" height="{high:.0f}" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, weight: str = "normal") -> str:
    return f'<text x="{x:.0f}" y="{y:.1f}" font-weight="{weight}" fill="#171c22">{escape(text)}</text>'
