"""A small vision transformer encoder."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldline.model.transformer import Block


class ViTEncoder(nn.Module):
    """Map pictures in [-1, 1] to latents: patches, a class token, pre-norm blocks, linear head on the class token."""

    def __init__(self, *, image_size: int, latent_dim: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, (image_size // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, latent_dim)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        patches = self.patches(x).flatten(2).transpose(1, 2)  # (b, n, e)
        tokens = torch.cat((self.token.expand(len(x), -1, -1), patches), dim=1) + self.position
        z: Tensor = self.linear(self.norm(self.blocks(tokens)[:, 0]))
        return z
