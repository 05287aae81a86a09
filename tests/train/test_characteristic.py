"""The recurrences give what cosines and sines of every angle give, value and gradient."""

import pytest
import torch
from torch import Tensor

from worldline.train.characteristic import characteristic
from worldline.train.losses import sigreg


def plain(y: Tensor, spacing: float, points: int) -> Tensor:
    angles = torch.arange(1, points + 1)[:, None, None, None] * spacing * y  # (k, g, n, p)
    return torch.stack((angles.cos().mean(dim=2), angles.sin().mean(dim=2)), dim=1)


@pytest.mark.parametrize("points", [1, 2, 3, 16])
@pytest.mark.parametrize("samples", [7, 3000])  # 3000 take their 40 projections in three parts
def test_recurrences_equal_cosines_and_sines(points: int, samples: int) -> None:
    generator = torch.Generator().manual_seed(1)
    y = 3.0 * torch.randn(2, samples, 40, generator=generator, dtype=torch.float64)
    y[0, 0, :3] = torch.tensor([0.0, 1e-4, torch.pi / 0.1875])  # where cos(x) is 1 or -1, the recurrence is worst
    weight = torch.randn(points, 2, 2, 40, generator=generator, dtype=torch.float64)
    found, wanted, single = (y.to(dtype, copy=True).requires_grad_() for dtype in (y.dtype, y.dtype, torch.float32))
    means, expected = characteristic(found, 0.1875, points), plain(wanted, 0.1875, points)
    rough = characteristic(single, 0.1875, points)
    torch.testing.assert_close(means, expected)
    torch.testing.assert_close(rough.double(), expected, atol=1e-5, rtol=0)
    for value, factor in ((means, weight), (expected, weight), (rough, weight.float())):
        (value * factor).sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad)
    assert float((single.grad.double() - wanted.grad).norm()) < 1e-5 * float(wanted.grad.norm())


def test_sigreg_has_float32_digits_under_autocast() -> None:
    z = torch.randn(2, 24, 6, generator=torch.Generator().manual_seed(1))
    expected = sigreg(z, torch.Generator().manual_seed(9), projections=5)
    with torch.autocast("cpu", torch.bfloat16):
        found = sigreg(z, torch.Generator().manual_seed(9), projections=5)
    assert torch.equal(found, expected)
