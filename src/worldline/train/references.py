"""The reference pack of a dataset: what a supervised encoder can see, and what actions alone can tell.

Made once for a dataset, stored beside it and tied to its fingerprint; `model/references.py` is its format and reader.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from safetensors.torch import save
from torch import Tensor, nn

from worldline.core.errors import WorldlineError, require_at_least
from worldline.core.files import fsync_directory, read_json, sha256_file, write_bytes, write_json
from worldline.core.progress import Task, progress
from worldline.core.seeding import rng_for, seed_for
from worldline.data.cache import FrameCache
from worldline.data.lerobot import Dataset
from worldline.model.factors import FactorHead
from worldline.model.references import ACTIONS_ONLY, CANONICAL, CARD, DIRECTORY, FORMAT, ActionsOnly, CanonicalEncoder

_CHECKS = 30
"""How often a training looks at the validation episodes."""
_QUALITY_FRAMES = 3000
"""Of test episodes, on which the encoder is measured."""
_LEAST_UPDATES = 20
"""A tenth of them is the learning rate's rise, which needs two."""


@dataclass(frozen=True, kw_only=True)
class ReferencesConfig:
    """How the reference pack is made. Each training keeps the weights that did best on validation episodes."""

    image_size: int | None = None
    """Pixels along a side of the pictures that the canonical encoder sees; None means the dataset's own. For worlds of
    another size, so that it sees no more than they do."""
    seed: int = 0
    """Of weights, frames and batches."""
    max_frames: int = 60_000
    """Training frames that the canonical encoder sees at most."""
    encoder_updates: int = 3000
    """Of the canonical encoder."""
    encoder_batch: int = 64
    """Frames an update."""
    actions_updates: int = 600
    """Of the actions-only forecaster."""
    actions_batch: int = 64
    """Windows an update."""
    actions_hidden: int = 64
    """Width of the forecaster's GRU."""
    horizon: int = 100
    """Steps of the forecaster's windows."""
    good_enough: float = 0.005
    """Share of the factors' variance, left unexplained on validation episodes, at which a training ends."""

    def __post_init__(self) -> None:
        least = {
            "max_frames": 1,
            "encoder_updates": _LEAST_UPDATES,
            "encoder_batch": 1,
            "actions_updates": _LEAST_UPDATES,
            "actions_batch": 1,
            "actions_hidden": 1,
            "horizon": 1,
        }
        require_at_least(self, least, "references: ")
        if self.image_size is not None and (self.image_size < 16 or self.image_size % 16):
            raise WorldlineError(
                f"references: image_size must be a positive multiple of 16, or null for the dataset's own, got "
                f"{self.image_size}"
            )

    def identity(self) -> dict[str, Any]:
        """Return what decides the content of the pack."""
        return {each.name: getattr(self, each.name) for each in fields(ReferencesConfig)}


@dataclass(frozen=True, kw_only=True)
class MakeReferencesConfig(ReferencesConfig):
    """Which dataset to make the pack of, and how."""

    dataset: str
    """The dataset: a LeRobot v3 directory with true states. The pack is kept in it."""


def make_references(dataset: Dataset, config: ReferencesConfig | None = None) -> Path:
    """Make the dataset's reference pack, or return the one that is there if data and configuration are the same.

    Trains the canonical encoder (frames to factors) and the actions-only forecaster on training episodes, stops both
    early on validation episodes, and measures R^2 and RMSE on test episodes. Repeatable to the bit on one machine with
    the same number of threads. One process makes a pack, others wait for it.

    Raises:
        WorldlineError: the dataset has no factors, or a split is empty.
    """
    config = config or ReferencesConfig()
    folder = dataset.path / DIRECTORY
    if _is_current(folder, dataset, config):
        return folder
    cache = folder.parent / ".cache"
    if not os.access(cache if cache.exists() else folder.parent, os.W_OK):
        raise WorldlineError(f"{folder}: not writable; the reference pack is kept there, copy the dataset")
    cache.mkdir(exist_ok=True)
    with open(cache / "references.lock", "w") as lock:  # the system lets go of it however the process ends
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_current(folder, dataset, config):
            _make(folder, dataset, config)
    return folder


