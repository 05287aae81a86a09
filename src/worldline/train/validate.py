"""Open-loop errors on held-out episodes while training. The measure that counts is `worldline evaluate`.

Shape legend: b windows, t steps, d latent.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from worldline.core.errors import WorldlineError
from worldline.core.seeding import seed_for
from worldline.data.cache import FrameCache
from worldline.data.sampler import Sampler
from worldline.model.picture import filmstrip
from worldline.model.world import World
from worldline.train.windows import encode_frames

HORIZONS = (1, 10, 50, 100)


class Validation:
    """The same windows of validation episodes every time, as long as the horizons and the episodes allow."""

    def __init__(self, cache: FrameCache, context: int, num_windows: int, seed: int) -> None:
        dataset = cache.dataset
        lengths = {e: dataset.lengths[e] for e in dataset.split("validation")}
        if not lengths:
            raise WorldlineError(
                f"{dataset.path}: no validation episodes among {dataset.num_episodes}; training wants at least 3"
            )
        self._context = context
        self._steps = min(max(HORIZONS), max(lengths.values()) - context)
        if self._steps < 1:
            raise WorldlineError(f"{dataset.path}: validation episodes are shorter than {context + 1} frames")
        window = context + self._steps
        indices = Sampler(lengths, window, num_windows, seed_for(seed, "validation")).indices(0)
        self._frames = cache.gather(indices, window)  # (b, t, h, w, 3)
        actions = [dataset.actions(e)[s : s + window - 1] for e, s in indices.tolist()]
        self._actions = torch.from_numpy(np.stack(actions).astype(np.float32))

    def __call__(self, world: World) -> dict[str, float]:
        """Return latent errors over the latents' variance (1 is as bad as always guessing the mean) and pixel errors.

        `rollout_error` is the mean over all steps; `error_h` is at step h, `still_h` that of standing still instead.
        """
        device, c = world.action_mean.device, self._context
        was_training = world.training
        world.eval()
        with torch.inference_mode():
            z = encode_frames(world, self._frames.reshape(-1, *self._frames.shape[2:])).to(device)
            z = z.reshape(*self._frames.shape[:2], -1)
            actions = self._actions.to(device)
            z_hat = world.rollout(world.begin(z[:, :c], actions[:, : c - 1]), actions[:, c - 1 :])
            truth = z[:, c:]
            variance = z.flatten(0, 1).var(dim=0).mean()
            error = _per_step(z_hat, truth) / variance
            still = _per_step(z[:, c - 1 : c].expand_as(truth), truth) / variance
            found = {"rollout_error": float(error.mean()), "latent_variance": float(variance)}
            found["pixels_0"] = self._pixel_error(world, z[:, c - 1], c - 1)
            for h in (h for h in HORIZONS if h <= self._steps):
                found[f"error_{h}"], found[f"still_{h}"] = float(error[h - 1]), float(still[h - 1])
                found[f"pixels_{h}"] = self._pixel_error(world, z_hat[:, h - 1], c + h - 1)
        world.train(was_training)
        return found

    @torch.inference_mode()
    def picture(self, world: World) -> Image.Image:
        """Draw the first window: the real frames above, below them what is imagined after the context."""
        device, c = world.action_mean.device, self._context
        was_training = world.training
        world.eval()
        actions = self._actions[:1].to(device)
        z = encode_frames(world, self._frames[0, :c]).to(device)[None]
        z_hat = world.rollout(world.begin(z, actions[:, : c - 1]), actions[:, c - 1 :])
        imagined = world.decode(z_hat[0]).cpu()
        world.train(was_training)
        return filmstrip([self._frames[0, c:], imagined], every=max(1, self._steps // 10))

    def _pixel_error(self, world: World, z: Float[Tensor, "b d"], step: int) -> float:
        truth = torch.from_numpy(self._frames[:, step]).to(z.device).float() / 255.0
        return float((world.decode_float(z) - truth).square().mean())


def _per_step(z_hat: Float[Tensor, "b t d"], z: Float[Tensor, "b t d"]) -> Float[Tensor, " t"]:
    return (z_hat - z).square().mean(dim=(0, 2))
