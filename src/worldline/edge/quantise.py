"""Post-training quantisation: a trained world to integers, its ranges measured on real frames and on long rollouts.

Shape legend: n calibration frames, b rollouts, t steps, c context, d latent, a action, o outputs, i inputs, k kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Float64, Int8, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from worldline.core.errors import WorldlineError
from worldline.edge import integer
from worldline.edge.graph import Affine, Chain, Flatten, Pixels, Size, Stage
from worldline.edge.world import Dense, Drawing, Gauge, IntegerWorld, Normalising, Predictor
from worldline.model.conv import ConvEncoder
from worldline.model.predictor import GRUPredictor
from worldline.model.world import World

_MARGIN = 1.25  # int16 ranges beyond what calibration saw: a bit is cheap there, and saturation is not
_GATE = 1 / 4096
_HIDDEN = 1 / 32768
_WHITE = 1 / 1024
_PIXEL = 1 / 127.5
_CORRECTIONS, _CORRECTED = 3, 128  # rounds, and pictures of each


class Calibration(NamedTuple):
    """What ranges are measured on: held-out from evaluation, so of training episodes."""

    frames: UInt8[Tensor, "n h w 3"]
    context: Float[Tensor, "b c d"]
    """Encoded real latents that rollouts begin with."""
    actions: Float[Tensor, "b t a"]
    """Native: c - 1 within the context, then those of the rollout."""


def quantise(world: World, data: Calibration, bits: int = 8) -> IntegerWorld:
    """Return the world in integers; `bits` is what a weight of the largest matrices takes, 8 or 4.

    These are the GRU's, the one behind it, and the decoder's first.

    Raises:
        WorldlineError: its encoder or predictor is of a kind that TinyEngine does not run.
    """
    if not isinstance(world.encoder, ConvEncoder) or not isinstance(world.predictor, GRUPredictor):
        raise WorldlineError(
            "TinyEngine runs worlds with a convolutional encoder and a GRU; train with model.encoder=conv "
            f"model.predictor=gru, this one has {world.config.encoder} and {world.config.predictor}"
        )
    if bits not in (8, 4):
        raise WorldlineError(f"weights take 8 or 4 bits, got {bits}")
    if world.config.hidden % 4:
        raise WorldlineError(f"TinyEngine wants model.hidden to be a multiple of 4, got {world.config.hidden}")
    if world.config.projection == "quantise":
        raise WorldlineError("model.projection=quantise is not among what TinyEngine runs; none and normalise are")
    with torch.no_grad():
        seen = _watch(world, data)
        scale = seen.latent * _MARGIN / 32767
        radius = round(math.sqrt(world.config.latent_dim) / scale) if world.config.projection == "normalise" else 0
        predictor = _predictor(world.predictor, seen, scale, radius, bits)
        encoder = _encoder(world, data.frames, scale)
        drawing, decoder = _decoder(world, seen.latents, scale, bits)
    return IntegerWorld(
        encoder=encoder,
        predictor=predictor,
        drawing=drawing,
        decoder=decoder,
        gauge=_gauge(world, scale),
        scale=scale,
        actions=Normalising(
            low=np.array(world.spec.action_low, np.float32),
            high=np.array(world.spec.action_high, np.float32),
            mean=world.action_mean.float().numpy(),
            factor=(1 / (world.action_std.double().numpy() * scale)).astype(np.float32),
        ),
    )


class _Seen(NamedTuple):
    """The largest values in rollouts."""

    latent: float
    embedded: float
    mixed: float
    latents: Float[Tensor, "n d"]
    """Some real, some imagined: what the decoder is shown."""


def _watch(world: World, data: Calibration) -> _Seen:
    p = cast(GRUPredictor, world.predictor)
    z, actions = data.context, world.normalise_actions(data.actions)
    (h,) = p.initial(len(z))
    now, shown = z[:, 0], []
    latent, embedded, mixed = float(torch.maximum(z.abs().max(), actions.abs().max())), 0.0, 0.0
    for t in range(actions.shape[1]):
        x = p.embed(torch.cat((now, actions[:, t]), dim=-1))
        h = p.cell(x, h)
        y = p.out[1](p.out[0](torch.cat((h, x), dim=-1)))
        now = world._project(now + p.out[2](y))
        embedded, mixed = max(embedded, float(x.max())), max(mixed, float(y.max()))
        latent = max(latent, float(now.abs().max()))
        if t + 1 < z.shape[1]:
            now = z[:, t + 1]
        shown.append(now)
    return _Seen(latent, embedded, mixed, torch.cat(shown)[:: max(1, len(shown) * len(z) // 512)])


def _predictor(p: GRUPredictor, seen: _Seen, scale: float, radius: int, bits: int) -> Predictor:
    x_scale, y_scale = seen.embedded * _MARGIN / 32767, seen.mixed * _MARGIN / 32767
    embed, mix, change = (cast(nn.Linear, m) for m in (p.embed[0], p.out[0], p.out[2]))
    hidden = p.cell.hidden_size
    mix_weight, nothing = _array(mix.weight), np.zeros(len(mix.weight))
    return Predictor(
        embed=_dense(_array(embed.weight), _array(embed.bias), scale, x_scale),
        input_gates=_dense(_array(p.cell.weight_ih), _array(p.cell.bias_ih), x_scale, _GATE, bits),
        hidden_gates=_dense(_array(p.cell.weight_hh), _array(p.cell.bias_hh), _HIDDEN, _GATE, bits),
        from_hidden=_dense(mix_weight[:, :hidden], _array(mix.bias), _HIDDEN, y_scale, bits),
        from_input=_dense(mix_weight[:, hidden:], nothing, x_scale, y_scale, bits),
        change=_dense(_array(change.weight), _array(change.bias), y_scale, scale),
        radius=radius,
    )


def layers(encoder: ConvEncoder) -> list[nn.Sequential]:
    """Return the encoder's convolutions, each with its norm and activation."""
    blocks = [cast(nn.Sequential, block) for block in encoder.blocks]
    halves = [cast(nn.Sequential, half) for block in blocks for half in (block[:3], block[3:])]
    return [encoder.stem, *halves, encoder.head]


