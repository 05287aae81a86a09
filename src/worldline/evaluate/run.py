"""Evaluate a checkpoint on a dataset: drift curves, HRI with its gates, H*, to `result.json` and `report.html`."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.files import atomic_path
from worldline.core.progress import progress
from worldline.core.result import write_result
from worldline.data.cache import FrameCache
from worldline.data.lerobot import Dataset, open_dataset
from worldline.evaluate.bounds import Bound, measure_bound
from worldline.evaluate.drift import Measurement, bounded, describe_region, measure, swap_across_episodes
from worldline.evaluate.figures import headline, to_figures
from worldline.evaluate.pictures import Scene
from worldline.evaluate.probe import fit_probe
from worldline.evaluate.ranking import nearest_multiple
from worldline.evaluate.reliability import DRAWS, HORIZONS, VISIBLE_R2, Interval, paired_difference, rank_correlation
from worldline.evaluate.report import write_report
from worldline.evaluate.trust import measure_trust
from worldline.evaluate.twins import NUDGE, twin_divergence
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
    training_actions,
    window_actions,
    window_states,
)
from worldline.model.checkpoint import load_world
from worldline.model.factors import FactorHead
from worldline.model.foreign import (
    AnyWorld,
    ForeignWorld,
    context_frames,
    frame_skip,
    is_foreign,
    load_any,
    num_parameters,
    weights_fingerprint,
)
from worldline.model.references import References, load_references
from worldline.model.world import World

_LONG = 1000
_LONG_EPISODES = 32
_GAUGE_HORIZONS = (10, 25, 50, 100)
_BOUND_WINDOWS = 16
_BOUND_FRAMES = 20_000


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate, on what."""

    checkpoint: str
    """A checkpoint, a run (its best checkpoint), or a shipped world's name. Or somebody else's model: a LeWM checkpoint
    of stable-worldmodel, or `module:callable`, which returns an object with encode, begin and step."""
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
    """Another model, scored on the same windows; the difference of the HRIs gets a paired interval."""
    train_frames: int = 60_000
    """Real training frames that the probe is fitted on, at most."""
    validation_frames: int = 6_000
    """Real validation frames that stop the probe's fit, at most."""
    bounds: bool = False
    """Also measure how much each step can amplify an error, and estimate the bound on a rollout's error that follows:
    one or two minutes more."""
    twins: int = 8
    """Simulators that begin almost as recorded and then do the same, to see how fast the world itself parts such twins;
    where the dataset's simulator is installed. 0 leaves them out."""
    allow_pickled_code: bool = False
    """Load a foreign checkpoint that is a pickle of Python objects, which runs whatever code its author put into it."""

    def __post_init__(self) -> None:
        if self.horizon < HORIZONS[0] or self.draws < 100:
            raise WorldlineError(
                f"evaluate: horizon must be at least {HORIZONS[0]} and draws at least 100, got {self.horizon} and "
                f"{self.draws}"
            )


def evaluate(config: EvaluateConfig) -> Path:
    """Evaluate a checkpoint and return the directory with `result.json`, `report.html` and `filmstrip.png`.

    Raises:
        WorldlineError: checkpoint and dataset do not fit, too few held-out windows, or some that training has
            seen, no reference pack, or one in which no factor can be seen.
    """
    started = time.monotonic()
    dataset = open_dataset(config.data)
    world = _load(config.checkpoint, dataset, config)
    twin_world = load_world(config.twin) if config.twin else None
    other_world = _load(config.compare, dataset, config) if config.compare else None
    every_world = [each for each in (world, twin_world, other_world) if each is not None]
    for each in every_world:
        _require_fit(each, dataset)
    if config.bounds and isinstance(world, ForeignWorld):
        raise WorldlineError(
            f"{config.checkpoint}: bounds=true is for worlds of worldline, whose state says what it holds; leave it out"
        )
    if config.bounds and isinstance(world, World) and world.config.projection == "quantise":
        raise WorldlineError(
            f"{config.checkpoint}: bounds=true needs a derivative, and its latents jump from one point of a grid to "
            "the next; leave it out"
        )
    context = max(2, *(context_frames(each) for each in every_world))
    every = math.lcm(*(frame_skip(each) for each in every_world))
    if every > config.horizon:
        raise WorldlineError(
            f"evaluate: the models' frame skips meet every {every} steps, expected at most the horizon, "
            f"{config.horizon}; raise the horizon"
        )
    windows = choose_windows(dataset, context=context, horizon=config.horizon, count=config.windows)
    references = load_references(dataset.path, dataset.fingerprint, dataset.spec)
    _require_visible(references, dataset)
    donor = swap_across_episodes(windows.episodes, config.seed)

    with progress(f"evaluate {dataset.spec.name}", 2 + len(every_world)) as task:
        twin = _read_twin(twin_world, dataset, windows, config) if twin_world is not None else None
        task.advance(int(twin is not None), "twin")
        cache = FrameCache(dataset, world.config.image_size)
        ours = _measure(world, cache, windows, donor, references, twin, config, every)
        task.advance(1, "measured")
        other, comparison = None, None
        if other_world is not None:
            other_cache = FrameCache(dataset, other_world.config.image_size)
            other = _measure(other_world, other_cache, windows, donor, references, twin, config, every)
            comparison = _compare(ours, other, config)
            task.advance(1, "compared")
        long = _long_rollouts(world, cache, ours)
        gauge = _gauge(world, cache, windows, ours)
        trust = _trust(world, cache, windows, ours, config)
        task.advance(1, "gauge")
        bound = _bound(world, cache, windows, ours, config) if config.bounds else None
        figures = to_figures(ours, dataset.spec)
        figures |= {
            "config": asdict(config),
            "model": {
                "weights_sha256": weights_fingerprint(world),
                "parameters": num_parameters(world),
                "config": world.config.to_json(),
            },
            "dataset": {"name": dataset.spec.name, "fingerprint": dataset.fingerprint, "references": references.sha256},
            "windows": {
                "count": len(windows.index),
                "episodes": len(np.unique(windows.episodes)),
                "context": windows.context,
                "horizon": windows.horizon,
                "every": every,
            },
            "long_rollouts": long,
            "gauge": gauge,
            "trust": trust,
            "twins": _twins(dataset, config),
        }
        if bound is not None:
            figures["bound"] = bound.to_figures()
        if comparison is not None and other is not None:
            figures["compare"] = comparison | {
                "checkpoint": config.compare,
                "verdict": to_figures(other, dataset.spec)["verdict"],
                "factors": to_figures(other, dataset.spec)["factors"],
            }
        out = _out(config)
        out.mkdir(parents=True, exist_ok=True)
        _write_draws(out / "draws.npz", windows, ours)
        write_result(out / "result.json", "evaluate", figures, {"seconds": round(time.monotonic() - started, 1)})
        write_report(out, figures, _scene(world, cache, windows, ours))
        task.advance(1, "written")
    print(headline(figures))
    return out


