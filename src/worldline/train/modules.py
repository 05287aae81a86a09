"""What a training begins with: a new world, with the encoder of another or of a pre-training where one is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from worldline.core.errors import WorldlineError
from worldline.core.seeding import seed_for
from worldline.data.lerobot import Dataset
from worldline.model.video import PictureEncoder, VideoEncoder, load_encoder
from worldline.model.world import World, WorldConfig
from worldline.train.config import TrainConfig
from worldline.train.features import PictureFeatures
from worldline.train.objective import Heads
from worldline.train.windows import action_statistics


def new_modules(
    config: TrainConfig, dataset: Dataset, features: PictureFeatures | None, source: World | None
) -> tuple[World, Heads]:
    """Make a world with weights that only the seed decides, and the heads that its training wants.

    Encoder and decoder are those of `source` where there is one, the video encoder that of `config.pretrained`.

    Raises:
        WorldlineError: they do not fit.
    """
    sight = None if config.pretrained is None else load_encoder(config.pretrained)
    model = config.model if sight is None else _seeing_with(config.model, sight, config.pretrained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "weights"))
        world = World(model, dataset.spec)
        size = 0 if features is None else sum(features.sizes)
        heads = Heads(
            inverse=bool(config.joint.inverse_dynamics or config.frozen.inverse_dynamics),
            latent_dim=config.model.latent_dim,
            action_dim=dataset.spec.action_dim,
            features=size,
        )
    mean, std = action_statistics(dataset)
    world.set_action_statistics(torch.from_numpy(mean), torch.from_numpy(std))
    if source is not None:
        _take_encoder(world, source, config.encoder)
    if sight is not None:
        world.get_submodule("encoder.video").load_state_dict(sight.state_dict())
    return world.to(config.device), heads.to(config.device)


def encoder_parts(encoder: nn.Module, lr: float, config: TrainConfig) -> Iterator[tuple[nn.Module, float]]:
    """Yield the parts of the encoder that a stage trains, each with its learning rate."""
    if config.pretrained is None or not isinstance(encoder, PictureEncoder):
        yield encoder, lr
        return
    if config.tune:
        yield encoder.video, lr * config.tune
    yield encoder.narrow, lr
    yield encoder.linear, lr


def _seeing_with(model: WorldConfig, sight: VideoEncoder, pretrained: Path | None) -> WorldConfig:
    """Return the sizes of a world that has a pre-trained encoder."""
    found = sight.config
    if found.image_size != model.image_size:
        raise WorldlineError(
            f"{pretrained} sees pictures of {found.image_size} pixels, the world of {model.image_size}; "
            f"give model.image_size={found.image_size}"
        )
    return replace(
        model,
        encoder="video",
        vit_patch=found.patch,
        vit_width=found.width,
        vit_depth=found.depth,
        vit_heads=found.heads,
        vit_tubelet=found.tubelet,
    )


def _take_encoder(world: World, source: World, checkpoint: Path | None) -> None:
    """Copy encoder, latent norm and decoder of the world that `checkpoint` holds."""
    for name in ("encoder", "latent_norm", "decoder"):
        ours, theirs = getattr(world, name), getattr(source, name).state_dict()
        shapes = {key: tensor.shape for key, tensor in theirs.items()}
        if {key: tensor.shape for key, tensor in ours.state_dict().items()} != shapes:
            raise WorldlineError(f"{checkpoint}: its {name} does not fit this run's; give the same model.* options")
        ours.load_state_dict(theirs)