def _encoder(world: World, frames: UInt8[Tensor, "n h w 3"], z_scale: float) -> Chain:
    encoder = cast(ConvEncoder, world.encoder)
    rows, columns = frames.shape[1:3]
    real = frames.permute(0, 3, 1, 2).float() * _PIXEL - 1.0
    whole = (frames.numpy() ^ 0x80).view(np.int8)
    # a picture's byte q + 128 means (q + 1/2) / 127.5, and half a step goes into the first bias
    grid = _Grid(size=(int(rows), int(columns), 3), scale=_PIXEL, zero=0, offset=0.5 * _PIXEL)
    stages: list[Stage] = []
    for part in layers(encoder):
        conv, norm, activation = cast(tuple[nn.Conv2d, nn.BatchNorm2d, nn.Module], tuple(part))
        real = activation(norm(conv(real)))
        stage, grid = _stage(conv, *_folded(conv, norm), grid, real, whole)
        whole = stage.run(whole)
        stages.append(stage)
    weight, bias = _array(encoder.linear.weight), _array(encoder.linear.bias)
    if isinstance(world.latent_norm, nn.BatchNorm1d):
        mean, variance = (
            _array(cast(Tensor, v)) for v in (world.latent_norm.running_mean, world.latent_norm.running_var)
        )
        by = 1 / np.sqrt(variance + world.latent_norm.eps)
        weight, bias = weight * by[:, None], (bias - mean) * by
    r, c, ch = grid.size
    weight = weight.reshape(-1, ch, r, c).transpose(0, 2, 3, 1).reshape(len(weight), -1)
    affine = _affine(weight, bias, grid.scale, z_scale, 0, (-32768, 32767))
    return Chain(stages=_fused(stages), end=Flatten(matrix=affine, zero_in=grid.zero))


