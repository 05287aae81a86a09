"""What each layer's integers cost, that layer alone: where to look when a world suffers from them.

Shape legend: n pictures, b rollouts, t steps, c context, d latent, a action, k channels, h = rows, w = columns.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn

from worldline.edge.graph import Affine, Stage
from worldline.edge.quantise import layers, rounded
from worldline.edge.world import IntegerWorld
from worldline.model.conv import ConvEncoder
from worldline.model.predictor import GRUPredictor
from worldline.model.world import World

Row = dict[str, Any]


@torch.inference_mode()
def sensitivity(
    world: World,
    whole: IntegerWorld,
    frames: UInt8[Tensor, "n h w 3"],
    context: Float[Tensor, "b c d"],
    actions: Float[Tensor, "b t a"],
) -> list[Row]:
    """Return a row for each layer: its part, weights, and what it costs when all others are the float world's.

    Encoder: `off`, one minus the cosine of latents, their mean. Predictor (its weights alone): `off`, the rollouts'
    distance at their end, in variances of real latents. Decoder: `off`, the pictures' mean difference, in shades.
    """
    z = world.encode(frames)
    return [*_encoder(world, whole, frames, z), *_predictor(world, whole, context, actions), *_decoder(world, whole, z)]


def _encoder(world: World, whole: IntegerWorld, frames: Tensor, z: Tensor) -> list[Row]:
    encoder, stages = cast(ConvEncoder, world.encoder), whole.encoder.stages
    parts, grouped = layers(encoder), []
    for stage in stages:
        count = 2 if stage.kind == "separable" else 1
        grouped.append(parts[:count])
        parts = parts[count:]
    real, rows = frames.permute(0, 3, 1, 2).float() / 127.5 - 1, []

    def latents(x: Tensor, first: int) -> Tensor:
        for group in grouped[first:]:
            for part in group:
                x = part(x)
        out = encoder.linear(x.flatten(1))
        return world._project(world.latent_norm(out))

    scale, pictures = 1 / 127.5, (frames.numpy() ^ 0x80).view(np.int8)
    for i, stage in enumerate(stages):
        given = pictures if i == 0 else _whole(real, scale, stage.zero_in)
        out = cast(Affine, stage.conv or stage.depthwise)
        ours = _real(stage.run(given), out.scale, out.zero_out)
        rows.append(_row("encoder", _name(stage, i), stage, _off(latents(ours, i + 1), z)))
        for part in grouped[i]:
            real = part(real)
        scale = out.scale
    end: Any = whole.encoder.end
    ours = torch.from_numpy(end.run(_whole(real, scale, end.zero_in)) * np.float32(whole.scale)).float()
    rows.append({"part": "encoder", "layer": "matrix", "weights": end.matrix.weight.size, "off": _off(ours, z)})
    return rows


def _predictor(world: World, whole: IntegerWorld, context: Tensor, actions: Tensor) -> list[Row]:
    def ends(of: World) -> Tensor:
        begun = of.begin(context, actions[:, : context.shape[1] - 1])
        return of.rollout(begun, actions[:, context.shape[1] - 1 :])[:, -1]

    want, rows, hidden = ends(world), [], whole.hidden
    places = {"embed": "embed.0", "input_gates": "cell.weight_ih", "hidden_gates": "cell.weight_hh",
              "mix": "out.0", "change": "out.2"}  # fmt: skip
    for layer, place in places.items():
        other = copy.deepcopy(world)
        predictor = cast(GRUPredictor, other.predictor)
        weight = predictor.get_parameter(place if "weight" in place else f"{place}.weight")
        bits = getattr(whole.predictor, "from_hidden" if layer == "mix" else layer).bits
        for part in (slice(0, hidden), slice(hidden, None)) if layer == "mix" else (slice(None),):  # two matrices
            weight[:, part] = torch.from_numpy(rounded(weight[:, part].double().numpy(), bits)).float()
        off = float(world.gauge.error(ends(other), want).mean())
        rows.append({"part": "predictor", "layer": layer, "weights": weight.numel(), "off": off})
    return rows


def _decoder(world: World, whole: IntegerWorld, z: Tensor) -> list[Row]:
    decoder = world.decoder
    want = world.decode(z).int()
    convs = [*decoder.convs, decoder.to_pixels]

    def drawn(x: Tensor, first: int) -> Tensor:
        for conv in convs[first:]:
            x = _layer(conv, x, conv is decoder.to_pixels)
        shown = nn.functional.pixel_shuffle(x, 2).sigmoid()
        return (shown * 255).round().permute(0, 2, 3, 1).int()

    def cost(x: Tensor, first: int) -> float:
        return float((drawn(x, first) - want).abs().float().mean())

    side, scale = decoder.grid, whole.drawing.scale
    out = whole.drawing.run(np.round(z.double().numpy() / whole.scale).clip(-32768, 32767).astype(np.int16))
    ours = _real(out.reshape(len(z), side, side, -1), scale, whole.drawing.zero_out)
    rows = [{"part": "decoder", "layer": "matrix", "weights": whole.drawing.matrix.weight.size, "off": cost(ours, 0)}]
    real = torch.relu(decoder.linear(z)).reshape(len(z), side, side, -1).permute(0, 3, 1, 2)
    for i, (stage, conv) in enumerate(zip(whole.decoder.stages, convs, strict=True)):
        affine = cast(Affine, stage.conv)
        ours = _real(stage.run(_whole(real, scale, stage.zero_in)), affine.scale, affine.zero_out)
        rows.append(_row("decoder", _name(stage, i), stage, cost(ours, i + 1)))
        real, scale = _layer(conv, real, conv is decoder.to_pixels), affine.scale
    return rows


def _layer(conv: nn.Module, x: Tensor, last: bool) -> Tensor:
    out = conv(x if last else nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    return cast(Tensor, out if last else torch.relu(out))


def _whole(x: Float[Tensor, "n k h w"], scale: float, zero: int) -> Int8[np.ndarray, "n h w k"]:
    values = np.round(x.permute(0, 2, 3, 1).double().numpy() / scale) + zero
    return values.clip(-128, 127).astype(np.int8)


def _real(x: Int8[np.ndarray, "n h w k"], scale: float, zero: int) -> Float[Tensor, "n k h w"]:
    return torch.from_numpy((x.astype(np.float64) - zero) * scale).float().permute(0, 3, 1, 2)


def _off(z: Float[Tensor, "n d"], want: Float[Tensor, "n d"]) -> float:
    return float(1 - nn.functional.cosine_similarity(z, want, dim=-1).mean())


def _name(stage: Stage, i: int) -> str:
    return f"{i + 1}: {stage.kind} {stage.kernel} x {stage.kernel}, {stage.size_in[2]} to {stage.size[2]}"


def _row(part: str, layer: str, stage: Stage, off: float) -> Row:
    weights = sum(affine.weight.size for affine in (stage.depthwise, stage.conv) if affine is not None)
    return {"part": part, "layer": layer, "weights": weights, "off": off}
