"""The pictures of a grid of trainings, drawn from `result.json` alone."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from worldline.bench.ablate_bars import named, pictures_of, recipes_of

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#717273", "#8a6d3b")
_MARK = ("x", "o")
"""Of a run that is invalid, and of one that is valid."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "worldline",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def draw(result: dict[str, Any]) -> dict[str, str]:
    """Return the pictures as SVG by name. Recipes have a colour each; terms have a picture of their own."""
    rows, recipes = result["runs"], recipes_of(result["config"])
    worlds = list(dict.fromkeys(row["world"] for row in rows))
    present = [name for name in recipes if any(row["variant"] == name for row in rows)]
    colours = {variant: _COLOURS[i % len(_COLOURS)] for i, variant in enumerate(present)}
    terms = [row for row in rows if row["variant"] in {named(text)[0] for text in result["config"]["terms"]}]
    ours = [row for row in rows if row["variant"] == result["ours"]]
    makers = {
        "drift": lambda: _drift(rows, worlds, colours),
        "reliability": lambda: _reliability(rows, worlds, colours, result["horizon"]),
        "frontier": lambda: _frontier(rows, worlds, colours),
        "planning": lambda: _planning(rows, worlds, colours, result["oracle"]),
        "terms": lambda: _terms(ours, terms, colours, result["horizon"]),
    }
    with matplotlib.rc_context(_STYLE):
        return {name: makers[name]() for name in pictures_of(result)}


def _grid(worlds: list[str], count: int, title: str) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(3.4 * count, 2.6 * len(worlds) + 0.5), layout="constrained")
    axes = figure.subplots(len(worlds), count, squeeze=False)
    figure.suptitle(title, fontsize=11)
    return figure, axes


