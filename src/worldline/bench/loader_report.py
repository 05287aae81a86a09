"""The loader benchmark's page and plot, from `result.json` alone."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

_COLOURS = {"raw": "#0072b2", "jpeg": "#009e73", "h264": "#d55e00", "source": "#717273", "jpeg by pyarrow": "#cc79a7"}
_MARKS = {1: "o", 4: "s", 0: "D"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "worldline",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def draw(result: dict[str, Any]) -> str:
    """Return the cost curve as SVG: bytes a frame across, CPU time a clip up, both logarithmic."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 4.6), layout="constrained")
        axes = figure.subplots()
        for row in result["timing"]["curve"]:
            colour, mark = _COLOURS[row["codec"]], _MARKS[row["stride"]]
            x, y = row["bytes_a_frame"], row["cpu_ms_a_clip"]
            low, high = row["quartiles_ms"]
            axes.errorbar(x, y, [[max(0, y - low)], [max(0, high - y)]], color=colour, marker=mark, linewidth=1)
            if (text := _mark(row)) and row["stride"] != 1:
                axes.annotate(text, (x, y), (5, 4), textcoords="offset points", color=colour, fontsize=8)
        for stride in (1, 4):
            curve = [row for row in result["timing"]["curve"] if row["codec"] == "h264" and row["stride"] == stride]
            across, up = ([row[name] for row in curve] for name in ("bytes_a_frame", "cpu_ms_a_clip"))
            axes.plot(across, up, color=_COLOURS["h264"], linewidth=0.8)
        for codec, colour in _COLOURS.items():
            axes.plot([], [], color=colour, marker="o", linestyle="none", label=codec)
        for stride, mark in _MARKS.items():
            axes.plot(
                [],
                [],
                color="#444444",
                marker=mark,
                linestyle="none",
                label=f"stride {stride}" if stride else "any stride",
            )
        axes.set(xscale="log", yscale="log", xlabel="bytes on disk for each frame that a clip shows")
        axes.set_ylabel(f"CPU ms for a clip of {result['num_frames']} frames")
        axes.legend(fontsize=8, loc="upper right")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()


def _mark(row: dict[str, Any]) -> str:
    if row["codec"] == "h264":
        return f"g{row['gop']}"
    return f"groups of {row['row_group']}" if row["codec"] == "jpeg by pyarrow" else ""


def render(result: dict[str, Any]) -> str:
    """Write the report."""
    made, timing = result["provenance"], result["timing"]
    lines = [*_readers(result), *_curve(result), *_memory(result)]
    head = timing["readers"][0]["comparisons"]
    video, hdf5 = 1 / head[0]["ratio"], 1 / head[2]["ratio"]
    return "\n".join(
        [
            f"# Reading clips: {video:.1f} times a plain mp4 reader, {hdf5:.1f} times HDF5",
            "",
            *lines,
            f"Machine: {made['machine']['processor']}, {made['machine']['cores']} cores; PyAV "
            f"{made['versions'].get('av')}, pyarrow {made['versions'].get('pyarrow')}; commit {made['commit']}. "
            "Other work shares its cores, caches and memory; times are CPU time of all threads of this process, "
            "all files in the page cache.",
            "",
            f"Again: `{made['command']}`",
            "",
        ]
    )


def _readers(result: dict[str, Any]) -> list[str]:
    batch, frames = result["batch"], result["num_frames"]
    lines = [
        "## Beside plain readers",
        "",
        f"PushT, {result['timing']['readers'][0]['episodes']} episodes of 160 frames; the same windows of {frames} "
        f"frames in the same order, {batch} a batch, in turns; every pixel of all windows was compared first. The mp4 "
        "is the dataset that `worldline collect` wrote (H.264 without loss, a key frame every 12). Plain readers: "
        "`bench/loader_plain.py`.",
        "",
        "| picture | A | B | A, clips a CPU second | B, clips a CPU second | B / A, 95% interval of the median |",
        "|---|---|---|---|---|---|",
    ]
    for part in result["timing"]["readers"]:
        for row in part["comparisons"]:
            rates = " | ".join(
                f"{batch * 1e9 / median:,.0f} ({batch * 1e9 / late:,.0f} to {batch * 1e9 / early:,.0f})"
                for median, (early, late) in zip(row["medians"], row["quartiles"], strict=True)
            )
            low, high = (1 / bound for bound in reversed(row["interval"]))
            ratio = f"{1 / row['ratio']:.2f} ({low:.2f} to {high:.2f}), {row['rounds']} rounds"
            lines.append(f"| {part['image_size']} px | {' | '.join(row['names'])} | {rates} | {ratio} |")
    lines += ["", "| picture | mp4 MB | HDF5 MB | raw MB | jpeg MB |", "|---|---|---|---|---|"]
    for part in result["timing"]["readers"]:
        sizes = [f"{part['size_bytes'][name] / 1e6:.1f}" for name in ("data", "hdf5", "raw", "jpeg")]
        lines.append(f"| {part['image_size']} px | {' | '.join(sizes)} |")
    return [
        *lines,
        "",
        "What the advantage is bought with: clips are cut when they are ingested, so that other windows want another "
        "ingest; a raw clip is a copy of bytes that lie in one piece, found without a table, and is compared with its "
        "checksum when first read only.",
        "",
    ]


