"""The page of `worldline bench edge`, written from its result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_GRAPH = """
The reference graph DS96: 96 x 96 x 3, a convolution, four depthwise-separable stages, mean, matrix; 4.3 million
multiplications in int8, the same weights and scales for all. Every build's bytes equal the Python reference's, which
equal TFLM's. Instructions are what QEMU counts, the same on every run; they are not cycles. Bytes of code are of the
whole image: engine, start-up, checksums, and the harness that feeds it.
"""
_THEIRS = """
Their figures were measured with their releases on the same machines of QEMU, not in this run (but for the size of the
model's file). The graph keeps its padding layers there, each of which holds a copy of a grid.
"""
_SIDES = """
Bytes of RAM. *TFLM* is what the tflite-micro wheel wants for the graph as converters from PyTorch leave it, with PAD
layers before strided convolutions, and *padding inside* where convolutions pad by themselves; found by trying arenas,
in this run, on a machine with 64-bit pointers, which cost it a thousand bytes or two (on a Cortex-M4 it wants 160,084
for DS96). It has the picture among its tensors, as has *ideal*: the largest input and output of any layer together,
every layer apart, and nothing else. Ours count scratch and results too; the picture is there in all but *rows*, where
it streams. *Tiles* is the smallest plan with at most 1.5 times the multiplications; all others make each once.
"""
_PUBLISHED = """
Others' own figures, for other networks or other machines, so not comparable line by line. MLPerf Tiny v1.1, ms on a
NUCLEO-L4R5ZI (Cortex-M4):
"""
_PICTURE = """
What lies where in the arena, and when, all to one scale (bytes upwards; blue grids, yellow what kernels work in):

![Arena plans of DS96](tinyengine_arena.svg)
"""
_PLANS = """
Of DS96: streamed, then every plan that keeps the picture and that no other such plan beats in both bytes and
multiplications.
"""


def report(result: dict[str, Any]) -> str:
    """Return the page."""
    graph, tflm, sizes = result["graph"], result["theirs"]["tflm"], result["sizes"]
    ours = [
        (
            f"ours, {core.upper()}, streamed",
            _million(on["instructions"]),
            *_bytes(on, "arena", "scratch", "stack", "code", "program"),
        )
        for core, on in graph.items()
    ]
    model = f"{result['tflm_wheel']['model_bytes']:,}"
    theirs = [
        (
            "TFLM + CMSIS-NN, M4",
            _million(tflm["m4"]),
            *_bytes(tflm, "arena"),
            "",
            *_bytes(tflm, "stack", "code"),
            model,
        ),
        ("TFLM + CMSIS-NN, M55", _million(tflm["m55"]), *_bytes(tflm, "arena"), "", "", "", model),
        ("ExecuTorch, its plan", "", *_bytes(result["theirs"]["executorch"], "arena"), "", "", "", ""),
    ]
    peak = max(on["arena_bytes"] + on["stack_bytes"] for on in graph.values())
    times = tflm["arena_bytes"] / peak
    share = (f"{100 * graph[core]['instructions'] / tflm[core]:.0f} % ({core.upper()})" for core in ("m4", "m55"))
    plans = [
        (
            plan["schedule"],
            plan["num_tiled"] or "",
            "{} x {}".format(*plan["tile"]) if plan["num_tiled"] else "",
            f"{plan['bytes']:,}",
            f"{plan['macs_ratio']:.2f}",
        )
        for plan in result["plans"]
    ]
    verbs = ("picture", "step", "decode", "region", "drift")
    world = [
        (core.upper(), *(_million(on[verb]) for verb in verbs), *_bytes(on, "stack", "code"))
        for core, on in result["world"].items()
    ]
    made = result["provenance"]
    played = {mode: result["timing"][mode] for mode in ("eager", "graph")}
    speed = " and ".join(
        f"{1 / found['ratio']:.2f} [{1 / high:.2f}, {1 / low:.2f}] times those in mode {mode}"
        for mode, found in played.items()
        for low, high in [found["interval"]]
    )
    published = result["published"]
    cnn = ", ".join(f"{less:g} times at {macs:g}" for less, macs in published["msf_cnn"])
    parts = [
        "# TinyEngine: memory and instructions",
        _GRAPH.strip(),
        _table(
            ("", "instructions, million", "arena", "of it scratch", "stack (painted)", "code", "weights and tables"),
            [*ours, *theirs],
        ),
        _THEIRS.strip(),
        f"Arena and stack together are at most {peak:,} bytes, {times:.1f} times below TFLM's arena alone; "
        f"instructions are {' and '.join(share)} of theirs.",
        "## By resolution",
        _SIDES.strip(),
        "DS96, whole:",
        _sides(result["memory"]["ds96"]),
        "The world's encoder, picture to latent:",
        _sides(result["memory"]["world"]),
        "## Plans",
        _PLANS.strip(),
        _table(("schedule", "stages in tiles", "tile", "bytes", "multiplications"), plans),
        _PICTURE.strip(),
        "## The world",
        f"Program (flash): {sizes['program_bytes']:,} bytes. Arena for everything: {sizes['arena_bytes']:,} bytes: "
        f"encoder {sizes['encoder_arena_bytes']:,}, decoder {sizes['decoder_arena_bytes']:,}, the rest predictor and "
        f"gauge.\nMultiplications: picture {sizes['encode_macs']:,}, step {sizes['step_macs']:,}, drawing "
        f"{sizes['decode_macs']:,}. Instructions in million:",
        _table(("core", "picture to latent", "step", "drawing", "region", "drift", "stack", "code"), world),
        f"Frames per second of CPU time on this machine ({made['machine']['processor']}, one thread; a step and its "
        f"drawing, in turns with the float world): {speed}.",
        *_encode(result["timing"]),
        "## Published",
        _PUBLISHED.strip(),
        _table(("", "keywords", "images", "wake words"), [(n, *ms) for n, ms in published["mlperf_tiny_ms"].items()]),
        f"msf-CNN (arXiv 2505.11483), memory below layer by layer with the picture not counted: {cnn} the "
        "multiplications. Ours are the last column above, at 1.00.",
        f"Commit {made['commit']}. Again: `{made['command']}`.",
    ]
    return "\n\n".join(parts) + "\n"


def _sides(rows: Sequence[dict[str, Any]]) -> str:
    head = ("side", "TFLM", "TFLM, padding inside", "ideal", "layer by layer", "tiles (multiplications)",
            "rows, picture kept", "rows", "TFLM / rows", "ideal / rows")  # fmt: skip
    names = ("tflm", "tflm_padding", "ideal", "layer_by_layer")
    told = [
        (
            row["side"], *(f"{row[name]:,}" for name in names), f"{row['tiles']:,} ({row['tiles_macs_percent']} %)",
            f"{row['rows_picture_kept']:,}", f"{row['rows']:,}", f"{row['tflm'] / row['rows']:.1f}",
            f"{row['ideal'] / row['rows']:.1f}",
        )
        for row in rows
    ]  # fmt: skip
    return _table(head, told)


def _encode(timing: dict[str, Any]) -> list[str]:
    if "encode" not in timing:
        return []
    found = timing["encode"]
    low, high = found["interval"]
    return [
        f"A picture to its latent on this machine, in turns with LiteRT's interpreter on a graph of the same sizes "
        f"(one thread each): {1 / found['ratio']:.2f} [{1 / high:.2f}, {1 / low:.2f}] times the pictures per second of "
        "CPU time."
    ]


def _million(count: float) -> str:
    return f"{count / 1e6:.2f}"


def _bytes(of: dict[str, Any], *names: str) -> tuple[str, ...]:
    return tuple(f"{of[f'{name}_bytes']:,}" for name in names)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
