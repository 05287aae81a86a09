"""The probe g: reads true factors off a latent. One hidden layer, fitted on real frames, used for every forecast."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from worldline.model.factors import FactorHead

HIDDEN = 256
_BATCH = 512
_EPOCHS, _UPDATES = 60, 6000
"""A fit ends after so many rounds of the frames, or so many updates."""
_CHECK_EVERY = 50
"""Updates between two looks at the validation frames."""


class Probe:
    """g: latents to factors, one hidden layer of 256, inputs standardised."""

    def __init__(self, head: FactorHead, mean: torch.Tensor, scale: torch.Tensor, net: nn.Module) -> None:
        self.head, self._mean, self._scale, self._net = head, mean, scale, net

    @torch.inference_mode()
    def __call__(self, z: Float[torch.Tensor, "*b d"]) -> dict[str, Float[np.ndarray, "*b _"]]:
        """Return readings of latents by factor."""
        return self.head.read(self._net((z - self._mean) / self._scale))


def fit_probe(
    head: FactorHead,
    z: Float[torch.Tensor, "n d"],
    state: Float[np.ndarray, "n s"],
    z_validation: Float[torch.Tensor, "m d"],
    state_validation: Float[np.ndarray, "m s"],
    seed: int = 0,
) -> Probe:
    """Fit g on encoded real training frames; keep the weights that read validation episodes best.

    Standardised inputs make it blind to the scale of the latent. Early stopping: of one training, its rate falling
    along a cosine, the weights with the least validation loss count. Deterministic on a CPU for a given seed and number
    of threads.
    """
    mean, scale = z.mean(0), z.std(0)
    scale = torch.where(scale > 1e-6 * mean.abs() + 1e-30, scale, torch.ones_like(scale))
    x, x_validation = (z - mean) / scale, (z_validation - mean) / scale
    y, y_validation = head.targets(state), head.targets(state_validation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, head.size))
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-4, fused=True)
    updates = min(_UPDATES, _EPOCHS * math.ceil(len(x) / _BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    best, best_weights = float("inf"), net.state_dict()
    for update in range(1, updates + 1):
        batch = torch.randint(len(x), (_BATCH,), generator=order)
        loss = head.loss(net(x[batch]), y[batch])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if update % _CHECK_EVERY == 0 or update == updates:
            with torch.no_grad():
                validation = float(head.loss(net(x_validation), y_validation))
            if validation < best:
                best, best_weights = validation, {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(best_weights)
    return Probe(head, mean, scale, net.eval())
