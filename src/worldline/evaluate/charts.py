"""The curves of a report as inline SVG, drawn from `result.json`'s figures alone.

Colours are written as CSS variables of the page, so that one picture serves dark and light.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# stand-ins that matplotlib can draw, replaced by the page's variables afterwards; no two may be alike
_VARIABLES = {
    "#009e73": "var(--truth)",
    "#0072b2": "var(--dream)",
    "#e69f00": "var(--action)",
    "#d55e00": "var(--warn)",
    "#111213": "var(--text)",
    "#717273": "var(--soft)",
    "#c1c2c3": "var(--line)",
}
TRUTH, DREAM, ACTION, WARN, TEXT, SOFT, LINE = _VARIABLES
_NAIVE = {
    "persistence": (SOFT, (0, (5, 2))),
    "standing still": (SOFT, (0, (4, 1.5, 1, 1.5))),
    "constant velocity": (SOFT, (0, (1, 1.5))),
    "actions only": (ACTION, (0, (5, 2))),
    "action-free twin": (ACTION, (0, (1, 1.5))),
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "worldline",
    "font.size": 11,
    "text.color": TEXT,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def reliability_chart(figures: dict[str, Any], step_seconds: float) -> str:
    """Draw R_f(h) of every factor with its naive forecasts, the credit area, the encoder's limit and H*."""
    factors, star = figures["factors"], figures["verdict"]["h_star"]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.4, max(0.6 + 2.5 * len(factors), 4.2)), layout="constrained")
        axes = figure.subplots(len(factors), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (name, factor) in zip(axes, factors.items(), strict=True):
            _factor(ax, name, factor, star, figures["windows"]["every"])
        axes[-1].set_xlabel(f"horizon h, steps of {step_seconds * 1000:.0f} ms")
        handles: dict[str, Artist] = {}
        for ax in axes:
            handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4, fontsize=10)
        return _svg(figure, "Skill over the horizon, by factor")


def latent_chart(figures: dict[str, Any]) -> str:
    """Draw latent error and the share of imagined latents inside the region of real ones."""
    every = figures["windows"]["every"]
    latents = figures["latents"]
    latents = latents | {key: value[::every] for key, value in latents.items() if isinstance(value, list)}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.4, 2.7), layout="constrained")
        left, right = figure.subplots(1, 2)
        h = np.arange(len(latents["error"])) * every
        left.plot(h, _curve(latents["error"]), color=DREAM, lw=2, label="imagination")
        left.plot(h, _curve(latents["error_persistence"]), color=SOFT, ls=(0, (5, 2)), label="persistence")
        left.axhline(np.sqrt(2), color=LINE, lw=1)
        left.text(h[-1], np.sqrt(2), "two real latents at random", color=SOFT, ha="right", va="bottom", fontsize=9)
        left.set(xlabel="horizon h, steps", ylabel="error, whitened", ylim=(0, None), xlim=(0, h[-1]))
        left.legend(loc="lower right", fontsize=9)
        right.plot(h, 100 * _curve(latents["share_inside"]), color=DREAM, lw=2)
        right.axhline(100 * latents["share_inside_real"], color=TRUTH, lw=1.4)
        right.set(xlabel="horizon h, steps", ylabel="inside real region, %", ylim=(0, 103), xlim=(0, h[-1]))
        right.text(
            h[-1], 100 * latents["share_inside_real"] - 3, "real latents", color=TRUTH, ha="right", va="top", fontsize=9
        )
        return _svg(figure, "Latent error and region")


def long_chart(figures: dict[str, Any]) -> str:
    """Draw where latents go on whole test episodes: the share inside the real region, and their median radius."""
    long = figures["long_rollouts"]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.4, 2.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        h = np.arange(len(long["inside_curve"])) * long["every"]
        left.plot(h, 100 * np.array(long["inside_real_curve"]), color=TRUTH, lw=1.2, label="the real latents there")
        left.plot(h, 100 * np.array(long["inside_curve"]), color=DREAM, lw=2, label="imagination")
        left.legend(loc="lower left", fontsize=9)
        left.set(ylabel="inside real region, %", ylim=(0, 103))
        right.plot(h, long["median_radius_real_curve"], color=TRUTH, lw=1.2)
        right.plot(h, np.clip(long["median_radius_curve"], 0, 10), color=DREAM, lw=2)
        right.set(ylabel="median radius, real = 1", ylim=(0, None))
        for ax in (left, right):
            ax.set(xlabel="horizon h, steps", xlim=(0, max(h[-1], 1)))
        return _svg(figure, "Region over long rollouts")


