"""Evaluate a checkpoint on a dataset: drift curves, HRI with its gates, H*, to `result.json` and `report.html`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64

from worldline.core.errors import WorldlineError
from worldline.core.progress import progress
from worldline.core.result import write_result
from worldline.data.cache import FrameCache
from worldline.data.lerobot import Dataset, open_dataset
from worldline.evaluate.drift import Measurement, bounded, measure, swap_across_episodes
from worldline.evaluate.figures import headline, to_figures
from worldline.evaluate.pictures import Scene
from worldline.evaluate.probe import fit_probe
from worldline.evaluate.reliability import DRAWS, HORIZONS, VISIBLE_R2, Interval, paired_difference, rank_correlation
from worldline.evaluate.report import write_report
from worldline.evaluate.windows import (
    Windows,
    choose_windows,
    encode_frames,
    encode_split,
    encode_windows,
    imagine,
    middle_actions,
    past_actions,
    roll_out,
    window_actions,
    window_states,
)
from worldline.model.checkpoint import load_world, weights_sha256
from worldline.model.factors import FactorHead
from worldline.model.references import References, load_references
from worldline.model.world import World

_LONG = 1000
_LONG_EPISODES = 32
_GAUGE_HORIZONS = (10, 25, 50, 100)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate, on what."""

    checkpoint: str
    """A checkpoint, a run (its best checkpoint), or a shipped world's name."""
    data: str
    """The dataset: a LeRobot v3 directory with a reference pack."""
    out: str | None = None
    """Directory for the result; None means `evaluation` in the checkpoint, `evaluations/NAME` for a name."""
    horizon: int = 100
    """Steps that are rolled out and scored."""
    windows: int = 300
    """Held-out windows to score, at most; at least 200 are needed."""
    seed: int = 0
    """Of the choice of frames and actions, and of the bootstrap."""
    draws: int = DRAWS
    """Bootstrap draws over episodes."""
    twin: str | None = None
    """Checkpoint of the same recipe trained with every action at the middle of its range, one more naive forecast."""
    compare: str | None = None
    """Another checkpoint, scored on the same windows; the difference of the HRIs gets a paired interval."""
    train_frames: int = 60_000
    """Real training frames that the probe is fitted on, at most."""
    validation_frames: int = 6_000
    """Real validation frames that stop the probe's fit, at most."""

    def __post_init__(self) -> None:
        if self.horizon < HORIZONS[0] or self.draws < 100:
            raise WorldlineError(
                f"evaluate: horizon must be at least {HORIZONS[0]} and draws at least 100, got {self.horizon} and "
                f"{self.draws}"
            )


def evaluate(config: EvaluateConfig) -> Path:
    """Evaluate a checkpoint and return the directory with `result.json`, `report.html` and `filmstrip.png`.

    Raises:
        WorldlineError: checkpoint and dataset do not fit, too few held-out windows, no reference pack, or one in which
            no factor can be seen.
    """
    started = time.monotonic()
    world, dataset = load_world(config.checkpoint), open_dataset(config.data)
    others = {name: load_world(path) for name, path in (("twin", config.twin), ("compare", config.compare)) if path}
    for each in (world, *others.values()):
        _require_fit(each, dataset)
    references = load_references(dataset.path, dataset.fingerprint, dataset.spec)
    _require_visible(references, dataset)
    context = max(2, *(each.config.context for each in (world, *others.values())))
    windows = choose_windows(dataset, context=context, horizon=config.horizon, count=config.windows)
    donor = swap_across_episodes(windows.episodes, config.seed)

    with progress(f"evaluate {dataset.spec.name}", 3 + len(others)) as task:
        twin = _read_twin(others["twin"], dataset, windows, config) if "twin" in others else None
        task.advance(int(twin is not None), "twin")
        cache = FrameCache(dataset, world.config.image_size)
        ours = _measure(world, cache, windows, donor, references, twin, config)
        task.advance(1, "measured")
        other, comparison = None, None
        if "compare" in others:
            other = _measure(
                others["compare"],
                FrameCache(dataset, others["compare"].config.image_size),
                windows,
                donor,
                references,
                twin,
                config,
            )
            comparison = _compare(ours, other, config)
            task.advance(1, "compared")
        long = _long_rollouts(world, cache, ours)
        gauge = _gauge(world, cache, windows, ours)
        task.advance(1, "gauge")
        figures = to_figures(ours, dataset.spec)
        figures |= {
            "config": asdict(config),
            "model": {
                "weights_sha256": weights_sha256(world),
                "parameters": sum(p.numel() for p in world.parameters()),
                "config": world.config.to_json(),
            },
            "dataset": {"name": dataset.spec.name, "fingerprint": dataset.fingerprint, "references": references.sha256},
            "windows": {
                "count": len(windows.index),
                "episodes": len(np.unique(windows.episodes)),
                "context": windows.context,
                "horizon": windows.horizon,
            },
            "long_rollouts": long,
            "gauge": gauge,
        }
        if comparison is not None and other is not None:
            figures["compare"] = comparison | {
                "checkpoint": config.compare,
                "verdict": to_figures(other, dataset.spec)["verdict"],
                "factors": to_figures(other, dataset.spec)["factors"],
            }
        out = _out(config)
        out.mkdir(parents=True, exist_ok=True)
        write_result(out / "result.json", "evaluate", figures, {"seconds": round(time.monotonic() - started, 1)})
        write_report(out, figures, _scene(world, cache, windows, ours))
        task.advance(1, "written")
    print(headline(figures))
    return out


