"""What the microbenchmarks say, from `result.json` alone: the report, the roofline, and two written answers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib

from worldline.bench.micro import LINKS, WIDTH, Prediction
from worldline.core.files import write_bytes

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = {
    "call": "#717273",
    "gemm": "#0072b2",
    "copy": "#009e73",
    "elementwise": "#d55e00",
    "chain": "#cc79a7",
    "transfer": "#e69f00",
    "synchronise": "#717273",
}
_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "worldline", "font.size": 10, "legend.frameon": False}
_NO_DEVICE = "No CUDA device was at hand in this run."
_ELSEWHERE = " What a run with one showed: [on a GPU](gpu.md)."
_SLOWER = 1.25
"""Times slower that call for a reason."""
_HARDLY = 0.5
"""A bound that is less than this share of the measured time does not explain it."""


def write_report(folder: Path, result: dict[str, Any], publish: Path | None = None) -> Path:
    """Write `report.md` and `roofline.svg`, and the answers where `publish` says; return the report's path."""
    picture = roofline(result)
    write_bytes(folder / "roofline.svg", picture.encode())
    write_bytes(folder / "report.md", render(result).encode())
    if publish:
        write_bytes(publish / "phase0_roofline.svg", picture.encode())
        write_bytes(publish / "phase0_week1.md", week1(result).encode())
        write_bytes(publish / "phase0_week2.md", week2(result).encode())
    return folder / "report.md"


def rows(result: dict[str, Any], device: str = "cpu") -> list[dict[str, Any]]:
    """Return each case with its time, rates, the bound that governs it, and the outcome of its prediction.

    Three bounds from below: the calls at the cost of an empty one, the bytes at the best copy, the operations at the
    largest product. The longest governs, and explains its share of the time.
    """
    times = result["timing"][device]
    declared = [*result["cases"], *(result["cuda_cases"] if device == "cuda" else [])]
    top = ceilings(result, device)
    found = []
    for case in declared:
        timing = times[case["name"]].get("events", times[case["name"]]["host"])
        ns = timing["median"]
        bounds = {
            "call": case["calls"] * top["call_ns"],
            "bandwidth": case["bytes"] / top["copy"],
            "compute": case["operations"] / top["gemm"],
        }
        governed = max(bounds, key=lambda name: bounds[name])
        measured = {
            "us": ns / 1e3,
            "GB/s": case["bytes"] / ns,
            "GFLOP/s": case["operations"] / ns,
        }
        row = case | {"ns": ns, "quartiles": timing["quartiles"], "measured": measured, "governed": governed}
        row["explains"] = bounds[governed] / ns
        if case["expected"] and device == "cpu":
            expected = Prediction(**case["expected"])
            row["outcome"] = measured[expected.unit]
            row["right"] = expected.holds(row["outcome"])
        found.append(row)
    return found


def ceilings(result: dict[str, Any], device: str = "cpu") -> dict[str, float]:
    """Return this run's ceilings.

    Keys: gemm (GFLOP/s of the largest product), copy and memory (GB/s of the best and the largest copy), call_ns (of
    an empty call).
    """
    times = result["timing"][device]

    def ns(case: dict[str, Any]) -> float:
        row = times[case["name"]]
        return float(row.get("events", row["host"])["median"])

    largest = max((case for case in result["cases"] if case["kind"] == "gemm"), key=lambda case: case["operations"])
    copies = [case for case in result["cases"] if case["kind"] == "copy"]
    return {
        "gemm": largest["operations"] / ns(largest),
        "copy": max(case["bytes"] / ns(case) for case in copies),
        "memory": copies[-1]["bytes"] / ns(copies[-1]),
        "call_ns": float(times["empty operation"]["host"]["median"]),
    }


