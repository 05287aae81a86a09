"""`worldline.serve.Client` against a real server in another process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from serve_client import Server, running

from worldline.core.errors import WorldlineError
from worldline.engine.recording import Kind, Recording
from worldline.engine.replay import verify
from worldline.engine.workloads.latent import LatentWorkload
from worldline.serve import AsyncClient, Client
from worldline.serve.protocol import Flag, FrameMessage


def frames_until(client: Client, frame_id: int) -> list[FrameMessage]:
    """Return the frames up to this one."""
    frames = [client.frame()]
    while frames[-1].frame_id < frame_id:
        frames.append(client.frame())
    return frames


def test_frames_arrive_in_order_with_pictures_and_spans(server: Server) -> None:
    with Client(server.url) as client:
        frames = [client.frame() for _ in range(20)]
        for before, frame in pairwise(frames):
            assert frame.frame_id - before.frame_id == 1 + frame.dropped - before.dropped
        assert frames[0].picture.dtype == np.uint8
        assert frames[0].picture.ndim == 3
        assert len(frames[0].spans_us) == len(client.hello["stages"])


def test_an_action_is_answered_with_its_frame_and_the_recording_replays_to_the_same_chain(server: Server) -> None:
    generator = np.random.default_rng(0)
    actions = generator.uniform(-1.0, 1.0, (8, 2)).astype(np.float32)
    with Client(server.url) as client:
        client.reset(2)
        newest = client.start_recording()
        acknowledged = [client.act(action) for action in actions]
        assert acknowledged[0] > newest
        assert acknowledged == sorted(set(acknowledged))
        seen = {frame.frame_id: frame.chain for frame in frames_until(client, acknowledged[-1])}
        saved = client.stop_recording()
    recording = Recording(server.recordings / saved.name)
    assert recording.frames == saved.frames
    steps = {record.id: record for record in recording.records() if record.kind is Kind.STEP}
    for number, action in zip(acknowledged, actions, strict=True):
        assert steps[number].body == action.tobytes()
    assert {number: steps[number].chain for number in acknowledged if number in seen} == {
        number: seen[number] for number in acknowledged if number in seen
    }
    assert sum(number in seen for number in acknowledged) >= 4  # a busy machine drops a picture here and there
    workload = LatentWorkload.open_for(recording, str(server.checkpoint))
    assert verify(recording.path, workload).ok


def test_actions_sent_at_once_have_a_frame_each_in_order(server: Server) -> None:
    async def play() -> list[int]:
        async with AsyncClient(server.url) as client:
            return await asyncio.gather(*(client.act([0.1 * index, 0.0]) for index in range(6)))

    acknowledged = asyncio.run(play())
    assert acknowledged == list(range(acknowledged[0], acknowledged[0] + 6))


def test_a_press_and_release_between_two_frames_acts(server: Server) -> None:
    with Client(server.url) as client:
        newest = client.start_recording()
        for _ in range(5):
            client.press("KeyD")
            let_go = client.release("KeyD")
            while (frame := client.frame()).input_time_ms != let_go:
                pass
        saved = client.stop_recording()
    records = Recording(server.recordings / saved.name).records()
    pushed = [record.id for record in records if record.kind is Kind.STEP and np.frombuffer(record.body, "<f4")[0] > 0]
    assert len(pushed) >= 5
    assert newest < pushed[0] <= frame.input_frame


def test_reset_and_anchor_are_answered_with_the_frames_that_they_made(server: Server) -> None:
    with Client(server.url) as client:
        first, anchored = client.reset(1), client.anchor()
        flags = {frame.frame_id: frame.flags for frame in frames_until(client, anchored)}
        assert Flag.FIRST in flags.get(first, Flag.FIRST)
        assert Flag.ANCHORED in flags.get(anchored, Flag.ANCHORED)
        assert first in flags or anchored in flags


@pytest.mark.parametrize("action", [[], [0.0], [0.0, 0.0, 0.0], [1e6, 0.0]])
def test_a_wrong_action_is_refused_and_the_session_goes_on(server: Server, action: list[float]) -> None:
    with Client(server.url) as client:
        with pytest.raises(WorldlineError, match="expected an action from"):
            client.act(action)
        assert client.act([0.0, 0.0]) >= 0


def test_misuse_is_told(server: Server) -> None:
    with Client(server.url) as client:
        with pytest.raises(WorldlineError, match="ArrowLeft"):
            client.press("F13")
        with pytest.raises(WorldlineError, match="no recording"):
            client.stop_recording()
        with Client(server.url) as onlooker:
            assert onlooker.frame().picture.size
            with pytest.raises(WorldlineError, match="watching"):
                onlooker.act([0.0, 0.0])
    with pytest.raises(WorldlineError, match="closed"):
        client.frame()
    with pytest.raises(WorldlineError, match="expected an address"):
        Client("127.0.0.1:8765")


def test_a_server_that_ends_is_a_clear_error_and_so_is_none(checkpoint: Path, tmp_path: Path) -> None:
    with running(checkpoint, tmp_path, token="secret", host="127.0.0.1") as server:
        address = server.url.partition("?")[0]
        with pytest.raises(WorldlineError, match="token"):
            Client(address)
        client = Client(address, token="secret")
        client.frame()
    with client:
        with pytest.raises(WorldlineError, match="closed"):
            client.act([0.0, 0.0])
        with pytest.raises(WorldlineError, match="closed"):
            frames_until(client, 2**62)  # what came before the end is still handed out
    with pytest.raises(WorldlineError, match="worldline play"):
        Client(address)


def test_what_waits_for_an_answer_ends_with_the_server(checkpoint: Path, tmp_path: Path) -> None:
    async def play() -> list[int | BaseException]:
        with ExitStack() as stack:
            server = stack.enter_context(running(checkpoint, tmp_path, fps=1.0))
            async with AsyncClient(server.url) as client:
                await client.frame()
                acts = [asyncio.create_task(client.act([0.0, 0.0])) for _ in range(20)]
                await asyncio.sleep(0)  # all are sent; at one frame a second most cannot be answered any more
                await asyncio.to_thread(stack.close)
                return await asyncio.gather(*acts, return_exceptions=True)

    last = asyncio.run(play())[-1]
    assert isinstance(last, WorldlineError)
    assert "closed" in str(last)


def test_frames_that_nobody_asks_for_give_way_oldest_first(checkpoint: Path, tmp_path: Path) -> None:
    with running(checkpoint, tmp_path, fps=0.0) as server, Client(server.url) as client:
        first = client.frame()
        while client.skipped < 100:
            time.sleep(0.01)
        assert client.frame().frame_id > first.frame_id + 100


def test_the_client_needs_no_torch() -> None:
    code = "import sys; from worldline.serve import Client; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
