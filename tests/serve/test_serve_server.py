"""A real server in another process, and real WebSocket clients."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import socket
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from serve_client import Page, Server, running
from websockets.exceptions import ConnectionClosed

from worldline.core.errors import WorldlineError
from worldline.serve.app import PlayConfig, _listen, serve
from worldline.serve.protocol import MAX_UP_BYTES, Flag


class Answer(NamedTuple):
    status: int
    policy: str
    body: bytes


def get(server: Server, path: str, host: str | None = None) -> Answer:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request("GET", path, headers={"Host": host} if host else {})
        response = connection.getresponse()
        return Answer(response.status, response.getheader("content-security-policy", ""), response.read())


def consecutive(page: Page, count: int) -> None:
    """Fail unless the next frames come without a gap, apart from what the server says it dropped."""
    last = page.frame()
    for _ in range(count):
        frame = page.frame()
        assert frame.frame_id - last.frame_id == 1 + frame.dropped - last.dropped
        last = frame


def test_a_page_is_told_about_the_world_and_gets_frames_and_an_echo(server: Server) -> None:
    with server.connect() as page:
        hello = page.event("hello")
        assert hello["control"] == "velocity"
        assert hello["fps"] == pytest.approx(25.0)
        first = page.frame()
        assert len(first.spans_us) == len(hello["stages"])
        assert first.truth is not None
        page.send("key", code="KeyD", down=True, time=4321.5)
        while math.isnan((frame := page.frame()).input_time_ms):
            pass
        assert frame.input_time_ms == 4321.5
        assert frame.target == (1.0, 0.5)
        page.send("key", code="KeyD", down=False, time=4400.0)
        consecutive(page, 10)


@pytest.mark.parametrize(
    ("garbage", "code"),
    [
        ("not json", 1007),
        ('{"t": "launch"}', 1007),
        ('{"t": "key", "code": "KeyW", "down": "yes", "time": 0}', 1007),
        (b"\x00\x01", 1003),
        ("x" * (MAX_UP_BYTES + 1), 1008),
        ("x" * (1 << 20), 1009),
    ],
)
def test_garbage_ends_its_sender_with_a_reason_and_nobody_else(server: Server, garbage: str | bytes, code: int) -> None:
    with server.connect() as player, server.connect() as visitor:
        player.frame()
        visitor.frame()
        visitor.socket.send(garbage)
        closed = visitor.closing()
        assert closed.code == code
        assert closed.reason or code == 1009
        consecutive(player, 10)


def test_a_flood_of_messages_ends_its_sender(server: Server) -> None:
    with server.connect() as player, server.connect() as visitor:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(3000):
                visitor.send("blur")
        closed = visitor.closing()
        assert closed.code == 1008
        assert "messages a second" in closed.reason
        consecutive(player, 5)


def test_the_second_page_watches_the_same_session_and_plays_when_the_first_leaves(server: Server) -> None:
    with server.connect() as first:
        assert first.event("status")["player"]
        with server.connect() as second:
            assert not second.event("status", viewers=2)["player"]
            second.send("key", code="KeyA", down=True, time=1.0)  # passed over: only the first page plays
            second.send("reset", seed=2)
            assert "watching" in second.event("note")["text"]
            first.send("key", code="KeyS", down=True, time=77.0)
            while (mine := first.frame()).input_time_ms != 77.0:
                pass
            assert mine.target == (0.5, 1.0)
            while (theirs := second.frame()).frame_id != mine.frame_id:
                assert theirs.frame_id < mine.frame_id
            assert theirs.chain == mine.chain
            assert math.isnan(theirs.input_time_ms)  # another browser's clock
            first.send("key", code="KeyS", down=False, time=78.0)
            first.socket.close()
            assert second.event("status", viewers=1)["player"]
            second.send("key", code="KeyA", down=True, time=5.0)
            while second.frame().target != (0.0, 0.5):
                pass
            second.send("key", code="KeyA", down=False, time=6.0)


def test_a_client_that_never_reads_loses_pictures_and_holds_nobody_up(server: Server) -> None:
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", server.port))
    with server.connect() as player, server.connect(sock=raw, max_queue=1) as slow:
        player.send("pace", fps=100)
        consecutive(player, 150)
        seen = [slow.frame() for _ in range(60)]
        ids = [frame.frame_id for frame in seen]
        assert ids == sorted(set(ids))
        assert seen[-1].dropped > 0
        assert seen[-1].dropped == ids[-1] - ids[0] + 1 - len(ids)
        player.send("pace", fps=None)


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:1", "null", None])
def test_a_page_of_another_origin_is_refused(server: Server, origin: str | None) -> None:
    with server.connect(origin=origin) as page:
        closed = page.closing()
    assert closed.code == 1008
    assert "origin" in closed.reason


def test_a_rebound_name_is_refused(server: Server) -> None:
    assert get(server, "/", host=f"evil.example:{server.port}").status == 403
    assert get(server, "/", host=f"localhost:{server.port}").status == 200


def test_the_page_allows_no_foreign_resource(server: Server) -> None:
    answer = get(server, "/")
    assert answer.policy.startswith("default-src 'none'")
    assert "unsafe" not in answer.policy
    body = answer.body.decode()
    assert "//" not in body.replace("http://www.w3.org/2000/svg", "").replace("<!doctype html>", "")


def test_record_download_verify(server: Server) -> None:
    with server.connect() as page:
        page.send("record", on=True)
        assert page.event("status")["player"]
        for _ in range(5):
            page.frame()
        page.send("key", code="KeyW", down=True, time=1.0)
        page.send("key", code="KeyW", down=False, time=2.0)
        for _ in range(10):
            page.frame()
        page.send("record", on=False)
        saved = page.event("saved")
        answer = get(server, f"/recordings/{saved['name']}")
        assert answer.status == 200
        assert answer.body == (server.recordings / saved["name"]).read_bytes()
        page.send("verify", name="")
        verdict = page.event("verified")  # another process: loading torch takes it a while
        assert verdict["equal"]
        assert f"{saved['frames']} frames, equal to the bit" in verdict["text"]
        changed = bytearray((server.recordings / saved["name"]).read_bytes())
        changed[len(changed) // 2] ^= 1
        (server.recordings / "changed.wlr").write_bytes(changed)
        page.send("verify", name="changed.wlr")
        verdict = page.event("verified")
        assert not verdict["equal"]
        assert "damaged" in verdict["text"]
        page.send("open", name="changed.wlr")
        assert "damaged" in page.event("note")["text"]
        consecutive(page, 5)


@pytest.mark.parametrize("path", ["/recordings/none.wlr", "/recordings/..%2f..%2fetc%2fpasswd", "/static/../app.py"])
def test_only_recordings_and_static_files_are_served(server: Server, path: str) -> None:
    assert get(server, path).status == 404


def test_frames_do_not_wait_for_the_acknowledgement_of_the_last_one() -> None:
    """Nagle's algorithm is off on the connections that asyncio makes of this listener."""

    async def accepted() -> int:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            done.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(note, sock=_listen("127.0.0.1", 0)) as server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            set_on = await done
            writer.close()
        return set_on

    assert asyncio.run(accepted()) != 0


