"""Latents back to pictures."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class ConvDecoder(nn.Module):
    """Map latents to pictures in [0, 1]: linear to a grid of image size / 16, three times up and 3x3, then sub-pixels.

    The last doubling is a pixel shuffle, so that no convolution runs at full resolution, where most time would go.
    """

    def __init__(self, *, image_size: int, latent_dim: int, width: int) -> None:
        super().__init__()
        self.grid = image_size // 16
        channels = (4 * width, 3 * width, 2 * width, width)
        self.linear = nn.Linear(latent_dim, channels[0] * self.grid**2)
        self.convs = nn.ModuleList(nn.Conv2d(c_in, c_out, 3, padding=1) for c_in, c_out in pairwise(channels))
        self.to_pixels = nn.Conv2d(width, 3 * 4, 3, padding=1)

    def forward(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b 3 h w"]:
        x = F.relu(self.linear(z)).reshape(len(z), self.grid, self.grid, -1).permute(0, 3, 1, 2)  # channels last
        for conv in self.convs:
            x = F.relu(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
        return F.pixel_shuffle(self.to_pixels(x), 2).sigmoid()
