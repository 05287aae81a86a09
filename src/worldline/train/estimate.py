"""Fit the gauge's error estimator on rollouts of validation episodes, helped by some of training episodes.

Training episodes flatter the predictor. What they say of the error's level is kept apart from the rest, and validation
episodes alone decide when to stop and calibrate the estimate.

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
from torch.nn import functional as F

from worldline.core.errors import WorldlineError
from worldline.core.seeding import rng_for, seed_for
from worldline.data.cache import FrameCache
from worldline.data.lerobot import Dataset
from worldline.model.estimator import SURPRISE, TOLD, ErrorEstimator
from worldline.model.world import World
from worldline.train.windows import encode_episodes

STEPS = 100
"""Imagined in each rollout, where the episodes are long enough."""
_LEAST_STEPS = 10
_LEAST_EPISODES = 5
_TRAINING_EPISODES = 200
_ROLLOUTS = 4096  # of validation episodes, and as many of training episodes
_EVERY = 4  # neighbouring steps say nearly the same: of every rollout each fourth is kept, each beginning elsewhere
_REAL = 1024  # latents that distances are taken to
_STOPPING = 0.2  # share of the validation episodes that decide when to stop
_UPDATES, _CHECK_EVERY, _BATCH = 3000, 100, 512
_RATE, _DECAY = 2e-3, 0.01
_DROPOUT_TOLD, _DROPOUT = 0.05, 0.5  # of the few features of a whole rollout; of all others and the hidden layer
_UNKNOWN = 0.3  # share of places that are shown without the context's surprise: rollouts may begin without a context
_LEAST_ERROR = 1e-4  # smaller ones are all alike, and their logarithms are not


class Seen(NamedTuple):
    """Places of rollouts, with what the estimator is told there and the true error."""

    features: Float[Tensor, "p f"]
    error: Float[Tensor, " p"]
    episode: Int64[Tensor, " p"]
    trained: Bool[Tensor, " p"]
    """The predictor was fitted to this episode."""


def rollout_steps(dataset: Dataset, context: int) -> int:
    """Return how many steps the estimator's rollouts would have; 0 where the validation episodes do not suffice."""
    longest = sorted((dataset.lengths[e] for e in dataset.split("validation")), reverse=True)[:_LEAST_EPISODES]
    steps = min(STEPS, longest[-1] - context) if len(longest) == _LEAST_EPISODES else 0
    return steps if steps >= _LEAST_STEPS else 0


