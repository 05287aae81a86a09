"""What a frozen pre-trained encoder knows of the true state, beside the same network with its first weights."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from worldline.core.errors import WorldlineError, require_at_least
from worldline.core.files import read_json, write_bytes
from worldline.core.progress import progress
from worldline.core.result import write_result
from worldline.core.seeding import rng_for
from worldline.core.types import Factor
from worldline.data.cache import FrameCache
from worldline.data.lerobot import Dataset, open_dataset
from worldline.evaluate.probe import fit_probe
from worldline.model.factors import FactorHead, split_factors, squared_error
from worldline.model.video import CARD, VideoEncoder, load_encoder
from worldline.train.checkpoint import RESULT
from worldline.train.learner import first_weights
from worldline.train.loop import threads
from worldline.train.unseen import told

_BATCH = 16
_DRAWS = 2000
_FOLDS = 5
_KEPT = ("steps", "loss", "clips", "parameters", "lost", "never_seen")
"""What is taken over from the result of the pre-training."""


@dataclass(frozen=True, kw_only=True)
class PretrainBenchConfig:
    """A pre-trained encoder and episodes with a true state, which it has not seen."""

    encoder: Path
    """The folder of a finished worldline pretrain run."""
    data: Path
    """Episodes of a simulator, other ones than those it was trained on."""
    stride: int = 2
    """Frames of an episode from one frame of a clip to the next; that of the training clips."""
    clips: int = 2000
    """Clips, drawn evenly from all episodes. Every fifth of the episodes is the test of probes fitted on the others."""
    probes: int = 3
    """Probes with seeds of their own; their errors are averaged."""
    seed: int = 0
    """Of the clips and the draws; the first weights are those of the run's own seed."""
    threads: int = 1
    """CPU threads."""
    reports: Path = Path("reports")
    """The report is written into a folder DATE-pretrain in it."""

    def __post_init__(self) -> None:
        require_at_least(self, {"stride": 1, "probes": 1, "threads": 0, "clips": 1})


def run(config: PretrainBenchConfig) -> Path:
    """Fit probes on features of both encoders; write `result.json` and `report.md`, return the report.

    Raises:
        WorldlineError: there is no finished run, or the data name no factors or have too short episodes.
    """
    finished = read_json(config.encoder / RESULT)
    with threads(config.threads):
        trained = load_encoder(config.encoder)
        sight = trained.config
        dataset = open_dataset(config.data)
        cache = FrameCache(dataset, sight.image_size)
        span = (sight.frames - 1) * config.stride + 1
        places = _places(dataset.lengths, span, config.clips, config.seed)
        state = np.stack([_states(dataset, episode)[start + span - 1] for episode, start in places.tolist()])
        training = read_json(config.encoder / CARD)["training"]
        fresh = first_weights(sight, training["config"]["seed"]).encoder.eval()
        errors: dict[str, dict[str, np.ndarray]] = {}
        spread: dict[str, np.ndarray] = {}
        for name, encoder in (("pretrained", trained), ("random", fresh)):
            with progress(f"encode ({name})", len(places)) as task:
                z = _features(encoder, cache, places, config.stride, task.advance)
            errors[name], spread = _errors(dataset.spec.factors, z, state, places[:, 0], config.probes)
        figures = {
            "encoder": training,
            "pretraining": {name: finished[name] for name in _KEPT},
            "data": {"name": dataset.spec.name, "fingerprint": dataset.fingerprint, "episodes": dataset.num_episodes},
            "clips": config.clips,
            "folds": _FOLDS,
            "stride": config.stride,
            "probes": config.probes,
            "factors": _scores(errors, spread, places[:, 0], config.seed),
        }
    folder = Path(config.reports) / f"{date.today():%Y-%m-%d}-pretrain"
    write_result(folder / "result.json", "pretrain-probe", figures, {"pretraining": finished["timing"]})
    report = folder / "report.md"
    write_bytes(report, render(read_json(folder / "result.json")).encode())
    return report


def _states(dataset: Dataset, episode: int) -> Float[np.ndarray, "t s"]:
    states = dataset.state(episode)
    if states is None:
        raise WorldlineError(f"{dataset.path} holds no true states; take episodes that `worldline collect` made")
    return states


def _places(lengths: Any, span: int, count: int, seed: int) -> Int64[np.ndarray, "n 2"]:
    """Draw (episode, start) of clips, evenly over the episodes that are long enough."""
    fit = [episode for episode, length in enumerate(lengths) if length >= span]
    if len(fit) < _FOLDS:
        raise WorldlineError(f"{len(fit)} episodes have {span} frames, {_FOLDS} are wanted; take a shorter stride")
    rng = rng_for("probe clips", seed)
    chosen = [fit[i % len(fit)] for i in range(count)]
    return np.array([(episode, rng.integers(lengths[episode] - span + 1)) for episode in chosen], dtype=np.int64)


@torch.inference_mode()
def _features(
    encoder: VideoEncoder, cache: FrameCache, rows: Int64[np.ndarray, "n 2"], stride: int, advance: Any
) -> Float[Tensor, "n e"]:
    """Encode clips; of each the mean over the last tubelets' features, where the state is asked for."""
    config, found = encoder.config, []
    span = (config.frames - 1) * stride + 1
    for first in range(0, len(rows), _BATCH):
        part = rows[first : first + _BATCH]
        clips = torch.from_numpy(cache.gather(part, span)[:, ::stride].copy())
        found.append(encoder(clips).unflatten(1, (config.grid[0], -1))[:, -1].mean(dim=1))
        advance(len(part))
    return torch.cat(found).clone()


