"""The terms of training, one pure function each.

Shape legend: b batch, t steps, d latent, a action, g groups, n samples, h w picture.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def scale_gradient(z: Float[Tensor, "*b d"], share: float) -> Float[Tensor, "*b d"]:
    """Return `z` itself, but let only `share` of the gradient through: share * z + (1 - share) * sg(z)."""
    if share == 1.0:
        return z
    if share == 0.0:
        return z.detach()
    return z.detach() + share * (z - z.detach())


def one_step(z_hat: Float[Tensor, "b t d"], z: Float[Tensor, "b t d"]) -> Float[Tensor, ""]:
    """Return the teacher-forced error: mean of (z_hat_i - z_i)^2, z_hat_i predicted from the true past of z_i.

    Source: LeWM, arXiv 2603.19312, the prediction term.
    """
    return (z_hat - z).square().mean()


def own_rollout(z_hat: Float[Tensor, "b t d"], z: Float[Tensor, "b t d"]) -> Float[Tensor, ""]:
    """Return the open-loop error: mean over t of (z_hat_t - z_t)^2, z_hat_t predicted from z_hat_{t-1}.

    The errors' gradients run through the whole rollout, so that a step learns what it does to the steps after it.
    Source: multi-step latent losses as in PlaNet, arXiv 1811.04551 (latent overshooting), here without its noise.
    """
    return (z_hat - z).square().mean()


def sigreg(
    z: Float[Tensor, "g n d"], generator: torch.Generator, *, projections: int, knots: int = 17, t_max: float = 3.0
) -> Float[Tensor, ""]:
    """Return how far each group of latents is from N(0, I), as seen along random directions u.

    The Epps-Pulley statistic of y = u.z: n * integral of |mean_j exp(i t y_j) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt over
    [-t_max, t_max], by the trapezoid rule on `knots` points of the half line (the integrand is even), then the mean
    over directions and groups. Directions come from `generator` alone.
    Source: LeJEPA, arXiv 2511.08544, SIGReg with Epps-Pulley; LeWM, arXiv 2603.19312, takes each time step as a group.
    """
    _, n, d = z.shape
    u = torch.randn(d, projections, generator=generator, dtype=torch.float32).to(z.device)
    y = z.float() @ (u / u.norm(dim=0))  # (g, n, p)
    t = torch.linspace(0.0, t_max, knots, device=z.device)
    gaussian = torch.exp(-t.square() / 2)
    weights = torch.full_like(t, 2 * t_max / (knots - 1))
    weights[0] = weights[-1] = t_max / (knots - 1)
    distance = torch.zeros(y.shape[0], y.shape[2], device=z.device)
    for k in range(1, knots):  # t = 0 adds nothing: both functions are 1 there
        angle = t[k] * y
        gap = (angle.cos().mean(dim=1) - gaussian[k]).square() + angle.sin().mean(dim=1).square()  # (g, p)
        distance = distance + weights[k] * gaussian[k] * gap
    return n * distance.mean()


def foreground_weight(
    pictures: Float[Tensor, "*b h w 3"], background: Float[Tensor, "h w 3"], gain: float
) -> Float[Tensor, "*b h w 1"]:
    """Return 1 + gain * |x - background|, the distance averaged over colours, in [0, 1]."""
    return 1.0 + gain * (pictures - background).abs().mean(dim=-1, keepdim=True)


def motion_weight(frames: Float[Tensor, "b n h w 3"], gain: float) -> Float[Tensor, "b n h w 1"]:
    """Return gain * the larger of a pixel's changes from the frame before and to the one after, in [0, 1].

    What moves is what actions act on, and a small thing that moves often would else hardly count among the pixels.
    """
    change = (frames[:, 1:] - frames[:, :-1]).abs().mean(dim=-1, keepdim=True)
    still = torch.zeros_like(change[:, :1])
    return gain * torch.maximum(torch.cat((still, change), dim=1), torch.cat((change, still), dim=1))


def grounding(
    pictures_hat: Float[Tensor, "*b h w 3"],
    pictures: Float[Tensor, "*b h w 3"],
    weight: Float[Tensor, "*b h w 1"] | None = None,
) -> Float[Tensor, ""]:
    """Return the pixel error: mean of weight * (x_hat - x)^2, pictures in [0, 1].

    It holds in the latent whatever can be seen, predictable or not.
    Source: the observation model of PlaNet, arXiv 1811.04551, with unit variance.
    """
    error = (pictures_hat - pictures).square()
    return (error if weight is None else error * weight).mean()


def features(y_hat: Float[Tensor, "*b k"], y: Float[Tensor, "*b k"]) -> Float[Tensor, ""]:
    """Return mean of (y_hat - y)^2, y the picture's features (`features.py`), y_hat told from its latent.

    Like `grounding` it holds in the latent what can be seen, but small differences count as much as large ones.
    """
    return (y_hat - y).square().mean()


def inverse_dynamics(action_hat: Float[Tensor, "b t a"], action: Float[Tensor, "b t a"]) -> Float[Tensor, ""]:
    """Return mean of (a_hat_t - a_t)^2, a_hat_t told from z_t and z_{t+1}; actions normalised.

    Source: Pathak et al., arXiv 1705.05363, section 2.2.
    """
    return (action_hat - action).square().mean()


def warmup_cosine(step: int, *, steps: int, warmup: int, end: float) -> float:
    """Return the factor of the learning rate at update `step`: a line from 0 to 1, then half a cosine to `end`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return end + (1.0 - end) * (1.0 + math.cos(math.pi * min(1.0, progress))) / 2
