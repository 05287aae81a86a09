"""The empirical characteristic function at equally spaced points, with its gradient, at a sixth of the naive price.

Shape legend: g groups, n samples, p projections, k points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK = 1 << 15  # samples at once on a CPU, so that the recurrence's arrays stay in its cache


def characteristic(y: Float[Tensor, "g n p"], spacing: float, points: int) -> Float[Tensor, "k 2 g p"]:
    """Return the means over n of cos(k s y) and sin(k s y), s the spacing and k from 1 to `points`.

    One cosine and one sine a sample: the others follow by cos(k x) = 2 cos(x) cos((k-1) x) - cos((k-2) x), alike for
    sines, and the gradient's sums over k by Clenshaw's form of it. Rounding errors grow with k^2 at worst and stay
    below 1e-5 for 16 points. It can be differentiated once.
    """
    means: Tensor = _Characteristic.apply(y, spacing, points)  # type: ignore[no-untyped-call]
    return means


class _Characteristic(torch.autograd.Function):
    """The recurrence needs a product and a difference; `addcmul_` has a product and a sum, and is one pass. So term k
    is kept with the sign `_sign(k)`, of which each is the opposite of the one two before."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, spacing: float, points: int) -> Tensor:
        ctx.save_for_backward(y)
        ctx.spacing, ctx.points = spacing, points
        sums = y.new_empty(points, 2, y.shape[0], y.shape[2])
        for groups, columns in _chunks(y):
            x = spacing * y[groups, :, columns]
            now = torch.stack((x.cos(), x.sin()))  # (2, g, n, p), of k = 1
            once, before = now[0].clone(), torch.zeros_like(now)
            before[0] = 1.0
            for k in range(1, points + 1):
                if k > 1:
                    now, before = before.addcmul_(once, now, value=2.0 * _sign(k) * _sign(k - 1)), now
                torch.sum(now, dim=2, out=sums[k - 1, :, groups, columns])
        return sums.mul_(_signs(points, y) / y.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        spacing, points = ctx.spacing, ctx.points
        rate = spacing / y.shape[1] * torch.arange(1, points + 1, device=y.device, dtype=y.dtype)[:, None, None, None]
        # d cos = -sin, d sin = cos: the gradient's series in cosines and in sines
        series = torch.stack((grad[:, 1], -grad[:, 0]), dim=1).mul_(rate * _signs(points, y))  # (k, 2, g, p)
        result = torch.empty_like(y)
        for groups, columns in _chunks(y):
            x = spacing * y[groups, :, columns]
            once = x.cos()
            after, later = x.new_zeros(2, *x.shape), x.new_zeros(2, *x.shape)  # Clenshaw's b of k + 1 and k + 2
            for k in range(points, 0, -1):
                b = later.addcmul_(once, after, value=2.0 * _sign(k) * _sign(k + 1))
                after, later = b.add_(series[k - 1, :, groups, None, columns]), after
            # b_1 cos(x) - b_2 of the cosines, b_1 sin(x) of the sines; b_2 is kept with a minus
            result[groups, :, columns] = (after[0] * once).add_(later[0]).addcmul_(after[1], x.sin())
        return result, None, None


def _sign(k: int) -> int:
    """Return +, +, -, - and so on from k = 0."""
    return 1 if k % 4 < 2 else -1


def _signs(points: int, like: Tensor) -> Float[Tensor, "k 1 1 1"]:
    return like.new_tensor([_sign(k) for k in range(1, points + 1)])[:, None, None, None]


def _chunks(y: Float[Tensor, "g n p"]) -> Iterator[tuple[slice, slice]]:
    """Yield which groups and which projections to take at once: all on a GPU, and on a CPU what its cache holds."""
    if y.device.type != "cpu":
        yield slice(None), slice(None)
        return
    groups, n, p = y.shape
    width = max(16, _CHUNK // n)
    for group in range(groups):
        for first in range(0, p, width):
            yield slice(group, group + 1), slice(first, first + width)
