"""Evaluate a checkpoint on a dataset: drift curves, HRI with its gates, H*, to `result.json` and `report.html`."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.files import atomic_path
from worldline.core.progress import progress
from worldline.core.result import write_result
from worldline.data.cache import FrameCache
from worldline.data.lerobot import Dataset, open_dataset
from worldline.evaluate.bounds import Bound, measure_bound
from worldline.evaluate.drift import Measurement, RealFrames, Rollouts, bounded, measure, swap_across_episodes
from worldline.evaluate.figures import headline, to_figures
from worldline.evaluate.long_rollouts import describe_long, roll_out_long
from worldline.evaluate.pictures import Scene
from worldline.evaluate.probe import fit_probe
from worldline.evaluate.reliability import DRAWS, HORIZONS, VISIBLE_R2, Interval, paired_difference, rank_correlation
from worldline.evaluate.report import write_report
from worldline.evaluate.trust import measure_trust
from worldline.evaluate.twins import NUDGE, twin_divergence
from worldline.evaluate.windows import (
    Windows,
    choose_windows,
    encode_split,
    encode_windows,
    held_out,
    imagine,
    middle_actions,
    past_actions,
    roll_out,
    states_of,
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

_GAUGE_HORIZONS = (10, 25, 50, 100)
_BOUND_WINDOWS = 16
_BOUND_FRAMES = 20_000
_CANONICAL_FRAMES = 3000


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate, on what."""

    checkpoint: str
    """A checkpoint, a run (its best checkpoint), or a shipped world's name. Or somebody else's model: a LeWM checkpoint
    of stable-worldmodel, or `module:callable`, which returns an object with encode, begin and step."""
    data: str
    """The dataset: a LeRobot v3 directory with a reference pack."""
    test: str | None = None
    """Another dataset of the same world, every episode of which is scored in place of the test split of `data`: more
    episodes than a split has, for narrower intervals. The probe is fitted on `data` all the same."""
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
    test = open_dataset(config.test) if config.test else None
    scored, episodes = held_out(dataset, test)
    world = _load(config.checkpoint, dataset, config)
    twin_world = load_world(config.twin) if config.twin else None
    other_world = _load(config.compare, dataset, config) if config.compare else None
    every_world = [each for each in (world, twin_world, other_world) if each is not None]
    for each in every_world:
        _require_fit(each, dataset)
        _require_fit(each, scored)
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
    windows = choose_windows(dataset, context=context, horizon=config.horizon, count=config.windows, scored=test)
    references = load_references(dataset.path, dataset.fingerprint, dataset.spec)
    if test is not None:
        references = _on_other_episodes(references, scored, episodes)
    _require_visible(references, dataset)
    donor = swap_across_episodes(windows.episodes, config.seed)

    with progress(f"evaluate {dataset.spec.name}", 3 + len(every_world)) as task:
        twin = _read_twin(twin_world, dataset, scored, windows, config) if twin_world is not None else None
        task.advance(int(twin is not None), "twin")
        models = [_Model.of(each, dataset, scored, config) for each in (world, other_world) if each is not None]
        # all is imagined before anybody is shown a future
        cache = models[0].scored
        long = roll_out_long(world, cache, episodes)
        rolled = roll_out([(model.world, model.scored) for model in models], windows, donor)
        task.advance(1, "imagined")
        measured = []
        for model, rollouts in zip(models, rolled, strict=True):
            measured.append(_measure(model, rollouts, windows, references, twin, config, every))
            task.advance(1, "measured")
        ours, other = measured[0], measured[1] if len(measured) == 2 else None
        gauge = _gauge(world, windows, ours)
        trust = _trust(world, cache, windows, ours, config)
        task.advance(1, "gauge")
        bound = _bound(models[0], windows, ours, config) if config.bounds else None
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
            "long_rollouts": describe_long(long, world, cache, ours),
            "gauge": gauge,
            "trust": trust,
            "twins": _twins(scored, episodes, config),
        }
        if bound is not None:
            figures["bound"] = bound.to_figures()
        if test is not None:
            figures["dataset"]["test"] = {"fingerprint": test.fingerprint, "episodes": len(episodes)}
        if other is not None:
            figures["compare"] = _compare(ours, other) | {
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


def _on_other_episodes(references: References, scored: Dataset, episodes: list[int]) -> References:
    """Return the pack with its encoder measured on the episodes that are scored."""
    pairs = np.array([(e, t) for e in episodes for t in range(scored.lengths[e])])
    pairs = pairs[np.linspace(0, len(pairs) - 1, min(_CANONICAL_FRAMES, len(pairs))).round().astype(int)]
    frames = torch.from_numpy(FrameCache(scored, references.image_size).gather(pairs, 1)[:, 0])
    quality = references.canonical.quality(
        references.head, frames, np.stack([states_of(scored, e)[t] for e, t in pairs.tolist()])
    )
    return replace(
        references,
        r2={name: r2 for name, (r2, _) in quality.items()},
        rmse={name: rmse for name, (_, rmse) in quality.items()},
    )


class _Model(NamedTuple):
    """A model to score, and what its probe is fitted on."""

    world: AnyWorld
    fitted: FrameCache
    scored: FrameCache
    train: RealFrames
    validation: RealFrames

    @classmethod
    def of(cls, world: AnyWorld, dataset: Dataset, scored: Dataset, config: EvaluateConfig) -> _Model:
        cache = FrameCache(dataset, world.config.image_size)
        return cls(
            world,
            cache,
            cache if scored is dataset else FrameCache(scored, world.config.image_size),
            encode_split(world, cache, "train", config.train_frames, config.seed),
            encode_split(world, cache, "validation", config.validation_frames, config.seed),
        )


def _measure(
    model: _Model,
    rollouts: Rollouts,
    windows: Windows,
    references: References,
    twin: dict[str, Float[np.ndarray, "n t1 _"]] | None,
    config: EvaluateConfig,
    every: int,
) -> Measurement:
    dataset = model.scored.dataset
    with torch.inference_mode():
        forecast = references.actions_only(torch.from_numpy(window_actions(dataset, windows)))
    return measure(
        factors=dataset.spec.factors,
        train=model.train,
        validation=model.validation,
        rollouts=rollouts,
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
    world: World, dataset: Dataset, scored: Dataset, windows: Windows, config: EvaluateConfig
) -> dict[str, Float[np.ndarray, "n t1 _"]]:
    """Return what the action-free twin forecasts, read through a probe of its own."""
    twin = _Model.of(world, dataset, scored, config)
    train, validation = twin.train, twin.validation
    head = FactorHead.fit(dataset.spec.factors, train.state)
    probe = fit_probe(
        head,
        torch.from_numpy(train.z),
        train.state,
        torch.from_numpy(validation.z),
        validation.state,
        config.seed,
    )
    context, _ = encode_windows(world, twin.scored, windows)
    past, actions = past_actions(scored, windows), window_actions(scored, windows)
    imagined = imagine(world, context, middle_actions(world, past), middle_actions(world, actions))
    return probe(torch.from_numpy(bounded(imagined, train.z)))


def _compare(ours: Measurement, other: Measurement) -> dict[str, Any]:
    def as_json(difference: Interval) -> dict[str, float]:
        return {key: round(value, 6) for key, value in asdict(difference).items()}

    both = [t for t in HORIZONS if t in ours.reliability.hri_draws and t in other.reliability.hri_draws]
    return {
        "hri_difference": {str(t): as_json(paired_difference(ours.reliability, other.reliability, t)) for t in both}
    }


def _twins(dataset: Dataset, episodes: list[int], config: EvaluateConfig) -> dict[str, Any]:
    """Return the medians of what twins are apart, or why there are none."""
    if not config.twins:
        return {"left_out": "twins=0"}
    try:
        apart = twin_divergence(
            dataset, horizon=config.horizon, count=config.twins, seed=config.seed, episodes=episodes
        )
    except WorldlineError as error:
        return {"left_out": str(error)}
    return {"count": len(apart), "nudge": NUDGE, "apart": [float(f"{x:.4g}") for x in np.median(apart, axis=0)]}


def _bound(model: _Model, windows: Windows, ours: Measurement, config: EvaluateConfig) -> Bound:
    """Measure gains and bound on a few windows, one an episode while there are enough of them."""
    world, dataset = model.world, model.scored.dataset
    assert isinstance(world, World)
    _, first = np.unique(windows.episodes, return_index=True)
    chosen = first[np.linspace(0, len(first) - 1, min(_BOUND_WINDOWS, len(first))).round().astype(int)]
    train = encode_split(world, model.fitted, "train", _BOUND_FRAMES, config.seed)
    return measure_bound(
        world,
        ours.rollouts.context[chosen],
        past_actions(dataset, windows)[chosen],
        window_actions(dataset, windows)[chosen],
        ours.rollouts.real[chosen],
        train.z,
        config.seed,
    )


@torch.inference_mode()
def _gauge(world: AnyWorld, windows: Windows, ours: Measurement) -> dict[str, Any] | None:
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
