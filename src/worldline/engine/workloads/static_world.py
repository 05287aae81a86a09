"""A world of convolutions and a GRU as a program over static memory: batch 1 (a step: any), float32, one CPU.

The arithmetic is the world's own in another order of sums, so pictures and latents differ from the eager ones by
rounding: batch norms are folded into the convolutions before them; a convolution is a product of patches; and three by
three over a picture that was doubled by repeating pixels is, for each of the four places in a doubled pixel, two by
two over the picture before, which is four ninths of the work.

Shape legend: b batch, h, w grid, c channels, e width of the GRU, d latent, a action.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldline.core.errors import WorldlineError
from worldline.engine.arena import Program, Slot, Tape, View
from worldline.model.conv import ConvEncoder
from worldline.model.predictor import GRUPredictor
from worldline.model.world import World


class StaticWorld:
    """The stages of a world, each a list of bound calls.

    `run["step"]()` reads `action` and turns `z` and `h` into the next ones; `run["decode"]()` draws `z` into `frame`, a
    (size, size, 3) tensor of bytes; `run["encode"]()` puts the latent of `frame` into `seen`. With a fitted gauge
    `run["region"]()` writes the first of its two `readings`, and `run["gap"]()` after `encode` the second. The weights
    are those that the world has when this is made.

    Raises:
        WorldlineError: the world has other parts than these programs are written for.
    """

    def __init__(self, world: World, action: Float[Tensor, "1 a"], frame: Tensor) -> None:
        refuse_unsupported(world)
        with torch.no_grad():
            tape = Tape()
            d, e = world.config.latent_dim, world.config.hidden
            va = tape.slot("latent and action", 1, d + world.spec.action_dim, keep=True)
            hx = tape.slot("memory and input", 1, 2 * e, keep=True)
            z = va.view(lambda t: t[:, :d])
            seen = tape.slot("seen latent", 1, d, keep=True)
            tape.stage = "step"
            note_step(tape, world, action, va, hx)
            tape.stage = "decode"
            _note_decode(tape, world, z, frame)
            stages = ["step", "decode"]
            readings: Slot | None = None
            if world.gauge.fitted:
                tape.stage = "region"
                readings = tape.slot("readings", 2, keep=True)
                white = tape.slot("white", 1, d)
                tape.call(torch.sub, z, world.gauge.mean, out=white)
                _note_norm(tape, white, world.gauge.whitening, world.gauge.radius99, readings, 0)
                stages.append("region")
            tape.stage = "encode"
            _note_encode(tape, world, frame, seen)
            stages.append("encode")
            if readings is not None and world.gauge.cycle99 > 0:
                tape.stage = "gap"
                gap = tape.slot("gap", 1, d)
                tape.call(torch.sub, seen, z, out=gap)
                _note_norm(tape, gap, world.gauge.whitening, world.gauge.cycle99, readings, 1)
                stages.append("gap")
            self.program: Program = tape.build()
        self.run: dict[str, Callable[[], None]] = {name: self.program.runner(name) for name in stages}
        self.z: Tensor = self.program.tensor(z)
        self.h: Tensor = self.program.tensor(hx.view(lambda t: t[:, :e]))
        self.seen: Tensor = self.program.tensor(seen)
        self.readings: Tensor = torch.zeros(0) if readings is None else self.program.tensor(readings)


def unsupported(world: World) -> str:
    """Return why a world cannot be made static, or nothing if it can."""
    if not isinstance(world.predictor, GRUPredictor):
        return f"this one has a {world.config.predictor}"
    if not isinstance(world.encoder, ConvEncoder):
        return f"this one has a {world.config.encoder} encoder"
    if world.config.projection == "quantise":
        return "and this one's latents lie on a grid"
    return ""


def refuse_unsupported(world: World) -> None:
    """Raise WorldlineError, with the way out, for a world that cannot be made static."""
    if reason := unsupported(world):
        raise WorldlineError(f"mode=graph on a CPU plays worlds of convolutions and a GRU, {reason}; give mode=eager")


def note_step(tape: Tape, world: World, action: Float[Tensor, "b a"], va: Slot, hx: Slot) -> None:
    """Note down a step of `b` rows: `action` and the latents in `va` (b, d + a), memories in `hx` (b, 2e)."""
    predictor, b, d = world.predictor, len(action), world.config.latent_dim
    assert isinstance(predictor, GRUPredictor)
    cell, e = predictor.cell, predictor.cell.hidden_size
    z, a = va.view(lambda t: t[:, :d]), va.view(lambda t: t[:, d:])
    h, x = hx.view(lambda t: t[:, :e]), hx.view(lambda t: t[:, e:])
    low, high = (torch.tensor(bound)[None] for bound in (world.spec.action_low, world.spec.action_high))
    tape.call(torch.clamp, action, low, high, out=a)
    tape.call(torch.sub, a, world.action_mean, out=a)
    tape.call(torch.div, a, world.action_std, out=a)
    _note_linear(tape, predictor.embed[0], va, x)
    tape.call(torch.relu_, x)
    by_x, by_h = tape.slot("GRU sums of the input", b, 3 * e), tape.slot("GRU sums of the memory", b, 3 * e)
    tape.call(torch.addmm, cell.bias_ih.detach(), x, _transposed(cell.weight_ih), out=by_x)
    tape.call(torch.addmm, cell.bias_hh.detach(), h, _transposed(cell.weight_hh), out=by_h)
    gates = by_x.view(lambda t: t[:, : 2 * e])
    tape.call(torch.add, gates, by_h.view(lambda t: t[:, : 2 * e]), out=gates)
    tape.call(torch.sigmoid, gates, out=gates)
    reset, update = by_x.view(lambda t: t[:, :e]), by_x.view(lambda t: t[:, e : 2 * e])
    new = by_x.view(lambda t: t[:, 2 * e :])
    tape.call(torch.addcmul, new, reset, by_h.view(lambda t: t[:, 2 * e :]), out=new)
    tape.call(torch.tanh, new, out=new)
    tape.call(torch.lerp, new, h, update, out=h)
    out = tape.slot("hidden of the change", b, e)
    _note_linear(tape, predictor.out[0], hx, out)
    tape.call(torch.relu_, out)
    last = predictor.out[2]
    assert isinstance(last, nn.Linear)
    tape.call(torch.addmm, z, out, _transposed(last.weight), out=z)
    tape.call(torch.add, z, last.bias.detach(), out=z)
    if world.config.projection == "normalise":
        length = tape.slot("length", b, 1)
        tape.call(torch.linalg.vector_norm, z, dim=-1, keepdim=True, out=length)
        tape.call(torch.clamp, length, 1e-12, out=length)
        tape.call(torch.div, z, length, out=z)
        tape.call(torch.mul, z, math.sqrt(d), out=z)


def _note_decode(tape: Tape, world: World, z: View, frame: Tensor) -> None:
    decoder = world.decoder
    grid, convs = decoder.grid, [conv for conv in decoder.convs if isinstance(conv, nn.Conv2d)]
    flat = tape.slot("decoder grid", 1, decoder.linear.out_features)
    _note_linear(tape, decoder.linear, z, flat)
    tape.call(torch.relu_, flat)
    padded = tape.slot("decoder input 0", grid + 2, grid + 2, convs[0].in_channels, keep=True)
    tape.call(_copy, _interior(padded), _on_grid(flat, grid))
    size = grid
    for number, conv in enumerate(convs):
        doubled = tape.slot(f"decoder input {number + 1}", 2 * size + 2, 2 * size + 2, conv.out_channels, keep=True)
        patches = tape.slot(f"patches of doubling {number}", size * size, 4 * conv.in_channels)
        sums = tape.slot(f"doubling {number}", size * size, conv.out_channels)
        for i, j in product((0, 1), (0, 1)):
            _note_patches(tape, padded, patches, size, kernel=2, at=(i, j))
            tape.call(torch.addmm, _bias(conv), patches, by_phase(conv.weight, i, j), out=sums)
            tape.call(torch.relu_, sums)
            place = _every_other(doubled, i, j)
            tape.call(_copy, place, _on_grid(sums, size))
        padded, size = doubled, 2 * size
    last = decoder.to_pixels
    patches = tape.slot("patches of pixels", size * size, 9 * last.in_channels)
    _note_patches(tape, padded, patches, size, kernel=3)
    # columns by place in the doubled pixel, then colour, as the picture has them; 12 make a slow product and 16 do not
    weight, bias = _as_matrix(last.weight), _bias(last)
    order = torch.arange(12).view(3, 2, 2).permute(1, 2, 0).flatten()
    pixels = tape.slot("pixels", size * size, 16)
    tape.call(
        torch.addmm, nn.functional.pad(bias[order], (0, 4)), patches, _pad_columns(weight[:, order], 16), out=pixels
    )
    tape.call(torch.sigmoid, pixels, out=pixels)
    tape.call(torch.mul, pixels, 255.0, out=pixels)
    tape.call(torch.round, pixels, out=pixels)
    bytes_ = tape.slot("pixels as bytes", size * size, 16, dtype=torch.uint8)
    tape.call(_copy, bytes_, pixels)
    places = _on_grid(bytes_, size, lambda t: t[:, :, :12].unflatten(2, (2, 6)).transpose(1, 2))
    tape.call(_copy, frame.view(size, 2, size, 6), places)


def _note_encode(tape: Tape, world: World, frame: Tensor, seen: Slot) -> None:
    encoder = world.encoder
    assert isinstance(encoder, ConvEncoder)
    size = world.config.image_size
    padded = tape.slot("picture", size + 2, size + 2, 3, keep=True)
    tape.call(_copy, _interior(padded), frame)
    tape.call(torch.div, _interior(padded), 127.5, out=_interior(padded))
    tape.call(torch.sub, _interior(padded), 1.0, out=_interior(padded))
    layers = [layer for part in (encoder.stem, *encoder.blocks, encoder.head) for layer in part]
    folded = [_fold(conv, norm) for conv, norm in zip(layers[::3], layers[1::3], strict=True)]
    flat: Slot | None = None
    for number, (conv, weight, bias) in enumerate(folded):
        stride, channels = conv.stride[0], conv.out_channels
        if conv.kernel_size == (1, 1):
            assert flat is not None
            sums = tape.slot(f"encoder {number}", size * size, channels)
            tape.call(torch.addmm, bias, flat, _as_matrix(weight), out=sums)
        else:
            if flat is not None:
                padded = tape.slot(f"encoder input {number}", size + 2, size + 2, conv.in_channels, keep=True)
                tape.call(_copy, _interior(padded), _on_grid(flat, size))
            size //= stride
            sums = tape.slot(f"encoder {number}", size * size, channels)
            if conv.groups == 1:
                patches = tape.slot(f"encoder patches {number}", size * size, 9 * conv.in_channels)
                _note_patches(tape, padded, patches, size, kernel=3, stride=stride)
                tape.call(torch.addmm, bias, patches, _as_matrix(weight), out=sums)
            else:
                _note_depthwise(tape, padded, weight, bias, sums, size, stride, number)
        tape.call(torch.clamp, sums, 0.0, 6.0, out=sums)
        flat = sums
    assert flat is not None
    rows = flat.view(lambda t: t.view(1, -1))
    weight, bias = _scaled_head(world, encoder.linear, size * size)
    tape.call(torch.addmm, bias, rows, weight, out=seen)
    if world.config.projection == "normalise":
        length = tape.slot("length of the seen", 1, 1)
        tape.call(torch.linalg.vector_norm, seen, dim=-1, keepdim=True, out=length)
        tape.call(torch.clamp, length, 1e-12, out=length)
        tape.call(torch.div, seen, length, out=seen)
        tape.call(torch.mul, seen, math.sqrt(world.config.latent_dim), out=seen)


def _note_depthwise(
    tape: Tape, padded: Slot, weight: Tensor, bias: Tensor, sums: Slot, size: int, stride: int, number: int
) -> None:
    """One product for each tap and channel, then the sum over the nine taps as a product with ones."""
    channels = len(bias)
    taps = tape.slot(f"encoder taps {number}", 3, 3, size, size, channels)
    window = padded.view(lambda t: windows(t, size, 3, stride).permute(2, 3, 0, 1, 4))
    tape.call(torch.mul, window, weight[:, 0].permute(1, 2, 0)[:, :, None, None].contiguous(), out=taps)
    total = sums.view(lambda t: t.view(1, -1))
    tape.call(torch.mm, torch.ones(1, 9), taps.view(lambda t: t.view(9, -1)), out=total)
    tape.call(torch.add, sums, bias, out=sums)


def _note_patches(
    tape: Tape, padded: Slot, patches: Slot, size: int, *, kernel: int, stride: int = 1, at: tuple[int, int] = (0, 0)
) -> None:
    """Copy the `kernel` x `kernel` neighbourhoods of a padded picture into the rows of a matrix."""
    i, j = at
    window = padded.view(lambda t: windows(t[i:, j:], size, kernel, stride))
    tape.call(_copy, patches.view(lambda t: t.view(size, size, kernel, kernel, -1)), window)


def _note_linear(tape: Tape, layer: nn.Module, x: Slot | View, out: Slot | View) -> None:
    assert isinstance(layer, nn.Linear)
    tape.call(torch.addmm, layer.bias.detach(), x, _transposed(layer.weight), out=out)


def _note_norm(tape: Tape, offset: Slot, whitening: Tensor, unit: Tensor, readings: Slot, row: int) -> None:
    """|offset @ whitening| / unit, into one of the readings."""
    white = tape.slot(f"whitened {row}", 1, offset.shape[1])
    tape.call(torch.mm, offset, whitening / unit, out=white)
    tape.call(torch.linalg.vector_norm, white, dim=-1, out=readings.view(lambda t: t[row : row + 1]))


def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source)


def _on_grid(flat: Slot, size: int, then: Callable[[Tensor], Tensor] = lambda t: t) -> View:
    return flat.view(lambda t: then(t.view(size, size, -1)))


def _every_other(padded: Slot, i: int, j: int) -> View:
    return padded.view(lambda t: t[1 + i : -1 : 2, 1 + j : -1 : 2])


def _interior(padded: Slot) -> View:
    return padded.view(lambda t: t[1:-1, 1:-1])


def windows(padded: Tensor, size: int, kernel: int, stride: int) -> Float[Tensor, "h w k k c"]:
    rows, pixels, _ = padded.stride()
    shape = (size, size, kernel, kernel, padded.shape[2])
    return padded.as_strided(shape, (stride * rows, stride * pixels, rows, pixels, 1), padded.storage_offset())


def by_phase(weight: Float[Tensor, "o c 3 3"], i: int, j: int) -> Float[Tensor, "kkc o"]:
    """Return what row i and column j of every doubled pixel sees: the taps that fall on one pixel are added up."""
    o, c = weight.shape[:2]
    found = weight.new_zeros(2, 2, c, o)
    for row, column in product(range(3), range(3)):
        found[(i + row - 1) // 2 + 1 - i, (j + column - 1) // 2 + 1 - j] += weight.detach()[:, :, row, column].T
    return found.reshape(4 * c, o)


def _as_matrix(weight: Float[Tensor, "o c k k"]) -> Float[Tensor, "kkc o"]:
    return weight.detach().permute(2, 3, 1, 0).reshape(-1, len(weight)).contiguous()


def _pad_columns(weight: Float[Tensor, "i o"], columns: int) -> Float[Tensor, "i p"]:
    return nn.functional.pad(weight, (0, columns - weight.shape[1]))


def _transposed(weight: Float[Tensor, "o i"]) -> Float[Tensor, "i o"]:
    return weight.detach().T.contiguous()


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias.detach()


def _fold(conv: nn.Module, norm: nn.Module) -> tuple[nn.Conv2d, Tensor, Tensor]:
    """Return a convolution with the weight and bias that it has together with its batch norm."""
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    scale, shift = _affine(norm)
    return conv, conv.weight.detach() * scale[:, None, None, None], shift


def _affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift + norm.bias.detach() if norm.affine else shift


def _scaled_head(world: World, linear: nn.Linear, cells: int) -> tuple[Float[Tensor, "i d"], Float[Tensor, " d"]]:
    """Return the encoder's last layer, fed channels last, with the norm of latents folded in."""
    weight = linear.weight.detach().view(len(linear.weight), -1, cells).transpose(1, 2).reshape(len(linear.weight), -1)
    bias = linear.bias.detach()
    if isinstance(world.latent_norm, nn.BatchNorm1d):
        scale, shift = _affine(world.latent_norm)
        weight, bias = weight * scale[:, None], bias * scale + shift
    return weight.T.contiguous(), bias