def _curve(result: dict[str, Any]) -> list[str]:
    if "curve" not in result["timing"]:
        return ["## The cost curve", "", f"Not drawn: {result['curve']}.", ""]
    rows = result["timing"]["curve"]
    lines = [
        "## The cost curve",
        "",
        f"Real videos (`bikes`, `cup`, `vtest`; 272 to 576 lines), clips of {result['num_frames']} frames at 224 px, a "
        "new clip every 64 frames, so that every row has the same clips; four clips a turn, in turns. Bytes are all of "
        "the cache, or of the source, for each frame that a clip shows: `h264` and `source` keep every frame of the "
        "videos, tables only those of the clips, which here are a quarter.",
        "",
        "![cost curve](curve.svg)",
        "",
        "| kept as | key frame every | row group | stride | CPU ms a clip (quartiles) | KB a frame |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["cpu_ms_a_clip"]):
        low, high = row["quartiles_ms"]
        group = "" if row["stride"] else row["row_group"]
        lines.append(
            f"| {row['codec']} | {row['gop'] or ''} | {group} | {row['stride'] or 'any'} | {row['cpu_ms_a_clip']:.2f} "
            f"({low:.2f} to {high:.2f}) | {row['bytes_a_frame'] / 1e3:.1f} |"
        )
    return [*lines, "", "### What to take", "", *_advice(rows, result["num_frames"]), ""]


def _advice(rows: list[dict[str, Any]], frames: int) -> list[str]:
    """Say what follows for some cases, in this run's numbers."""
    ms = {(r["codec"], r["gop"], r["row_group"], r["stride"]): r["cpu_ms_a_clip"] for r in rows}
    size = {(r["codec"], r["gop"]): r["bytes_a_frame"] for r in rows}
    gops = sorted({gop for codec, gop in size if codec == "h264"})

    def terabytes(codec: str) -> str:
        return f"{size[codec, 0] * frames * 1e6 / 1e12:.2f} TB"

    raw, jpeg, source = ms["raw", 0, 1, 0], ms["jpeg", 0, 1, 0], ms["source", 0, 1, 4]
    middle = min(gops, key=lambda gop: ms["h264", gop, 1, 4])
    single, many = ms["jpeg by pyarrow", 0, 1, 0], ms["jpeg by pyarrow", 0, 16, 0]
    return [
        f"- **A disk that holds it** ({terabytes('raw')} for a million clips): `raw`. A clip costs {raw:.2f} ms, "
        f"{jpeg / raw:.0f} times less than `jpeg`. Small pictures of simulators belong here.",
        f"- **Video that is read for many epochs**: `jpeg`. {jpeg:.1f} ms a clip beside {source:.0f} ms out of the "
        f"source, {terabytes('jpeg')} for a million clips ({size['jpeg', 0] / 1e3:.1f} KB a frame; the source, with "
        f"all its frames, {size['source', 0] / 1e3:.1f} KB).",
        f"- **The stride is not settled, or clips are to overlap**: `h264` with gop={middle}, the cheapest to read at "
        f"stride 4. {ms['h264', middle, 1, 4]:.0f} ms a clip at stride 4 and {ms['h264', middle, 1, 1]:.0f} ms at "
        f"stride 1, with {size['h264', middle] / size['jpeg', 0]:.2f} times the bytes of `jpeg`, for every frame "
        "instead of a quarter of them.",
        f"- **Disk or network is short**: `h264` with gop={gops[-1]}. {size['h264', gops[-1]] / 1e3:.1f} KB a frame, "
        f"{size['h264', gops[-1]] / size['h264', middle]:.2f} times those of gop={middle}, at "
        f"{ms['h264', gops[-1], 1, 4]:.0f} and {ms['h264', gops[-1], 1, 1]:.0f} ms. Key frames everywhere "
        f"(gop={gops[0]}) buy nothing: they are larger, and all frames between are decoded too.",
        "- **One look, or no room at all**: `source`. Nothing is written but time stamps.",
        f"- **Row groups**: one clip each. Read by pyarrow, 16 clips a group cost {many - single:+.2f} ms a clip; to "
        f"find the bytes by our index in place of the tables costs {jpeg - single:+.2f} ms.",
    ]


def _memory(result: dict[str, Any]) -> list[str]:
    index, order = result["index"], result["order"]
    lines = ["## Memory of the index", ""]
    if index is None:
        lines += ["Not measured: this system does not tell the memory of a process.", ""]
    else:
        apart = 1 / 8 + 8 / index["shard_clips"]
        lines += [
            f"{index['clips']:,} clips, opened in {index['opened_seconds']:.3f} s and touched to the last byte by a "
            f"fresh process: {index['bytes'] / 1e6:.0f} MB more than an index of {index['shard_clips']} clips, "
            f"**{index['bytes_a_clip']:.2f} bytes a clip**. It is 12 bytes (place, size, checksum), a bit for what has "
            f"been verified, and 8 bytes for each shard of {index['shard_clips']} clips: {12 + apart:.2f}. At 100 "
            f"million clips that is {(12 + apart) * 1e8 / 1e9:.2f} GB, of which all but {apart * 1e8 / 1e6:.0f} MB is "
            "a mapped file that processes share and that the system may drop.",
            "",
        ]
    for row in filter(None, result.get("video_index", [])):
        each = (row["bytes"] / row["clips"] - 8) * row["clips_each"]
        lines += [
            f"`{row['codec']}`, {row['clips']:,} clips, {row['clips_each']} out of each video, opened in "
            f"{row['opened_seconds']:.1f} s: {row['bytes'] / 1e6:.0f} MB, **{row['bytes_a_clip']:.1f} bytes a clip**, "
            f"8 for its time stamp and {each:.0f} for each video.",
            "",
        ]
    told = ", ".join(f"{name} {us:.0f} us" for name, us in order["cpu_us_a_batch"].items())
    return [
        *lines,
        f"The order holds no array: the ids of a global batch of {order['batch']} out of {order['clips']:,} clips, at "
        f"steps far apart, take {told} of CPU.",
        "",
    ]
