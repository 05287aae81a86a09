"""What a picture holds, as a short vector: a latent can be asked for it at a fraction of the price of drawing it.

Two descriptions, each reduced to principal components. Pixels say where things are and how they look; edges by
direction say how things are turned, which hardly shows in the pixels' variance. Without the second, a latent learns an
object's angle last, or never.

Shape legend: n pictures, h w picture, o directions of edges, e components of edges, p components of pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

_EDGES, _COARSE_EDGES, _PIXELS = 256, 72, 384
"""Components at most: of edges in small cells, of edges in large cells, of pixels."""
_FLOOR = 1e-4
"""A component with less than this share of the largest one's variance is rounding, not picture."""
_COARSE_VARIANCE, _PIXEL_VARIANCE = 2.0, 0.2
"""Variance of a component of large cells, and mean variance of the pixels', beside 1 of a component of small cells."""
_DIRECTIONS, _CELL = 8, 8
"""Directions of edges, and half a small cell's side in pixels; large cells are twice as wide, all overlap by half."""
_CHUNK = {"cpu": 32, "cuda": 1024}
"""Pictures described at once: few enough for a processor's cache, enough to fill a GPU."""


class PictureFeatures:
    """Principal components of edges, whitened, and of pixels, each divided by the fourth root of its variance.

    Edges are looked at twice: in small cells, which say where they are, and in large ones, which see an object's angle
    almost wherever it is. Whitening asks for small differences as loudly as for large ones. Fitted on sample pictures
    alone, on a CPU, so that it can be made again from the same sample; pictures are described on `device`. Sources:
    histograms of oriented gradients as a target, MaskFeat, arXiv 2112.09133; smooth tuning to 8 signed directions by
    the cube of the cosine.
    """

    def __init__(self, frames: UInt8[np.ndarray, "n h w 3"], device: str = "cpu") -> None:
        pictures = torch.from_numpy(frames.copy())
        edges = torch.cat([_edges(part) for part in _chunks(pictures)])
        coarse = _coarser(edges, pictures.shape[1])
        self._edge_mean, edge_axes, edge_variance = _principal(edges, _EDGES)
        self._edge_map = edge_axes / edge_variance.sqrt()  # (o cells, e)
        self._coarse_mean, coarse_axes, coarse_variance = _principal(coarse, _COARSE_EDGES)
        self._coarse_map = coarse_axes * (_COARSE_VARIANCE / coarse_variance).sqrt()
        pixels = torch.cat([_pixels(part) for part in _chunks(pictures)])
        self._pixel_mean, pixel_axes, pixel_variance = _principal(pixels, _PIXELS)
        self._pixel_map = pixel_axes / pixel_variance.pow(0.25)  # (3 h w / 4, p)
        self._pixel_map *= (_PIXEL_VARIANCE / pixel_variance.sqrt().mean()).sqrt()
        self._device = torch.device(device)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(self._device))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Components of edges in small cells, in large cells, and of pixels."""
        return self._edge_map.shape[1], self._coarse_map.shape[1], self._pixel_map.shape[1]

    def __call__(self, frames: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n k"]:
        """Describe pictures: edges in small cells, in large cells, then pixels."""
        parts = []
        for part in _chunks(frames.to(self._device)):
            edges = _edges(part)
            coarse = (_coarser(edges, part.shape[1]) - self._coarse_mean) @ self._coarse_map
            pixels = (_pixels(part) - self._pixel_mean) @ self._pixel_map
            parts.append(torch.cat(((edges - self._edge_mean) @ self._edge_map, coarse, pixels), dim=1))
        return torch.cat(parts)


class FeatureHead(nn.Module):
    """Tell a picture's features from its latent; only training uses it.

    One hidden layer: what a deep head could still untangle, a predictor or a probe could not.
    """

    def __init__(self, latent_dim: int, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(latent_dim, 512), nn.GELU(), nn.Linear(512, size))

    def forward(self, z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        features: Tensor = self.layers(z)
        return features


def _chunks(frames: UInt8[Tensor, "n h w 3"]) -> list[UInt8[Tensor, "m h w 3"]]:
    size = _CHUNK[frames.device.type]
    return [frames[i : i + size] for i in range(0, len(frames), size)]


def _edges(frames: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n k"]:
    """Return how much edge of each direction each cell holds, by the grey picture's central differences."""
    grey = frames.float() @ torch.full((3,), 1 / (3 * 255.0), device=frames.device)
    across = F.pad(grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2], (1, 1, 1, 1)) / 2
    down = F.pad(grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1], (1, 1, 1, 1)) / 2
    inverse = 1.0 / (across.square() + down.square() + 1e-8)
    maps = []
    for k in range(_DIRECTIONS // 2):  # the other half looks the opposite way
        angle = 2 * math.pi * k / _DIRECTIONS
        along = across * math.cos(angle) + down * math.sin(angle)
        tuned = along * along * along * inverse  # length x cosine^3
        maps += [tuned.clamp(min=0.0), tuned.neg().clamp_(min=0.0)]
    halves = F.avg_pool2d(torch.stack(maps, dim=1), _CELL)  # (n, o, h / 8, w / 8)
    return F.avg_pool2d(halves, 2, stride=1).flatten(1)


def _coarser(edges: Float[Tensor, "n k"], size: int) -> Float[Tensor, "n l"]:
    """Return edges in cells twice as wide, every second one: from (n, o, h / 8 - 1, w / 8 - 1), h = w = `size`."""
    cells = edges.reshape(len(edges), _DIRECTIONS, size // _CELL - 1, -1)
    return F.avg_pool2d(cells, 3, stride=2).flatten(1)


def _pixels(frames: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n k"]:
    """Return the picture at half size; what the largest components hold is coarser still."""
    return F.avg_pool2d(frames.permute(0, 3, 1, 2).float() / 255.0, 2).flatten(1)


def _principal(
    x: Float[Tensor, "n k"], count: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k m"], Float[Tensor, " m"]]:
    """Return mean, axes and variances of the `count` largest principal components, or fewer if there are fewer."""
    mean = x.mean(dim=0)
    centred = x - mean
    wide = x.shape[1] > x.shape[0]  # then the smaller matrix has the same variances
    gram = (centred @ centred.T if wide else centred.T @ centred) / len(x)
    values, vectors = (part.float().flip(-1) for part in torch.linalg.eigh(gram.double()))
    count = min(count, int((values > _FLOOR * values[0]).sum()))
    values, vectors = values[:count], vectors[:, :count]
    axes = centred.T @ vectors / (values * len(x)).sqrt() if wide else vectors
    return mean, axes, values
