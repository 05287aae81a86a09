"""A real server in a process of its own, and what a page does, without a browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.frames import Close
from websockets.sync.client import ClientConnection, connect

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
        return urlsplit(self.url).port or 80

    @contextmanager
    def connect(self, query: str = "", **options: Any) -> Iterator[Page]:
        options.setdefault("origin", f"http://127.0.0.1:{self.port}")
        options.setdefault("close_timeout", 1)  # a page that is behind does not read the answer
        with connect(f"ws://127.0.0.1:{self.port}/ws{query}", **options) as socket:
            yield Page(socket)


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

    def closing(self) -> Close:
        """Read until the server closes the connection; return its code and reason."""
        with pytest.raises(ConnectionClosed) as closed:
            self._read_on()
        return closed.value.rcvd or Close(1006, "cut without a close frame")

    def _read_on(self) -> None:
        while True:
            self.next()


@contextmanager
def running(checkpoint: Path, recordings: Path, first: str = "", **options: Any) -> Iterator[Server]:
    """Run a server on a free port, after the statements `first`."""
    options = {"checkpoint": str(checkpoint), "port": 0, "recordings": str(recordings), **options}
    command = [sys.executable, "-c", f"{first}\n{SERVER}", repr(options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, f"the server printed no address but {line!r}"
        yield Server(found.group(), recordings, checkpoint)
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()
