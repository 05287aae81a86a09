"""How much of the server a stranger may take: uvicorn, with its door and its patience measured.

A handshake costs about as much as a frame, and a crowd that is turned away comes back at once. So connections are let
in one after the other, one that does not come to its request is let go, and so is one that talks on after the end.
"""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

RATE, AT_ONCE = 25.0, 8
"""Connections a second that are let in, in the long run and at once; more wait in the kernel."""
REQUEST_S = 10.0
"""Time from the connection to its first request."""
RECEIVE_BUFFER = 1 << 13
"""What the kernel holds for each connection; all of it may be parsed at one go."""
_LEFTOVERS = 1 << 10
"""Bytes that are still read after the server has said that it closes; the other side's word for it is 8."""
_PARTING_S = 1.0
"""Time to hear that, for those who go on talking."""
_EXHAUSTED_S = 1.0


class Server(uvicorn.Server):
    """A uvicorn server that accepts its connections one by one."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen on `sockets`, which must be given."""
        await super().startup(sockets=[])
        self._doors = [asyncio.create_task(self._let_in(listener)) for listener in sockets or []]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for door in self._doors:
            door.cancel()
        await asyncio.gather(*self._doors, return_exceptions=True)
        await super().shutdown(sockets)

    async def _let_in(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        free_at = 0.0  # when all that were let in have had their share of time
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except ConnectionError:
                continue  # gone before its turn
            except OSError:
                await asyncio.sleep(_EXHAUSTED_S)  # no file descriptor is left: those that are open come first
                continue
            await loop.connect_accepted_socket(self._protocol, connection)
            free_at = max(free_at, loop.time()) + 1.0 / RATE
            await asyncio.sleep(free_at - loop.time() - (AT_ONCE - 1) / RATE)

    def _protocol(self) -> asyncio.Protocol:
        return HTTPProtocol(self.config, self.server_state, self.lifespan.state)


class HTTPProtocol(H11Protocol):
    """HTTP for those who ask for something in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(REQUEST_S, self._hurry)

    def _hurry(self) -> None:
        if self.scope is None:
            self.transport.abort()


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """WebSockets that stop listening to who talks on after the end."""

    _left = _LEFTOVERS

    def data_received(self, data: bytes) -> None:
        if self.close_sent:
            self._left -= len(data)
            if self._left < 0:
                self._part()
                return
        super().data_received(data)

    def handle_parser_exception(self) -> None:
        """Say what was wrong, and wait until it has arrived: closing with bytes unread resets the connection."""
        said = self.conn.close_sent
        assert said is not None
        self.queue.put_nowait({"type": "websocket.disconnect", "code": said.code, "reason": said.reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent, self._left = True, -1
        self._part()

    def _part(self) -> None:
        self.transport.pause_reading()
        if self.close_timer is not None:
            self.close_timer.cancel()
        self.close_timer = self.loop.call_later(_PARTING_S, self.transport.abort)
