"""A grid of recipes x worlds x seeds at equal compute: trained, evaluated, planned with, and compared.

What the comparison needs of a run is kept in one small file beside the report, its evidence, so that half a grid can go
on on another machine, and anybody can draw the report again without training.
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from worldline.bench.ablate_bars import named
from worldline.bench.ablate_report import collect_evidence, summarise, write_report
from worldline.bench.results_page import write_page
from worldline.cli import configure
from worldline.core.errors import WorldlineError, require_at_least
from worldline.core.files import read_json, write_json
from worldline.core.progress import progress
from worldline.core.result import provenance, write_result
from worldline.train.cost import measure_costs

_COST_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """What to train on what, how often, and for how long. Everything finished is used again."""

    name: str = "ablate"
    """Datasets are in `datasets/NAME`, runs in `runs/NAME`, the evidence of finished runs in `reports/NAME`, the
    result in `reports/DATE-NAME`."""
    worlds: tuple[str, ...] = ()
    """`NAME: OPTIONS` each, the options of `worldline collect`."""
    variants: tuple[str, ...] = ()
    """`NAME: OPTIONS` each, the options of `worldline train`. The others are compared with the first."""
    terms: tuple[str, ...] = ()
    """More variants, trained with the first `term_seeds` seeds only: what one term buys."""
    seeds: int = 5
    """Trainings of each variant on each world."""
    term_seeds: int = 1
    """The same for `terms`."""
    term_worlds: tuple[str, ...] = ()
    """Names of the worlds that `terms` are trained on; none means all."""
    base: str = ""
    """Options of `worldline train` that every run has."""
    minutes: float | None = 5.0
    """CPU minutes that each training gets: the numbers of updates follow from what one costs. null takes the numbers of
    updates as the options give them."""
    joint_share: float = 0.6
    """Share of the minutes for the joint stage of variants with two stages; a variant with `frozen.steps=0` has one."""
    references: str = ""
    """Options of `worldline references`."""
    test: str | None = None
    """Options of `worldline collect` for episodes that are only scored, every one, in place of each world's own test
    split; they are in `datasets/NAME/WORLD-test`."""
    evaluate: str = ""
    """Options of `worldline evaluate`."""
    evaluate_first: str = ""
    """More of them for the first seed of each variant."""
    plan: str | None = None
    """Options of `worldline plan`; null leaves planning out. A world's first run plans with the true dynamics, too."""
    workers: int = 1
    """Runs at a time; each computes with one thread and makes its batches with another."""
    train: bool = True
    """false trains nothing and reports what there is evidence of."""
    reports: str = "reports"
    """Where `NAME/` and `DATE-NAME/` are written."""
    publish: str | None = None
    """A page to write from the newest reports, this one among them."""

    def __post_init__(self) -> None:
        require_at_least(self, {"seeds": 1, "term_seeds": 0, "workers": 1}, "ablate: ")
        if not self.worlds or len(self.variants) + len(self.terms) < 2:
            raise WorldlineError(
                "ablate compares at least two variants on at least one world, such as worlds=['two_room:'] and "
                "variants=['drift_aware:', 'lewm: objective=lewm']"
            )
        for text in (*self.worlds, *self.variants, *self.terms):
            if not text.partition(":")[0].strip() or ":" not in text:
                raise WorldlineError(f"ablate: a world or variant is 'NAME: OPTIONS', got {text!r}")
        if unknown := set(self.term_worlds) - {named(text)[0] for text in self.worlds}:
            raise WorldlineError(f"ablate: term_worlds names {min(unknown)!r}, which is none of the grid's worlds")
        if (self.minutes is not None and self.minutes <= 0) or not 0 < self.joint_share < 1:
            raise WorldlineError(
                f"ablate: minutes must be positive and joint_share between 0 and 1, got {self.minutes} and "
                f"{self.joint_share}"
            )


class Run(NamedTuple):
    """One training of the grid."""

    world: str
    variant: str
    seed: int
    options: str
    """Of its variant."""
    steps: dict[str, int]
    """Updates of each stage; empty where the options decide."""
    evaluate: str
    """Options of `worldline evaluate`."""
    place: Path
    evidence: Path
    oracle: bool
    """Plan with the true dynamics, too."""

    @property
    def title(self) -> str:
        return f"{self.world} {self.variant} {self.seed}"


