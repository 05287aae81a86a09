"""A depthwise-separable convolutional encoder that a microcontroller can run later.

Only convolutions, foldable batch norms, ReLU6, and one linear map over a small grid, since average pooling would lose
position.

Shape legend: b pictures, c channels, h = w = image size, g = image size / 8 (the grid), d latent.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ConvEncoder(nn.Module):
    """Map pictures in [-1, 1] to latents: stem, separable blocks to a grid of image size / 8, linear head."""

    def __init__(self, *, image_size: int, latent_dim: int, width: int, head_channels: int) -> None:
        super().__init__()
        grid = image_size // 8
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), ExactBatchNorm(width), nn.ReLU6(inplace=True)
        )
        self.blocks = nn.Sequential(
            _separable(width, 2 * width, stride=2),
            _separable(2 * width, 4 * width, stride=2),
            _separable(4 * width, 4 * width, stride=1),
            _separable(4 * width, 4 * width, stride=1),
        )
        self.head = nn.Sequential(
            nn.Conv2d(4 * width, head_channels, 1, bias=False), ExactBatchNorm(head_channels), nn.ReLU6(inplace=True)
        )
        self.linear = nn.Linear(head_channels * grid * grid, latent_dim)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        with torch.autocast("cpu", enabled=False):  # depthwise convolutions in bfloat16 take 1.6 times as long there
            grid = self.head(self.blocks(self.stem(x)))  # (b, c, g, g)
        z: Tensor = self.linear(grid.flatten(1))
        return z


def _separable(channels_in: int, channels_out: int, *, stride: int) -> nn.Sequential:
    """3x3 depthwise, then 1x1, each with batch norm and ReLU6."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_in, 3, stride=stride, padding=1, groups=channels_in, bias=False),
        ExactBatchNorm(channels_in),
        nn.ReLU6(inplace=True),
        nn.Conv2d(channels_in, channels_out, 1, bias=False),
        ExactBatchNorm(channels_out),
        nn.ReLU6(inplace=True),
    )


class ExactBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics are right to float32's digits where pictures are channels last, at no cost.

    On a CPU torch adds up all pixels of a batch one after another there, so that of a million only three digits of mean
    and variance are left, and gradients are off by several percent.
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        coarse = x.device.type == "cpu" and x.dtype == torch.float32
        if not (self.training and coarse and x.is_contiguous(memory_format=torch.channels_last)):
            return super().forward(x)
        with torch.no_grad():
            mean, variance = _statistics(x)
            count = x.numel() / x.shape[1]
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(1.0, count - 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        normalised: Tensor = _Normalise.apply(x, self.weight, self.bias, mean, variance, self.eps)  # type: ignore[no-untyped-call]
        return normalised


def _statistics(x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Return mean and variance of each channel: those of 256 shares of the pixels, then over the shares."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    shares = math.gcd(len(rows), 256)
    found = torch.batch_norm_update_stats(rows.view(-1, shares * x.shape[1]), None, None, 0.0)
    means, variances = (part.view(shares, -1).double() for part in found)
    return means.mean(dim=0).float(), (variances.mean(dim=0) + means.var(dim=0, correction=0)).float()


class _Normalise(torch.autograd.Function):
    """Batch norm by given statistics of `x` itself, which its gradient counts in."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.eps = eps
        normalised: Tensor = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
        return normalised

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, weight, mean, scale = ctx.saved_tensors
        found = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, scale, True, ctx.eps, [True, True, True]
        )
        return (*found, None, None, None)
