"""How much of a real server strangers can take."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_client import Server, running

from worldline.serve import gate


@pytest.fixture(scope="module")
def impatient(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits half a second for a request."""
    first = "import worldline.serve.gate as gate; gate.REQUEST_S = 0.5"
    with running(checkpoint, tmp_path_factory.mktemp("recordings"), first) as made:
        yield made


def test_connections_are_let_in_one_after_the_other(impatient: Server) -> None:
    count = gate.AT_ONCE + 15
    time.sleep(gate.AT_ONCE / gate.RATE)  # whoever came before has had its turn
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        lines = [
            stack.enter_context(socket.create_connection(("127.0.0.1", impatient.port), timeout=20))
            for _ in range(count)
        ]
        for line in lines:
            line.sendall(b"GET /missing HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        first_answered = lines[0].recv(12), time.monotonic() - begun
        last_answered = lines[-1].recv(12), time.monotonic() - begun
    assert first_answered[0] == last_answered[0] == b"HTTP/1.1 404"
    assert last_answered[1] >= 0.95 * (count - gate.AT_ONCE) / gate.RATE


@pytest.mark.parametrize("said", [b"", b"GET /ws HTTP/1.1\r\nHost: 127"])
def test_who_never_comes_to_a_request_is_let_go(impatient: Server, said: bytes) -> None:
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=20) as line:
        line.sendall(said)
        with contextlib.suppress(ConnectionResetError):
            assert line.recv(1) == b""


def test_who_talks_on_after_the_end_is_cut_off(impatient: Server) -> None:
    """A client that reads its close frame, never answers it, and keeps sending."""
    key = "GET /ws HTTP/1.1\r\nHost: {0}\r\nOrigin: http://{0}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    key += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=20) as line:
        line.sendall(key.format(f"127.0.0.1:{impatient.port}").encode())
        assert line.recv(1 << 10).startswith(b"HTTP/1.1 101")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            talk_on(line, 8.0)  # well below the 10 s that uvicorn waits for an answer


def talk_on(line: socket.socket, seconds: float) -> None:
    blur = b"\x81\x8c\0\0\0\0" + b'{"t":"blur"}'
    begun = time.monotonic()
    while time.monotonic() < begun + seconds:
        line.sendall(20 * blur)
        line.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while line.recv(1 << 16):
                pass
        line.settimeout(20)
