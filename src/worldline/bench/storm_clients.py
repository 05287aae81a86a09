"""Clients that misbehave, in a process of their own: python -m worldline.bench.storm_clients ADDRESS COUNT SECONDS

They begin when a line comes in. A quarter each: garbage (what is no message of the protocol), floods (messages as
fast as they go), slow readers (a small buffer, and nothing is ever read), half-open connections (a handshake that is
begun, or cut by a reset). Who is thrown out comes again. Prints one JSON object: attempts and how they ended, by kind.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import sys
import time
from collections import Counter
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

KINDS = ("garbage", "flood", "slow", "half-open")
_AGAIN_S = 0.2
_GARBAGE = ('{"t": "key"}', "[" * 500, "x" * 3000, "{}")
_REQUEST = (
    "GET /ws HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


async def talk(host: str, kind: str, rng: random.Random, until: float) -> str:
    """Say wrong things, or too much, until the server closes; return how it ended."""
    try:
        async with connect(f"ws://{host}/ws", origin=f"http://{host}", compression=None, ping_interval=None) as socket_:  # type: ignore[arg-type]
            drain = asyncio.create_task(_drain(socket_))  # a close frame comes after the pictures before it
            try:
                while time.monotonic() < until:
                    if kind == "flood":
                        await socket_.send('{"t": "key", "code": "KeyD", "down": true, "time": 1.0}')
                    else:
                        await socket_.send(rng.choice(_GARBAGE) if rng.random() < 0.8 else rng.randbytes(200))
                    await asyncio.sleep(0 if kind == "flood" else 0.01)
            finally:
                drain.cancel()
                await asyncio.gather(drain, return_exceptions=True)
            return "until the end"
    except ConnectionClosed as error:
        return f"closed, {error.rcvd.code}" if error.rcvd else "cut"
    except (OSError, WebSocketException, asyncio.TimeoutError) as error:
        return type(error).__name__


async def _drain(socket_: ClientConnection) -> None:
    async for _ in socket_:
        pass


async def hold(host: str, kind: str, rng: random.Random, until: float) -> str:
    """Connect and never read, or never finish the handshake."""
    loop, name = asyncio.get_running_loop(), host.rpartition(":")
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.setblocking(False)
    try:
        await loop.sock_connect(line, (name[0], int(name[2])))
        request = _REQUEST.format(host=host).encode()
        await loop.sock_sendall(line, request if kind == "slow" else request[: rng.randrange(len(request) - 4)])
        left = until - time.monotonic()
        await asyncio.sleep(max(0.0, left if kind == "slow" else min(left, rng.uniform(0.2, 3.0))))
        if kind != "slow" and rng.random() < 0.5:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends in a reset
            return "reset"
        return "left"
    except OSError as error:
        return type(error).__name__
    finally:
        line.close()


async def storm(host: str, count: int, seconds: float) -> dict[str, dict[str, int]]:
    """Run `count` clients for a time; return how often each kind's attempts ended how."""
    until = time.monotonic() + seconds
    ends: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}

    async def misbehave(number: int) -> None:
        kind, rng = KINDS[number % len(KINDS)], random.Random(number)
        act = talk if kind in ("garbage", "flood") else hold
        while time.monotonic() < until:
            ends[kind][await act(host, kind, rng, until)] += 1
            await asyncio.sleep(_AGAIN_S)

    await asyncio.gather(*(misbehave(number) for number in range(count)))
    return {kind: dict(found) for kind, found in ends.items()}


if __name__ == "__main__":
    sys.stdin.readline()  # until then, this process has only begun
    found = asyncio.run(storm(urlsplit(sys.argv[1]).netloc, int(sys.argv[2]), float(sys.argv[3])))
    print(json.dumps(found))