def _decoder(world: World, z: Float[Tensor, "n d"], scale: float, bits: int) -> tuple[Drawing, Chain]:
    decoder = world.decoder
    real = torch.relu(decoder.linear(z))
    grid_scale, zero = float(real.max()) / 255, -128
    matrix = _dense(_array(decoder.linear.weight), _array(decoder.linear.bias), scale, grid_scale, bits)
    drawing = Drawing(matrix=matrix, zero_out=zero, scale=grid_scale)
    side = decoder.grid
    real = real.reshape(len(z), side, side, -1).permute(0, 3, 1, 2)
    whole = drawing.run(integer.saturate(np.round(z.double().numpy() / scale).astype(np.int64), 16).astype(np.int16))
    whole = whole.reshape(len(z), side, side, -1)
    grid = _Grid(size=(side, side, int(real.shape[1])), scale=grid_scale, zero=zero)
    stages: list[Stage] = []
    for conv in (*decoder.convs, decoder.to_pixels):
        last = conv is decoder.to_pixels
        real = conv(real if last else nn.functional.interpolate(real, scale_factor=2.0, mode="nearest"))
        real = real if last else torch.relu(real)
        conv = cast(nn.Conv2d, conv)
        stage, grid = _stage(conv, _array(conv.weight), _array(cast(Tensor, conv.bias)), grid, real, whole, not last)
        whole = stage.run(whole)
        stages.append(stage)
    shades = np.round(255 / (1 + np.exp(-grid.scale * (np.arange(-128, 128) - grid.zero))))
    return drawing, Chain(stages=tuple(stages), end=Pixels(shades=shades.astype(np.uint8)))


def _gauge(world: World, scale: float) -> Gauge:
    if not world.gauge.fitted:
        raise WorldlineError("this world's drift gauge has not been fitted; finish its training, or call gauge.fit")
    whitening = _array(world.gauge.whitening).T
    mean = integer.saturate(np.round(_array(world.gauge.mean) / scale).astype(np.int64), 16).astype(np.int16)
    return Gauge(
        mean=mean,
        whiten=_dense(whitening, np.zeros(len(whitening)), scale, _WHITE),
        radius99=max(1, round(float(world.gauge.radius99) / _WHITE)),
    )


@dataclass(frozen=True)
class _Grid:
    size: Size
    scale: float
    zero: int
    offset: float = 0.0
    """What every value is off by, told to the bias of the next stage."""


