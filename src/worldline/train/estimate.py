"""Fit the gauge's error estimator on validation episodes: training episodes would flatter the predictor.

Shape legend: n rollouts, t steps, c context, d latent, a action, p places (rollout, step), f features.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from worldline.core.errors import WorldlineError
from worldline.core.seeding import rng_for, seed_for
from worldline.data.cache import FrameCache
from worldline.data.lerobot import Dataset
from worldline.model.estimator import ErrorEstimator, memory_size
from worldline.model.world import World
from worldline.train.windows import encode_episodes

STEPS = 100
"""Imagined in each rollout, where the episodes are long enough."""
_LEAST_STEPS = 10
_LEAST_EPISODES = 5
_ROLLOUTS = 1024
_EVERY = 4  # neighbouring steps say nearly the same: of every rollout each fourth is kept, each beginning elsewhere
_STOPPING = 0.2  # share of the episodes that decide when to stop
_UPDATES, _CHECK_EVERY, _BATCH = 1500, 100, 512
_DROPOUT, _RATE, _DECAY = 0.3, 1e-3, 0.1
_LEAST_ERROR = 1e-4  # smaller ones are all alike, and their logarithms are not


class Seen(NamedTuple):
    """Places of rollouts, with what the estimator is told there and the true error."""

    features: Float[Tensor, "p f"]
    error: Float[Tensor, " p"]
    episode: Int64[Tensor, " p"]


def rollout_steps(dataset: Dataset, context: int) -> int:
    """Return how many steps the estimator's rollouts would have; 0 where the validation episodes do not suffice."""
    longest = sorted((dataset.lengths[e] for e in dataset.split("validation")), reverse=True)[:_LEAST_EPISODES]
    steps = min(STEPS, longest[-1] - context) if len(longest) == _LEAST_EPISODES else 0
    return steps if steps >= _LEAST_STEPS else 0


def fit_estimator(world: World, cache: FrameCache, seed: int) -> ErrorEstimator:
    """Fit an estimator of the world's error on rollouts of validation episodes, stopped on some of these episodes.

    A pure function of world, data and seed on a CPU with the same number of threads.

    Raises:
        WorldlineError: the gauge is not fitted, or there are too few validation episodes.
    """
    dataset, context = cache.dataset, world.config.context
    steps = rollout_steps(dataset, context)
    if not world.gauge.fitted or not steps:
        raise WorldlineError(
            f"{dataset.path}: an error estimator wants a world with a fitted gauge and at least {_LEAST_EPISODES} "
            f"validation episodes of {context + _LEAST_STEPS} frames; collect more episodes"
        )
    seen = observe_errors(world, cache, steps)
    episodes = rng_for(seed, "estimator-stops").permutation(np.unique(seen.episode.numpy()))
    stopping = torch.isin(seen.episode, torch.from_numpy(episodes[: math.ceil(_STOPPING * len(episodes))]))
    return fit_to(seen, stopping, world.config.latent_dim, memory_size(world.predictor.initial(1)), seed)


@torch.no_grad()
def observe_errors(world: World, cache: FrameCache, steps: int) -> Seen:
    """Roll out from moments spread evenly over the validation episodes, and keep features and true errors."""
    dataset, context = cache.dataset, world.config.context
    room = {e: dataset.lengths[e] - context - steps + 1 for e in dataset.split("validation")}
    room = {e: places for e, places in room.items() if places > 0}
    latents = encode_episodes(world, cache, list(room))
    each = math.ceil(_ROLLOUTS / len(room))
    index = [(e, int(s)) for e, r in room.items() for s in np.unique(np.linspace(0, r - 1, min(each, r)).round())]
    windows = torch.stack([latents[e][s : s + context + steps] for e, s in index])
    taken = np.stack([dataset.actions(e)[s : s + context + steps - 1] for e, s in index])
    device = world.action_mean.device
    z, actions = windows.to(device), torch.from_numpy(taken).to(device)
    blank = ErrorEstimator(world.config.latent_dim, memory_size(world.predictor.initial(1)))
    episode = torch.tensor([e for e, _ in index])
    state = world.begin(z[:, :context], actions[:, : context - 1])
    rows = torch.arange(len(index))
    parts = []
    for step in range(1, steps + 1):
        state = world.step(state, actions[:, context - 2 + step])
        kept = rows[(rows + step) % _EVERY == 0]
        memory = tuple(part[kept].cpu() for part in state.memory)
        white = ((state.z[kept] - world.gauge.mean) @ world.gauge.whitening).cpu()
        error = world.gauge.error(state.z[kept], z[kept, context - 1 + step]).cpu()
        parts.append(Seen(blank.features(white, memory, torch.full((len(kept),), step)), error, episode[kept]))
    return Seen(*(torch.cat(each) for each in zip(*parts, strict=True)))


