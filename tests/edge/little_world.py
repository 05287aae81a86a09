"""A little world with the statistics of a trained one, the same in integers, and its bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from toy_world import SPEC, TINY
from worldline.edge.emit import write_bundle
from worldline.edge.quantise import Calibration, quantise
from worldline.edge.world import IntegerWorld
from worldline.engine.workloads.latent import Starts, save_starts
from worldline.model import World
from worldline.model.checkpoint import save_world

CONTEXT, STEPS, SIZES = 4, 20, (24, 2, 32)


def pictures(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return smooth pictures."""
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 5, 5)))
    fine = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 255)
    return fine.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def little_worlds(projection: str, bits: int) -> tuple[World, IntegerWorld]:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    world = World(replace(TINY, projection=projection), SPEC)
    frames = torch.from_numpy(pictures(rng, 256))
    world.train()
    with torch.no_grad():
        for _ in range(40):
            world.encode(frames)
        for parameter in world.predictor.parameters():  # so that steps go somewhere
            parameter.mul_(1.5)
        world.eval()
        z = world.encode(frames)
        world.gauge.fit(world, z)
    actions = torch.from_numpy(rng.uniform(0, 512, (16, CONTEXT + STEPS - 1, 2)).astype(np.float32))
    context = z[: 16 * CONTEXT].reshape(16, CONTEXT, -1)
    return world, quantise(world, Calibration(frames, context, actions), bits)


def little_bundle(world: World, whole: IntegerWorld, folder: Path) -> Path:
    rng = np.random.default_rng(3)
    checkpoint = save_world(folder / "world", world, training={})
    starts = Starts(
        frames=pictures(rng, 2 * CONTEXT).reshape(2, CONTEXT, 32, 32, 3),
        actions=rng.uniform(0, 512, (2, CONTEXT - 1, 2)).astype(np.float32),
        seeds=np.zeros(2, np.int64),
        prefix=np.zeros((2, 1, 2), np.float32),
        prefix_lengths=np.zeros(2, np.int64),
    )
    save_starts(checkpoint, starts)
    return write_bundle(folder / "bundle", checkpoint, whole, {})