def run(config: AblateConfig) -> Path:
    """Run the grid; write `result.json`, `report.md` and figures, and return the report's path.

    A run that fails is part of the result, with its message. After an interruption the same call goes on.

    Raises:
        WorldlineError: a dataset or its references could not be made, or no run succeeded.
    """
    root, data, kept = Path("runs") / config.name, Path("datasets") / config.name, Path(config.reports) / config.name
    worlds = dict(named(text) for text in config.worlds)
    runs, costs = [], {}
    failures: dict[str, str] = {}
    for world, options in worlds.items():
        costs[world] = _costs(config, kept / world / "costs.json", data / world, options) if config.minutes else {}
        for seed in range(max(config.seeds, config.term_seeds)):
            for number, text in enumerate(_variants_of(config, world, seed)):
                variant, options = named(text)
                name = f"{variant.replace(' ', '-')}-{seed}"
                more = config.evaluate_first if seed == 0 and text in config.variants else ""
                places = root / world / name, kept / world / f"{name}.json"
                asked = f"{config.evaluate} {more}".strip()
                each = Run(world, variant, seed, options, {}, asked, *places, oracle=seed == number == 0)
                cost = costs[world].get(variant, {})
                if isinstance(cost, str):
                    failures[each.title] = cost
                else:
                    runs.append(each._replace(steps=_steps(config, cost)))
    # the variants before the terms, and all of one seed before any of the next, so that half a grid says something
    terms = {named(text)[0] for text in config.terms}
    runs.sort(key=lambda each: (each.variant in terms, each.seed))
    missing = [each for each in runs if not _is_kept(config, each)] if config.train else []
    for world in dict.fromkeys(each.world for each in missing):
        _prepare(config, data / world, world, worlds[world])
        if config.test is not None:
            _worldline("collect", f"env={world}", f"path={_test_of(data / world)}", *config.test.split())
    with progress(f"ablate {config.name}", len(missing)) as task, ThreadPoolExecutor(config.workers) as pool:
        results = pool.map(lambda one: _finish(config, data / one.world, one), missing)
        for each, failure in zip(missing, results, strict=True):
            if failure:
                failures[each.title] = failure
            task.advance(1, f"{each.title} {'failed' if failure else 'done'}")
    finished = [each for each in runs if _is_kept(config, each)]
    if not finished:
        if failures:
            raise WorldlineError(f"ablate: every run failed, the first with: {next(iter(failures.values()))}")
        raise WorldlineError(f"ablate: no evidence of any run in {kept}; train=true makes it")
    figures = {
        "config": asdict(config),
        "costs": costs,
        "failures": failures,
        "not_run": [each.title for each in runs if each not in finished and each.title not in failures],
        **summarise([read_json(each.evidence) for each in finished], named(config.variants[0])[0]),
    }
    folder = Path(config.reports) / f"{date.today():%Y-%m-%d}-{config.name}"
    write_result(folder / "result.json", "ablate", figures, {})
    report = write_report(folder, read_json(folder / "result.json"))
    if config.publish:
        write_page(Path(config.publish), Path(config.reports))
    return report


def _variants_of(config: AblateConfig, world: str, seed: int) -> tuple[str, ...]:
    asked = not config.term_worlds or world in config.term_worlds
    terms = config.terms if asked and seed < config.term_seeds else ()
    return (config.variants if seed < config.seeds else ()) + terms


def _prepare(config: AblateConfig, path: Path, world: str, options: str) -> None:
    _worldline("collect", f"env={world}", f"path={path}", *options.split())
    _worldline("references", str(path), *config.references.split())


def _test_of(data: Path) -> Path:
    return data.with_name(f"{data.name}-test")


def _train_options(config: AblateConfig, data: Path, options: str) -> list[str]:
    return [f"data={data}", *config.base.split(), *options.split()]


def _asked(config: AblateConfig, run: Run) -> dict[str, Any]:
    """Return what a run's figures depend on."""
    return {
        "data": dict(named(text) for text in config.worlds)[run.world],
        "references": config.references,
        "test": config.test,
        "train": f"{config.base} {run.options}".strip(),
        "steps": run.steps,
        "seed": run.seed,
        "evaluate": run.evaluate,
        "plan": config.plan,
    }


