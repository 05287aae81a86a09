"""What a grid of trainings shows: every run in figures, pairs compared, as `result.json`, report and pictures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from worldline.bench.ablate_bars import difference, judge, named, pictures_of, two
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, write_bytes
from worldline.core.seeding import rng_for
from worldline.evaluate.reliability import DRAWS, Bootstrap, interval, rank_correlation


def collect_evidence(place: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Return what comparisons need of a finished run: its row of the tables, the bootstrap's draws, what plans reached.

    `run` names it: world, variant, seed.
    """
    trained, found = read_json(place / "result.json"), read_json(place / "evaluation/result.json")
    verdict, latents, long, trust = found["verdict"], found["latents"], found["long_rollouts"], found["trust"]
    horizon = max(map(int, verdict["hri"]))
    row = {
        **run,
        "updates": [trained["config"][stage]["steps"] for stage in ("joint", "frozen")],
        "seconds": round(trained["timing"]["seconds"], 1),
        "cpu_seconds": round(trained["timing"]["cpu_seconds"], 1),
        "weights_sha256": found["model"]["weights_sha256"],
        "model": {key: found["model"]["config"][key] for key in ("predictor", "projection")},
        "parameters": found["model"]["parameters"],
        "commits": [trained["provenance"]["commit"], found["provenance"]["commit"]],
        "windows": found["windows"]["count"],
        "episodes": found["windows"]["episodes"],
        "invalid": verdict["invalid"],
        "hri": verdict["hri"],
        "h_star": {key: verdict["h_star"][key] for key in ("steps", "low", "high", "ended_by", "censored")},
        "growth": latents["growth_e100_e10"],
        "error": [_short(value) for value in latents["error"]],
        "long_steps": long["steps"],
        "inside": long["inside"][-1],
        "inside_curve": [_short(value) for value in long["inside_curve"][:: max(1, long["steps"] // 100)]],
        "median_radius": long["median_radius"][-1],
        "inside_real": long["inside_real"][-1],
        "median_radius_real": long["median_radius_real"][-1],
        "factors": {
            name: {
                "r": [_short(value) for value in factor["r"]],
                "credit": factor["mean_credit"],
                "kept": factor["gates"]["g1"]["probe_r2"],
                "canonical": factor["gates"]["g1"]["canonical_r2"],
            }
            for name, factor in found["factors"].items()
        },
        "auroc": trust["mean_auroc"].get("estimator"),
        "bound": _bound(found["bound"]) if "bound" in found else None,
    }
    with np.load(place / "evaluation/draws.npz") as saved:
        draws = {
            key: [_short(value) for value in saved[key].tolist()]
            for key in saved
            if key in (f"hri_{horizon}", "h_star")
        }
    evidence = {"row": row, "draws": draws}
    if (place / "planning/result.json").exists():
        planned = read_json(place / "planning/result.json")
        row["commits"].append(planned["provenance"]["commit"])
        evidence["plan"] = {
            "starts": planned["starts"],
            "reached": planned["reached"]["world"],
            "success": {
                name: {o: rate["value"] for o, rate in rates.items()} for name, rates in planned["success"].items()
            },
            "decision_ms": planned["timing"]["decision_ms"]["world"]["p50"],
        }
    return evidence


def _bound(bound: dict[str, Any]) -> dict[str, Any]:
    """Return what an evaluation with `bounds=true` comes to: medians over windows and steps."""

    def median(rows: list[list[float | None]]) -> float | None:
        known = [value for row in rows for value in row if value is not None]
        return _short(float(np.median(known))) if known else None

    whole = {key: median(bound[key]) for key in ("residual", "gain", "gain_seen")}
    split = {name: median(rows) for name, rows in bound["split"].items()}
    return {"held": bound["held"], "says_something_up_to": bound["says_something_up_to"], **whole, "split": split}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def summarise(evidence: list[dict[str, Any]], ours: str) -> dict[str, Any]:
    """Return what the runs reached, and each variant against `ours`, world by world and seed by seed."""
    horizon = min(max(map(int, each["row"]["hri"])) for each in evidence)
    planned = all("plan" in each for each in evidence)
    for each in evidence:
        each["row"] |= {"hri": each["row"]["hri"][str(horizon)]} | (
            {
                "success": each["plan"]["success"]["world"],
                "decision_ms": each["plan"]["decision_ms"],
                "tries": np.shape(next(iter(each["plan"]["reached"].values()))),
            }
            if planned
            else {}
        )
    rows = [each["row"] for each in evidence]
    worlds, variants = (list(dict.fromkeys(row[key] for row in rows)) for key in ("world", "variant"))
    pairs = []
    for world in worlds:
        here = {
            (each["row"]["variant"], each["row"]["seed"]): each for each in evidence if each["row"]["world"] == world
        }
        for variant in (name for name in variants if name != ours):
            seeds = [seed for name, seed in here if name == variant and (ours, seed) in here]
            if seeds:
                both = [(here[ours, seed], here[variant, seed]) for seed in seeds]
                pairs.append({"world": world, "variant": variant, "seeds": seeds, **_pair(both, horizon, planned)})
    oracle = {
        each["row"]["world"]: each["plan"]["success"]["oracle"]
        for each in evidence
        if planned and "oracle" in each["plan"]["success"]
    }
    return {
        "horizon": horizon,
        "ours": ours,
        "runs": rows,
        "pairs": pairs,
        "oracle": oracle,
        "success_correlation": _correlation(rows) if planned else None,
    }


def _pair(both: list[tuple[dict[str, Any], dict[str, Any]]], horizon: int, planned: bool) -> dict[str, Any]:
    """Compare two variants on the same windows and starts; intervals are over episodes, of the mean over seeds."""
    draws = [tuple({key: np.array(values) for key, values in each["draws"].items()} for each in pair) for pair in both]
    rows = [(ours["row"], theirs["row"]) for ours, theirs in both]
    key = f"hri_{horizon}"
    defined = all(key in a and key in b for a, b in draws)
    found: dict[str, Any] = {
        "hri": _mean_difference([(a[key], b[key]) for a, b in draws]) if defined else None,
        "h_star": _mean_difference([(a["h_star"], b["h_star"]) for a, b in draws]),
        "h_star_each": [[a["h_star"]["steps"], b["h_star"]["steps"]] for a, b in rows],
        "growth_ratio_each": [a["growth"] / b["growth"] if a["growth"] and b["growth"] else None for a, b in rows],
    }
    if planned:
        plans = [(ours["plan"], theirs["plan"]) for ours, theirs in both]
        found["success"] = {
            offset: _mean_difference([_reached_draws(a, b, offset) for a, b in plans])
            for offset in plans[0][0]["reached"]
        }
    return found


def _mean_difference(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Return the interval of the mean over seeds of ours minus theirs, and each seed's own difference."""
    rows = [np.subtract(*np.broadcast_arrays(ours, theirs)).astype(float) for ours, theirs in pairs]
    return {**_rounded(np.mean(rows, axis=0)), "each": [round(float(row[0]), 5) for row in rows]}


def _rounded(rows: Float[np.ndarray, " draws"]) -> dict[str, float]:
    return {key: round(value, 5) for key, value in asdict(interval(rows)).items()}


def _reached_draws(ours: dict[str, Any], theirs: dict[str, Any], offset: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Raises:
        WorldlineError: the two were not tried on the same starts.
    """
    if ours["starts"][offset] != theirs["starts"][offset]:
        raise WorldlineError(f"plans to goals {offset} ahead began at different starts; run both with the same options")
    bootstrap = Bootstrap(np.array(ours["starts"][offset])[:, 0], DRAWS)
    count = bootstrap.sums(np.ones(len(ours["starts"][offset])))
    rates = [bootstrap.sums(np.mean(each["reached"][offset], axis=1)) / count for each in (ours, theirs)]
    return rates[0], rates[1]


def _correlation(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return Spearman's correlation of HRI with mean planning success over the runs of each world, and over all.

    The interval is over draws of checkpoints.
    """
    worlds = list(dict.fromkeys(row["world"] for row in rows))
    found: dict[str, Any] = {}
    for name, among in {**{world: [world] for world in worlds}, "all": worlds}.items():
        here = [row for row in rows if row["world"] in among and row["hri"]]
        found[name] = {"spearman": None, "checkpoints": len(here)}
        if len(here) < 3:
            continue
        hri = np.array([row["hri"]["value"] for row in here])
        success = np.array([np.mean(list(row["success"].values())) for row in here])
        drawn = rng_for("checkpoints", len(here)).integers(len(here), size=(len(here), DRAWS))
        chosen = np.column_stack([np.arange(len(here)), drawn])
        rho = rank_correlation(hri[chosen], success[chosen])
        if np.isfinite(rho[0]):
            found[name]["spearman"] = _rounded(rho[np.isfinite(rho)])
    return found


def write_report(folder: Path, result: dict[str, Any]) -> Path:
    """Write the report and its pictures from `result.json` alone; return the report's path."""
    from worldline.bench.ablate_figures import draw

    for title, svg in draw(result).items():
        write_bytes(folder / f"{title}.svg", svg.encode())
    path = folder / "report.md"
    write_bytes(path, render(result).encode())
    return path


def render(result: dict[str, Any]) -> str:
    """Return the report, without its pictures."""
    config, made, rows = result["config"], result["provenance"], result["runs"]
    worlds, variants = (list(dict.fromkeys(row[key] for row in rows)) for key in ("world", "variant"))
    lines = [
        f"# Recipes compared: {', '.join(worlds)}",
        "",
        _budget(config, rows),
        f"{_commits(rows)} {made['machine']['processor']}, {made['machine']['cores']} cores. Every seed is "
        "shown; intervals are 95%, over held-out episodes.",
        "",
        *_sample(config, rows),
        "",
    ]
    lines += [f"![{picture}]({picture}.svg)\n" for picture in pictures_of(result)]
    if bars := judge(result):
        lines += ["## What was asked", "", "| world | of | asked | found | kept |", "|---|---|---|---|---|"]
        lines += [f"| {bar.world} | {bar.of} | {bar.asked} | {bar.found} | {bar.verdict} |" for bar in bars]
        lines += ["", "An error that does not grow has an e_100 / e_10 of 1: half of one under 2 is out of reach.", ""]
    for world in worlds:
        lines += [f"## {world}", "", *_world_table(result, world, variants), ""]
        lines += _pairs_table(result, world)
        lines += _bound_table(result, world)
    if result["success_correlation"]:
        lines += ["## Does HRI tell what plans well?", "", *_correlation_lines(result), ""]
    if result["failures"]:
        lines += ["## Failures", "", *(f"- {title}: {why}" for title, why in result["failures"].items()), ""]
    if result["not_run"]:
        lines += [f"Not run yet: {', '.join(result['not_run'])}.", ""]
    lines += ["## The variants", "", f"All have `{config['base']}`.", ""]
    lines += ["| variant | options of `worldline train` | predictor | latents | parameters |", "|---|---|---|---|---|"]
    for text in (*config["variants"], *config["terms"]):
        variant, options = named(text)
        mine = next((row for row in rows if row["variant"] == variant), None)
        shown = [*mine["model"].values(), f"{mine['parameters']:,}"] if mine else [""] * 3
        lines.append(f"| {variant} | `{options}` | {' | '.join(shown)} |")
    return "\n".join([*lines, "", f"Again: `{made['command']}`", ""])


def _budget(config: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    if config["minutes"] is None:
        return "The same numbers of updates for all, whatever they cost."
    took = [row["cpu_seconds"] / 60 for row in rows]
    return (
        "The same layers and sizes for all; how a predictor remembers and whether latents are kept on a sphere belongs "
        f"to a recipe (last table). For each training {config['minutes']:g} minutes of one core, from which the "
        f"numbers of updates follow by the cost of one, measured beforehand. They took {min(took):.1f} to "
        f"{max(took):.1f} minutes of CPU time."
    )


def _commits(rows: list[dict[str, Any]]) -> str:
    """Return what code made the runs: of training, of evaluation and, where they planned, of planning."""
    done = [", ".join(dict.fromkeys(commits)) for commits in zip(*(row["commits"] for row in rows), strict=True)]
    told = [f"{what} at commit {at}" for what, at in zip(("Trained", "evaluated", "planned"), done, strict=False)]
    return f"{', '.join(told)}."


def _sample(config: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Return how much each figure rests on."""
    lines = []
    for world in dict.fromkeys(row["world"] for row in rows):
        row = next(row for row in rows if row["world"] == world)
        told = f"- {world}: {row['windows']} windows of {row['episodes']} test episodes"
        if "tries" in row:
            told += "; {} starts at each distance from a goal, {} searches from each".format(*row["tries"])
        lines.append(told)
    lines.append(f"- `worldline evaluate` had `{config['evaluate']}`")
    lines += [f"- `worldline plan` had `{config['plan']}`"] if config["plan"] else []
    return [*lines, ""]


def _world_table(result: dict[str, Any], world: str, variants: list[str]) -> list[str]:
    horizon = result["horizon"]
    rows = [row for row in result["runs"] if row["world"] == world]
    factors, planned = list(rows[0]["factors"]), "success" in rows[0]
    heads = ["recipe", f"HRI_{horizon} of each seed", "H*", "e_100 / e_10"]
    heads += [
        f"inside at {rows[0]['long_steps']}, %",
        "median radius",
        *(f"{name}: R(0) / supervised" for name in factors),
    ]
    heads += [f"{name}: R({horizon})" for name in factors]
    heads.append("AUROC of the gauge")
    heads += [f"success at {', '.join(rows[0]['success'])}, %", "ms a decision"] if planned else []
    heads += ["updates", "CPU minutes", "TFLOP"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for variant in variants:
        mine = [row for row in rows if row["variant"] == variant]
        if not mine:
            continue
        cells = [
            variant,
            _each(mine, _shown_hri, "<br>"),
            _each(mine, _shown_star, "<br>"),
            _each(mine, lambda row: two(row["growth"])),
        ]
        cells += [
            _each(mine, lambda row: f"{100 * row['inside']:.0f}"),
            _each(mine, lambda row: two(row["median_radius"])),
        ]
        for name in factors:
            kept = [row["factors"][name]["kept"] / row["factors"][name]["canonical"] for row in mine]
            cells.append(two(float(np.median(kept))))
        cells += [_each(mine, lambda row, name=name: two(row["factors"][name]["r"][horizon])) for name in factors]
        cells.append(_each(mine, lambda row: two(row["auroc"] and row["auroc"]["value"])))
        if planned:
            success = [np.mean([row["success"][offset] for row in mine]) for offset in mine[0]["success"]]
            cells.append(", ".join(f"{100 * rate:.0f}" for rate in success))
            cells.append(f"{np.median([row['decision_ms'] for row in mine]):.0f}")
        minutes = np.median([row["cpu_seconds"] for row in mine]) / 60
        flops = _teraflops(result, world, variant, mine[0]["updates"])
        cells += [
            " + ".join(map(str, mine[0]["updates"])),
            f"{minutes:.1f}",
            "n/a" if flops is None else f"{flops:.1f}" if flops < 10 else f"{flops:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if world in result["oracle"]:
        shown = ", ".join(f"{100 * rate:.0f} at {offset}" for offset, rate in result["oracle"][world].items())
        mine = [row["success"] for row in rows if row["variant"] == result["ours"]]
        below = ", ".join(
            f"{100 * (rate - np.mean([success[offset] for success in mine])):.0f}"
            for offset, rate in result["oracle"][world].items()
        )
        lines += [
            "",
            f"The same planner, no better at searching, with the true dynamics reaches, in %: {shown}. "
            f"{result['ours']} is {below} points below that.",
        ]
    return lines


def _pairs_table(result: dict[str, Any], world: str) -> list[str]:
    horizon = result["horizon"]
    pairs = [pair for pair in result["pairs"] if pair["world"] == world]
    if not pairs:
        return []
    offsets = list(pairs[0].get("success", {}))
    heads = [f"{result['ours']} minus", f"HRI_{horizon}", "seeds above 0", "H*, steps", "H* of both, by seed"]
    heads += ["e_100 / e_10, ours / theirs", *(f"success at {offset}, points" for offset in offsets)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for pair in pairs:
        each = pair["hri"]["each"] if pair["hri"] else []
        cells = [pair["variant"], difference(pair["hri"]), f"{sum(one > 0 for one in each)} of {len(pair['seeds'])}"]
        cells += [difference(pair["h_star"], ".0f"), ", ".join(f"{a} : {b}" for a, b in pair["h_star_each"])]
        cells.append(", ".join(two(ratio) for ratio in pair["growth_ratio_each"]))
        cells += [difference(pair["success"][offset], ".0f", 100) for offset in offsets]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _bound_table(result: dict[str, Any], world: str) -> list[str]:
    rows = [row for row in result["runs"] if row["world"] == world and row.get("bound")]
    if not rows:
        return []
    split = list(rows[0]["bound"]["split"])
    heads = ["recipe", "one-step error", "gain of the state, largest", "what steps did"]
    heads += [*(f"gain of the latent, {name}" for name in split), "bound under two random latents", "bound held, %"]
    lines = [
        "What a step can make of an error, and the bound on a rollout's that follows (docs/evaluate.md; medians; an "
        "estimate from below, not a certificate):",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
    ]
    for row in rows:
        bound = row["bound"]
        cells = [row["variant"], *(two(bound[key]) for key in ("residual", "gain", "gain_seen"))]
        cells += [two(bound["split"][name]) for name in split]
        cells += [f"{bound['says_something_up_to']} steps", f"{100 * bound['held']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _correlation_lines(result: dict[str, Any]) -> list[str]:
    return [
        f"- {world}: Spearman's correlation of HRI_{result['horizon']} with success, mean over offsets, is "
        f"{difference(found['spearman']).replace('+', '')} over {found['checkpoints']} checkpoints."
        for world, found in result["success_correlation"].items()
    ]


def _teraflops(result: dict[str, Any], world: str, variant: str, updates: list[int]) -> float | None:
    cost = result["costs"].get(world, {}).get(variant)
    if not cost:
        return None
    steps = dict(zip(("joint", "frozen"), updates, strict=True))
    return float(sum(steps[stage] * found["update_flops"] for stage, found in cost.items()) / 1e12)


def _each(rows: list[dict[str, Any]], shown: Any, between: str = ", ") -> str:
    return between.join(shown(row) for row in rows)


def _shown_hri(row: dict[str, Any]) -> str:
    hri = row["hri"]
    value = "n/a" if hri is None else f"{hri['value']:.2f} [{hri['low']:.2f}, {hri['high']:.2f}]"
    return value if row["invalid"] is None else f"{value} (invalid)"


def _shown_star(row: dict[str, Any]) -> str:
    star = row["h_star"]
    return f"{star['steps']}{'+' * star['censored']} [{star['low']}, {star['high']}]"
