"""The terms of training, one pure function each.

Shape legend: b batch, t steps, d latent, a action, g groups, n samples, h w picture.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist

from worldline.train.characteristic import characteristic


def scale_gradient(z: Float[Tensor, "*b d"], share: float) -> Float[Tensor, "*b d"]:
    """Return `z` itself, but let only `share` of the gradient through: share * z + (1 - share) * sg(z)."""
    if share == 1.0:
        return z
    if share == 0.0:
        return z.detach()
    return z.detach() + share * (z - z.detach())


def noisy(z: Float[Tensor, "*b d"], std: float, generator: torch.Generator) -> Float[Tensor, "*b d"]:
    """Return z + std * e, e ~ N(0, I): pushforward noise where a predictor is given it and its targets are not.

    What it predicts from a latent that is a little off is then drawn back to where the true one leads.
    Source: noise on a simulator's input, Sanchez-Gonzalez et al., arXiv 2002.09405, in place of the pushed-forward
    state of Brandstetter et al., arXiv 2202.03376.
    """
    return z + std * torch.randn(z.shape, generator=generator).to(z.device) if std else z


Norm = Literal["l2", "l1", "log"]


def one_step(z_hat: Float[Tensor, "b t d"], z: Float[Tensor, "b t d"], norm: Norm = "l2") -> Float[Tensor, ""]:
    """Return the teacher-forced error: mean of (z_hat_i - z_i)^2, z_hat_i predicted from the true past of z_i.

    `l1` takes |z_hat_i - z_i|, `log` the mean over i of the logarithm of the batch's mean squared error.
    Source: LeWM, arXiv 2603.19312, the prediction term; l1: V-JEPA 2-AC, arXiv 2506.09985.
    """
    if norm == "log":
        return _log_errors(z_hat, z).mean()
    return _error(z_hat, z, norm)


def own_rollout(z_hat: Float[Tensor, "b t d"], z: Float[Tensor, "b t d"], norm: Norm = "l2") -> Float[Tensor, ""]:
    """Return the open-loop error: mean over t of (z_hat_t - z_t)^2, z_hat_t predicted from z_hat_{t-1}.

    The errors' gradients run through the whole rollout, so that a step learns what it does to the steps after it.
    `l1` takes |z_hat_t - z_t|. `log` takes the mean of log e_t with weights 1 / t, e_t the batch's mean squared error
    at step t: a hundredth part of the error counts as much where errors are small as where they are large, and the
    first ten steps of a hundred more than the other ninety.
    Source: multi-step latent losses as in PlaNet, arXiv 1811.04551 (latent overshooting), here without its noise.
    """
    if norm == "log":
        weight = 1.0 / torch.arange(1, z.shape[1] + 1, device=z.device)
        return (weight * _log_errors(z_hat, z)).sum() / weight.sum()
    return _error(z_hat, z, norm)


def _log_errors(z_hat: Float[Tensor, "b t d"], z: Float[Tensor, "b t d"]) -> Float[Tensor, " t"]:
    return (z_hat - z).float().square().mean(dim=(0, 2)).clamp(min=1e-8).log()


def _error(z_hat: Tensor, z: Tensor, norm: Literal["l2", "l1"]) -> Tensor:
    gap = z_hat - z
    return gap.abs().mean() if norm == "l1" else gap.square().mean()


def excess_growth(
    z_hat: Float[Tensor, "b t d"],
    z: Float[Tensor, "b t d"],
    whitening: Float[Tensor, "d d"],
    log_growth: Float[Tensor, " t-1"],
) -> Float[Tensor, ""]:
    """Return how much faster a rollout's error grows than neighbouring real latents part.

    mean_k relu(log e_{k+1} - sg(log e_k) - log rho_k), e_k the batch's mean of |W (z_hat_k - sg(z_k))|^2, W the
    whitening of real latents and `log_growth` log rho_k, how much the squared distance of real neighbours grows from
    step k to the next. Where the world itself expands, error may expand with it: to ask for contraction there is to ask
    for forgetting. It is a penalty, and bounds nothing.
    """
    e = ((z_hat - z.detach()) @ whitening).square().mean(dim=(0, 2))  # (t,)
    log_e = e.clamp(min=1e-12).log()
    return (log_e[1:] - log_e[:-1].detach() - log_growth).relu().mean()


def straightening(z: Float[Tensor, "b t d"]) -> Float[Tensor, ""]:
    """Return how much latents turn: mean of 1 - cos(z_{t+1} - z_t, z_{t+2} - z_{t+1}).

    Source: temporal straightening, arXiv 2603.12231.
    """
    v = z.diff(dim=1)
    return (1.0 - torch.cosine_similarity(v[:, 1:], v[:, :-1], dim=-1, eps=1e-6)).mean()


def variance(z: Float[Tensor, "n d"], floor: float = 1e-4) -> Float[Tensor, ""]:
    """Return how far each dimension's standard deviation falls short of 1: mean of relu(1 - std).

    Source: VICReg, arXiv 2105.04906, eq. 1 and 2; eb_jepa, arXiv 2602.03604.
    """
    return (1.0 - (z.var(dim=0) + floor).sqrt()).relu().mean()


def covariance(z: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Return the squared covariances of different dimensions: sum over i != j of C_ij^2, divided by d.

    Source: VICReg, arXiv 2105.04906, eq. 3 and 4; eb_jepa, arXiv 2602.03604.
    """
    centred = z - z.mean(dim=0)
    c = centred.T @ centred / (len(z) - 1)
    return (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]