def fit_estimator(world: World, cache: FrameCache, seed: int) -> ErrorEstimator:
    """Fit an estimator of the world's error on rollouts, stopped and calibrated on some of the validation episodes.

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
    training = dataset.split("train")
    spread = np.linspace(0, len(training) - 1, min(_TRAINING_EPISODES, len(training))).round().astype(int)
    held_out = encode_episodes(world, cache, dataset.split("validation"))
    trained_on = encode_episodes(world, cache, [training[i] for i in spread])
    shown = torch.cat(list(trained_on.values()))
    kept = rng_for(seed, "estimator-real").integers(0, len(shown), _REAL)
    device = world.action_mean.device
    net = ErrorEstimator(world.config.latent_dim, _REAL).to(device).requires_grad_(False)
    net.real.copy_(world.gauge.white(shown[kept].to(device)))
    parts = [
        observe_errors(world, net, dataset, latents, steps, trained)
        for latents, trained in ((held_out, False), (trained_on, True))
    ]
    seen = Seen(*(torch.cat(each) for each in zip(*parts, strict=True)))
    episodes = rng_for(seed, "estimator-stops").permutation(np.unique(seen.episode[~seen.trained].numpy()))
    stopping = torch.isin(seen.episode, torch.from_numpy(episodes[: math.ceil(_STOPPING * len(episodes))]))
    return fit_to(net.cpu(), seen, stopping, seed)


@torch.no_grad()
def observe_errors(
    world: World,
    net: ErrorEstimator,
    dataset: Dataset,
    latents: dict[int, Float[Tensor, "_ d"]],
    steps: int,
    trained: bool,
) -> Seen:
    """Roll out from moments spread evenly over some episodes, and keep features and true errors."""
    context, device = world.config.context, world.action_mean.device
    room = {e: len(z) - context - steps + 1 for e, z in latents.items()}
    room = {e: places for e, places in room.items() if places > 0}
    each = math.ceil(_ROLLOUTS / max(len(room), 1))
    index = [(e, int(s)) for e, r in room.items() for s in np.unique(np.linspace(0, r - 1, min(each, r)).round())]
    z = torch.stack([latents[e][s : s + context + steps] for e, s in index]).to(device)
    taken = np.stack([dataset.actions(e)[s : s + context + steps - 1] for e, s in index])
    actions = torch.from_numpy(taken).to(device)
    episode, rows = torch.tensor([e for e, _ in index]), torch.arange(len(index))
    seen, past = z[:, :context], actions[:, : context - 1]
    white = world.gauge.white
    state = world.begin(seen, past)
    foreseen = white(world.teacher_forced(seen[:, :-1], past)) if context > 1 else None
    track = net.begin(white(seen), foreseen, actions.shape[2])
    parts = []
    for step in range(1, steps + 1):
        action = actions[:, context - 2 + step]
        state = world.step(state, action)
        track = net.follow(track, white(state.z), world.normalise_actions(action))
        kept = (rows + step) % _EVERY == 0
        error = world.gauge.error(state.z, z[:, context - 1 + step])[kept].cpu()
        features = net.features(track)[kept].cpu()
        parts.append(Seen(features, error, episode[kept], torch.full((len(error),), trained)))
    return Seen(*(torch.cat(each) for each in zip(*parts, strict=True)))


def fit_to(net: ErrorEstimator, seen: Seen, stopping: Bool[Tensor, " p"], seed: int) -> ErrorEstimator:
    """Fit by maximum likelihood to the places that are not `stopping`; of one training, the weights count under which
    the stopping ones are most likely. Of `net`, only the real latents are kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "estimator"))
        fitted = ErrorEstimator(net.latent_dim, len(net.real))
        fitted.real.copy_(net.real)
        known = torch.nan_to_num(seen.features[~stopping], nan=0.0)
        fitted.mean.copy_(known.mean(dim=0))
        spread = known.std(dim=0)
        fitted.scale.copy_(
            spread.clamp(min=1e-2).masked_fill(spread == 0, torch.inf)
        )  # what never varied tells nothing
        x, y = fitted.normalise(seen.features), seen.error.clamp(min=_LEAST_ERROR).log()
        x_stop, y_stop = x[stopping], y[stopping]
        x, y, trained = x[~stopping], y[~stopping], seen.trained[~stopping]
        share = torch.full((x.shape[1],), _DROPOUT)
        share[:TOLD] = _DROPOUT_TOLD
        flattery = nn.Parameter(torch.zeros(len(fitted.hidden.bias)))
        weights = [*fitted.parameters(), flattery]
        optimizer = torch.optim.AdamW(weights, lr=_RATE, weight_decay=_DECAY, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _UPDATES)
        best, kept = math.inf, copy.deepcopy(fitted.state_dict())
        for update in range(1, _UPDATES + 1):
            rows = torch.randint(len(x), (_BATCH,))
            shown = x[rows] * (torch.rand(_BATCH, x.shape[1]) >= share) / (1 - share)
            shown[torch.rand(_BATCH) < _UNKNOWN, SURPRISE] = 0.0
            hidden = torch.relu(fitted.hidden(shown) + trained[rows, None] * flattery)
            loss = _surprise(fitted.read_out(F.dropout(hidden, _DROPOUT)), y[rows])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            if update % _CHECK_EVERY == 0:
                with torch.no_grad():
                    found = float(_surprise(fitted(x_stop), y_stop))
                if found < best:
                    best, kept = found, copy.deepcopy(fitted.state_dict())
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


def _surprise(told: tuple[Float[Tensor, " p"], Float[Tensor, " p"]], y: Float[Tensor, " p"]) -> Tensor:
    """Return the mean negative log likelihood of log errors y under mu and log sigma, up to a constant."""
    mu, log_sigma = told
    surprise: Tensor = (0.5 * ((y - mu) / log_sigma.exp()).square() + log_sigma).mean()
    return surprise