def roofline(result: dict[str, Any], device: str = "cpu") -> str:
    """Return the picture as SVG: cases that compute under the roof, and all that move bytes by time over bytes."""
    top, found = ceilings(result, device), rows(result, device)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        roof, cost = figure.subplots(1, 2)
        x = sorted([2.0**-6, 2.0**8, top["gemm"] / top["copy"], top["gemm"] / top["memory"]])
        roof.plot(x, [min(top["gemm"], i * top["copy"]) for i in x], color="#333435", lw=1.5, label="best copy")
        roof.plot(
            x, [min(top["gemm"], i * top["memory"]) for i in x], "--", color="#717273", lw=1, label="largest copy"
        )
        bytes_seen = [row["bytes"] for row in found if row["bytes"]]
        span = [min(bytes_seen) / 2, max(bytes_seen) * 2]
        cost.plot(span, [n / top["copy"] / 1e3 for n in span], color="#333435", lw=1.5, label="best copy")
        cost.plot(span, [n / top["memory"] / 1e3 for n in span], "--", color="#717273", lw=1, label="largest copy")
        cost.axhline(top["call_ns"] / 1e3, color="#717273", lw=1, ls=":", label="a call that does nothing")
        for row in found:
            if not row["bytes"]:
                continue
            colour = _COLOURS[row["kind"]]
            cost.plot(row["bytes"], row["ns"] / 1e3, "o", color=colour, ms=4)
            _label(cost, row, (row["bytes"], row["ns"] / 1e3))
            if row["operations"]:
                at = row["operations"] / row["bytes"], row["measured"]["GFLOP/s"]
                roof.plot(*at, "o", color=colour, ms=4)
                _label(roof, row, at)
        roof.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s", title=f"Roofline, {device}")
        cost.set(xscale="log", yscale="log", xlabel="bytes moved", ylabel="microseconds", title="Time and bytes moved")
        for ax in (roof, cost):
            ax.legend(fontsize=8)
        with io.StringIO() as text:
            figure.savefig(text, format="svg", metadata={"Date": None})
            return text.getvalue()


def _label(ax: Axes, row: dict[str, Any], at: tuple[float, float]) -> None:
    ax.annotate(row["name"], at, fontsize=6, xytext=(3, -3), textcoords="offset points", rotation=-35, va="top")