def bound_chart(figures: dict[str, Any]) -> str:
    """Draw the measured error beside its bound, and the gains that the bound is made of."""
    bound = figures["bound"]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.4, 3.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        h = np.arange(1, len(bound["error"][0]) + 1)
        for key, colour, label in (("bound", WARN, "bound, estimated"), ("error", DREAM, "measured error")):
            rows = np.array([_curve(row) for row in bound[key]])
            left.fill_between(h, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.18, lw=0)
            left.plot(h, np.median(rows, axis=0), color=colour, lw=2, label=f"{label}: median and range")
        left.axhline(np.sqrt(2), color=LINE, lw=1)
        left.text(h[-1], np.sqrt(2), "two real latents at random", color=SOFT, ha="right", va="bottom", fontsize=9)
        left.set(yscale="log", ylabel="error", ylim=(None, 1e6))
        left.legend(loc="lower right", fontsize=9)
        right.plot(h, np.median([_curve(row) for row in bound["gain"]], axis=0), color=WARN, lw=2, label="whole state")
        for name, colour in (("tangent", ACTION), ("off", SOFT)):
            rows = np.array([_curve(row) for row in bound["split"][name]])
            label = "latent, along real latents" if name == "tangent" else "latent, off them"
            right.plot(bound["split_at"], np.median(rows, axis=0), color=colour, lw=1.6, label=label)
        seen = np.array([_curve(row) for row in bound["gain_seen"]])[:, 1:]
        if np.isfinite(seen).any():
            right.plot(h[1:], np.nanmedian(seen, axis=0), color=DREAM, lw=2, label="what steps did to the error")
        right.axhline(1, color=LINE, lw=1)
        right.set(ylabel="gain of one step, median", ylim=(0, None))
        right.legend(loc="lower right", fontsize=9)
        for ax in (left, right):
            ax.set(xlabel="horizon h, steps", xlim=(0, h[-1]))
        return _svg(figure, "Measured error and its bound")


def trust_chart(figures: dict[str, Any]) -> str:
    """Draw how well each reading of the gauge tells wrong from right, and what the estimator's chances came to."""
    trust = figures["trust"]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.4, 3.0), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
        h, counts = np.array(trust["at"]), np.array(trust["counts"])
        for name, colour in (("region", SOFT), ("cycle", ACTION), ("estimator", DREAM)):
            if name in trust["auroc"]:
                area = _curve(trust["auroc"][name])
                left.plot(h, area, color=colour, lw=1)
                left.plot(h, np.where(counts, area, np.nan), color=colour, lw=2.4, label=name)
        left.axhline(0.5, color=LINE, lw=1)
        left.text(h[-1], 0.5, "chance", color=SOFT, ha="right", va="bottom", fontsize=9)
        left.set(xlabel="horizon h, steps", ylabel="AUROC", ylim=(0, 1), xlim=(0, h[-1]))
        left.legend(loc="lower left", fontsize=9, ncols=3)
        right.plot((0, 1), (0, 1), color=LINE, lw=1)
        if "reliability" in trust:
            bins = trust["reliability"]["bins"]
            size = np.array([row["count"] for row in bins])
            said, found = ([row[key] for row in bins] for key in ("said", "found"))
            right.plot(said, found, color=DREAM, lw=1)
            right.scatter(said, found, s=12 + 120 * size / size.sum(), color=DREAM, lw=0)
        right.set(xlabel="chance of being wrong, as told", ylabel="share that was", xlim=(0, 1), ylim=(0, 1))
        return _svg(figure, "What the gauge knows of the error")


def _factor(ax: Axes, name: str, factor: dict[str, Any], star: dict[str, Any], every: int) -> None:
    factor = factor | {key: value[::every] for key, value in factor.items() if isinstance(value, list)}
    r, credit = _curve(factor["r"]), _curve(factor["credit"])
    h = np.arange(len(r)) * every
    later = h >= 1
    ax.axhline(0, color=LINE, lw=1)
    ax.axhline(0.5, color=LINE, lw=1, ls=(0, (2, 3)))
    ax.fill_between(h, 0, np.nan_to_num(credit), color=DREAM, alpha=0.22, lw=0, step="mid", label="credit")
    ax.plot(h, _curve(factor["r_real_latents"]), color=TRUTH, lw=1.4, label="encoder's limit (real latents)")
    for kind, (colour, dashes) in _NAIVE.items():
        if kind in factor["r_naive"]:
            values = np.where(later, _curve(factor["r_naive"][kind][::every]), np.nan)
            ax.plot(h, np.clip(values, -0.6, None), color=colour, lw=1.3, ls=dashes, label=kind)
    ax.fill_between(h[1:], _curve(factor["r_low"])[1:], _curve(factor["r_high"])[1:], color=DREAM, alpha=0.18, lw=0)
    ax.plot(h[1:], r[1:], color=DREAM, lw=2.2, label="imagination R(h), 95% interval")
    if not star["censored"] and star["ended_by"] is not None:
        ax.axvline(star["steps"], color=WARN, lw=1.4, label="H*")
        if star["ended_by"] == name:
            ax.text(star["steps"] + 0.8, 1.02, f"H* {star['steps']}", color=WARN, va="top", fontsize=10)
    scored = np.array(factor["scored"])
    ax.plot(h[~scored & later], np.full((~scored & later).sum(), -0.55), ".", color=LINE, ms=3, label="not scored")
    ax.set(ylim=(-0.6, 1.06), xlim=(0, h[-1]), ylabel="skill R")
    ax.set_title(name.replace("_", " "), loc="left", fontsize=12, color=TEXT, fontweight="bold")


def _curve(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])


def _svg(figure: Figure, title: str) -> str:
    data = io.StringIO()
    figure.savefig(data, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = data.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
