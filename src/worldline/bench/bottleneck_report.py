"""What `worldline bottleneck` found, in words and as a plan for another machine, from `result.json` alone."""

from __future__ import annotations

from typing import Any

import numpy as np

PARTS = {
    "read": "bytes off the disk, one thread, nothing cached",
    "decode": "pictures out of bytes in memory, one thread",
    "feed": "batches, nobody to train",
    "update": "updates of one batch again and again",
    "all": "everything together",
}


def rates(result: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Return clips a second of each part: median, least and most over its turns."""
    turns = {name: [turn["clips_per_second"] for turn in found] for name, found in result["timing"]["turns"].items()}
    return {name: (float(np.median(found)), min(found), max(found)) for name, found in turns.items()}


def limit(result: dict[str, Any]) -> str:
    """Return what has the lowest ceiling: `update`, or within the feed `read` or `decode`."""
    ceilings = {name: found[0] for name, found in rates(result).items()}
    if ceilings["update"] <= ceilings["feed"]:
        return "update"
    return "read" if ceilings.get("read", np.inf) < ceilings["decode"] else "decode"


def demand(result: dict[str, Any], gpus: int | None = None) -> dict[str, float]:
    """Return what the target needs, or as many GPUs of its kind: clips a second, cores that decode as this machine's
    do, megabytes a second, and what sharding moves: gigabytes an update in and out of each GPU, and how many clips a
    GPU must take at a time for computing to last as long.

    Moved are the weights, gathered in bfloat16 for the forward and again for the backward pass, the averaged encoder's
    once, and gradients, reduced in float32.
    """
    target, count = result["config"]["target"], gpus or result["config"]["target"]["gpus"]
    of_one = target["tflops"] * 1e12 * target["mfu"] / result["target_flops_per_clip"]
    clips = count * of_one
    encoder, predictor = (result["target_parameters"][part] for part in ("encoder", "predictor"))
    moved = ((2 + 2 + 4) * (encoder + predictor) + 2 * encoder) * (count - 1) / count
    found = {
        "clips_per_second": clips,
        "cores": clips * _cpu_seconds(result, "decode"),
        "moved_gb": moved / 1e9,
        "clips_to_hide_it": moved / 1e9 / target["network_gb_per_s"] * of_one,
    }
    if size := result["bytes_per_clip"]:
        found["mb_per_second"] = clips * size / 1e6
        found["epoch_hours"] = target["data_tb"] * 1e12 / size / clips / 3600
    return found


def render(result: dict[str, Any]) -> str:
    """Write the report."""
    found, timing, made = rates(result), result["timing"], result["provenance"]
    config, size = result["config"], result["bytes_per_clip"]
    which, stall = limit(result), timing["stall"]
    achieved = found["update"][0] * result["flops_per_clip"]
    lines = [
        f"# What limits: {_SAID[which]}",
        "",
        f"Masked pre-training on {result['data']['num_clips']:,} clips of {result['data']['frames']} frames of "
        f"{result['data']['image_size']} px ({result['data']['kind']}), {config['batch']} an update, "
        f"{config['feed']['threads']} thread(s) that feed, {config['threads']} that train. Every part alone, in turns "
        f"of {config['seconds']:g} s, {config['rounds']} of each.",
        "",
        f"| part | clips/s, median (least to most) | CPU ms a clip | KB a clip | MB/s | ready, of "
        f"{config['feed']['depth']} batches |",
        "|---|---|---|---|---|---|",
    ]
    pixels = result["data"]["frames"] * 3
    sizes = {"read": size, "decode": pixels * result["data"]["image_size"] ** 2}
    sizes["feed"] = pixels * config["model"]["image_size"] ** 2
    for name, (middle, least, most) in found.items():
        cost = "-" if name == "all" else f"{1e3 * _cpu_seconds(result, name):.2f}"
        given = sizes.get(name, sizes["feed"])
        ready = f"{timing['ready_batches'][name]:.1f}" if name in timing["ready_batches"] else "-"
        lines.append(
            f"| {PARTS[name]} | {_few(middle)} ({_few(least)} to {_few(most)}) | {cost} | {given / 1e3:,.1f} | "
            f"{_few(middle * given / 1e6)} | {ready} |"
        )
    share = found["all"][0] / min(found["feed"][0], found["update"][0])
    product = timing["product_flops"]
    lines += [
        "",
        "KB are what a part hands on, and of updates what they take: bytes on disk, then pixels. Batches lay ready "
        "when one was asked for.",
        "",
        f"Together {found['all'][0]:.3g} clips/s, {100 * share:.0f}% of the lower ceiling. Updates "
        f"waited {_percent(stall)}.",
        "",
        *_run(timing["run"]),
        f"An update spends {result['flops_per_clip'] / 1e9:.2f} GFLOP on a clip, hidden tokens not counted, and "
        f"reaches {achieved / 1e9:.1f} GFLOP/s: {100 * achieved / product:.0f}% of the {product / 1e9:.0f} that one "
        "large product reaches here." + (f" A clip has {size / 1e3:.1f} KB." if size else ""),
        "",
        _lift(result, which),
        "",
        *_target(result),
        "",
        f"Machine: {made['machine']['processor']}, {made['machine']['cores']} cores; torch "
        f"{made['versions'].get('torch')}; commit {made['commit']}. {_load(timing['load'])}",
        "",
        f"Again: `{made['command']}`",
        "",
    ]
    return "\n".join(lines)


def _load(load: float) -> str:
    """Say what else ran. Under a load, parts' clips a second are too low, and their CPU time is a little too high."""
    if load < 0.5:
        return "Nothing else ran on it."
    return (
        f"Other work ran beside it (load average {load:.1f} when it began): alone, it would give more clips a second."
    )


_SAID = {"update": "computing", "read": "the disk", "decode": "decoding"}


def _percent(stall: dict[str, float]) -> str:
    p50, p95, most = (100 * stall[name] for name in ("p50", "p95", "max"))
    return f"{p50:.1f}% of their time (p50), {p95:.1f}% (p95), {most:.1f}% (most)"


def _run(run: dict[str, Any] | None) -> list[str]:
    if run is None:
        return []
    ranks = "1 rank" if run["ranks"] == 1 else f"{run['ranks']} ranks"
    return [
        f"In the run {run['path']}, on {ranks}, {run['updates']:,} updates waited {_percent(run['stall'])}, each as "
        "long as the rank that waited longest, the first for the feed to begin. Ranks, each over all its updates, "
        f"waited {_percent(run['stall_over_ranks'])}; {run['ready_batches']:.1f} batches lay ready on average.",
        "",
    ]


def _few(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cpu_seconds(result: dict[str, Any], part: str) -> float:
    return float(np.median([turn["cpu_seconds_per_clip"] for turn in result["timing"]["turns"][part]]))


def _lift(result: dict[str, Any], which: str) -> str:
    """Say what would lift the limit, and how far."""
    found = rates(result)
    if which == "update":
        return (
            f"The feed could do {found['feed'][0] / found['update'][0]:.3g} times as many clips as are computed: more "
            "cores for decoding or a faster disk would change nothing here, a faster processor for updates would."
        )
    cores = found["update"][0] * _cpu_seconds(result, "decode")
    told = f"To feed what could be computed takes {cores:.1f} cores that decode (`feed.threads`)"
    if result["bytes_per_clip"]:
        told += f" and {found['update'][0] * result['bytes_per_clip'] / 1e6:.0f} MB/s off the disk"
    return told + "."


def _target(result: dict[str, Any]) -> list[str]:
    target, need = result["config"]["target"], demand(result)
    model = target["model"]
    lines = [
        f"## {target['gpus']} x {target['tflops']:g} TFLOP/s at {100 * target['mfu']:g}%",
        "",
        f"A model of {model['width']} channels and {model['depth']} blocks spends "
        f"{result['target_flops_per_clip'] / 1e9:,.0f} GFLOP on a clip ({model['frames']} frames of "
        f"{model['image_size']} px), so that such a machine would take {need['clips_per_second']:,.0f} clips/s: "
        f"{need['cores']:,.0f} cores that decode as fast as one here"
        + (
            f", {need['mb_per_second']:,.0f} MB/s from disks or over the network, and {need['epoch_hours']:.1f} hours "
            f"for {target['data_tb']:g} TB of such clips."
            if "epoch_hours" in need
            else "."
        ),
        "",
        f"Its {sum(result['target_parameters'].values()) / 1e6:,.0f} million parameters sharded over all of them, an "
        f"update moves {need['moved_gb']:.1f} GB in and out of each GPU. At {target['network_gb_per_s']:g} GB/s that "
        f"takes as long as computing {need['clips_to_hide_it']:.1f} clips: with more of them a GPU it can be hidden.",
        "",
        "Arithmetic from this machine's costs, not a measurement: what its GPUs would really reach is *not yet "
        "measured*.",
    ]
    return lines