def fit_to(seen: Seen, stopping: Bool[Tensor, " p"], latent_dim: int, memory_dim: int, seed: int) -> ErrorEstimator:
    """Fit by maximum likelihood to the places that are not `stopping`; of one training, the weights count under which
    the stopping ones are most likely."""
    target = seen.error.clamp(min=_LEAST_ERROR).log()
    (x, y), (x_stop, y_stop) = ((seen.features[rows], target[rows]) for rows in (~stopping, stopping))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "estimator"))
        net = ErrorEstimator(latent_dim, memory_dim, dropout=_DROPOUT)
        net.mean.copy_(x.mean(dim=0))
        net.scale.copy_(x.std(dim=0).clamp(min=1e-2))
        optimizer = torch.optim.AdamW(net.parameters(), lr=_RATE, weight_decay=_DECAY, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _UPDATES)
        best, kept = math.inf, copy.deepcopy(net.state_dict())
        for update in range(1, _UPDATES + 1):
            batch = torch.randint(len(x), (_BATCH,))
            loss = _surprise(net, x[batch], y[batch])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            if update % _CHECK_EVERY == 0:
                net.eval()
                with torch.no_grad():
                    found = float(_surprise(net, x_stop, y_stop))
                net.train()
                if found < best:
                    best, kept = found, copy.deepcopy(net.state_dict())
    fitted = ErrorEstimator(latent_dim, memory_dim)
    fitted.load_state_dict(kept)
    with torch.no_grad():
        _calibrate(fitted, x_stop, y_stop)
    return fitted.eval().requires_grad_(False)


def _calibrate(fitted: ErrorEstimator, x: Float[Tensor, "p f"], y: Float[Tensor, " p"]) -> None:
    """Put mu in line with log errors y that the weights were not fitted to, and let sigma be as wide as what is left.

    Dropout draws mu towards its mean, and a fit always thinks too well of itself.
    """
    mu, log_sigma = fitted(x)
    weight = torch.exp(-2 * log_sigma)
    mean_mu, mean_y = ((weight * values).sum() / weight.sum() for values in (mu, y))
    spread = (weight * (mu - mean_mu).square()).sum()
    slope = (weight * (mu - mean_mu) * (y - mean_y)).sum() / spread.clamp(min=1e-12)
    slope = slope.clamp(min=0.0)  # that it should say the opposite of what it learned is chance
    offset = mean_y - slope * mean_mu
    width = (weight * (y - offset - slope * mu).square()).mean().sqrt()
    fitted.out.weight[0] *= slope
    fitted.out.bias[0] = slope * fitted.out.bias[0] + offset
    fitted.out.bias[1] += width.clamp(min=1e-3).log()


def _surprise(net: nn.Module, x: Float[Tensor, "p f"], y: Float[Tensor, " p"]) -> Tensor:
    """Return the mean negative log likelihood of log errors y, up to a constant."""
    mu, log_sigma = net(x)
    surprise: Tensor = (0.5 * ((y - mu) / log_sigma.exp()).square() + log_sigma).mean()
    return surprise
