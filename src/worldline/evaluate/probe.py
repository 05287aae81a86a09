"""The probe g: reads true factors off a latent. One hidden layer, fitted on real frames, used for every forecast."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from worldline.model.factors import FactorHead

HIDDEN = 256
_BATCH = 512
_MAX_EPOCHS = 60
_PATIENCE = 6
_MAX_UPDATES = 4000


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

    Standardised inputs make it blind to the scale of the latent. Early stopping: 6 epochs without a better validation
    loss. Deterministic on a CPU for a given seed and number of threads.
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
    best, best_weights, waited, updates = float("inf"), net.state_dict(), 0, 0
    for _ in range(_MAX_EPOCHS):
        for batch in torch.split(torch.randperm(len(x), generator=order), _BATCH):
            loss = head.loss(net(x[batch]), y[batch])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            updates += 1
        with torch.no_grad():
            validation = float(head.loss(net(x_validation), y_validation))
        waited = 0 if validation < best else waited + 1
        if validation < best:
            best, best_weights = validation, {k: v.clone() for k, v in net.state_dict().items()}
        if waited >= _PATIENCE or updates >= _MAX_UPDATES:
            break
        if waited == _PATIENCE // 2:
            for group in optimizer.param_groups:
                group["lr"] *= 0.3
    net.load_state_dict(best_weights)
    return Probe(head, mean, scale, net.eval())