def _write_draws(path: Path, windows: Windows, ours: Measurement) -> None:
    """Keep the bootstrap draws: models scored on the same windows with the same seed are paired draw by draw."""
    found = ours.reliability
    arrays: dict[str, Any] = {f"hri_{t}": values for t, values in found.hri_draws.items()}
    arrays |= {"h_star": found.horizon.draws, "windows": windows.index}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def _load(path: str, dataset: Dataset, config: EvaluateConfig) -> AnyWorld:
    if not is_foreign(path):
        return load_world(path)
    actions = training_actions(dataset)
    return load_any(path, dataset.spec, actions=actions, allow_pickled_code=config.allow_pickled_code)


def _require_fit(world: AnyWorld, dataset: Dataset) -> None:
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
    world: AnyWorld,
    cache: FrameCache,
    windows: Windows,
    donor: Int64[np.ndarray, " n"],
    references: References,
    twin: dict[str, Float[np.ndarray, "n t1 _"]] | None,
    config: EvaluateConfig,
    every: int,
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
        every=every,
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


def _long_rollouts(world: AnyWorld, cache: FrameCache, ours: Measurement) -> dict[str, Any]:
    """Roll out whole test episodes, to 1,000 steps where they are that long, and see whether latents stay at home.

    Beside them stand the real latents of the same episodes at the same steps: how far so few stray by chance.
    """
    dataset, context, skip = cache.dataset, context_frames(world), frame_skip(world)
    longest = max(dataset.lengths[e] for e in dataset.split("test")) - context
    steps = min(_LONG, longest)
    episodes = [e for e in dataset.split("test") if dataset.lengths[e] - context >= steps][:_LONG_EPISODES]
    z = np.stack([encode_frames(world, cache.frames(e, 0, context)) for e in episodes])
    actions = np.stack([dataset.actions(e)[: context - 1 + steps] for e in episodes])
    imagined = imagine(world, z, actions[:, : context - 1], actions[:, context - 1 :])
    inside, radius = describe_region(ours.whitening, ours.latents, imagined)
    # every frame once, after all was imagined: a model is shown no future
    frames = [cache.frames(e, context - 1, steps + 1)[::skip] for e in episodes]
    real = np.stack([encode_frames(world, each) for each in frames])
    inside_real, radius_real = describe_region(ours.whitening, ours.latents, real)
    marks = sorted({nearest_multiple(h, skip) for h in (1, 10, 25, 50, 100, 200, 300, 500, 700, 1000)})
    marks = [h for h in marks if h <= steps]
    return {
        "steps": steps,
        "wanted_steps": _LONG,
        "episodes": len(episodes),
        "at": marks,
        "inside": [round(float(inside[h]), 4) for h in marks],
        "median_radius": [round(float(radius[h]), 4) for h in marks],
        "inside_real": [round(float(inside_real[h // skip]), 4) for h in marks],
        "median_radius_real": [round(float(radius_real[h // skip]), 4) for h in marks],
        "every": skip,
        "inside_curve": [round(float(share), 4) for share in inside[::skip]],
        "median_radius_curve": [round(float(each), 4) for each in radius[::skip]],
        "inside_real_curve": [round(float(share), 4) for share in inside_real],
        "median_radius_real_curve": [round(float(each), 4) for each in radius_real],
    }


def _twins(dataset: Dataset, config: EvaluateConfig) -> dict[str, Any]:
    """Return the medians of what twins are apart, or why there are none."""
    if not config.twins:
        return {"left_out": "twins=0"}
    try:
        apart = twin_divergence(dataset, horizon=config.horizon, count=config.twins, seed=config.seed)
    except WorldlineError as error:
        return {"left_out": str(error)}
    return {"count": len(apart), "nudge": NUDGE, "apart": [float(f"{x:.4g}") for x in np.median(apart, axis=0)]}


def _bound(world: AnyWorld, cache: FrameCache, windows: Windows, ours: Measurement, config: EvaluateConfig) -> Bound:
    """Measure gains and bound on a few windows, one an episode while there are enough of them."""
    assert isinstance(world, World)
    _, first = np.unique(windows.episodes, return_index=True)
    chosen = first[np.linspace(0, len(first) - 1, min(_BOUND_WINDOWS, len(first))).round().astype(int)]
    train = encode_split(world, cache, "train", _BOUND_FRAMES, config.seed)
    return measure_bound(
        world,
        ours.rollouts.context[chosen],
        past_actions(cache.dataset, windows)[chosen],
        window_actions(cache.dataset, windows)[chosen],
        ours.rollouts.real[chosen],
        train.z,
        config.seed,
    )


@torch.inference_mode()
def _gauge(world: AnyWorld, cache: FrameCache, windows: Windows, ours: Measurement) -> dict[str, Any] | None:
    """Return how well the world's own gauge tells, at a given h, which windows went wrong; None where it has none."""
    if isinstance(world, ForeignWorld) or not world.gauge.fitted:
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


def _trust(
    world: AnyWorld, cache: FrameCache, windows: Windows, ours: Measurement, config: EvaluateConfig
) -> dict[str, Any] | None:
    """Return how well the world tells its own error; None where it has no gauge."""
    if isinstance(world, ForeignWorld) or not world.gauge.fitted:
        return None
    return measure_trust(
        world,
        ours.rollouts.context,
        past_actions(cache.dataset, windows),
        window_actions(cache.dataset, windows),
        ours.rollouts.real,
        windows.episodes,
        config.draws,
        config.seed,
    )


@torch.inference_mode()
def _scene(world: AnyWorld, cache: FrameCache, windows: Windows, ours: Measurement) -> Scene:
    """Return the window to show: of those in which most factors moved, the one of median error."""
    scores = ours.reliability.factors
    moves = sum((ours.moved[s.name].any(axis=1).astype(int) for s in scores), np.zeros(len(windows.index), int))
    most = np.flatnonzero(moves == moves.max())
    white = ours.whitening(ours.rollouts.imagined[most]) - ours.whitening(ours.rollouts.real[most])
    error = np.square(white).sum(-1).mean(-1)
    window = int(most[np.argsort(error, kind="stable")[len(most) // 2]])
    episode, start = windows.index[window].tolist()
    if drawn := not isinstance(world, ForeignWorld) or world.has_decoder:
        imagined = world.decode(torch.from_numpy(ours.rollouts.imagined[window].copy())).numpy()
    else:
        imagined = _nearest_frames(cache, windows, ours, window)
    return Scene(
        truth=cache.frames(episode, start, windows.horizon + 1).copy(),
        imagined=imagined,
        drawn=drawn,
        episode=episode,
        start=start,
        step_seconds=cache.dataset.spec.step_seconds,
    )


def _nearest_frames(
    cache: FrameCache, windows: Windows, ours: Measurement, window: int
) -> UInt8[np.ndarray, "t1 h w 3"]:
    """Return, for what was imagined in a window, the frames of other test episodes whose latents lie nearest."""
    others = windows.index[windows.episodes != windows.episodes[window]]
    real = ours.whitening(ours.rollouts.real[windows.episodes != windows.episodes[window]])  # (m, t1, r)
    flat, sought = real.reshape(-1, real.shape[-1]), ours.whitening(ours.rollouts.imagined[window])
    nearest = [int(np.square(flat - z).sum(axis=-1).argmin()) for z in sought]
    places = [divmod(each, real.shape[1]) for each in nearest]  # (window, h)
    return np.stack([cache.frames(int(others[w, 0]), int(others[w, 1]) + h, 1)[0] for w, h in places])


def _out(config: EvaluateConfig) -> Path:
    if config.out is not None:
        return Path(config.out)
    checkpoint = Path(config.checkpoint)
    if checkpoint.is_dir():
        return checkpoint / "evaluation"
    return Path("evaluations") / checkpoint.name.replace(":", "-")