def render(result: dict[str, Any]) -> str:
    """Return the report."""
    top, found = ceilings(result), rows(result)
    lines = [
        "# Microbenchmarks",
        "",
        f"Ceilings of this run: {top['gemm']:.1f} GFLOP/s (largest product), {top['copy']:.1f} GB/s (best copy), "
        f"{top['memory']:.1f} GB/s (largest copy), {top['call_ns'] / 1e3:.2f} us for a call that does nothing. "
        f"{_tally(result)}",
        "",
        _machine(result),
        "",
        "![Roofline](roofline.svg)",
        "",
        "| case | bytes | operations | median us (quartiles) | GFLOP/s | GB/s | longest bound, its share | "
        "expected | came | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in found]
    lines += ["", "## In turns", "", _chain_sentence(result), "", "## CUDA", ""]
    lines += _cuda(result)
    lines += [
        "",
        "Medians of turns of at least 0.2 ms by the monotonic clock, after a warm-up by time. The bounds: calls at the "
        "cost of an empty one, bytes at the best copy, operations at the largest product. Bytes are those the case "
        "declares, each buffer once a call that reads or writes it; a write's read of its own line is not in them. The "
        "best copy stays in a cache, so that work in memory cannot reach it; a sigmoid counts as one operation. "
        "Expectations were written before the first run.",
        "",
        f"Again: `worldline bench micro`, here run as `{result['provenance']['command']}`.",
        "",
    ]
    return "\n".join(lines)


def week1(result: dict[str, Any]) -> str:
    """Return the answer of the first week: what dominates, what was surprising, where CPU and device timing part."""
    found = [row for row in rows(result) if row["calls"]]
    hardly = [row for row in found if row["explains"] < _HARDLY]
    by = {name: [row for row in found if row["governed"] == name and row not in hardly] for name in _BOUND}
    wrong = sorted((row for row in rows(result) if not row["right"]), key=lambda row: -_off(row))
    lines = ["# Week 1: what dominates time", "", *_source(result), "", "## What dominates", ""]
    words = {"call": "the cost of calls", "bandwidth": "moving bytes", "compute": "arithmetic"}
    lines += [f"- {len(by[name])} of {len(found)} cases: {words[name]}. {_names(by[name])}." for name in by]
    lines += [
        f"- {len(hardly)} of {len(found)} cases: none of the three alone. {_names(hardly)}.",
        "",
        "A case belongs to the longest of its three bounds (calls at the cost of an empty one, bytes at the best copy, "
        "operations at the largest product), if that is at least half of the measured time. What belongs to none "
        "waits for something that these ceilings do not hold: bytes farther away than the best copy's, or operations "
        "dearer than a multiply-add.",
        "",
        "## What was surprising",
        "",
    ]
    lines += [
        f"- {row['name']}: expected {row['expected']['value']:g} {row['expected']['unit']} "
        f"({row['expected']['because']}), "
        f"came {row['outcome']:.3g}: {_off(row):.1f} times "
        f"{'more' if row['outcome'] > row['expected']['value'] else 'less'}."
        for row in wrong
    ] or [f"Nothing: all {len(rows(result))} expectations held."]
    *timed, last = _cuda(result)
    elsewhere = _ELSEWHERE if result["timing"]["cuda"] is None else ""
    lines += ["", _tally(result), "", "## Where CPU and device timing part", "", *timed, last + elsewhere, ""]
    return "\n".join(lines)


def week2(result: dict[str, Any]) -> str:
    """Return the answer of the second week: bandwidth, compute, overhead, and why the results look so."""
    top, found = ceilings(result), rows(result)
    copies = [row for row in found if row["kind"] == "copy"]
    best = max(copies, key=lambda row: row["measured"]["GB/s"])
    gemms = [row for row in found if row["kind"] == "gemm"]
    square = [row for row in gemms if not row["name"].startswith("gemm 1 ")]
    vector = next(row for row in gemms if row["name"].startswith("gemm 1 "))
    half = [row for row in square if row["measured"]["GFLOP/s"] >= top["gemm"] / 2]
    quickest = max(square, key=lambda row: row["measured"]["GFLOP/s"])
    drop = top["copy"] / top["memory"]
    lines = ["# Week 2: bandwidth, compute, overhead", "", *_source(result), "", "## Bandwidth", ""]
    lines += [
        f"The best copy is `{best['name']}` with {top['copy']:.1f} GB/s; the smallest, `{copies[0]['name']}`, has "
        f"{copies[0]['measured']['GB/s']:.1f}, where a call that does nothing takes "
        f"{100 * top['call_ns'] / copies[0]['ns']:.0f}% of its "
        f"time. The largest, `{copies[-1]['name']}`, has {top['memory']:.1f} GB/s, "
        + (
            f"{drop:.1f} times less: its bytes come from memory, not from a cache."
            if drop > _SLOWER
            else "about as much."
        ),
        "",
    ]
    for name in ("add", "sigmoid"):
        near, far = [row for row in found if row["name"].startswith(f"{name} ")][-2:]
        slower = near["measured"]["GB/s"] / far["measured"]["GB/s"]
        lines.append(
            f"- `{far['name']}` moves {far['measured']['GB/s']:.1f} GB/s, `{near['name']}` "
            f"{near['measured']['GB/s']:.1f}: "
            + (
                "the larger one waits for memory."
                if slower > _SLOWER
                else "the larger one is hardly slower, so memory is not what it waits for."
            )
        )
    kept, fresh = (next(row for row in found if row["name"] == name) for name in ("add 1 MiB", "fresh add 1 MiB"))
    lines.append(
        f"- `{fresh['name']}`, with its result in memory taken anew, takes {fresh['ns'] / kept['ns']:.2f} times as "
        "long as into memory that is kept."
    )
    reached = f"from `{half[0]['name']}` on products reach half of it" if half else "no product reaches half of it"
    lines += [
        "",
        "## Compute",
        "",
        f"The largest product, `{square[-1]['name']}`, runs at {top['gemm']:.1f} GFLOP/s; {reached}"
        + (
            f"; `{quickest['name']}` is faster still, {quickest['measured']['GFLOP/s']:.1f}."
            if quickest is not square[-1]
            else "."
        ),
        "",
        f"`{vector['name']}`, a frame's product in the GRU, runs at {vector['measured']['GFLOP/s']:.1f} GFLOP/s, "
        f"{100 * vector['measured']['GFLOP/s'] / top['gemm']:.0f}% of that. It does "
        f"{vector['operations'] / vector['bytes']:.2f} operations a "
        f"byte and reads {vector['measured']['GB/s']:.1f} GB/s, "
        f"{100 * vector['measured']['GB/s'] / top['copy']:.0f}% of the best copy: "
        f"its longest bound is {_BOUND[vector['governed']]}.",
        "",
        "## Overhead",
        "",
        f"A call that does nothing takes {top['call_ns'] / 1e3:.2f} us. {_chain_sentence(result)} At the best "
        f"copy the bytes of the {LINKS} "
        f"links would take {LINKS * 12 * WIDTH / top['copy'] / 1e3:.1f} us.",
        "",
        "![Roofline](phase0_roofline.svg)",
        "",
        _NO_DEVICE + _ELSEWHERE if result["timing"]["cuda"] is None else "On a CUDA device: see week 1.",
        "",
    ]
    return "\n".join(lines)


_BOUND = {"call": "the cost of the call", "bandwidth": "moving its bytes", "compute": "arithmetic"}


def _line(row: dict[str, Any]) -> str:
    low, high = (each / 1e3 for each in row["quartiles"])
    bound = f"{row['governed']}, {100 * row['explains']:.0f}%" if row["calls"] else "-"
    text = (
        f"| {row['name']} | {row['bytes']:,} | {row['operations']:,} | {row['ns'] / 1e3:,.2f} ({low:,.2f} to "
        f"{high:,.2f}) | "
        f"{row['measured']['GFLOP/s']:.2f} | {row['measured']['GB/s']:.2f} | {bound} |"
    )
    if "right" not in row:
        return f"{text} - | - | |"
    expected = row["expected"]
    return (
        f"{text} {expected['value']:g} {expected['unit']} within x{expected['factor']:g}: {expected['because']} | "
        f"{row['outcome']:.3g} | {'right' if row['right'] else '**wrong**'} |"
    )


def _tally(result: dict[str, Any]) -> str:
    found = rows(result)
    right = sum(row["right"] for row in found)
    return f"Of {len(found)} expectations written before the run {right} held and {len(found) - right} did not."


def _chain_sentence(result: dict[str, Any]) -> str:
    compared, expected = result["timing"]["chain"], Prediction(**result["chain_expected"])
    eager, bound = (median / 1e3 for median in compared["medians"])
    low, high = compared["interval"]
    return (
        f"A chain of {LINKS} operations on {WIDTH} numbers takes {eager:.1f} us eager and {bound:.1f} us as "
        f"bound calls into planned "
        f"memory, {10 * eager:.0f} and {10 * bound:.0f} ns a link. Bound over eager is {compared['ratio']:.3f} "
        f"({low:.3f} to {high:.3f}, "
        f"{compared['rounds']} rounds), {compared['verdict']}; {expected.value:g} within x{expected.factor:g} "
        f"was expected "
        f"({expected.because}), which was {'right' if expected.holds(compared['ratio']) else '**wrong**'}."
    )


def _cuda(result: dict[str, Any]) -> list[str]:
    if result["timing"]["cuda"] is None:
        return [_NO_DEVICE]
    lines = ["| case | events us | host us | host / events |", "|---|---|---|---|"]
    parted = []
    for name, timing in result["timing"]["cuda"].items():
        device, host = timing["events"]["median"], timing["host"]["median"]
        lines.append(f"| {name} | {device / 1e3:.2f} | {host / 1e3:.2f} | {host / device:.2f} |")
        if host < device / 2:
            parted.append(name)
    said = f"In {len(parted)} of {len(lines) - 2} cases the call came back in less than half of the device's time"
    return [*lines, "", said + (f": {', '.join(parted)}." if parted else ".")]


def _machine(result: dict[str, Any]) -> str:
    machine, load, provenance = result["provenance"]["machine"], result["timing"]["load"], result["provenance"]
    busy = load["before"][0] > 0.5
    return (
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['system']}; torch "
        f"{provenance['versions'].get('torch')}, "
        f"{result['config']['threads']} thread; commit {provenance['commit']}. Load average "
        f"{load['before'][0]:.1f} before and "
        f"{load['after'][0]:.1f} after"
        + (
            ": other work ran on these cores, took its share of caches and bandwidth, and is in every figure."
            if busy
            else "."
        )
    )


def _source(result: dict[str, Any]) -> list[str]:
    when = result["provenance"]["time"][:10]
    return [
        f"Written by `worldline bench micro publish=...` from `reports/{when}-micro/result.json`. {_machine(result)}"
    ]


def _names(found: list[dict[str, Any]]) -> str:
    return ", ".join(row["name"] for row in found) or "none"


def _off(row: dict[str, Any]) -> float:
    ratio = row["outcome"] / row["expected"]["value"]
    return float(max(ratio, 1 / ratio))
