"""A small untrained world, and a real server that plays it in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from websockets.sync.client import ClientConnection, connect

from worldline.data.simulators import make_simulator
from worldline.engine.workloads.latent import make_starts, save_starts
from worldline.model.checkpoint import save_world
from worldline.model.world import World, WorldConfig
from worldline.serve.protocol import FrameMessage, unpack

SERVER = "import sys; from worldline.serve.app import PlayConfig, serve; serve(PlayConfig(**eval(sys.argv[1])))"


@dataclass(frozen=True)
class Server:
    """A server that runs in another process."""

    url: str
    recordings: Path
    checkpoint: Path

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1].strip("/"))

    def connect(self, **options: Any) -> Page:
        options.setdefault("origin", self.url.rstrip("/"))
        return Page(connect(self.url.replace("http", "ws") + "ws", **options))


class Page:
    """What a page does, without a browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"t": kind, **fields}))

    def next(self, timeout: float = 20.0) -> FrameMessage | dict[str, Any]:
        data = self.socket.recv(timeout)
        return json.loads(data) if isinstance(data, str) else unpack(data)

    def frame(self) -> FrameMessage:
        while not isinstance(message := self.next(), FrameMessage):
            pass
        return message

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Return the next event of a kind whose fields have these values."""
        while True:
            message = self.next()
            if isinstance(message, dict) and message["t"] == kind and fields.items() <= message.items():
                return message

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()


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
    recordings = tmp_path_factory.mktemp("recordings")
    options = {"checkpoint": str(checkpoint), "port": 0, "recordings": str(recordings)}
    process = subprocess.Popen([sys.executable, "-c", SERVER, repr(options)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, f"the server printed no address but {line!r}"
        yield Server(found.group(), recordings, checkpoint)
    finally:
        process.terminate()
        process.wait(timeout=20)