def _require_fit(world: World, dataset: Dataset) -> None:
    if world.spec.name != dataset.spec.name:
        raise WorldlineError(
            f"this is a world of {world.spec.name}, {dataset.path} holds episodes of {dataset.spec.name}; evaluate it "
            "on data of its own world"
        )
    if world.spec.action_dim != dataset.spec.action_dim:
        raise WorldlineError(
            f"the world takes {world.spec.action_dim} actions, {dataset.path} records {dataset.spec.action_dim}; "
            "evaluate it on data of its own world"
        )
    if not np.isclose(world.spec.step_seconds, dataset.spec.step_seconds):
        raise WorldlineError(
            f"one step of the world lasts {world.spec.step_seconds} s, one of {dataset.path} "
            f"{dataset.spec.step_seconds} s; evaluate it on data of the same pace"
        )


def _require_visible(references: References, dataset: Dataset) -> None:
    if not any(r2 >= VISIBLE_R2 for r2 in references.r2.values()):
        seen = ", ".join(f"{name} {r2:.2f}" for name, r2 in references.r2.items())
        raise WorldlineError(
            f"{dataset.path}: no factor can be scored: the reference pack's encoder should see at least one with an "
            f"R^2 of {VISIBLE_R2}, got {seen}; collect more episodes, or make the pack with more encoder_updates"
        )


def _measure(
    world: World,
    cache: FrameCache,
    windows: Windows,
    donor: Int64[np.ndarray, " n"],
    references: References,
    twin: dict[str, Float[np.ndarray, "n t1 _"]] | None,
    config: EvaluateConfig,
) -> Measurement:
    dataset = cache.dataset
    with torch.inference_mode():
        forecast = references.actions_only(torch.from_numpy(window_actions(dataset, windows)))
    return measure(
        factors=dataset.spec.factors,
        train=encode_split(world, cache, "train", config.train_frames, config.seed),
        validation=encode_split(world, cache, "validation", config.validation_frames, config.seed),
        rollouts=roll_out(world, cache, windows, donor),
        state=window_states(dataset, windows),
        episodes=windows.episodes,
        canonical={f.name: (references.r2[f.name], references.rmse[f.name]) for f in dataset.spec.factors},
        actions_only=references.head.read(forecast),
        twin=twin,
        draws=config.draws,
        seed=config.seed,
    )


def _read_twin(
    twin: World, dataset: Dataset, windows: Windows, config: EvaluateConfig
) -> dict[str, Float[np.ndarray, "n t1 _"]]:
    """Return what the action-free twin forecasts, read through a probe of its own."""
    cache = FrameCache(dataset, twin.config.image_size)
    train = encode_split(twin, cache, "train", config.train_frames, config.seed)
    validation = encode_split(twin, cache, "validation", config.validation_frames, config.seed)
    head = FactorHead.fit(dataset.spec.factors, train.state)
    probe = fit_probe(
        head,
        torch.from_numpy(train.z),
        train.state,
        torch.from_numpy(validation.z),
        validation.state,
        config.seed,
    )
    context, _ = encode_windows(twin, cache, windows)
    past, actions = past_actions(dataset, windows), window_actions(dataset, windows)
    imagined = imagine(twin, context, middle_actions(twin, past), middle_actions(twin, actions))
    return probe(torch.from_numpy(bounded(imagined, train.z)))


