"""What one update minimises: the terms of `losses`, put together for the two stages.

Shape legend: b windows, n looked-at frames of a window, t steps, c context, m drawn frames, d latent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.func import functional_call

from worldline.model.world import World
from worldline.train import losses
from worldline.train.config import StageConfig
from worldline.train.features import FeatureHead
from worldline.train.geometry import Geometry

Terms = dict[str, Tensor]

_SIGREG_STEPS = 8  # of a rollout, so that SIGReg costs less than the rollout itself


class JointBatch(NamedTuple):
    """Windows of pictures: the whole context, then every `target_stride`-th frame of the rollout."""

    frames: UInt8[Tensor, "b n h w 3"]
    actions: Float[Tensor, "b t a"]
    """Every action of the window, whatever frames are left out."""
    loose: UInt8[Tensor, "m h w 3"]
    """Single frames, moved about, that only `features` sees."""
    features: Float[Tensor, "f k"]
    """Of the b n frames, then of the m loose ones; k is 0 where the term is off."""


class FrozenBatch(NamedTuple):
    """Windows of latents, and, where a term wants pixels, some of their pictures."""

    z: Float[Tensor, "b t d"]
    actions: Float[Tensor, "b t a"]
    pixel_rows: Int64[Tensor, " m"]
    pixel_steps: Int64[Tensor, " m"]
    """Place of each picture in its window, always beyond the context."""
    pixel_frames: UInt8[Tensor, "m 2 h w 3"]
    """Each picture after the one before it."""


class InverseHead(nn.Module):
    """Tell the normalised action from a latent and its successor; only training uses it."""

    def __init__(self, latent_dim: int, action_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * latent_dim, 256), nn.ReLU(), nn.Linear(256, action_dim))

    def forward(self, z: Float[Tensor, "b t d"], z_next: Float[Tensor, "b t d"]) -> Float[Tensor, "b t a"]:
        action: Tensor = self.layers(torch.cat((z, z_next), dim=-1))
        return action


class Heads(nn.Module):
    """What training asks of latents and a world does not need; None where the term is off.

    `features` is how many numbers describe a picture, 0 without that term.
    """

    def __init__(self, *, inverse: bool, latent_dim: int, action_dim: int, features: int) -> None:
        super().__init__()
        self.inverse = InverseHead(latent_dim, action_dim) if inverse else None
        self.features = FeatureHead(latent_dim, features) if features else None


def picked_frames(context: int, rollout: int, stride: int) -> list[int]:
    """Return the places in a window that the joint stage looks at: the context, then every `stride`-th beyond."""
    return [*range(context), *range(context - 1 + stride, context + rollout, stride)]


def joint_terms(
    world: World,
    heads: Heads,
    batch: JointBatch,
    stage: StageConfig,
    rollout: int,
    background: Float[Tensor, "h w 3"],
    generator: torch.Generator,
) -> Terms:
    """Return the unweighted terms of the joint stage, by the name of their weight in the stage."""
    c, stride, terms = world.config.context, stage.target_stride, Terms()
    rows, looked_at = batch.frames.shape[:2]
    encoded = world.encode(torch.cat((batch.frames.flatten(0, 1), batch.loose)))  # (b n + m, d)
    z = encoded[: rows * looked_at].reshape(rows, looked_at, -1)
    predicted = losses.scale_gradient(z, stage.prediction_share)
    neighbours = z.shape[1] if stride == 1 else c  # so many first frames follow each other without a gap

    given = losses.noisy(predicted, stage.pushforward_noise, generator)
    if stage.one_step:
        z_hat = world.teacher_forced(given[:, : neighbours - 1], batch.actions[:, : neighbours - 1])
        terms["one_step"] = losses.one_step(z_hat, predicted[:, 1:neighbours], stage.error)
    if stage.own_rollout or stage.rollout_pixels:
        state = world.begin(given[:, :c], batch.actions[:, : c - 1])
        z_hat = world.rollout(state, batch.actions[:, c - 1 : c - 1 + rollout])[:, stride - 1 :: stride]
        terms["own_rollout"] = losses.own_rollout(z_hat, predicted[:, c:], stage.error)
    if stage.sigreg:
        groups = z.transpose(0, 1) if stage.sigreg_per_step else z.flatten(0, 1)[None]
        terms["sigreg"] = losses.sigreg(groups, generator, projections=stage.projections)
    if stage.straightening:
        terms["straightening"] = losses.straightening(z[:, :neighbours])
    if stage.variance:
        terms["variance"] = losses.variance(z.flatten(0, 1))
    if stage.covariance:
        terms["covariance"] = losses.covariance(z.flatten(0, 1))
    if stage.time_similarity:
        terms["time_similarity"] = losses.time_similarity(z[:, :neighbours])
    if heads.features is not None:
        features = heads.features(losses.noisy(encoded, stage.latent_noise, generator))
        terms["features"] = losses.features(features.float(), batch.features)
    if stage.inverse_dynamics and heads.inverse is not None:
        action_hat = heads.inverse(z[:, : neighbours - 1], z[:, 1:neighbours])
        action = world.normalise_actions(batch.actions[:, : neighbours - 1])
        terms["inverse_dynamics"] = losses.inverse_dynamics(action_hat, action)
    if stage.grounding:
        drawn = torch.randperm(z.shape[0] * z.shape[1], generator=generator)[: stage.pixel_frames].to(z.device)
        decoded = losses.noisy(z.flatten(0, 1)[drawn], stage.latent_noise, generator)
        motion = None
        if stage.motion:
            motion = losses.motion_weight(batch.frames.float() / 255.0, stage.motion).flatten(0, 1)[drawn]
        terms["grounding"] = _pixels(
            world,
            decoded,
            batch.frames.flatten(0, 1)[drawn],
            background,
            stage.foreground,
            motion,
        )
    if stage.rollout_pixels:
        drawn = torch.randperm(z_hat.shape[0] * z_hat.shape[1], generator=generator)[: stage.pixel_frames].to(z.device)
        seen = batch.frames[:, c:].flatten(0, 1)[drawn]
        terms["rollout_pixels"] = _pixels(world, z_hat.flatten(0, 1)[drawn], seen, background, stage.foreground)
    return terms


def frozen_terms(
    world: World,
    heads: Heads,
    batch: FrozenBatch,
    stage: StageConfig,
    rollout: int,
    background: Float[Tensor, "h w 3"],
    generator: torch.Generator,
    geometry: Geometry | None,
) -> Terms:
    """Return the unweighted terms of the frozen stage, by the name of their weight in the stage."""
    c, terms = world.config.context, Terms()
    z, actions = batch.z, batch.actions
    given, ahead = losses.noisy(z, stage.pushforward_noise, generator), actions[:, c - 1 : c - 1 + rollout]
    if stage.one_step:
        z_hat = world.teacher_forced(given[:, : c + rollout - 1], actions[:, : c + rollout - 1])
        terms["one_step"] = losses.one_step(z_hat, z[:, 1 : c + rollout], stage.error)
    if stage.own_rollout or stage.rollout_pixels or geometry is not None or stage.rollout_inverse:
        z_hat = world.rollout(world.begin(given[:, :c], actions[:, : c - 1]), ahead)
    if stage.own_rollout:
        terms["own_rollout"] = losses.own_rollout(z_hat, z[:, c : c + rollout], stage.error)
    if stage.excess_growth and geometry is not None:
        allowed = geometry.log_growth[: rollout - 1]
        terms["excess_growth"] = losses.excess_growth(z_hat.float(), z[:, c : c + rollout], geometry.whitening, allowed)
    if stage.rollout_sigreg and geometry is not None and rollout >= (first := stage.rollout_sigreg_from):
        steps = first - 1 + torch.randperm(rollout - first + 1, generator=generator)[:_SIGREG_STEPS].to(z.device)
        whitened = (z_hat[:, steps].float() - geometry.mean) @ geometry.whitening
        groups = whitened.transpose(0, 1)
        terms["rollout_sigreg"] = losses.sigreg(groups, generator, projections=stage.projections)
    if stage.inverse_dynamics and heads.inverse is not None:
        action = world.normalise_actions(actions)
        terms["inverse_dynamics"] = losses.inverse_dynamics(heads.inverse(z[:, :-1], z[:, 1:]), action)
        if stage.rollout_inverse:  # real latents alone train the head, or it would learn to read a rollout's own marks
            fixed = {name: parameter.detach() for name, parameter in heads.inverse.named_parameters()}
            action_hat = functional_call(heads.inverse, fixed, (z_hat[:, :-1], z_hat[:, 1:]))
            terms["rollout_inverse"] = losses.inverse_dynamics(action_hat, world.normalise_actions(ahead[:, 1:]))
    rows, steps, seen = batch.pixel_rows, batch.pixel_steps, batch.pixel_frames[:, 1]
    if stage.grounding:
        decoded = losses.noisy(z[rows, steps], stage.latent_noise, generator)
        motion = losses.motion_weight(batch.pixel_frames.float() / 255.0, stage.motion)[:, 1] if stage.motion else None
        terms["grounding"] = _pixels(world, decoded, seen, background, stage.foreground, motion)
    if stage.rollout_pixels:
        drawn = z_hat[rows, steps - c]
        terms["rollout_pixels"] = _pixels(world, drawn, seen, background, stage.foreground)
    return terms


def weighted_sum(terms: Terms, stage: StageConfig) -> Float[Tensor, ""]:
    """Return the loss: every term times its weight in the stage."""
    return torch.stack([getattr(stage, name) * term for name, term in terms.items()]).sum()


def _pixels(
    world: World,
    z: Float[Tensor, "m d"],
    frames: UInt8[Tensor, "m h w 3"],
    background: Float[Tensor, "h w 3"],
    foreground: float,
    extra_weight: Float[Tensor, "m h w 1"] | None = None,
) -> Float[Tensor, ""]:
    pictures = frames.float() / 255.0
    weight = losses.foreground_weight(pictures, background, foreground)
    if extra_weight is not None:
        weight = weight + extra_weight
    return losses.grounding(world.decode_float(z).float(), pictures, weight)