def _make(folder: Path, dataset: Dataset, config: ReferencesConfig) -> None:
    splits = {name: dataset.split(name) for name in ("train", "validation", "test")}
    if not all(splits.values()):
        raise WorldlineError(
            f"{dataset.path}: a reference pack needs episodes in every split, got "
            f"{', '.join(f'{len(e)} {name}' for name, e in splits.items())}; collect more episodes"
        )
    train_state = np.concatenate([_state(dataset, episode) for episode in splits["train"]])
    head = FactorHead.fit(dataset.spec.factors, train_state)
    for left_over in folder.parent.glob(f".{DIRECTORY}.*.tmp"):  # by a process that was killed
        shutil.rmtree(left_over)
    temporary = folder.with_name(f".{DIRECTORY}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        # outside the bar below: decoding has its own
        cache = FrameCache(dataset, config.image_size)
        with progress(f"references {dataset.spec.name}", config.encoder_updates + config.actions_updates) as task:
            encoder = _train_encoder(dataset, cache, head, splits, config, task)
            forecaster = _train_actions_only(dataset, head, splits, config, task)
        shown = _labelled(dataset, cache, _frame_indices(dataset, splits["test"], _QUALITY_FRAMES, 0))
        quality = encoder.quality(head, *shown)
        write_bytes(temporary / CANONICAL, save(encoder.state_dict()))
        write_bytes(temporary / ACTIONS_ONLY, save(forecaster.state_dict()))
        card = {
            "format": FORMAT,
            "fingerprint": dataset.fingerprint,
            "config": config.identity(),
            "factors": {name: {"r2": r2, "rmse": rmse} for name, (r2, rmse) in quality.items()},
            "head": head.to_json(),
            "actions_only": {"hidden": config.actions_hidden},
            "files": {name: sha256_file(temporary / name) for name in (CANONICAL, ACTIONS_ONLY)},
        }
        write_json(temporary / CARD, card)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
        fsync_directory(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_current(folder: Path, dataset: Dataset, config: ReferencesConfig) -> bool:
    if not (folder / CARD).exists():
        return False
    card = read_json(folder / CARD)
    same = (card.get("format"), card.get("fingerprint"), card.get("config")) == (
        FORMAT,
        dataset.fingerprint,
        config.identity(),
    )
    return same and all(
        (folder / name).exists() and sha256_file(folder / name) == found for name, found in card["files"].items()
    )


def _state(dataset: Dataset, episode: int) -> Float32[np.ndarray, "t s"]:
    state = dataset.state(episode)
    if state is None:
        raise WorldlineError(
            f"{dataset.path}: this dataset has no true state, which references are trained on; use one that "
            "`worldline collect` made"
        )
    return state


def _frame_indices(dataset: Dataset, episodes: list[int], at_most: int, seed: int) -> Int64[np.ndarray, "n 2"]:
    """Return at most `at_most` pairs of (episode, frame), drawn evenly, in order."""
    pairs = np.array([(e, t) for e in episodes for t in range(dataset.lengths[e])])
    if len(pairs) > at_most:
        pairs = pairs[np.sort(rng_for(seed, "reference-frames").choice(len(pairs), at_most, replace=False))]
    return pairs


def _labelled(
    dataset: Dataset, cache: FrameCache, pairs: Int64[np.ndarray, "n 2"]
) -> tuple[Tensor, Float32[np.ndarray, "n s"]]:
    frames = torch.from_numpy(cache.gather(pairs, 1)[:, 0])
    return frames, np.stack([_state(dataset, e)[t] for e, t in pairs.tolist()])


def _train_encoder(
    dataset: Dataset,
    cache: FrameCache,
    head: FactorHead,
    splits: dict[str, list[int]],
    config: ReferencesConfig,
    task: Task,
) -> CanonicalEncoder:
    pairs = _frame_indices(dataset, splits["train"], config.max_frames, config.seed)
    frames, state = _labelled(dataset, cache, _frame_indices(dataset, splits["validation"], 1000, config.seed))
    targets = head.targets(state)
    rng = rng_for(config.seed, "reference-encoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "reference-encoder"))
        model = CanonicalEncoder(cache.image_size, head.size)

    def update() -> Tensor:
        batch = pairs[rng.integers(len(pairs), size=config.encoder_batch)]
        pictures, truth = _labelled(dataset, cache, batch)
        return head.loss(model(pictures), head.targets(truth))

    def validate() -> float:
        return float(head.loss(model(frames), targets))

    _train(model, update, validate, config.encoder_updates, 3e-3, config.good_enough, task, "encoder")
    return model


def _train_actions_only(
    dataset: Dataset, head: FactorHead, splits: dict[str, list[int]], config: ReferencesConfig, task: Task
) -> ActionsOnly:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "reference-actions"))
        model = ActionsOnly(dataset.spec.action_dim, head.size, config.actions_hidden)
    actions = torch.from_numpy(np.concatenate([dataset.actions(e) for e in splits["train"]]))
    model.action_mean.copy_(actions.mean(0))
    model.action_scale.copy_(actions.std(0).clamp(min=1e-6))
    rng = rng_for(config.seed, "reference-actions")
    steps = min(config.horizon, max(dataset.lengths) - 1)

    def windows(episodes: list[int], count: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        long = [e for e in episodes if dataset.lengths[e] > steps]
        chosen = [long[i] for i in draw.integers(len(long), size=count)]
        starts = [int(draw.integers(dataset.lengths[e] - steps)) for e in chosen]
        pairs = list(zip(chosen, starts, strict=True))
        inputs = np.stack([dataset.actions(e)[s : s + steps] for e, s in pairs])
        truth = np.stack([_state(dataset, e)[s : s + steps + 1] for e, s in pairs])
        return torch.from_numpy(inputs), head.targets(truth)

    for name in ("train", "validation"):
        if not any(dataset.lengths[e] > steps for e in splits[name]):
            raise WorldlineError(f"{dataset.path}: no {name} episode has over {steps} frames; collect longer episodes")
    inputs, targets = windows(splits["validation"], 256, rng_for(config.seed, "reference-actions-validation"))

    def update() -> Tensor:
        x, y = windows(splits["train"], config.actions_batch, rng)
        return head.loss(model(x), y)

    def validate() -> float:
        return float(head.loss(model(inputs), targets))

    _train(model, update, validate, config.actions_updates, 5e-3, config.good_enough, task, "actions only")
    return model


def _train(
    model: nn.Module,
    update: Callable[[], Tensor],
    validate: Callable[[], float],
    updates: int,
    rate: float,
    good_enough: float,
    task: Task,
    label: str,
) -> None:
    """Train by AdamW with a cosine schedule, and keep the weights that did best on validation episodes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=updates, pct_start=0.1)
    best, kept, every = float("inf"), model.state_dict(), max(updates // _CHECKS, 1)
    for number in range(1, updates + 1):
        model.train()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(update())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        task.advance()
        if number % every == 0 or number == updates:
            model.eval()
            with torch.no_grad():
                loss = validate()
            if loss < best:
                best, kept = loss, {name: tensor.clone() for name, tensor in model.state_dict().items()}
            task.advance(0, note=f"{label}: validation loss {loss:.4f}")
            if loss < good_enough:
                task.advance(updates - number)
                break
    model.load_state_dict(kept)
    model.eval()
