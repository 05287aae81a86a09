"""Batches of a dataset for the two stages: pictures from the frame cache, or latents that were encoded once.

Shape legend: b windows, t steps, n looked-at frames, d latent.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from worldline.core.errors import WorldlineError
from worldline.core.progress import progress
from worldline.core.seeding import rng_for, seed_for
from worldline.data.cache import FrameCache
from worldline.data.lerobot import Dataset
from worldline.data.sampler import Sampler
from worldline.model.world import World
from worldline.train.config import StageConfig, rollout_length
from worldline.train.features import PictureFeatures
from worldline.train.objective import FrozenBatch, JointBatch, picked_frames

_CHUNK = 512  # frames encoded at once
_SHIFT = 6  # pixels


class JointWindows:
    """Batch number `step` of the joint stage, on the CPU; a pure function of the seed and the step."""

    def __init__(
        self,
        cache: FrameCache,
        stage: StageConfig,
        context: int,
        seed: int,
        features: PictureFeatures | None = None,
    ) -> None:
        self._cache, self._stage, self._context, self._seed = cache, stage, context, seed
        self._features = features
        lengths = _lengths(cache.dataset, "train")
        self._episodes = list(lengths)
        self._sampler = Sampler(lengths, context + stage.rollout, stage.batch, seed_for(seed, "joint"))

    def __call__(self, step: int) -> JointBatch:
        indices = self._sampler.indices(step)
        rollout = rollout_length(self._stage, step)
        picks = picked_frames(self._context, rollout, self._stage.target_stride)
        window = picks[-1] + 1
        frames = np.stack([self._cache.frames(e, s, window)[picks] for e, s in indices.tolist()])
        actions = _actions(self._cache.dataset, indices, self._context + rollout - 1)
        loose = self._loose(step)
        seen = torch.from_numpy(np.concatenate((frames.reshape(-1, *frames.shape[2:]), loose)))
        features = torch.zeros(len(seen), 0) if self._features is None else self._features(seen)
        return JointBatch(torch.from_numpy(frames), actions, torch.from_numpy(loose), features)

    def _loose(self, step: int) -> UInt8[np.ndarray, "m h w 3"]:
        """Draw frames from everywhere, move each by up to `_SHIFT` pixels, its edges repeated, and mirror it."""
        size, rng = self._cache.image_size, rng_for(self._seed, "loose", step)
        moved = np.empty((self._stage.loose_frames, size, size, 3), dtype=np.uint8)
        for place in moved:
            episode = self._episodes[rng.integers(len(self._episodes))]
            frame = self._cache.frames(episode, int(rng.integers(self._cache.dataset.lengths[episode])), 1)[0]
            down, across = (
                np.clip(np.arange(size) + rng.integers(-_SHIFT, _SHIFT + 1), 0, size - 1)[:: rng.choice((-1, 1))]
                for _ in range(2)
            )
            turned = frame[down][:, across]
            place[:] = turned.transpose(1, 0, 2) if rng.integers(2) else turned
        return moved


class FrozenWindows:
    """Batch number `step` of the frozen stage, on the CPU; a pure function of the seed, the step and the encoder."""

    def __init__(self, cache: FrameCache, stage: StageConfig, world: World, seed: int) -> None:
        self._cache, self._stage, self._context, self._seed = cache, stage, world.config.context, seed
        lengths = _lengths(cache.dataset, "train")
        self._sampler = Sampler(lengths, self._context + stage.rollout, stage.batch, seed_for(seed, "frozen"))
        self.latents = encode_episodes(world, cache, list(lengths))
        """Of every training frame, by episode."""

    def __call__(self, step: int) -> FrozenBatch:
        indices = self._sampler.indices(step)
        rollout = rollout_length(self._stage, step)
        window = self._context + rollout
        z = torch.stack([self.latents[e][s : s + window] for e, s in indices.tolist()])
        wanted = self._stage.pixel_frames if self._stage.grounding or self._stage.rollout_pixels else 0
        rng = rng_for(self._seed, "frozen-pixels", step)
        rows = rng.integers(0, len(indices), wanted)
        steps = rng.integers(self._context, window, wanted)
        size = self._cache.image_size
        frames = np.empty((wanted, 2, size, size, 3), dtype=np.uint8)
        for place, (row, at) in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
            episode, start = indices[row].tolist()
            frames[place] = self._cache.frames(episode, start + at - 1, 2)
        return FrozenBatch(
            z,
            _actions(self._cache.dataset, indices, window - 1),
            torch.from_numpy(rows),
            torch.from_numpy(steps),
            torch.from_numpy(frames),
        )


def encode_episodes(world: World, cache: FrameCache, episodes: list[int]) -> dict[int, Float[Tensor, "t d"]]:
    """Encode every frame of some episodes with the world as it is; latents end on the CPU."""
    encoded = {}
    total = sum(cache.dataset.lengths[e] for e in episodes)
    with torch.no_grad(), progress("encode", total) as task:
        for episode in episodes:
            encoded[episode] = encode_frames(world, cache.frames(episode))
            task.advance(len(encoded[episode]))
    return encoded


def encode_frames(world: World, frames: np.ndarray) -> Float[Tensor, "t d"]:
    """Encode pictures in pieces of a fixed size, so that memory stays small."""
    device = world.action_mean.device
    parts = [torch.from_numpy(frames[i : i + _CHUNK].copy()) for i in range(0, len(frames), _CHUNK)]
    with torch.no_grad():
        return torch.cat([world.encode(part.to(device)).float().cpu() for part in parts])


def sample_frames(cache: FrameCache, count: int, seed: int) -> np.ndarray:
    """Return `count` pictures of training episodes, drawn evenly; fewer where there are not so many."""
    dataset = cache.dataset
    places = [(episode, at) for episode in dataset.split("train") for at in range(dataset.lengths[episode])]
    chosen = sorted(rng_for(seed, "sample-frames").permutation(len(places))[:count].tolist())
    return np.stack([cache.frames(episode, at, 1)[0] for episode, at in (places[i] for i in chosen)])


def action_statistics(dataset: Dataset) -> tuple[Float32[np.ndarray, " a"], Float32[np.ndarray, " a"]]:
    """Return mean and standard deviation of the training episodes' actions.

    Raises:
        WorldlineError: an action is not finite.
    """
    actions = np.concatenate([dataset.actions(e) for e in dataset.split("train")]).astype(np.float64)
    if not np.isfinite(actions).all():
        raise WorldlineError(f"{dataset.path}: its actions must be finite numbers, and some are NaN or infinite")
    return actions.mean(axis=0).astype(np.float32), actions.std(axis=0).astype(np.float32)


def _lengths(dataset: Dataset, split: str) -> dict[int, int]:
    return {e: dataset.lengths[e] for e in dataset.split(split)}


def _actions(dataset: Dataset, indices: Int64[np.ndarray, "b 2"], count: int) -> Float[Tensor, "b t a"]:
    rows = [dataset.actions(e)[s : s + count] for e, s in indices.tolist()]
    return torch.from_numpy(np.stack(rows).astype(np.float32))
