"""Which windows of held-out episodes a model is judged on, and what it imagines of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.seeding import rng_for
from worldline.data.cache import FrameCache
from worldline.data.lerobot import Dataset
from worldline.evaluate.drift import RealFrames, Rollouts
from worldline.model.foreign import AnyWorld, context_frames, frame_skip
from worldline.model.world import World

MIN_WINDOWS = 200
MIN_EPISODES = 5
_BATCH = 256
_COPY = 0.02
"""Root mean squared distance, in standard deviations, under which two stretches of states and actions are one. Between
episodes of one simulator the nearest were 0.11 apart."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows by (episode, index of the frame at h = 0); every episode's are spread evenly over it."""

    index: Int64[np.ndarray, "n 2"]
    context: int
    """Frames that a model may see, the one at h = 0 included."""
    horizon: int

    @property
    def episodes(self) -> Int64[np.ndarray, " n"]:
        return self.index[:, 0]


def held_out(dataset: Dataset, test: Dataset | None) -> tuple[Dataset, list[int]]:
    """Return the episodes to score and where they lie: the test split's, or all of another dataset's."""
    return (dataset, dataset.split("test")) if test is None else (test, list(range(test.num_episodes)))


def choose_windows(
    fitted: Dataset, *, context: int, horizon: int, count: int, scored: Dataset | None = None
) -> Windows:
    """Stride about `count` windows through the test episodes that are long enough, or through those of `scored`.

    Raises:
        WorldlineError: under 200 windows or under 5 episodes would be left, or training episodes hold some of them.
    """
    dataset, test = held_out(fitted, scored)
    room = {e: dataset.lengths[e] - horizon - context + 1 for e in test}  # anchors that fit
    usable = [e for e in test if room[e] > 0]
    available = sum(room[e] for e in usable)
    if len(usable) < MIN_EPISODES or available < MIN_WINDOWS or count < MIN_WINDOWS:
        raise WorldlineError(
            f"{dataset.path}: the metric needs at least {MIN_WINDOWS} windows from {MIN_EPISODES} test episodes; "
            f"asked for {count}, and {len(usable)} of {len(test)} test episodes have the {context + horizon} frames of "
            f"a window (context {context}, horizon {horizon}), which makes {available} windows; collect more or longer "
            "episodes, or lower the horizon"
        )
    index: list[tuple[int, int]] = []
    left = count
    for place, episode in enumerate(sorted(usable, key=lambda e: room[e])):
        share = min(room[episode], -(-left // (len(usable) - place)))
        anchors = np.linspace(0, room[episode] - 1, share).round().astype(int) + context - 1
        index += [(episode, int(anchor)) for anchor in anchors]
        left -= share
    windows = Windows(index=np.array(sorted(index)), context=context, horizon=horizon)
    _require_unseen(fitted, dataset, windows)
    return windows


def _require_unseen(fitted: Dataset, scored: Dataset, windows: Windows) -> None:
    """Check that no test episode happens in training or validation episodes too, shifted in time or not.

    Splits go by an episode's index, which tells nothing of its content: a model or a probe that has seen the episode
    under another index would read its future from memory. States and actions are compared at five moments of a window.

    Raises:
        WorldlineError: at least half of a test episode's windows are seen elsewhere.
    """
    at = np.linspace(0, windows.horizon, 5).round().astype(int)

    def stretches(dataset: Dataset, episode: int, starts: Int64[np.ndarray, " m"]) -> Float32[np.ndarray, "m 5 f"]:
        rows = np.concatenate([states_of(dataset, episode), dataset.actions(episode)], axis=1)
        stretched: np.ndarray = rows[starts[:, None] + at]
        return stretched

    held_out = np.unique(windows.episodes).tolist()
    test = np.concatenate([stretches(scored, e, windows.index[windows.episodes == e, 1]) for e in held_out])
    scale = test.std(axis=(0, 1))
    unit = np.where(scale > 0, scale, 1.0) * np.sqrt(test[0].size)
    sought = (test / unit).reshape(len(test), -1)
    nearest, source = np.full(len(sought), np.inf), np.zeros(len(sought), dtype=np.int64)
    for episode in (e for split in ("train", "validation") for e in fitted.split(split)):
        starts = np.arange(fitted.lengths[episode] - windows.horizon)
        seen = (stretches(fitted, episode, starts) / unit).reshape(len(starts), sought.shape[1])
        squares = np.square(seen).sum(axis=1)[:, None] + np.square(sought).sum(axis=1) - 2 * seen @ sought.T
        found = np.sqrt(squares.clip(min=0).min(axis=0, initial=np.inf))
        nearest, source = np.minimum(nearest, found), np.where(found < nearest, episode, source)
    for episode in held_out:
        copied = (nearest < _COPY) & (windows.episodes == episode)
        if 2 * copied.sum() >= (windows.episodes == episode).sum():
            raise WorldlineError(
                f"{scored.path}: test episode {episode} happens again in episode {source[copied][0]}"
                + (f" of {fitted.path}" if scored is not fitted else "")
                + ", which models and probes are fitted on: expected test episodes that nobody has seen; remove one of "
                "the two"
            )


def encode_frames(world: AnyWorld, frames: UInt8[np.ndarray, "m h w 3"]) -> Float32[np.ndarray, "m d"]:
    """Encode frames in batches."""
    with torch.inference_mode():
        parts = [world.encode(torch.from_numpy(frames[i : i + _BATCH].copy())) for i in range(0, len(frames), _BATCH)]
        latents: np.ndarray = torch.cat(parts).numpy()
    return latents


def encode_split(world: AnyWorld, cache: FrameCache, split: str, at_most: int, seed: int) -> RealFrames:
    """Encode at most `at_most` frames of a split, drawn evenly over all its frames."""
    dataset = cache.dataset
    pairs = np.array([(e, t) for e in dataset.split(split) for t in range(dataset.lengths[e])])
    if len(pairs) > at_most:
        pairs = pairs[np.sort(rng_for(seed, "probe-frames", split).choice(len(pairs), at_most, replace=False))]
    latents = [encode_frames(world, cache.gather(pairs[i : i + 1024], 1)[:, 0]) for i in range(0, len(pairs), 1024)]
    states = np.concatenate(
        [states_of(dataset, e)[pairs[pairs[:, 0] == e, 1]] for e in np.unique(pairs[:, 0]).tolist()]
    )
    return RealFrames(np.concatenate(latents), states)


def states_of(dataset: Dataset, episode: int) -> Float32[np.ndarray, "t s"]:
    """Return an episode's true states.

    Raises:
        WorldlineError: the dataset has none.
    """
    state = dataset.state(episode)
    if state is None or not dataset.spec.factors:
        raise WorldlineError(
            f"{dataset.path}: a model is scored on factors of a true state, and this dataset has none; use one that "
            "`worldline collect` made"
        )
    return state


def window_states(dataset: Dataset, windows: Windows) -> Float32[np.ndarray, "n t1 s"]:
    """Return the true states at h = 0 ... T."""
    return np.stack([states_of(dataset, e)[t : t + windows.horizon + 1] for e, t in windows.index.tolist()])


def training_actions(dataset: Dataset) -> Float32[np.ndarray, "m a"]:
    """Return the actions of all training episodes."""
    return np.concatenate([dataset.actions(e) for e in dataset.split("train")])


def window_actions(dataset: Dataset, windows: Windows) -> Float32[np.ndarray, "n t a"]:
    """Return the recorded actions that lead from h = 0 to h = T."""
    return np.stack([dataset.actions(e)[t : t + windows.horizon] for e, t in windows.index.tolist()])


def encode_windows(
    world: AnyWorld, cache: FrameCache, windows: Windows
) -> tuple[Float32[np.ndarray, "n c d"], Float32[np.ndarray, "n t1 d"]]:
    """Return latents of the context and of h = 0 ... T; each frame is encoded once, however many windows share it."""
    before, after = windows.context - 1, windows.horizon + 1
    context, real = [], []
    for episode in np.unique(windows.episodes):
        anchors = windows.index[windows.episodes == episode, 1]
        first = int(anchors.min()) - before
        z = encode_frames(world, cache.frames(int(episode), first, int(anchors.max()) + after - first))
        context += [z[t - before - first : t + 1 - first] for t in anchors]
        real += [z[t - first : t + after - first] for t in anchors]
    return np.stack(context), np.stack(real)


@torch.inference_mode()
def imagine(
    world: AnyWorld,
    context: Float32[np.ndarray, "n c d"],
    past: Float32[np.ndarray, "n c1 a"],
    actions: Float32[np.ndarray, "n t a"],
) -> Float32[np.ndarray, "n t1 d"]:
    """Roll out open loop from the last `world.config.context` real latents; row 0 is the last of them.

    A world with a frame skip of k takes every k-th latent and k actions at once. What it imagined last is held in
    between, where nobody is scored.
    """
    skip, kept = frame_skip(world), context_frames(world)
    steps, (n, _, a) = actions.shape[1], actions.shape
    z = torch.from_numpy(context[:, context.shape[1] - kept :: skip].copy())
    before = torch.from_numpy(past[:, past.shape[1] - kept + 1 :].reshape(n, -1, skip * a))
    after = torch.from_numpy(actions[:, : steps // skip * skip].reshape(n, -1, skip * a))
    rolled: np.ndarray = torch.cat([z[:, -1:], world.rollout(world.begin(z, before), after)], dim=1).numpy()
    return rolled.repeat(skip, axis=1)[:, : steps + 1]


def past_actions(dataset: Dataset, windows: Windows) -> Float32[np.ndarray, "n c1 a"]:
    """Return the actions between the frames of the context."""
    return np.stack([dataset.actions(e)[t - windows.context + 1 : t] for e, t in windows.index.tolist()])


def roll_out(
    models: Sequence[tuple[AnyWorld, FrameCache]], windows: Windows, donor: Int64[np.ndarray, " n"]
) -> list[Rollouts]:
    """Encode the windows and imagine them with the recorded actions and with those of the windows `donor`.

    In order of time: when a window is imagined, no model has been shown anything of that episode beyond its context,
    so that one which keeps what it is shown, or what another was shown, cannot have kept the future. Recorded and
    swapped actions come shuffled in one batch, and no bookkeeping tells which are which.
    """
    dataset, n = models[0][1].dataset, len(windows.index)
    past, actions = past_actions(dataset, windows), window_actions(dataset, windows)
    imagined: list[list[np.ndarray]] = [[np.empty(0)] * (2 * n) for _ in models]
    for turn in _turns(windows):
        first = windows.index[turn] - [0, windows.context - 1]
        rows = rng_for("rows-of-a-rollout", n).permutation(2 * len(turn))
        who = np.concatenate([turn, turn])[rows]
        acts = np.concatenate([actions[turn], actions[donor[turn]]])[rows]
        for (world, cache), kept in zip(models, imagined, strict=True):
            frames = cache.gather(first, windows.context)  # (m, c, h, w, 3)
            context = encode_frames(world, frames.reshape(-1, *frames.shape[2:])).reshape(*frames.shape[:2], -1)
            z_hat = imagine(world, np.concatenate([context, context])[rows], past[who], acts)
            for row, z in zip(np.concatenate([turn, turn + n])[rows], z_hat, strict=True):
                kept[row] = z
    rollouts = []
    for (world, cache), kept in zip(models, imagined, strict=True):
        context, real = encode_windows(world, cache, windows)
        imagination, swapped = np.stack(kept[:n]), np.stack(kept[n:])
        rollouts.append(Rollouts(context=context, real=real, imagined=imagination, swapped=swapped))
    return rollouts


def _turns(windows: Windows) -> list[Int64[np.ndarray, " m"]]:
    """Return windows in groups: the first of every episode, then the second of those that have one, and so on."""
    place = np.arange(len(windows.index)) - np.searchsorted(windows.episodes, windows.episodes)
    return [np.flatnonzero(place == turn) for turn in range(place.max() + 1)]


def middle_actions(world: World, like: Float[np.ndarray, "*b a"]) -> Float32[np.ndarray, "*b a"]:
    """Return the middle of the range in place of every action: what an action-free twin is trained and run on."""
    middle = (np.array(world.spec.action_low) + np.array(world.spec.action_high)) / 2
    return np.broadcast_to(middle.astype(np.float32), like.shape).copy()