def test_a_port_in_use_is_one_line_with_the_next_step(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(WorldlineError, match=rf"port {port} is in use; choose another: port=\d+"):
            serve(PlayConfig(checkpoint=str(checkpoint), port=port))


def test_elsewhere_than_loopback_everything_but_static_files_wants_a_token(checkpoint: Path, tmp_path: Path) -> None:
    with running(checkpoint, tmp_path, host="0.0.0.0") as server:
        token = server.url.partition("?token=")[2]
        assert len(token) >= 20
        assert get(server, "/").status == 403
        assert get(server, "/?token=wrong").status == 403
        assert get(server, f"/?token={token}").status == 200
        assert get(server, "/static/main.js").status == 200
        origin = f"http://127.0.0.1:{server.port}"
        with server.connect(origin=origin) as page:
            assert "token" in page.closing().reason
        with server.connect(origin=origin, query=f"?token={token}") as page:
            page.frame()


@pytest.mark.parametrize("wrong", [{"port": 70000}, {"fps": float("nan")}, {"fps": 0.1}, {"seed": -1}, {"fps": 1000.0}])
def test_a_wrong_setting_says_what_was_expected(wrong: dict[str, float]) -> None:
    with pytest.raises(WorldlineError, match="expected"):
        PlayConfig(**json.loads(json.dumps(wrong)))


def test_a_page_gets_no_more_pictures_than_it_can_use_but_every_beginning(checkpoint: Path, tmp_path: Path) -> None:
    with running(checkpoint, tmp_path, fps=0.0) as server, server.connect() as page:
        page.send("visible", on=True, most=10)
        page.event("status")
        while page.frame().frame_id < 50:
            pass  # what was on its way
        began = time.monotonic()
        frames = [page.frame() for _ in range(10)]
        assert time.monotonic() - began > 0.8
        assert all(b.frame_id - a.frame_id > 3 for a, b in pairwise(frames))  # the session itself does not wait
        assert frames[-1].dropped == frames[0].dropped  # these are not called lost
        for seed in range(5):
            page.send("reset", seed=seed)
            while not page.frame().flags & Flag.FIRST:
                pass
