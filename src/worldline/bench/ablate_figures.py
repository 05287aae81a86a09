"""The pictures of a grid of trainings, drawn from `result.json` alone."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#717273", "#8a6d3b")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "worldline",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def draw(result: dict[str, Any]) -> dict[str, str]:
    """Return the pictures as SVG by name."""
    rows = result["runs"]
    worlds = list(dict.fromkeys(row["world"] for row in rows))
    colours = {
        variant: _COLOURS[i % len(_COLOURS)] for i, variant in enumerate(dict.fromkeys(row["variant"] for row in rows))
    }
    with matplotlib.rc_context(_STYLE):
        pictures = {
            "drift": _drift(rows, worlds, colours),
            "reliability": _reliability(rows, worlds, colours, result["horizon"]),
            "frontier": _frontier(rows, worlds, colours),
        }
        if "success" in rows[0]:
            pictures["planning"] = _planning(rows, worlds, colours, result["oracle"])
    return pictures


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
            _band(error, [_curve(row["error"]) for row in mine], 1, colour, variant)
            _band(skill, [_skill(row) for row in mine], 1, colour, variant)
            step = max(1, mine[0]["long_steps"] // 100)
            _band(region, [100 * _curve(row["inside_curve"]) for row in mine], step, colour, variant)
        error.axhline(np.sqrt(2), color="#c1c2c3", lw=1)
        error.set(ylabel=f"{world}\nlatent error, whitened", ylim=(0, 2), xlabel="step")
        skill.set(ylabel="skill R, mean over factors", ylim=(-0.6, 1.03), xlabel="step")
        region.set(ylabel="inside real region, %", ylim=(0, 103), xlabel="step")
    axes[0][0].legend(fontsize=8)
    return _svg(figure)


def _reliability(rows: list[dict[str, Any]], worlds: list[str], colours: dict[str, str], horizon: int) -> str:
    figure = Figure(figsize=(3.4 * len(worlds), 3.4), layout="constrained")
    for ax, world in zip(figure.subplots(1, len(worlds), squeeze=False)[0], worlds, strict=True):
        for place, (variant, colour) in enumerate(colours.items()):
            for row in (row for row in rows if (row["world"], row["variant"]) == (world, variant) and row["hri"]):
                hri = row["hri"]
                x = place + 0.12 * (row["seed"] - 2)
                ax.plot([x, x], [hri["low"], hri["high"]], color=colour, lw=1.5, alpha=0.6)
                ax.plot(x, hri["value"], "o" if row["invalid"] is None else "x", color=colour, ms=5)
        ax.set(title=world, ylim=(-0.03, 1.03), ylabel=f"HRI_{horizon}, a mark each seed; x: invalid")
        ax.set_xticks(range(len(colours)), list(colours), rotation=40, ha="right", fontsize=8)
    return _svg(figure)


def _frontier(rows: list[dict[str, Any]], worlds: list[str], colours: dict[str, str]) -> str:
    """Draw what each encoder kept against how far its rollouts were off: stability is worth nothing by forgetting."""
    figure = Figure(figsize=(3.4 * len(worlds), 3.2), layout="constrained")
    axes = figure.subplots(1, len(worlds), squeeze=False)[0]
    for ax, world in zip(axes, worlds, strict=True):
        for variant, colour in colours.items():
            mine = [row for row in rows if (row["world"], row["variant"]) == (world, variant)]
            kept = [min(factor["kept"] / factor["canonical"] for factor in row["factors"].values()) for row in mine]
            off = [row["error"][-1] for row in mine]
            ax.plot(np.clip(kept, 0, 1.05), np.clip(off, 0, 2), "o", color=colour, ms=5, label=variant)
        ax.axvline(0.8, color="#c1c2c3", lw=1)
        ax.set(title=world, xlim=(0, 1.08), ylim=(2.02, 0), xlabel="R(0) of the worst factor / supervised")
    axes[0].set_ylabel(f"latent error at {len(rows[0]['error']) - 1}, whitened (2: 2 or more)")
    axes[0].legend(fontsize=8)
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
                _band(ax, [100 * np.array(list(each.values())) for each in mine], 1, colour, variant, offsets)
        if world in oracle:
            ax.plot(
                list(map(int, oracle[world])), [100 * rate for rate in oracle[world].values()], color="#111213", ls=":"
            )
        ax.set(title=world, xlabel="goal ahead, steps", ylabel="reached, % (dotted: true dynamics)", ylim=(-3, 103))
    axes[0].legend(fontsize=8)
    return _svg(figure)


def _band(ax: Axes, curves: list[np.ndarray], step: int, colour: str, label: str, at: list[int] | None = None) -> None:
    values = np.stack(curves)
    x = np.arange(values.shape[1]) * step if at is None else np.array(at)
    known = ~np.isnan(values).all(axis=0)
    x, values = x[known], values[:, known]
    ax.fill_between(x, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=colour, alpha=0.15, lw=0)
    ax.plot(x, np.nanmedian(values, axis=0), color=colour, lw=1.6, label=label)


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
