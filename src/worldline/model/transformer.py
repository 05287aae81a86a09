"""Attention blocks that the ViT encoder and the transformer predictor share.

Shape legend: b batch, n tokens, e width, k heads.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention, with rotary positions where `rotary` is set, so that only distances matter."""

    def __init__(self, width: int, heads: int, *, rotary: bool) -> None:
        super().__init__()
        self._heads, self._rotary = heads, rotary
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n e"], mask: Bool[Tensor, "*m n n"] | None = None) -> Float[Tensor, "b n e"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self._heads, -1)).permute(2, 0, 3, 1, 4)  # each (b, k, n, e/k)
        if self._rotary:
            q, k = _rotate(q), _rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return mixed


class Norm(nn.LayerNorm):
    """A layer norm whose weights are float32 at work: sharded, they may have been gathered in bfloat16, which a CPU's
    layer norm of float32 does not take."""

    def forward(self, x: Float[Tensor, "*b e"]) -> Float[Tensor, "*b e"]:
        return F.layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.attention = Attention(width, heads, rotary=False)
        self.mlp = _mlp(width)

    def forward(self, x: Float[Tensor, "b n e"]) -> Float[Tensor, "b n e"]:
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class ConditionedBlock(nn.Module):
    """A block whose norms are shifted, scaled and gated by a condition, all zero at first (AdaLN-zero).

    Source: Peebles and Xie, arXiv 2212.09748, section 3.2.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads, rotary=True)
        self.mlp = _mlp(width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, x: Float[Tensor, "b n e"], condition: Float[Tensor, "b n e"], mask: Bool[Tensor, "*m n n"]
    ) -> Float[Tensor, "b n e"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, mask)
        x = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def _rotate(x: Float[Tensor, "b k n e"]) -> Float[Tensor, "b k n e"]:
    """Turn pairs of features by angles that grow with the position. Source: Su et al., arXiv 2104.09864."""
    n, e = x.shape[-2:]
    frequency = 100.0 ** (-torch.arange(0, e, 2, device=x.device, dtype=torch.float32) / e)
    angle = torch.arange(n, device=x.device, dtype=torch.float32)[:, None] * frequency  # (n, e/2)
    sin, cos = angle.sin().to(x.dtype), angle.cos().to(x.dtype)
    even, odd = x.chunk(2, dim=-1)
    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
