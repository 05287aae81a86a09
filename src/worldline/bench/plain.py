"""LeWM's training step on the `tiny` network, as one would write it down in PyTorch: float32, channels first.

What `worldline bench train` times and checks gradients against; it shares no code with the package.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn


class PlainLeWM(nn.Module):
    """Encoder, latent norm and GRU predictor; attributes are named as a `World`'s, whose weights it can load."""

    def __init__(self, *, image_size: int, latent_dim: int, width: int, head: int, hidden: int, actions: int) -> None:
        super().__init__()
        self.encoder = _Encoder(image_size, latent_dim, width, head)
        self.latent_norm = nn.BatchNorm1d(latent_dim, affine=False)
        self.predictor = _Predictor(latent_dim, actions, hidden)

    def forward(
        self,
        frames: UInt8[Tensor, "b n h w 3"],
        actions: Float[Tensor, "b t a"],
        directions: Float[Tensor, "d p"],
        sigreg_weight: float,
    ) -> Float[Tensor, ""]:
        """Return the loss: the one-step error, and SIGReg at each time step. Actions come normalised."""
        b, n = frames.shape[:2]
        pictures = frames.flatten(0, 1).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0
        z = self.latent_norm(self.encoder(pictures)).reshape(b, n, -1)
        z_hat = self.predictor(z[:, :-1], actions[:, : n - 1])
        prediction = (z_hat - z[:, 1:]).square().mean()
        loss: Tensor = prediction + sigreg_weight * plain_sigreg(z.transpose(0, 1), directions)
        return loss


def plain_sigreg(
    z: Float[Tensor, "g n d"], directions: Float[Tensor, "d p"], knots: int = 17, t_max: float = 3.0
) -> Float[Tensor, ""]:
    """Return SIGReg with Epps-Pulley, all knots in one tensor. Source: arXiv 2511.08544."""
    t = torch.linspace(0.0, t_max, knots, device=z.device)
    weights = torch.full((knots,), 2 * t_max / (knots - 1), device=z.device)
    weights[[0, -1]] = t_max / (knots - 1)
    gaussian = torch.exp(-t.square() / 2)
    angles = (z @ (directions / directions.norm(dim=0))).unsqueeze(-1) * t  # (g, n, p, knots)
    gap = (angles.cos().mean(dim=1) - gaussian).square() + angles.sin().mean(dim=1).square()  # (g, p, knots)
    statistic: Tensor = z.shape[1] * (gap @ (weights * gaussian)).mean()
    return statistic


class _Encoder(nn.Module):
    def __init__(self, image_size: int, latent_dim: int, width: int, head: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, width, 3, stride=2))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(*_conv(c_in, c_in, 3, stride=stride, groups=c_in), *_conv(c_in, c_out, 1))
                for c_in, c_out, stride in (
                    (width, 2 * width, 2),
                    (2 * width, 4 * width, 2),
                    (4 * width, 4 * width, 1),
                    (4 * width, 4 * width, 1),
                )
            )
        )
        self.head = nn.Sequential(*_conv(4 * width, head, 1))
        self.linear = nn.Linear(head * (image_size // 8) ** 2, latent_dim)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        z: Tensor = self.linear(self.head(self.blocks(self.stem(x))).flatten(1))
        return z


def _conv(c_in: int, c_out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True)]


class _Predictor(nn.Module):
    def __init__(self, latent_dim: int, actions: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(latent_dim + actions, hidden), nn.ReLU())
        self.cell = nn.GRUCell(hidden, hidden)
        self.out = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, latent_dim))

    def forward(self, z: Float[Tensor, "b t d"], actions: Float[Tensor, "b t a"]) -> Float[Tensor, "b t d"]:
        h = z.new_zeros(len(z), self.cell.hidden_size)
        predicted = []
        for i in range(z.shape[1]):
            x = self.embed(torch.cat((z[:, i], actions[:, i]), dim=-1))
            h = self.cell(x, h)
            predicted.append(z[:, i] + self.out(torch.cat((h, x), dim=-1)))
        return torch.stack(predicted, dim=1)
