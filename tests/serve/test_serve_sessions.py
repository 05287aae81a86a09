"""Several sessions on one server: each its own world, replayed to the bit whoever played beside it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from serve_client import running

from worldline.core.errors import WorldlineError
from worldline.engine.recording import Recording
from worldline.engine.replay import verify
from worldline.engine.workloads.latent import LatentWorkload
from worldline.serve import Client


def play(client: Client, number: int) -> str:
    actions = np.random.default_rng(number).uniform(-1.0, 1.0, (15 + 5 * number, 2))
    client.reset(number)
    client.start_recording()
    acknowledged = [client.act(action) for action in actions]
    assert acknowledged == sorted(set(acknowledged))
    return client.stop_recording().name


def test_sessions_play_side_by_side_and_each_replays_by_itself(checkpoint: Path, tmp_path: Path) -> None:
    with running(checkpoint, tmp_path, sessions=3, fps=60.0) as server:
        clients = [Client(server.url) for _ in range(3)]  # each takes the first session without a player
        assert [client.hello["session"] for client in clients] == [0, 1, 2]
        with Client(server.url) as onlooker, Client(server.url, session=2) as another:
            assert (onlooker.hello["session"], another.hello["session"]) == (0, 2)
            with pytest.raises(WorldlineError, match="watching"):
                another.act([0.0, 0.0])
            with ThreadPoolExecutor(3) as pool:
                names = list(pool.map(play, clients, range(3)))
        with pytest.raises(WorldlineError, match="expected 0 to 2"):
            Client(server.url, session=3)
        for client in clients:
            client.close()
    for number, name in enumerate(names):
        recording = Recording(server.recordings / name)
        assert recording.header.fingerprint["slot"] == f"{number} of 3"
        verdict = verify(recording.path, LatentWorkload.open_for(recording, checkpoint))
        assert verdict.ok, verdict
