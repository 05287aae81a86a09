"""A depthwise-separable convolutional encoder that a microcontroller can run later.

Only convolutions, foldable batch norms, ReLU6, and one linear map over a small grid, since average pooling would lose
position.

Shape legend: b pictures, c channels, h = w = image size, g = image size / 8 (the grid), d latent.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ConvEncoder(nn.Module):
    """Map pictures in [-1, 1] to latents: stem, separable blocks to a grid of image size / 8, linear head."""

    def __init__(self, *, image_size: int, latent_dim: int, width: int, head_channels: int) -> None:
        super().__init__()
        grid = image_size // 8
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(inplace=True)
        )
        self.blocks = nn.Sequential(
            _separable(width, 2 * width, stride=2),
            _separable(2 * width, 4 * width, stride=2),
            _separable(4 * width, 4 * width, stride=1),
            _separable(4 * width, 4 * width, stride=1),
        )
        self.head = nn.Sequential(
            nn.Conv2d(4 * width, head_channels, 1, bias=False), nn.BatchNorm2d(head_channels), nn.ReLU6(inplace=True)
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
        nn.BatchNorm2d(channels_in),
        nn.ReLU6(inplace=True),
        nn.Conv2d(channels_in, channels_out, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU6(inplace=True),
    )
