"""The world model: encode what is seen, imagine what comes, decode it again.

Shape legend: b batch, t steps, c context, d latent, a action, h = w = image size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from worldline.core.errors import WorldlineError
from worldline.core.types import WorldSpec
from worldline.model.conv import ConvEncoder
from worldline.model.decoder import ConvDecoder
from worldline.model.estimator import Estimate, Track
from worldline.model.gauge import Gauge
from worldline.model.predictor import GRUPredictor, TransformerPredictor, WindowedGRUPredictor
from worldline.model.video import PictureEncoder, VideoConfig
from worldline.model.vit import ViTEncoder

_REACH = 3.0  # latents are standardised


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """The sizes of a world. The defaults are the `tiny` world."""

    image_size: int = 64
    """Height and width of the pictures that the encoder sees, pixels; a multiple of 16."""
    latent_dim: int = 64
    """Length of a latent."""
    context: int = 4
    """Real frames that `World.begin` wants."""
    latent_norm: bool = True
    """Standardise latents by a batch norm without scale and shift (foldable into the linear map before it)."""

    projection: Literal["none", "normalise", "quantise"] = "none"
    """Where every latent, encoded or imagined, is put back to: onto the sphere of radius sqrt(latent_dim), or onto
    `levels` values in each dimension, from -3 to 3. What lies there already stays."""
    levels: int = 31
    """Of `projection=quantise`."""

    encoder: Literal["conv", "vit", "video"] = "conv"
    """`video` is a ViT over tubelets, as `worldline pretrain` trains it, that sees each picture standing still."""
    conv_width: int = 16
    """Channels of the stem; the blocks have 2 and 4 times as many."""
    conv_head: int = 16
    """Channels of the grid that is flattened into the latent; encoder=video has such a grid too."""
    vit_patch: int = 8
    """Pixels along a side of a ViT's patch."""
    vit_width: int = 192
    """Channels of the ViT encoder."""
    vit_depth: int = 4
    """Blocks of the ViT encoder."""
    vit_heads: int = 3
    """Attention heads of the ViT encoder."""
    vit_tubelet: int = 2
    """Frames of a tubelet (encoder=video only)."""

    predictor: Literal["gru", "gru_window", "transformer"] = "gru"
    """`gru` carries its memory on for ever; `gru_window` begins anew from the last `context` latents at every step, for
    recipes that never train it on more."""
    hidden: int = 448
    """Width of the GRU and of the maps around it."""
    window: int = 8
    """Latents that the transformer sees."""
    transformer_width: int = 192
    """Channels of the transformer predictor."""
    transformer_depth: int = 4
    """Blocks of the transformer predictor."""
    transformer_heads: int = 3
    """Attention heads of the transformer predictor."""

    decoder_width: int = 16
    """Channels at half resolution; the smaller grids have 2, 3 and 4 times as many."""

    def __post_init__(self) -> None:
        if self.image_size % 16 or self.image_size <= 0:
            raise WorldlineError(f"image_size must be a positive multiple of 16, got {self.image_size}")
        predictors = ("gru", "gru_window", "transformer")
        if self.encoder not in ("conv", "vit", "video") or self.predictor not in predictors:
            raise WorldlineError(
                "encoder must be conv, vit or video, predictor gru, gru_window or transformer, got "
                f"{self.encoder!r}, {self.predictor!r}"
            )
        if self.projection not in ("none", "normalise", "quantise") or self.levels < 2:
            raise WorldlineError(
                "projection must be none, normalise or quantise, and levels at least 2, got "
                f"{self.projection!r} and {self.levels}"
            )
        if self.context < 1 or self.window < 2:
            raise WorldlineError(f"context must be at least 1 and window 2, got {self.context}, {self.window}")
        if self.encoder != "conv" and self.image_size % self.vit_patch:
            raise WorldlineError(f"vit_patch must divide image_size {self.image_size}, got {self.vit_patch}")
        for width, heads in (
            (self.vit_width, self.vit_heads),
            (self.transformer_width, self.transformer_heads),
        ):
            if width % (2 * heads):
                raise WorldlineError(f"a transformer's width must be a multiple of 2 x heads, got {width} and {heads}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class State(NamedTuple):
    """Everything that the next step depends on."""

    z: Float[Tensor, "b d"]
    """The current latent, predicted or observed."""
    memory: tuple[Tensor, ...]
    """What the predictor carries, batch first, fixed shapes."""


class World(nn.Module):
    """A latent world model. Actions are in the spec's native units everywhere; pictures are uint8, height first."""

    action_mean: Tensor
    action_std: Tensor

    def __init__(self, config: WorldConfig, spec: WorldSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.encoder = _make_encoder(config)
        self.latent_norm = nn.BatchNorm1d(config.latent_dim, affine=False) if config.latent_norm else nn.Identity()
        self.predictor = _make_predictor(config, spec.action_dim)
        self.decoder = ConvDecoder(
            image_size=config.image_size, latent_dim=config.latent_dim, width=config.decoder_width
        )
        self.gauge = Gauge(config.latent_dim)
        low, high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
        bounded = torch.isfinite(low) & torch.isfinite(high) & (high > low)
        self.register_buffer("action_mean", torch.where(bounded, (low + high) / 2, 0.0).float())
        self.register_buffer("action_std", torch.where(bounded, (high - low) / math.sqrt(12), 1.0).float())

    def encode(self, frames: UInt8[Tensor, "*b h w 3"]) -> Float[Tensor, "*b d"]:
        """Encode pictures of `config.image_size`.

        Raises:
            WorldlineError: the pictures have another size or type.
        """
        size = self.config.image_size
        if frames.shape[-3:] != (size, size, 3) or frames.dtype != torch.uint8:
            raise WorldlineError(
                f"this world sees uint8 pictures of shape (..., {size}, {size}, 3), "
                f"got {str(frames.dtype).removeprefix('torch.')} {tuple(frames.shape)}; resize them first"
            )
        x = frames.reshape(-1, size, size, 3).permute(0, 3, 1, 2)  # channels last in memory, as a CPU likes it
        if x.is_cuda:
            x = x.contiguous()  # depthwise convolutions of few channels
        z: Tensor = self.latent_norm(self.encoder(x.float() / 127.5 - 1.0))
        return self._project(z.reshape(*frames.shape[:-3], self.config.latent_dim))

    def begin(self, z: Float[Tensor, "b c d"], actions: Float[Tensor, "b cm1 a"]) -> State:
        """Return the state after `c` real latents and the c - 1 actions between them; any c from 1 works."""
        self._require_latents(z)
        if z.shape[1] != actions.shape[1] + 1:
            raise WorldlineError(
                f"begin wants one action fewer than latents, got {actions.shape[1]} actions and {z.shape[1]} latents"
            )
        state = State(z[:, 0], self.predictor.initial(len(z)))
        for i in range(actions.shape[1]):
            state = self.observe(self.step(state, actions[:, i]), z[:, i + 1])
        return state

    def step(self, state: State, action: Float[Tensor, "b a"]) -> State:
        """Imagine one step: the new state's `z` is the predicted latent."""
        z, memory = self.predictor.advance(state.z, self.normalise_actions(action), state.memory)
        return State(self._project(z), memory)

    def observe(self, state: State, z: Float[Tensor, "b d"]) -> State:
        """Put a real latent in the place of the predicted one; the memory of the past stays."""
        return State(z, state.memory)

    def rollout(self, state: State, actions: Float[Tensor, "b t a"]) -> Float[Tensor, "b t d"]:
        """Imagine `t` steps open loop: row i is the latent after actions[:, : i + 1]."""
        predictions = []
        for action in actions.unbind(1):
            state = self.step(state, action)
            predictions.append(state.z)
        return torch.stack(predictions, dim=1)

    def track(self, z: Float[Tensor, "b c d"], actions: Float[Tensor, "b cm1 a"]) -> Track:
        """Return what the error estimator wants to know of the real latents and actions that `begin` was given.

        Raises:
            WorldlineError: the gauge has no error estimator.
        """
        foreseen = self.teacher_forced(z[:, :-1], actions) if z.shape[1] > 1 else None
        return self.gauge.begin(z, foreseen, self.spec.action_dim)

    def rollout_with_error(
        self, state: State, actions: Float[Tensor, "b t a"], track: Track | None = None
    ) -> tuple[Float[Tensor, "b t d"], Estimate]:
        """Roll out, and return with each latent what is expected of its true error, (b, t) each.

        `track` tells what led to `state` (`World.track`, `Gauge.follow`); without it, the state's latent is taken for
        a real one of which no more is known, and the estimate is a little worse.

        Raises:
            WorldlineError: the gauge has no error estimator.
        """
        if track is None:
            track = self.track(state.z[:, None], actions[:, :0])
        predictions, estimates = [], []
        for action in actions.unbind(1):
            state = self.step(state, action)
            track = self.gauge.follow(track, state.z, self.normalise_actions(action))
            predictions.append(state.z)
            estimates.append(self.gauge.estimate(track))
        by_step = Estimate(*(torch.stack(values, dim=1) for values in zip(*estimates, strict=True)))
        return torch.stack(predictions, dim=1), by_step

    def teacher_forced(self, z: Float[Tensor, "b t d"], actions: Float[Tensor, "b t a"]) -> Float[Tensor, "b t d"]:
        """Predict each latent's successor from the true latents so far: row i predicts z[:, i + 1]."""
        return self._project(self.predictor.teacher_forced(z, self.normalise_actions(actions)))

    def decode(self, z: Float[Tensor, "*b d"]) -> UInt8[Tensor, "*b h w 3"]:
        """Draw latents as pictures."""
        return self.decode_float(z).mul(255.0).round_().to(torch.uint8)

    def decode_float(self, z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b h w 3"]:
        """Draw latents as pictures in [0, 1], differentiably.

        Raises:
            WorldlineError: the latents have another width.
        """
        self._require_latents(z)
        pictures: Tensor = self.decoder(z.reshape(-1, self.config.latent_dim)).permute(0, 2, 3, 1)
        return pictures.reshape(*z.shape[:-1], *pictures.shape[1:])

    def set_action_statistics(self, mean: Float[Tensor, " a"], std: Float[Tensor, " a"]) -> None:
        """Set how actions are normalised; an action that never varies is only centred."""
        self.action_mean.copy_(mean)
        self.action_std.copy_(torch.where(std > 1e-6, std, 1.0))

    def normalise_actions(self, actions: Float[Tensor, "*b a"]) -> Float[Tensor, "*b a"]:
        """Return actions as the predictor sees them: centred and scaled by the training data's statistics.

        Raises:
            WorldlineError: an action has another number of values.
        """
        if actions.shape[-1:] != (self.spec.action_dim,):  # a single value would be broadcast silently
            raise WorldlineError(
                f"an action of this world has {self.spec.action_dim} values ({', '.join(self.spec.action_names)}), "
                f"got actions of shape {tuple(actions.shape)}"
            )
        return (actions - self.action_mean) / self.action_std

    def _project(self, z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Put latents back onto the manifold that the config names; the gradient passes a quantiser unchanged.

        Source: normalised at every step: V-JEPA 2-AC, arXiv 2506.09985; finite scalars: arXiv 2309.15505, here clipped
        instead of squashed, so that a latent that lies on the grid stays where it is.
        """
        if self.config.projection == "normalise":
            return nn.functional.normalize(z, dim=-1) * math.sqrt(self.config.latent_dim)
        if self.config.projection == "quantise":
            spacing = 2 * _REACH / (self.config.levels - 1)
            z = z.clamp(-_REACH, _REACH)
            on_grid = ((z + _REACH) / spacing).round() * spacing - _REACH
            return z + (on_grid - z).detach()
        return z

    def _require_latents(self, z: Tensor) -> None:
        if z.shape[-1:] != (self.config.latent_dim,):
            raise WorldlineError(
                f"a latent of this world has {self.config.latent_dim} values, got latents of shape {tuple(z.shape)}; "
                "encode pictures with the same world"
            )


def _make_encoder(config: WorldConfig) -> nn.Module:
    if config.encoder == "conv":
        return ConvEncoder(
            image_size=config.image_size,
            latent_dim=config.latent_dim,
            width=config.conv_width,
            head_channels=config.conv_head,
        )
    if config.encoder == "video":
        video = VideoConfig(
            image_size=config.image_size,
            frames=config.vit_tubelet,
            patch=config.vit_patch,
            tubelet=config.vit_tubelet,
            width=config.vit_width,
            depth=config.vit_depth,
            heads=config.vit_heads,
        )
        return PictureEncoder(video, config.latent_dim, config.conv_head)
    return ViTEncoder(
        image_size=config.image_size,
        latent_dim=config.latent_dim,
        patch=config.vit_patch,
        width=config.vit_width,
        depth=config.vit_depth,
        heads=config.vit_heads,
    )


def _make_predictor(config: WorldConfig, action_dim: int) -> GRUPredictor | WindowedGRUPredictor | TransformerPredictor:
    sizes = {"latent_dim": config.latent_dim, "action_dim": action_dim}
    if config.predictor == "gru":
        return GRUPredictor(**sizes, hidden=config.hidden)
    if config.predictor == "gru_window":
        return WindowedGRUPredictor(**sizes, hidden=config.hidden, window=config.context)
    return TransformerPredictor(
        **sizes,
        width=config.transformer_width,
        depth=config.transformer_depth,
        heads=config.transformer_heads,
        window=config.window,
    )