def _errors(
    factors: tuple[Factor, ...],
    z: Float[Tensor, "n e"],
    state: Float[np.ndarray, "n s"],
    episode: Int64[np.ndarray, " n"],
    probes: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return squared errors of each clip by factor, of probes and of the training mean, none of which saw its episode.

    Of five folds of episodes one is tested, one stops the probe and three train it, in turns.
    """
    fold = episode % _FOLDS
    errors = {f.name: np.zeros(len(z)) for f in factors}
    spread = {f.name: np.zeros(len(z)) for f in factors}
    for number in range(_FOLDS):
        test, stop = fold == number, fold == (number + 1) % _FOLDS
        fit = ~(test | stop)
        head = FactorHead.fit(factors, state[fit])
        truth = split_factors(state[test], factors)
        for name, values in truth.items():
            spread[name][test] = squared_error(np.broadcast_to(head.mean[name], values.shape), values)
        for seed in range(probes):
            probe = fit_probe(head, z[fit], state[fit], z[stop], state[stop], seed)
            read = probe(z[test])
            for name, values in truth.items():
                errors[name][test] += squared_error(read[name], values) / probes
    return errors, spread


def _scores(
    errors: dict[str, dict[str, np.ndarray]], spread: dict[str, np.ndarray], episode: np.ndarray, seed: int
) -> dict[str, Any]:
    """Return R^2 of both encoders and the 95% interval of the difference, from draws of whole test episodes."""
    names, where = np.unique(episode, return_inverse=True)
    rng = rng_for("probe draws", seed)
    draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=_DRAWS)  # (draws, episodes)

    def by_episode(values: np.ndarray) -> np.ndarray:
        return np.bincount(where, weights=values, minlength=len(names))

    found = {}
    for factor, base in spread.items():
        per = {name: by_episode(error[factor]) for name, error in errors.items()}
        whole = by_episode(base)
        r2 = {name: float(1 - sums.sum() / whole.sum()) for name, sums in per.items()}
        gain = (draws @ (per["random"] - per["pretrained"])) / (draws @ whole)
        low, high = np.percentile(gain, (2.5, 97.5))
        found[factor] = {**r2, "gain": r2["pretrained"] - r2["random"], "interval": [float(low), float(high)]}
    return found


def render(result: dict[str, Any]) -> str:
    """Write the report from `result.json` alone."""
    made, trained = result["provenance"], result["encoder"]
    config = trained["config"]
    model, rows = config["model"], result["factors"]
    beaten = [name for name, row in rows.items() if row["interval"][0] > 0 and row["pretrained"] > 0]
    verdict = f"beats its first weights on {' and '.join(beaten)}" if beaten else "does not beat its first weights"
    run, timing = result["pretraining"], result["timing"]["pretraining"]
    unseen = told(run["never_seen"]) or "none"
    lines = [
        f"# A frozen encoder, pre-trained without actions or states, {verdict}",
        "",
        f"A video transformer of {model['width']} channels and {model['depth']} blocks, {trained['step']} updates of "
        f"{config['batch']} clips ({model['frames']} frames of {model['image_size']} px) of masked pre-training, "
        f"target `{config['learner']['target']}`. Then frozen: a probe of one hidden layer reads the true state of "
        f"{result['data']['name']} at a clip's last frame from the mean of its last features. The "
        f"{result['clips']} clips are of {result['data']['episodes']} episodes that pre-training never saw; each fifth "
        "of the episodes is the test of probes that were fitted and stopped on the others. Beside it the "
        "same network with the weights that this training began with, on the same clips, with probes of the same kind.",
        "",
        f"The pre-training: {run['parameters'] / 1e6:.2f} million weights, {run['clips']:,} clips, "
        f"{timing['cpu_seconds'] / 60:.1f} minutes of CPU time in {timing['seconds'] / 60:.1f} minutes"
        + (f" (since it was resumed at update {timing['resumed_at']})" if timing["resumed_at"] else "")
        + f", last loss {run['loss']:.4f}. Clips not read in their turn: {run['lost']}; never seen: {unseen}.",
        "",
        "| factor | R^2 pre-trained | R^2 first weights | gain, 95% interval over test episodes |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        low, high = row["interval"]
        lines.append(
            f"| {name} | {row['pretrained']:.3f} | {row['random']:.3f} | "
            f"{row['gain']:+.3f} ({low:+.3f} to {high:+.3f}) |"
        )
    lines += [
        "",
        f"The interval is paired: {_DRAWS} draws of whole test episodes, both encoders' errors from the same draw; "
        f"errors are means over {result['probes']} probes. Probes of different folds share training episodes, so that "
        "the intervals are a little too narrow.",
        "",
        f"Machine: {made['machine']['processor']}, {made['machine']['cores']} cores; torch "
        f"{made['versions'].get('torch')}; commit {made['commit']}.",
        "",
        f"Pre-trained by `{trained['provenance']['command']}`.",
        "",
        f"Again: `{made['command']}`",
        "",
    ]
    return "\n".join(lines)
