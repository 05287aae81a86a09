"""Pictures of rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from worldline.core.errors import WorldlineError

Film = UInt8[Tensor, "_ h w 3"] | UInt8[np.ndarray, "_ h w 3"]


def filmstrip(
    films: Film | Sequence[Film],
    *,
    every: int = 10,
    scale: int = 2,
    gap: int = 2,
) -> Image.Image:
    """Lay every `every`-th frame side by side, one row for each film, such as truth over imagination.

    `scale` enlarges by whole pixels; `gap` is the white space between pictures, before scaling.
    """
    several = [films] if isinstance(films, torch.Tensor | np.ndarray) else list(films)
    arrays = [np.asarray(film)[::every] for film in several]
    if not arrays or any(a.shape != arrays[0].shape or a.ndim != 4 for a in arrays):
        raise WorldlineError(f"a filmstrip wants films (t, h, w, 3) of one shape, got {[a.shape for a in arrays]}")
    t, h, w, _ = arrays[0].shape
    canvas = np.full((len(arrays) * (h + gap) - gap, t * (w + gap) - gap, 3), 255, dtype=np.uint8)
    for i, film in enumerate(arrays):
        for j, frame in enumerate(film):
            canvas[i * (h + gap) : i * (h + gap) + h, j * (w + gap) : j * (w + gap) + w] = frame
    return Image.fromarray(canvas.repeat(scale, axis=0).repeat(scale, axis=1))
