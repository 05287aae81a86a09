"""A small untrained world, and a server that plays it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from serve_client import Server, running

from worldline.data.simulators import make_simulator
from worldline.engine.workloads.latent import make_starts, save_starts
from worldline.model.checkpoint import save_world
from worldline.model.world import World, WorldConfig


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    simulator = make_simulator("two_room")
    config = WorldConfig(latent_dim=16, hidden=32, conv_width=8, decoder_width=8, context=2)
    world = World(config, simulator.spec).eval()
    frames = [simulator.reset(seed).frame for seed in range(120)]
    with torch.no_grad():
        world.gauge.fit(world, world.encode(torch.from_numpy(np.stack(frames))))
    path = save_world(tmp_path_factory.mktemp("serve") / "rooms", world, training={"note": "untrained"})
    save_starts(path, make_starts("two_room", config.context, count=3))
    return path


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(checkpoint, tmp_path_factory.mktemp("recordings")) as made:
        yield made
