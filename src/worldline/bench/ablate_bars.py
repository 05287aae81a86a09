"""What was asked of the first variant of a grid before anything was run, and whether it was kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

KEPT = {True: "yes", False: "no", None: "n/a"}


class Bar(NamedTuple):
    """Something that the first variant is to reach in a world, by itself or against another variant."""

    world: str
    of: str
    asked: str
    found: str
    kept: bool | None
    """None where it could not be judged."""


def judge(result: dict[str, Any]) -> list[Bar]:
    """Hold the first variant to its bars: against each other variant (the terms are none), and by itself."""
    ours, horizon = result["ours"], result["horizon"]
    names = [text.partition(":")[0].strip() for text in result["config"]["variants"]]
    bars = []
    for world in dict.fromkeys(row["world"] for row in result["runs"]):
        rows = {name: [r for r in result["runs"] if (r["world"], r["variant"]) == (world, name)] for name in names}
        pairs = [pair for pair in result["pairs"] if pair["world"] == world and pair["variant"] in names]
        for pair in pairs:
            against = f"{ours} against {pair['variant']}, {len(pair['seeds'])} seeds"
            hri = pair["hri"]
            bars.append(
                Bar(
                    world,
                    against,
                    f"HRI_{horizon} higher, interval above 0, the same sign in every seed",
                    f"{difference(hri)}, {sum(one > 0 for one in hri['each'])} of {len(hri['each'])}" if hri else "n/a",
                    hri and hri["low"] > 0 and all(one > 0 for one in hri["each"]),
                )
            )
            first, second = (float(np.median([both[side] for both in pair["h_star_each"]])) for side in (0, 1))
            triple = 1 <= second <= 33
            bars.append(
                Bar(
                    world,
                    against,
                    "H* three times as long" if triple else "H* longer, interval above 0",
                    f"{first:g} to {second:g} (medians), {difference(pair['h_star'], '.0f')}",
                    first >= 3 * second if triple else pair["h_star"]["low"] > 0,
                )
            )
            ratios = [ratio for ratio in pair["growth_ratio_each"] if ratio is not None]
            ratio = float(np.median(ratios)) if ratios else None
            bars.append(
                Bar(
                    world,
                    against,
                    "e_100 / e_10 at most half",
                    f"{two(ratio)} of theirs (median)",
                    None if ratio is None else ratio <= 0.5,
                )
            )
        mine = rows[ours]
        if mine:
            inside, radii = min(row["inside"] for row in mine), [row["median_radius"] for row in mine]
            bars.append(
                Bar(
                    world,
                    ours,
                    f"97% inside at step {mine[0]['long_steps']}, median radius within 10%",
                    f"{100 * inside:.0f}% or more, radius {min(radii):.2f} to {max(radii):.2f}",
                    inside >= 0.97 and all(abs(radius - 1) <= 0.1 for radius in radii),
                )
            )
        if mine and "success" in mine[0]:
            bars += _planning_bars(world, ours, rows)
    return bars


def _planning_bars(world: str, ours: str, rows: dict[str, list[dict[str, Any]]]) -> list[Bar]:
    bars = []
    for offset in rows[ours][0]["success"]:
        rates = {name: float(np.mean([r["success"][offset] for r in each])) for name, each in rows.items() if each}
        others = {name: rate for name, rate in rates.items() if name != ours}
        if not others:
            continue
        best = max(others, key=lambda name: others[name])
        above = int(offset) >= 75 and others[best] < 0.95
        bars.append(
            Bar(
                world,
                f"{ours} against the best, {best}",
                f"success at {offset} " + ("above its" if above else "within 5 points of its"),
                f"{100 * rates[ours]:.0f}% to {100 * others[best]:.0f}%",
                rates[ours] > others[best] if above else rates[ours] >= others[best] - 0.05,
            )
        )
    return bars


def two(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.2f}" if abs(value) < 1e4 else f"{value:.0e}"


def difference(found: dict[str, Any] | None, digits: str = ".2f", scale: float = 1.0) -> str:
    if found is None:
        return "n/a"
    value, low, high = (scale * found[key] for key in ("value", "low", "high"))
    return f"{value:+{digits}} [{low:+{digits}}, {high:+{digits}}]"
