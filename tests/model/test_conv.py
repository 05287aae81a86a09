"""The encoder's batch norm keeps float32's digits where torch's own does not."""

import pytest
import torch
from torch import Tensor, nn

from worldline.model.conv import ConvEncoder, ExactBatchNorm


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("size", [(96, 64, 64), (3, 5, 7)])  # the latter has an odd number of pixels
def test_batch_norm_equals_that_of_float64(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    b, h, w = size
    x = (1.3 + 0.1 * torch.randn(b, 16, h, w)).contiguous(memory_format=torch.channels_last)
    factor = torch.randn(x.shape) + 0.3
    ours, wanted = ExactBatchNorm(16), nn.BatchNorm2d(16).double()
    with torch.no_grad():
        ours.weight.uniform_(0.5, 1.5)
        ours.bias.normal_()
    wanted.load_state_dict(ours.state_dict())
    found, expected = x.clone().requires_grad_(), x.double().requires_grad_()
    for module, given, weight in ((ours, found, factor), (wanted, expected, factor.double())):
        (module(given).clamp(0, 6) * weight).sum().backward()
    for name in ("running_mean", "running_var"):
        assert relative(getattr(ours, name), getattr(wanted, name)) < 1e-5
    assert int(ours.num_batches_tracked) == 1
    assert relative(found.grad, expected.grad) < 1e-4
    assert relative(ours.weight.grad, wanted.weight.grad) < 1e-3
    assert relative(ours.bias.grad, wanted.bias.grad) < 1e-3
    torch.testing.assert_close(ours.eval()(x), wanted.eval()(x.double()).float(), atol=1e-4, rtol=0)


def test_the_encoders_gradients_equal_those_of_float64() -> None:
    torch.manual_seed(1)
    encoder = ConvEncoder(image_size=64, latent_dim=16, width=8, head_channels=4)
    pictures = torch.full((96, 64, 64, 3), 0.6)
    pictures[:, 20:40, 20:40] = torch.rand(96, 20, 20, 3)  # most of it is background, as in most worlds
    pictures = pictures.permute(0, 3, 1, 2)
    factor = torch.randn(96, 16)
    gradients = []
    for double in (False, True):
        encoder.zero_grad()
        z = encoder.double()(pictures.double()) if double else encoder(pictures)
        (z * factor.to(z.dtype)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]).double())
    assert relative(gradients[0], gradients[1]) < 5e-3