def _stage(
    conv: nn.Conv2d,
    weight: Float64[np.ndarray, "o i k k"],
    bias: Float64[np.ndarray, " o"],
    grid: _Grid,
    real: Float[Tensor, "n o H W"],
    whole: Int8[np.ndarray, "n h w c"],
    upsample: bool = False,
) -> tuple[Stage, _Grid]:
    """Return a convolution in integers, its biases corrected so that every channel's mean is the real one's."""
    low, high = min(0.0, float(real.min())), float(real.max())
    scale = (high - low) / 255
    zero = -128 - round(low / scale)
    bounds = (zero if low == 0 else -128, 127)
    deep = conv.groups > 1
    size: Size = (int(real.shape[2]), int(real.shape[3]), int(real.shape[1]))
    bias = bias + grid.offset * weight.sum(axis=(1, 2, 3))
    affine = _affine(weight.transpose(0, 2, 3, 1), bias, grid.scale, scale, zero, bounds)
    stage = Stage(
        kind="depthwise" if deep else "conv", size_in=grid.size, size=size, kernel=conv.kernel_size[0],
        stride=conv.stride[0], padding=cast(tuple[int, int], conv.padding), upsample=upsample, zero_in=grid.zero,
        depthwise=_deep(affine) if deep else None, conv=None if deep else affine,
    )  # fmt: skip
    some = slice(None, None, max(1, len(whole) // _CORRECTED))
    means = real[some].permute(0, 2, 3, 1).double().numpy().mean(axis=(0, 1, 2))
    for _ in range(_CORRECTIONS):
        out = stage.run(whole[some])
        # what is clamped does not follow its bias
        free = ((out > bounds[0]) & (out < bounds[1])).mean(axis=(0, 1, 2)).clip(0.1, 1.0)
        off = (means - scale * (out.astype(np.float64).mean(axis=(0, 1, 2)) - zero)) / free
        steps = np.round(off / (grid.scale * _channel_scale(weight))).astype(np.int64)
        affine = replace(affine, bias=(affine.bias + steps).astype(np.int32))
        stage = replace(stage, depthwise=_deep(affine) if deep else None, conv=None if deep else affine)
    return stage, _Grid(size, scale, zero)


def _deep(affine: Affine) -> Affine:
    """Return depthwise weights (o, k, k, 1) as (k, k, o)."""
    return replace(affine, weight=np.ascontiguousarray(affine.weight[..., 0].transpose(1, 2, 0)))


def _fused(stages: list[Stage]) -> tuple[Stage, ...]:
    """Return the stages with every depthwise one and the 1x1 one behind it made into one."""
    fused: list[Stage] = []
    for stage in stages:
        if fused and fused[-1].kind == "depthwise" and stage.kind == "conv" and stage.kernel == 1:
            fused[-1] = replace(fused[-1], kind="separable", size=stage.size, conv=stage.conv)
        else:
            fused.append(stage)
    return tuple(fused)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Float64[np.ndarray, "o i k k"], Float64[np.ndarray, " o"]]:
    """Return weights and biases of a convolution and the batch norm behind it."""
    mean, variance = _array(cast(Tensor, norm.running_mean)), _array(cast(Tensor, norm.running_var))
    by = _array(norm.weight) / np.sqrt(variance + norm.eps)
    return _array(conv.weight) * by[:, None, None, None], _array(norm.bias) - mean * by


def _affine(
    weight: Float64[np.ndarray, "o ..."],
    bias: Float64[np.ndarray, " o"],
    scale_in: float,
    scale_out: float,
    zero_out: int,
    bounds: tuple[int, int],
) -> Affine:
    scales = _channel_scale(weight)
    whole, steps = _whole(weight, bias, scales, scale_in)
    by = integer.scaling(scale_in * scales / scale_out)
    return Affine(weight=whole, bias=steps, by=by, zero_out=zero_out, low=bounds[0], high=bounds[1], scale=scale_out)


def _dense(
    weight: Float64[np.ndarray, "o i"],
    bias: Float64[np.ndarray, " o"],
    scale_in: float,
    scale_out: float,
    bits: int = 8,
) -> Dense:
    scales = _channel_scale(weight)
    if bits == 4:
        weight, scales = _coarse(weight)
    whole, steps = _whole(weight, bias, scales, scale_in)
    return Dense(weight=whole, bias=steps, by=integer.wide_scaling(scale_in * scales / scale_out), bits=bits)


def rounded(weight: Float64[np.ndarray, "o i"], bits: int) -> Float64[np.ndarray, "o i"]:
    """Return a matrix's weights as integers have them."""
    if bits == 4:
        return _coarse(weight)[0]
    by = _channel_scale(weight)[:, None]
    return np.round(weight / by) * by


def _coarse(
    weight: Float64[np.ndarray, "o i"],
) -> tuple[Float64[np.ndarray, "o i"], Float64[np.ndarray, " o"]]:
    """Return weights of 15 values a row, and the rows' scales in steps of a sixteenth: those with the least squares."""
    most = _channel_scale(weight) * 127
    best, scales = np.full(len(weight), np.inf), most
    for share in np.linspace(0.5, 1.0, 26):
        step = share * most[:, None] / 7
        error = np.square(np.clip(np.round(weight / step), -7, 7) * step - weight).sum(axis=1)
        scales = np.where(error < best, step[:, 0] / 16, scales)
        best = np.minimum(best, error)
    return np.clip(np.round(weight / (16 * scales[:, None])), -7, 7) * 16 * scales[:, None], scales


def _whole(
    weight: Float64[np.ndarray, "o ..."],
    bias: Float64[np.ndarray, " o"],
    scales: Float64[np.ndarray, " o"],
    scale_in: float,
) -> tuple[Int8[np.ndarray, "o ..."], np.ndarray]:
    by = scales.reshape(-1, *[1] * (weight.ndim - 1))
    whole = np.clip(np.round(weight / by), -127, 127).astype(np.int8)
    steps = np.round(bias / (scales * scale_in))
    if np.abs(steps).max() >= integer.LIMIT / 2:
        raise WorldlineError(
            "a channel's bias is too large beside its weights for int8; prune dead channels, or train anew"
        )
    return whole, steps.astype(np.int32)


def _channel_scale(weight: Float64[np.ndarray, "o ..."]) -> Float64[np.ndarray, " o"]:
    most = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    return np.maximum(most, 1e-6 * max(float(most.max()), 1e-6)) / 127


def _array(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().numpy()
