"""A small two_room dataset with its reference pack, and untrained worlds of it, that several tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from worldline.data.collect import CollectConfig, collect
from worldline.data.lerobot import Dataset, open_dataset
from worldline.model.checkpoint import save_world
from worldline.model.world import World, WorldConfig
from worldline.train.references import ReferencesConfig, make_references

QUICK = ReferencesConfig(
    encoder_updates=150, encoder_batch=32, actions_updates=20, actions_batch=16, horizon=20, good_enough=0.05
)


def make_dataset(path: Path) -> Dataset:
    made = open_dataset(collect(CollectConfig(env="two_room", path=str(path), episodes=60, steps=70, workers=1)))
    make_references(made, QUICK)
    return made


def world_at(path: Path, dataset: Dataset, seed: int) -> str:
    torch.manual_seed(seed)
    config = WorldConfig(latent_dim=24, conv_width=8, conv_head=4, hidden=32, decoder_width=4, context=2 + seed)
    world = World(config, dataset.spec)
    frames = torch.from_numpy(np.concatenate([dataset.read_episode(i).frames for i in range(3)]))
    for _ in range(20):  # settles the batch norms
        world.encode(frames)
    world.eval()
    world.gauge.fit(world, world.encode(frames))
    return str(save_world(path, world, training={}))