def time_similarity(z: Float[Tensor, "b t d"]) -> Float[Tensor, ""]:
    """Return how far latents move in a step: mean of (z_{t+1} - z_t)^2.

    Source: the time-similarity term of PLDM, arXiv 2502.14819, and eb_jepa, arXiv 2602.03604.
    """
    return z.diff(dim=1).square().mean()


def sigreg(
    z: Float[Tensor, "g n d"], generator: torch.Generator, *, projections: int, knots: int = 17, t_max: float = 3.0
) -> Float[Tensor, ""]:
    """Return how far each group of latents is from N(0, I), as seen along random directions u.

    The Epps-Pulley statistic of y = u.z: n * integral of |mean_j exp(i t y_j) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt over
    [-t_max, t_max], by the trapezoid rule on `knots` points of the half line (the integrand is even), then the mean
    over directions and groups. Directions come from `generator` alone.

    Under `torch.distributed` n counts the samples of all ranks, equally many each, and mean_j runs over them. Every
    rank returns the value, and once gradients are averaged over ranks has the gradient, of one process with the whole
    batch.
    Ranks must give generators of the same state.
    Source: LeJEPA, arXiv 2511.08544, SIGReg with Epps-Pulley; LeWM, arXiv 2603.19312, takes each time step as a group.
    """
    _, n, d = z.shape
    u = torch.randn(d, projections, generator=generator, dtype=torch.float32).to(z.device)
    with torch.autocast(z.device.type, enabled=False):  # bfloat16 has too few digits for angles
        y = z.float() @ (u / u.norm(dim=0))  # (g, n, p)
        spacing = t_max / (knots - 1)
        t = spacing * torch.arange(1, knots, device=z.device)[:, None, None]  # t = 0 adds nothing: both are 1 there
        gaussian = torch.exp(-t.square() / 2)
        weights = 2 * spacing * gaussian
        weights[-1] /= 2
        cosines, sines = _over_ranks(characteristic(y, spacing, knots - 1)).unbind(1)  # (k, g, p)
        distance = (weights * ((cosines - gaussian).square() + sines.square())).sum(dim=0)
        return _ranks() * n * distance.mean()


def _over_ranks(means: Tensor) -> Tensor:
    """Average means of equally many samples over all ranks, differentiably."""
    if _ranks() == 1:
        return means
    total: Tensor = _SumOverRanks.apply(means)  # type: ignore[no-untyped-call]
    return total / _ranks()


class _SumOverRanks(torch.autograd.Function):
    """Every rank has the sum, so that a rank's part is in all of their losses: its gradient is the sum of theirs."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