def _is_kept(config: AblateConfig, run: Run) -> bool:
    """
    Raises:
        WorldlineError: the evidence is of other options.
    """
    if not run.evidence.exists():
        return False
    asked, found = _asked(config, run), read_json(run.evidence)["asked"]
    other = [key for key in asked if asked[key] != found.get(key)]
    if other:
        raise WorldlineError(
            f"{run.evidence} is evidence of a run with {other[0]} {found.get(other[0])!r}, asked for is "
            f"{asked[other[0]]!r}; give the grid another name, or move the file away"
        )
    return True


def _costs(config: AblateConfig, path: Path, data: Path, collected: str) -> dict[str, Any]:
    """Measure what an update of each variant costs, in rounds over all of them; kept, since runs depend on it.

    A variant that fails has its message instead.
    """
    known = read_json(path) if path.exists() else {}
    wanted = _variants_of(config, data.name, 0)
    missing = [named(text) for text in wanted if named(text)[0] not in known] if config.train else []
    if missing:
        _prepare(config, data, data.name, collected)
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {}
    for _ in range(_COST_ROUNDS if missing else 0):
        for variant, options in missing:
            words = [*_train_options(config, data, options), f"path={Path('runs') / config.name / 'costs'}"]
            try:
                costs = measure_costs(configure("train", words))
            except WorldlineError as error:
                known[variant] = str(error)
            else:
                rounds.setdefault(variant, []).append({stage: cost._asdict() for stage, cost in costs.items()})
    for variant, found in rounds.items():
        known[variant] = {
            stage: {key: statistics.median(each[stage][key] for each in found) for key in found[0][stage]}
            for stage in found[0]
        }
    if missing:
        write_json(path, {variant: cost for variant, cost in known.items() if not isinstance(cost, str)})
    return dict(known)


def _steps(config: AblateConfig, cost: dict[str, dict[str, float]]) -> dict[str, int]:
    """Return the updates of each stage that fit into the minutes."""
    if config.minutes is None:
        return {}
    shares = {"joint": config.joint_share, "frozen": 1 - config.joint_share}
    if len(cost) == 1:
        shares = dict.fromkeys(cost, 1.0)
    seconds = 60 * config.minutes - sum(stage["prepare_seconds"] for stage in cost.values())
    return {name: max(1, round(shares[name] * seconds / stage["update_seconds"])) for name, stage in cost.items()}


def _finish(config: AblateConfig, data: Path, run: Run) -> str | None:
    """Train, evaluate and plan, each unless it is done, and keep the evidence; return why it failed, if it did."""
    steps = [f"{stage}.steps={count}" for stage, count in run.steps.items()]
    options = _train_options(config, data, run.options)
    out, planning = run.place / "evaluation", run.place / "planning"
    test = [] if config.test is None else [f"test={_test_of(data)}"]
    calls = {out: ["evaluate", str(run.place), f"data={data}", *test, f"out={out}", *run.evaluate.split()]}
    if config.plan is not None:
        oracle = f"oracle={run.oracle}".lower()
        calls[planning] = ["plan", str(run.place), f"data={data}", f"out={planning}", oracle, *config.plan.split()]
    try:
        # a finished run is left alone, but for a look at its options
        _worldline("train", *options, *steps, f"path={run.place}", f"seed={run.seed}", log=run.place)
        for place, call in calls.items():
            if _command_of(place / "result.json") != call:
                _worldline(*call, log=run.place)
        found = collect_evidence(run.place, {"world": run.world, "variant": run.variant, "seed": run.seed})
        write_json(run.evidence, {"asked": _asked(config, run), **found, "provenance": provenance()})
    except WorldlineError as error:
        return str(error)
    return None


def _command_of(result: Path) -> list[str] | None:
    """Return the arguments that a result was made with, or None if there is none."""
    return shlex.split(read_json(result)["provenance"]["command"])[1:] if result.exists() else None


def _worldline(*arguments: str, log: Path | None = None) -> None:
    """Run a command of worldline, what it says to the screen or to the end of `log`.log.

    Raises:
        WorldlineError: it failed; with the last line that it wrote.
    """
    command = [sys.executable, "-m", "worldline", *arguments]
    if log is None:
        done = subprocess.run(command, check=False)
        said = "its message stands above"
    else:
        path = log.with_name(f"{log.name}.log")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            done = subprocess.run(command, check=False, stdout=file, stderr=subprocess.STDOUT)
        said = (path.read_text().strip().splitlines() or ["nothing"])[-1]
    if done.returncode:
        raise WorldlineError(f"worldline {arguments[0]} ended with status {done.returncode}: {said}")
