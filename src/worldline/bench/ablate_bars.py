"""What is asked of the first variant of a grid, and whether it was kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from worldline.evaluate.reliability import ENCODER_SHARE, VISIBLE_R2

_FAIR = 0.95
"""A baseline has at least this share of our CPU time."""


class Bar(NamedTuple):
    """Something that the first variant is to reach in a world, by itself or against another variant."""

    world: str
    of: str
    asked: str
    found: str
    kept: bool | None
    """None where it could not be judged."""
    surely: bool = True
    """False where the value speaks for `kept` and the interval leaves it open."""

    @property
    def verdict(self) -> str:
        said = {True: "yes", False: "no", None: "n/a"}[self.kept]
        return said if self.surely else f"{said}, within noise"


def judge(result: dict[str, Any]) -> list[Bar]:
    """Hold the first variant to its bars: against each other variant (the terms are none), and by itself.

    In planning the terms count that are recipes of their own.
    """
    ours, horizon = result["ours"], result["horizon"]
    names, recipes = [named(text)[0] for text in result["config"]["variants"]], recipes_of(result["config"])
    bars = []
    for world in dict.fromkeys(row["world"] for row in result["runs"]):
        rows = [row for row in result["runs"] if row["world"] == world]
        mine = [row for row in rows if row["variant"] == ours]
        here = [pair for pair in result["pairs"] if pair["world"] == world]
        pairs = [pair for pair in here if pair["variant"] in names]
        for pair in pairs:
            against = f"{ours} against {pair['variant']}, {_seeds(pair)}"
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
            theirs = [row for row in rows if row["variant"] == pair["variant"]]
            growths = [row["growth"] for row in theirs if row["growth"] is not None]
            ratios = [ratio for ratio in pair["growth_ratio_each"] if ratio is not None]
            ratio = float(np.median(ratios)) if ratios else None
            bars.append(
                Bar(
                    world,
                    against,
                    "e_100 / e_10 at most half",
                    f"{two(ratio)} of theirs, which is {two(float(np.median(growths)) if growths else None)} (medians)",
                    None if ratio is None else ratio <= 0.5,
                )
            )
            share = min(row["cpu_seconds"] for row in theirs) / float(np.median([row["cpu_seconds"] for row in mine]))
            bars.append(
                Bar(
                    world,
                    against,
                    f"CPU time at least {100 * _FAIR:.0f}% of ours",
                    f"{100 * share:.0f}% or more",
                    share >= _FAIR,
                )
            )
        if mine:
            inside, radii = [row["inside"] for row in mine], [row["median_radius"] for row in mine]
            bars.append(
                Bar(
                    world,
                    ours,
                    f"97% of all seeds' rollouts inside at step {mine[0]['long_steps']}, each seed's median radius "
                    "within 10%",
                    f"{100 * np.mean(inside):.1f}% ({100 * min(inside):.0f} to {100 * max(inside):.0f} of a seed), "
                    f"radius {min(radii):.2f} to {max(radii):.2f}; the real latents there: "
                    f"{100 * np.mean([row['inside_real'] for row in mine]):.1f}%, "
                    f"{min(row['median_radius_real'] for row in mine):.2f} to "
                    f"{max(row['median_radius_real'] for row in mine):.2f}",
                    float(np.mean(inside)) >= 0.97 and all(abs(radius - 1) <= 0.1 for radius in radii),
                )
            )
            kept, least = min(
                (found["kept"] / found["canonical"], name)
                for row in mine
                for name, found in row["factors"].items()
                if found["canonical"] >= VISIBLE_R2
            )
            bars.append(
                Bar(
                    world,
                    ours,
                    f"every factor's R(0) at least {ENCODER_SHARE} of a supervised encoder's, in every seed",
                    f"{kept:.2f} or more (least: {least})",
                    kept >= ENCODER_SHARE,
                )
            )
        if mine and "success" in mine[0]:
            bars += _planning_bars(world, ours, [pair for pair in here if pair["variant"] in recipes], rows)
    return bars


def recipes_of(config: dict[str, Any]) -> list[str]:
    """Return the names of the variants, and of the terms whose options name another `objective` than the first's."""
    ours = _objective(config["variants"][0])
    return [named(text)[0] for text in (*config["variants"], *(t for t in config["terms"] if _objective(t) != ours))]


def pictures_of(result: dict[str, Any]) -> list[str]:
    """Return the names of the pictures that a report of these runs has."""
    rows, terms = result["runs"], {named(text)[0] for text in result["config"]["terms"]}
    names = ["drift", "reliability", "frontier"]
    names += ["planning"] if "success" in rows[0] else []
    return names + (["terms"] if any(row["variant"] in terms for row in rows) else [])


def named(text: str) -> tuple[str, str]:
    """Return the parts of `NAME: OPTIONS`."""
    name, _, options = text.partition(":")
    return name.strip(), options.strip()


def _objective(text: str) -> str:
    return next((word for word in named(text)[1].split() if word.startswith("objective=")), "")


def _planning_bars(world: str, ours: str, pairs: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[Bar]:
    """Judge success by the mean over the seeds that both have; the best is who leaves us the least."""
    bars = []
    for offset in pairs[0]["success"] if pairs else ():
        best = min(pairs, key=lambda pair: pair["success"][offset]["value"])
        name, found = best["variant"], best["success"][offset]
        rate, theirs = (
            float(np.mean([r["success"][offset] for r in rows if r["variant"] == each and r["seed"] in best["seeds"]]))
            for each in (ours, name)
        )
        above = int(offset) >= 75 and theirs < 0.95
        least = 0.0 if above else -0.05
        kept = found["value"] > least if above else found["value"] >= least
        bars.append(
            Bar(
                world,
                f"{ours} against the best, {name}, {_seeds(best)}",
                f"success at {offset} " + ("above its" if above else "within 5 points of its"),
                f"{100 * rate:.0f}% to {100 * theirs:.0f}%, {difference(found, '.0f', 100)}",
                kept,
                surely=found["low"] > least if kept else found["high"] < least,
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


def _seeds(pair: dict[str, Any]) -> str:
    count = len(pair["seeds"])
    return f"{count} seed{'s' if count > 1 else ''}"