def _compare(ours: Measurement, other: Measurement, config: EvaluateConfig) -> dict[str, Any]:
    def as_json(difference: Interval) -> dict[str, float]:
        return {key: round(value, 6) for key, value in asdict(difference).items()}

    both = [t for t in HORIZONS if t in ours.reliability.hri_draws and t in other.reliability.hri_draws]
    return {
        "hri_difference": {str(t): as_json(paired_difference(ours.reliability, other.reliability, t)) for t in both}
    }


def _long_rollouts(world: World, cache: FrameCache, ours: Measurement) -> dict[str, Any]:
    """Roll out whole test episodes, to 1,000 steps where they are that long, and see whether latents stay at home."""
    dataset, context = cache.dataset, world.config.context
    longest = max(dataset.lengths[e] for e in dataset.split("test")) - context
    steps = min(_LONG, longest)
    episodes = [e for e in dataset.split("test") if dataset.lengths[e] - context >= steps][:_LONG_EPISODES]
    z = np.stack([encode_frames(world, cache.frames(e, 0, context)) for e in episodes])
    actions = np.stack([dataset.actions(e)[: context - 1 + steps] for e in episodes])
    imagined = imagine(world, z, actions[:, : context - 1], actions[:, context - 1 :])
    train_radius = ours.latents.radius99
    radius = ours.whitening.radius(np.nan_to_num(imagined, nan=1e30, posinf=1e30, neginf=-1e30))
    marks = [h for h in (1, 10, 25, 50, 100, 200, 300, 500, 700, 1000) if h <= steps]
    return {
        "steps": steps,
        "wanted_steps": _LONG,
        "episodes": len(episodes),
        "at": marks,
        "inside": [round(float((radius[:, h] <= train_radius).mean()), 4) for h in marks],
        "median_radius": [round(float(np.median(radius[:, h]) / ours.latents.median_radius_real), 4) for h in marks],
    }


@torch.inference_mode()
def _gauge(world: World, cache: FrameCache, windows: Windows, ours: Measurement) -> dict[str, Any] | None:
    """Return how well the world's own gauge tells, at a given h, which windows went wrong; None where it has none."""
    if not world.gauge.fitted:
        return None
    marks = [h for h in _GAUGE_HORIZONS if h <= windows.horizon]
    imagined = ours.rollouts.imagined[:, marks]
    error = np.linalg.norm(ours.whitening(imagined) - ours.whitening(ours.rollouts.real[:, marks]), axis=-1)
    z = torch.from_numpy(imagined.copy())
    region = world.gauge.region(z).double().numpy()
    cycle = torch.cat([world.gauge.cycle(world, part) for part in torch.split(z, 64)]).double().numpy()
    return {
        "at": marks,
        "region": [None if np.isnan(c) else round(float(c), 4) for c in rank_correlation(region, error)],
        "cycle": [None if np.isnan(c) else round(float(c), 4) for c in rank_correlation(cycle, error)],
    }


@torch.inference_mode()
def _scene(world: World, cache: FrameCache, windows: Windows, ours: Measurement) -> Scene:
    """Return the window to show: of those in which most factors moved, the one of median error."""
    scores = ours.reliability.factors
    moves = sum((ours.moved[s.name].any(axis=1).astype(int) for s in scores), np.zeros(len(windows.index), int))
    most = np.flatnonzero(moves == moves.max())
    white = ours.whitening(ours.rollouts.imagined[most]) - ours.whitening(ours.rollouts.real[most])
    error = np.square(white).sum(-1).mean(-1)
    window = int(most[np.argsort(error, kind="stable")[len(most) // 2]])
    episode, start = windows.index[window].tolist()
    z = torch.from_numpy(ours.rollouts.imagined[window].copy())
    return Scene(
        truth=cache.frames(episode, start, windows.horizon + 1).copy(),
        imagined=world.decode(z).numpy(),
        episode=episode,
        start=start,
        step_seconds=cache.dataset.spec.step_seconds,
    )


def _out(config: EvaluateConfig) -> Path:
    if config.out is not None:
        return Path(config.out)
    checkpoint = Path(config.checkpoint)
    return checkpoint / "evaluation" if checkpoint.is_dir() else Path("evaluations") / checkpoint.name
