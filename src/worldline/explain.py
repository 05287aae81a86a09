"""A run's frame ledger as a page that a person can read: every sentence is computed from it."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float64

matplotlib.use("Agg")
from matplotlib.figure import Figure

from worldline.core.errors import WorldlineError
from worldline.core.files import write_bytes
from worldline.core.result import write_result
from worldline.engine.contracts import slope
from worldline.engine.ledger import OWN, Ledger, Summary
from worldline.engine.runtime import ledger_path
from worldline.evaluate.style import CSS

_SLOW = 2.0  # times the median: a slow frame
_TAIL = 3.0  # times its median: what p99 of an uneven stage is above
_SHARE = 0.02  # of busy time: stages below are too small to speak of
_COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#8a6d3b",
    "#717273",
    "#b0a000",
    "#444444",
)


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """What to explain."""

    file: str
    """A recording with its ledger beside it, or a ledger (`.ledger.npz`)."""
    out: str | None = None
    """Directory for the page; None means `NAME.explained` beside the file."""


def explain(config: ExplainConfig) -> Path:
    """Write `index.html`, `result.json` and `trace.json` (for ui.perfetto.dev); return their directory.

    Raises:
        WorldlineError: no ledger there.
    """
    path = Path(config.file)
    source = ledger_path(path) if path.suffix == ".wlr" else path
    if not source.exists():
        raise WorldlineError(
            f"{source}: no ledger there; it is written when a recording is stopped in order, so record another session"
        )
    ledger, info = Ledger.load(source)
    out = Path(config.out) if config.out else source.with_name(source.name.removesuffix(".ledger.npz") + ".explained")
    sections = tell(ledger, float(info["fps"]))
    figures = {"file": source.name, "info": info, "sentences": sections}
    write_result(out / "result.json", "explain", figures, {"ledger": ledger.summary().to_json()})
    write_bytes(out / "trace.json", json.dumps(trace(ledger)).encode())
    write_bytes(out / "index.html", _page(ledger, info, sections).encode())
    return out


def tell(ledger: Ledger, fps: float) -> dict[str, list[str]]:
    """Return sentences by section: where time goes, what was surprising, what would help.

    `fps` is the pace of a session whose frames had no deadlines.
    """
    summary = ledger.summary()
    busy, spans, begin, deadline = _arrays(ledger)
    if (apart := np.diff(deadline[deadline > 0])).size:  # the session's own pace
        fps = round(1e9 / float(np.median(apart)), 2)
    return {
        "Where time goes": _where(summary, fps, begin),
        "What was surprising": _surprises(ledger, summary, busy, spans, deadline, begin) or ["Nothing."],
        "What would help": _helps(summary, fps),
    }


def _where(summary: Summary, fps: float, begin: Float64[np.ndarray, " n"]) -> list[str]:
    budget, p50 = 1e9 / fps, summary.busy.p50
    shares = sorted(_shares(summary).items(), key=lambda item: -item[1])
    most = ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares if share >= _SHARE)
    told = [
        f"{summary.frames:,} frames: half take up to {_ms(p50)}, 99 of 100 up to {_ms(summary.busy.p99)}, the longest "
        f"{_ms(summary.busy.max)}. At {fps:g} frames a second there are {_ms(budget)} for one; the median uses "
        f"{100 * p50 / budget:.0f}% of that.",
        f"Of the busy time: {most}. {100 * summary.coverage:.2f}% of it is accounted for.",
    ]
    if len(begin) > 2:
        between = np.diff(begin)
        told.append(
            f"Frames begin {_ms(float(np.median(between)))} apart (99 of 100 within "
            f"{_ms(float(np.percentile(between, 99)))}); between them the engine waits for its turn."
        )
    if summary.paced:
        told.append(f"{summary.paced - summary.missed:,} of {summary.paced:,} deadlines were kept.")
    return told


def _surprises(
    ledger: Ledger,
    summary: Summary,
    busy: Float64[np.ndarray, " n"],
    spans: Float64[np.ndarray, "n s"],
    deadline: Float64[np.ndarray, " n"],
    begin: Float64[np.ndarray, " n"],
) -> list[str]:
    told = []
    names, usual = ledger.stages, np.median(spans, axis=0)
    slow = busy > _SLOW * summary.busy.p50
    if slow.any():
        excess = spans[slow] - usual
        culprit, held = np.unique(excess.argmax(axis=1), return_counts=True)
        worst = culprit[held.argmax()]
        told.append(
            f"{slow.sum()} frames took over {_SLOW:g} times the median; in {held.max()} of them it was {names[worst]} "
            f"that was furthest beyond its usual time, {_ms(float(np.median(excess[:, worst])))} in the middle."
        )
    for name in names:
        spread = summary.stages[name]
        if spread.p50 > 0 and spread.p99 > _TAIL * spread.p50 and spread.p99 > _SHARE * summary.busy.p50:
            told.append(
                f"{name} is uneven: {_ms(spread.p50)} in the middle and over {_ms(spread.p99)} in 1 of 100 frames."
            )
    if summary.coverage < 0.99:
        told.append(f"{100 * (1 - summary.coverage):.1f}% of busy time lies outside of every stage.")
    blocks = np.array_split(busy, 16) if len(busy) >= 160 else []
    if blocks:
        low, middle, high = slope([(float(i), float(np.median(block))) for i, block in enumerate(blocks)])
        if (low > 0 or high < 0) and abs(middle) * 15 > 0.05 * summary.busy.p50:
            told.append(f"Frames became {'slower' if middle > 0 else 'faster'}: {_ms(15 * middle)} from first to last.")
    missed = (deadline > 0) & (begin + busy > deadline)
    if missed.any():
        late = int((begin[missed] + summary.busy.p50 > deadline[missed]).sum())
        told.append(
            f"Of {missed.sum()} missed deadlines {late} were of frames that began too late, and the others of frames "
            "that took too long."
        )
    return told


def _helps(summary: Summary, fps: float) -> list[str]:
    shares = {name: share for name, share in _shares(summary).items() if name != "unattributed"}
    name = max(shares, key=lambda key: shares[key])
    rest = summary.busy.mean * (1 - shares[name])
    told = [
        f"The largest lever is {name}: were it free, a frame would take {_ms(rest)} on average, not "
        f"{_ms(summary.busy.mean)}, and there could be {summary.busy.mean / max(rest, 1.0):.1f} times as many. Half of "
        f"it is worth {1 / (1 - shares[name] / 2):.2f} times."
    ]
    engine = sum(shares.get(key, 0.0) for key in ("input", "hash", "record", OWN))
    told.append(f"All but the arithmetic of the world itself, hashing and recording included, is {100 * engine:.0f}%.")
    spare = 1e9 / fps / max(summary.busy.p99, 1.0)
    if spare > 1:
        told.append(
            f"At {fps:g} frames a second nothing has to be faster: even p99 leaves room for {spare:.1f} times the work."
        )
    return told


def _shares(summary: Summary) -> dict[str, float]:
    rows = {**summary.stages, "unattributed": summary.unattributed}
    return {name: spread.mean / max(summary.busy.mean, 1.0) for name, spread in rows.items()}


def trace(ledger: Ledger) -> dict[str, Any]:
    """Return the ledger as a trace in Chrome's JSON format, which ui.perfetto.dev opens; times in microseconds."""
    rows = ledger.rows()
    origin = rows[0].begin_ns
    events: list[dict[str, Any]] = []

    def add(name: str, start: int, length: int, thread: int) -> None:
        events.append(
            {"name": name, "ph": "X", "ts": (start - origin) / 1e3, "dur": length / 1e3, "pid": 1, "tid": thread}
        )

    for row in rows:
        add(f"frame {row.id}", row.begin_ns, row.busy_ns, 1)
        for name, length in row.spans.items():
            if length:
                add(name, row.starts[name], length, 2)
        if row.deadline_ns:
            mark = {"name": "deadline", "ph": "i", "ts": (row.deadline_ns - origin) / 1e3, "pid": 1, "tid": 1, "s": "t"}
            events.append(mark)
    for thread, name in ((1, "frames"), (2, "stages")):
        events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _arrays(ledger: Ledger) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return busy time, spans by stage, begin and deadline of every frame, in nanoseconds."""
    rows = ledger.rows()
    spans = np.array([list(row.spans.values()) for row in rows], dtype=float)
    busy, begin, deadline = (
        np.array([getattr(row, name) for row in rows], dtype=float) for name in ("busy_ns", "begin_ns", "deadline_ns")
    )
    return busy, spans, begin, deadline


def _ms(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:.2f} ms" if abs(nanoseconds) >= 1e5 else f"{nanoseconds / 1e3:.0f} us"


def _page(ledger: Ledger, info: dict[str, Any], sections: dict[str, list[str]]) -> str:
    summary = ledger.summary()
    title = f"A frame takes {_ms(summary.busy.p50)}, and {100 * summary.coverage:.2f}% of it is accounted for"
    parts = [
        f"<section><h2>{escape(name)}</h2>" + "".join(f"<p>{escape(each)}</p>" for each in told) + "</section>"
        for name, told in sections.items()
    ]
    parts.insert(1, f"<section><h2>Frame by frame</h2>{_draw(ledger)}</section>")
    rows = {**summary.stages, "unattributed": summary.unattributed, "busy": summary.busy}
    shares = _shares(summary) | {"busy": 1.0}
    body = "".join(
        f'<tr><td class="text">{escape(name)}</td>'
        + "".join(f"<td>{value / 1e3:.1f}</td>" for value in list(asdict(spread).values())[:4])
        + f"<td>{100 * shares[name]:.1f}%</td></tr>"
        for name, spread in rows.items()
    )
    heads = "".join(f"<th>{name}</th>" for name in ("p50", "p95", "p99", "max", "share"))
    parts.append(
        f'<section><h2>Microseconds</h2><div class="scroll"><table><thead><tr><th class="text">stage</th>{heads}</tr>'
        f"</thead><tbody>{body}</tbody></table></div></section>"
    )
    made = "".join(
        f'<tr><td class="text">{escape(key)}</td><td class="text">{escape(str(value))}</td></tr>'
        for key, value in info["fingerprint"].items()
    )
    parts.append(f'<section><h2>Made with</h2><div class="scroll"><table><tbody>{made}</tbody></table></div></section>')
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{CSS}</style>'
        f'</head><body><main><p class="kicker">{escape(str(info.get("recording", "")))}</p><h1>{escape(title)}</h1>'
        f"{''.join(parts)}</main></body></html>"
    )


def _draw(ledger: Ledger) -> str:
    """Draw the stages of every frame, stacked, with its deadline."""
    busy, spans, begin, deadline = _arrays(ledger)
    spans = spans / 1e6
    ids = np.array([row.id for row in ledger.rows()])
    step = max(1, len(ids) // 400)  # of each stretch the longest frame, or it would not be seen
    shown = [at + int(busy[at : at + step].argmax()) for at in range(0, len(ids), step)]
    seen = [column for column in range(len(ledger.stages)) if spans[:, column].mean() > 0]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "worldline", "font.size": 10}):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        ax = figure.subplots()
        colours = [_COLOURS[place % len(_COLOURS)] for place in range(len(seen))]
        names = [ledger.stages[column] for column in seen]
        ax.stackplot(ids[shown], spans[shown][:, seen].T, labels=names, colors=colours, lw=0)
        allowed = np.where(deadline > 0, deadline - begin, np.nan) / 1e6
        if np.isfinite(allowed).any() and np.nanmedian(allowed) < 4 * busy.max() / 1e6:
            ax.plot(ids[shown], allowed[shown], color="#d55e00", lw=1, label="until the deadline")
        what = "frame" if step == 1 else f"frame (the longest of each {step})"
        ax.set(xlabel=what, ylabel="ms", ylim=(0, None), xlim=(ids[0], max(ids[-1], ids[0] + 1)))
        figure.legend(fontsize=8, ncols=10, frameon=False, loc="outside upper center")
        ax.spines[["top", "right"]].set_visible(False)
        data = io.StringIO()
        figure.savefig(data, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return data.getvalue()[data.getvalue().index("<svg") :]