def _drift(rows: list[dict[str, Any]], worlds: list[str], colours: dict[str, str]) -> str:
    figure, axes = _grid(worlds, 3, "Median over seeds, band from the lowest to the highest")
    for world, (error, skill, region) in zip(worlds, axes, strict=True):
        for variant, colour in colours.items():
            mine = [row for row in rows if (row["world"], row["variant"]) == (world, variant)]
            if not mine:
                continue
            _band(error, [_curve(row["error"]) for row in mine], 1, colour)
            _band(skill, [_skill(row) for row in mine], 1, colour)
            step = max(1, mine[0]["long_steps"] // 100)
            _band(region, [100 * _curve(row["inside_curve"]) for row in mine], step, colour)
        error.axhline(np.sqrt(2), color="#c1c2c3", lw=1)
        error.set(ylabel=f"{world}\nlatent error, whitened", ylim=(0, 2), xlabel="step")
        skill.set(ylabel="skill R, mean over factors", ylim=(-0.6, 1.03), xlabel="step")
        region.set(ylabel="inside real region, %", ylim=(0, 103), xlabel="step")
    _legend(axes[0][0], colours)
    return _svg(figure)


def _reliability(rows: list[dict[str, Any]], worlds: list[str], colours: dict[str, str], horizon: int) -> str:
    figure = Figure(figsize=(3.4 * len(worlds), 3.4), layout="constrained")
    axes = figure.subplots(1, len(worlds), squeeze=False)[0]
    for ax, world in zip(axes, worlds, strict=True):
        names = [name for name in colours if any((row["world"], row["variant"]) == (world, name) for row in rows)]
        for row in (row for row in rows if row["world"] == world and row["variant"] in names and row["hri"]):
            place, colour = names.index(row["variant"]), colours[row["variant"]]
            x = place + 0.12 * (row["seed"] - 2)
            ax.plot([x, x], [row["hri"]["low"], row["hri"]["high"]], color=colour, lw=1.5, alpha=0.6)
            ax.plot(x, row["hri"]["value"], _MARK[row["invalid"] is None], color=colour, ms=5)
        ax.set(title=world, xlim=(-0.6, len(names) - 0.4), ylim=(-0.03, 1.03))
        ax.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes[0].set_ylabel(f"HRI_{horizon} of each seed (x: invalid)")
    return _svg(figure)


def _terms(ours: list[dict[str, Any]], terms: list[dict[str, Any]], colours: dict[str, str], horizon: int) -> str:
    """Draw what the first variant is without each of its terms, or with another, beside itself with the same seeds."""
    worlds = list(dict.fromkeys(row["world"] for row in terms))
    names = list(dict.fromkeys(row["variant"] for row in (*ours, *terms)))
    heads = {
        f"HRI_{horizon} (x: invalid)": lambda row: row["hri"] and row["hri"]["value"],
        "inside real region at the end, %": lambda row: 100 * row["inside"],
        "R(0) of the worst factor / supervised": _kept,
    }
    if "success" in terms[0]:
        heads["reached, mean over offsets, %"] = lambda row: 100 * float(np.mean(list(row["success"].values())))
    figure = Figure(figsize=(2.7 * len(heads) + 1.6, (0.24 * len(names) + 0.9) * len(worlds)), layout="constrained")
    for line, world in zip(figure.subplots(len(worlds), len(heads), squeeze=False, sharey=True), worlds, strict=True):
        seeds = {row["seed"] for row in terms if row["world"] == world}
        here = [row for row in (*ours, *terms) if row["world"] == world and row["seed"] in seeds]
        for ax, (head, value) in zip(line, heads.items(), strict=True):
            for row in (row for row in here if value(row) is not None):
                y, colour = names.index(row["variant"]), colours.get(row["variant"], "#515253")
                if value is next(iter(heads.values())):
                    ax.plot([row["hri"]["low"], row["hri"]["high"]], [y, y], color=colour, lw=1.5, alpha=0.6)
                ax.plot(value(row), y, _MARK[row["invalid"] is None], color=colour, ms=5)
                if row in ours:
                    ax.axvline(value(row), color="#c1c2c3", lw=1, zorder=0)
            ax.set(xlabel=head, xlim=(-0.03, 1.06) if "%" not in head else (-3, 106), ylim=(len(names) - 0.5, -0.5))
        line[0].set(title=world)
        line[0].set_yticks(range(len(names)), names, fontsize=8)
    return _svg(figure)


def _frontier(rows: list[dict[str, Any]], worlds: list[str], colours: dict[str, str]) -> str:
    """Draw what each encoder kept against how far its rollouts were off: stability is worth nothing by forgetting."""
    figure = Figure(figsize=(3.4 * len(worlds), 3.2), layout="constrained")
    axes = figure.subplots(1, len(worlds), squeeze=False)[0]
    for ax, world in zip(axes, worlds, strict=True):
        for variant, colour in colours.items():
            mine = [row for row in rows if (row["world"], row["variant"]) == (world, variant)]
            kept, off = [_kept(row) for row in mine], [row["error"][-1] for row in mine]
            ax.plot(np.clip(kept, 0, 1.05), np.clip(off, 0, 2), "o", color=colour, ms=5)
        ax.axvline(0.8, color="#c1c2c3", lw=1)
        ax.set(title=world, xlim=(0, 1.08), ylim=(2.02, 0), xlabel="R(0) of the worst factor / supervised")
    axes[0].set_ylabel(f"latent error at {len(rows[0]['error']) - 1}, cut at 2")
    _legend(axes[0], colours)
    return _svg(figure)


def _planning(
    rows: list[dict[str, Any]], worlds: list[str], colours: dict[str, str], oracle: dict[str, dict[str, float]]
) -> str:
    figure = Figure(figsize=(3.4 * len(worlds), 3.0), layout="constrained")
    axes = figure.subplots(1, len(worlds), squeeze=False)[0]
    for ax, world in zip(axes, worlds, strict=True):
        for variant, colour in colours.items():
            mine = [row["success"] for row in rows if (row["world"], row["variant"]) == (world, variant)]
            if mine:
                offsets = list(map(int, mine[0]))
                _band(ax, [100 * np.array(list(each.values())) for each in mine], 1, colour, offsets)
        if world in oracle:
            ax.plot(
                list(map(int, oracle[world])), [100 * rate for rate in oracle[world].values()], color="#111213", ls=":"
            )
        ax.set(title=world, xlabel="goal ahead, steps", ylim=(-3, 103))
    axes[0].set_ylabel("reached, % (dotted: true dynamics)")
    _legend(axes[0], colours)
    return _svg(figure)


def _legend(ax: Axes, colours: dict[str, str]) -> None:
    """Name every recipe, also those that this part of the picture lacks."""
    ax.legend([Line2D([], [], color=colour, lw=1.6) for colour in colours.values()], list(colours), fontsize=8)


def _band(ax: Axes, curves: list[np.ndarray], step: int, colour: str, at: list[int] | None = None) -> None:
    values = np.stack(curves)
    x = np.arange(values.shape[1]) * step if at is None else np.array(at)
    known = ~np.isnan(values).all(axis=0)
    x, values = x[known], values[:, known]
    ax.fill_between(x, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=colour, alpha=0.15, lw=0)
    ax.plot(x, np.nanmedian(values, axis=0), color=colour, lw=1.6)


def _kept(row: dict[str, Any]) -> float:
    return float(min(factor["kept"] / factor["canonical"] for factor in row["factors"].values()))


def _skill(row: dict[str, Any]) -> np.ndarray:
    curves = np.stack([_curve(factor["r"]) for factor in row["factors"].values()])
    known = ~np.isnan(curves)
    mean = np.where(known, curves, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return np.where(known.any(axis=0), np.clip(mean, -1, 1), np.nan)


def _curve(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])


def _svg(figure: Figure) -> str:
    data = io.StringIO()
    figure.savefig(data, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return data.getvalue()[data.getvalue().index("<svg") :]
