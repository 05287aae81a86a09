"""The whole way with one command: episodes, reference pack, world, evaluation, page. Finished stages are used again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from worldline.checkpoints import add_result, add_starts
from worldline.core.files import read_json
from worldline.core.progress import within
from worldline.data.collect import CollectConfig, collect
from worldline.data.lerobot import open_dataset
from worldline.evaluate.run import EvaluateConfig, evaluate
from worldline.listing import headline
from worldline.model.checkpoint import load_world, read_card, weights_sha256
from worldline.serve.app import PlayConfig, serve
from worldline.train.config import TrainConfig
from worldline.train.loop import train
from worldline.train.references import ReferencesConfig, make_references


@dataclass(frozen=True, kw_only=True)
class StageSeconds:
    """What each stage is expected to take on two cores; decides nothing but the estimate of the time left."""

    collect: float
    """What collecting should take, seconds; used for the estimate of the time left alone."""
    references: float
    """What the reference pack should take."""
    train: float
    """What training should take."""
    evaluate: float
    """What evaluating should take."""


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Every stage's own options, and whether to play at the end."""

    collect: CollectConfig
    references: ReferencesConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    page: PlayConfig
    play: bool = True
    """Serve the page at the end; false ends after the evaluation."""
    seconds: StageSeconds


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the way: what it is called, how long it should take, and what does it."""

    name: str
    expected: float
    """Seconds."""
    run: Callable[[], str]
    """Does the work and returns what there is now, in a few words."""


def quickstart(config: QuickstartConfig) -> None:
    """Run every stage that is not finished yet, then serve the page if asked for.

    Raises:
        WorldlineError: a stage cannot run, or a place is taken by something else.
    """
    expected = config.seconds
    stages = (
        Stage(name="collect", expected=expected.collect, run=lambda: _collect(config.collect)),
        Stage(name="references", expected=expected.references, run=lambda: _references(config)),
        Stage(name="train", expected=expected.train, run=lambda: _train(config.train)),
        Stage(name="evaluate", expected=expected.evaluate, run=lambda: _evaluate(config.evaluate)),
    )
    started = time.monotonic()
    pace = 1.0  # how much slower this machine is than the one whose seconds are expected
    for number, stage in enumerate(stages, start=1):
        later = sum(other.expected for other in stages[number:])
        print(
            f"[{number}/{len(stages)}] {stage.name}: about {_duration(pace * stage.expected)}, "
            f"{_duration(pace * (stage.expected + later))} left in all",
            flush=True,
        )
        begun = time.monotonic()
        with within(partial(_left_in_all, f"stage {number} of {len(stages)}", pace * later)):
            found = stage.run()
        taken = time.monotonic() - begun
        reused = taken < 0.1 * stage.expected and found.endswith("used again")
        if not reused:
            pace = 0.5 * pace + 0.5 * taken / stage.expected
        print(f"[{number}/{len(stages)}] {stage.name}: {found}, {taken:.0f} s", flush=True)
    print(f"done in {_duration(time.monotonic() - started)}: {_report(config)}")
    if config.play:
        serve(config.page)
    else:
        print(f"next: worldline play {config.train.path}")


def _collect(config: CollectConfig) -> str:
    there = Path(config.path).exists()
    path = collect(config)
    dataset = open_dataset(path)
    return _told(f"{path}, {dataset.num_episodes} episodes, {dataset.num_frames} frames", there)


def _references(config: QuickstartConfig) -> str:
    dataset = open_dataset(config.collect.path)
    card = dataset.path / "references/references.json"
    before = card.stat().st_mtime_ns if card.exists() else None
    folder = make_references(dataset, config.references)
    quality = {name: factor["r2"] for name, factor in read_json(card)["factors"].items()}
    told = ", ".join(f"{name} {r2:.2f}" for name, r2 in quality.items())
    return _told(f"{folder}, R^2 of what can be seen: {told}", before == card.stat().st_mtime_ns)


def _train(config: TrainConfig) -> str:
    there = (config.path / "result.json").exists()
    path = train(config)
    add_starts(path)
    return _told(str(path), there)


def _evaluate(config: EvaluateConfig) -> str:
    if config.out and _evaluated(config, Path(config.out)):
        return _told(config.out, True)
    out = evaluate(config)
    add_result(config.checkpoint, out)
    return _told(str(out), False)


def _evaluated(config: EvaluateConfig, out: Path) -> bool:
    """Return whether `out` holds this evaluation of these weights on this dataset."""
    if not (out / "result.json").exists() or not (out / "report.html").exists():
        return False
    there = read_json(out / "result.json")
    return (there["config"], there["model"]["weights_sha256"], there["dataset"]["fingerprint"]) == (
        asdict(config),
        weights_sha256(load_world(config.checkpoint)),
        open_dataset(config.data).fingerprint,
    )


def _report(config: QuickstartConfig) -> str:
    return f"{headline(read_card(config.train.path)['result'])}; see {config.evaluate.out}/report.html"


def _left_in_all(place: str, later: float, here: float) -> str:
    return f"{place}, {_duration(here + later)} left in all"


def _told(found: str, reused: bool) -> str:
    return f"{found}; finished before and used again" if reused else found


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
