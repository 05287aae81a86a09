"""The same training with one thing changed at a time: what each variant reaches, and what a CPU minute of it buys."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, write_bytes, write_json
from worldline.core.result import write_result


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """What to train, and how its variants differ."""

    data: str = "datasets/pusht"
    """A dataset with a reference pack."""
    name: str = "ablate"
    """The report is `reports/DATE-NAME`, the runs are in `runs/NAME`; finished runs are used again."""
    base: str = ""
    """Options of `worldline train` that every variant has."""
    variants: tuple[str, ...] = ()
    """`NAME: OPTIONS` each, the options of `worldline train` that differ; none for the base itself."""
    reports: str = "reports"
    """Where `DATE-NAME/` is written."""

    def __post_init__(self) -> None:
        if len(self.variants) < 2:
            raise WorldlineError(
                "bench ablate compares at least two variants, such as 'base:' and 'wide: model.hidden=768'"
            )
        if unnamed := [text for text in self.variants if not text.partition(":")[0].strip() or ":" not in text]:
            raise WorldlineError(f"a variant is 'NAME: OPTIONS', got {unnamed[0]!r}")


def run(config: AblateConfig) -> Path:
    """Train and evaluate every variant in turn; write `result.json` and `report.md`, and return the report's path.

    Raises:
        WorldlineError: a variant's training or evaluation failed; its own message stands above.
    """
    rows = []
    for text in config.variants:
        name, _, options = (part.strip() for part in text.partition(":"))
        place = Path("runs") / config.name / name.replace(" ", "-")
        minutes = _train(place, config, options)
        out = place / "evaluation"
        if not (out / "result.json").exists():
            _worldline("evaluate", str(place), f"data={config.data}", f"out={out}")
        rows.append(_row(name, options, minutes, read_json(out / "result.json")))
    folder = Path(config.reports) / f"{date.today():%Y-%m-%d}-{config.name}"
    figures = {"data": config.data, "base": config.base, "variants": [row["figures"] for row in rows]}
    write_result(
        folder / "result.json", "bench-ablate", figures, {"cpu_minutes": {r["name"]: r["cpu_minutes"] for r in rows}}
    )
    report = folder / "report.md"
    write_bytes(report, _report(read_json(folder / "result.json")).encode())
    return report


def _train(place: Path, config: AblateConfig, options: str) -> float:
    """Train a variant and return its CPU minutes, all starts of an interrupted one together."""
    spent = place.with_name(f"{place.name}.cpu-minutes.json")  # beside the run, whose directory is its own
    before = read_json(spent) if spent.exists() else 0.0
    finished, started = (place / "result.json").exists(), _cpu_minutes()
    try:  # a finished run is returned as it is, or refused if its options were others
        _worldline("train", f"data={config.data}", f"path={place}", *config.base.split(), *options.split())
    finally:
        total = before if finished else before + _cpu_minutes() - started
        write_json(spent, total)
    return float(total)


def _worldline(*arguments: str) -> None:
    print("worldline " + " ".join(arguments), flush=True)
    done = subprocess.run([sys.executable, "-m", "worldline", *arguments], check=False)
    if done.returncode:
        raise WorldlineError(f"worldline {arguments[0]} ended with status {done.returncode}; mend it and start again")


def _cpu_minutes() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


def _row(name: str, options: str, minutes: float, result: dict[str, Any]) -> dict[str, Any]:
    verdict, factors = result["verdict"], result["factors"]
    figures = {
        "name": name,
        "options": options,
        "valid": verdict["valid"],
        # None where no factor is scored up to that step
        "hri": {horizon: interval and interval["value"] for horizon, interval in verdict["hri"].items()},
        "factors": {factor: {"r": curves["r"]} for factor, curves in factors.items()},
    }
    return {"name": name, "cpu_minutes": minutes, "figures": figures}


def _report(result: dict[str, Any]) -> str:
    made, minutes = result["provenance"], result["timing"]["cpu_minutes"]
    factors = list(result["variants"][0]["factors"])
    horizons = list(result["variants"][0]["hri"])
    heads = ["variant", "options", "CPU min", *(f"HRI_{h}" for h in horizons), f"HRI_{horizons[-1]} / CPU min"]
    heads += [f"{factor} R at 0, {', '.join(horizons)}" for factor in factors]
    lines = [
        f"# Variants on {result['data']}",
        "",
        f"Every variant: `worldline train {result['base']}` with its own options; commit {made['commit']}, "
        f"{made['machine']['processor']}, {made['machine']['cores']} cores.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for row in result["variants"]:
        hri = [row["hri"][h] for h in horizons]
        cells = [row["name"], f"`{row['options']}`" if row["options"] else "", f"{minutes[row['name']]:.1f}"]
        each = None if hri[-1] is None else hri[-1] / minutes[row["name"]]
        cells += [*(_shown(value) for value in hri), _shown(each, 3)]
        for factor in factors:
            curve = row["factors"][factor]
            at = [curve["r"][h] for h in (0, *map(int, horizons))]
            cells.append(", ".join(_shown(value) for value in at))
        if not row["valid"]:
            cells[0] += " (invalid)"
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "R is read through each variant's own probe, on windows in which the factor moved; at 0 it is the encoder's "
        "own limit. One seed each: differences of a few hundredths mean nothing. CPU minutes are of the training.",
        "",
        f"Again: `{made['command']}`",
        "",
    ]
    return "\n".join(lines)


def _shown(value: float | None, digits: int = 2) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"
