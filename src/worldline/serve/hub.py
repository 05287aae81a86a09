"""Who is connected: one player, any number of onlookers, and a short queue each.

The first page plays; later ones see the same session. When the player leaves, the page that has waited longest plays.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from worldline.core.errors import WorldlineError
from worldline.engine.recording import Recording
from worldline.serve import protocol
from worldline.serve.recordings import find_recording, list_recordings
from worldline.serve.session import Pause, Play, Session

QUEUE = 2
"""Pictures that wait for a slow client; the oldest gives way."""
MAX_EVENTS = 256
"""Events that may wait for a client; one that is further behind is let go."""
MAX_CLIENTS = 16
"""Pages of one session; each costs the others a share of every frame."""
REFUSAL_S = 3.0
"""Who finds the session full waits this long to hear it: a handshake costs the server more than a frame, and some would
try again at once."""
RATE, BURST = 400.0, 200.0
"""Messages a second that a client may send in the long run, and at once."""

_WATCHING = "You are watching: the page that came first plays."
UNSUPPORTED, INVALID, POLICY, LATER = 1003, 1007, 1008, 1013
"""Close codes (RFC 6455): not text, not this protocol, too much, come again later."""


class Client:
    """One page."""

    def __init__(self, websocket: WebSocket) -> None:
        self.websocket = websocket
        self.visible = True
        self.every_s = 0.0
        """No more than one picture in this time is of use to it."""
        self.dropped = 0
        self._next = 0.0
        self._pictures: deque[bytearray] = deque()
        self._events: deque[dict[str, Any]] = deque()
        self._wake = asyncio.Event()
        self._allowance, self._allowed_at = BURST, asyncio.get_running_loop().time()

    def wants(self, now: float, always: bool) -> bool:
        """Return whether a picture made now is of use; one that must not be missed is `always`."""
        if not self.visible or (now < self._next and not always):
            return False
        self._next = max(self._next, now - self.every_s) + self.every_s
        return True

    def offer(self, picture: bytearray) -> None:
        """Queue a picture; a full queue loses its oldest."""
        if len(self._pictures) >= QUEUE:
            self._pictures.popleft()
            self.dropped += 1
        self._pictures.append(picture)
        self._wake.set()

    def tell(self, event: dict[str, Any]) -> None:
        """Queue an event; events are never dropped."""
        self._events.append(event)
        self._wake.set()

    async def send_all(self, hub: Hub) -> None:
        """Send what is queued, as fast as this client takes it.

        Raises:
            ProtocolError: the client takes nothing at all.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            if len(self._events) > MAX_EVENTS:
                raise protocol.ProtocolError("too slow: events pile up")
            try:
                while self._events:
                    await self.websocket.send_text(json.dumps(self._events.popleft()))
                while self._pictures:
                    picture = self._pictures.popleft()
                    await self.websocket.send_bytes(protocol.for_client(picture, self.dropped, hub.player is self))
            except RuntimeError:  # what uvicorn raises once it has closed the connection itself, as after lost pings
                raise WebSocketDisconnect(1006) from None

    def spend(self, now: float) -> bool:
        """Count one received message; return whether it was still within the rate."""
        self._allowance = min(BURST, self._allowance + (now - self._allowed_at) * RATE) - 1.0
        self._allowed_at = now
        return self._allowance >= 0.0


class Hub:
    """Between the session's thread and the event loop.

    Args:
        checkpoint: where the world came from; a verification opens it again.
        hello: what a page must know about this world, sent first.
        truth: `{"available", "why"}`, whether there is a true world to show.
    """

    def __init__(self, checkpoint: str, hello: dict[str, Any], truth: dict[str, Any]) -> None:
        self.session: Session
        self._checkpoint, self._hello, self._truth = checkpoint, hello, truth
        self._clients: list[Client] = []
        self._loop: asyncio.AbstractEventLoop
        self._verification: asyncio.Task[None] | None = None

    @property
    def player(self) -> Client | None:
        """The client whose hands count."""
        return self._clients[0] if self._clients else None

    def start(self, session: Session) -> None:
        """Begin to pass things on; called in the event loop."""
        self.session, self._loop = session, asyncio.get_running_loop()
        session.start()

    async def stop(self) -> None:
        """End the session in order, and a verification with it."""
        if self._verification is not None:
            self._verification.cancel()
            await asyncio.gather(self._verification, return_exceptions=True)
        await asyncio.to_thread(self.session.stop)

    def publish(self, message: bytearray) -> None:
        """Give a packed frame to all who can make use of it; called in the session's thread."""
        now, always = time.monotonic(), protocol.must_be_seen(message)
        if takers := [client for client in self._clients if client.wants(now, always)]:
            self._loop.call_soon_threadsafe(self._fan_out, message, takers)

    def notify(self, event: dict[str, Any]) -> None:
        """Give an event to everybody; called in the session's thread."""
        self._loop.call_soon_threadsafe(self._tell_all, event)

    async def attend(self, websocket: WebSocket) -> None:
        """Look after one accepted client until it leaves; garbage ends it with a code and a reason."""
        if len(self._clients) >= MAX_CLIENTS:
            await asyncio.sleep(REFUSAL_S)
            await _close(websocket, LATER, f"{MAX_CLIENTS} pages look at this session already; come again later")
            return
        client = Client(websocket)
        client.tell({**self._hello, "seed": self.session.status()["seed"]})
        self._clients.append(client)
        self._crowd_changed()
        sender = asyncio.create_task(client.send_all(self))
        receiver = asyncio.create_task(self._receive(client))
        try:
            await asyncio.wait((sender, receiver), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._clients.remove(client)
            for task in (sender, receiver):
                task.cancel()
            results = await asyncio.gather(sender, receiver, return_exceptions=True)
            self._crowd_changed()
        for error in results:
            if isinstance(error, _Refusal):
                await _close(websocket, error.code, str(error))
            elif isinstance(error, protocol.ProtocolError):
                await _close(websocket, POLICY, str(error))
            elif isinstance(error, Exception) and not isinstance(error, WebSocketDisconnect):
                raise error

    async def _receive(self, client: Client) -> None:
        while True:
            data = await client.websocket.receive()
            if data["type"] == "websocket.disconnect":
                return
            text = data.get("text")
            if text is None:
                raise _Refusal(UNSUPPORTED, "expected JSON text, got a binary message")
            if len(text) > protocol.MAX_UP_BYTES:
                raise _Refusal(POLICY, f"expected at most {protocol.MAX_UP_BYTES} characters")
            if not client.spend(self._loop.time()):
                raise _Refusal(POLICY, f"more than {RATE:g} messages a second")
            try:
                message = protocol.parse(text)
            except protocol.ProtocolError as error:
                raise _Refusal(INVALID, str(error)) from None
            await self._act(client, message)

    async def _act(self, client: Client, message: protocol.Message) -> None:
        """Act on a message; what only the player may do is passed over when an onlooker asks."""
        if isinstance(message, protocol.Visible):
            client.visible, client.every_s = message.on, 1.0 / message.most if message.most else 0.0
            self._crowd_changed()
        elif isinstance(message, protocol.ListRecordings):
            files = await asyncio.to_thread(list_recordings, self.session.recordings)
            client.tell({"t": "recordings", "files": files})
        elif client is not self.player:
            if not isinstance(message, protocol.Edge):
                client.tell({"t": "note", "text": _WATCHING})
                if (event := protocol.answer(message, None, _WATCHING)) is not None:
                    client.tell(event)
        elif isinstance(message, protocol.Open):
            await self._open(client, message.name)
        elif isinstance(message, protocol.Verify):
            await self._verify(client, message.name)
        else:
            self.session.post(message)

    async def _open(self, client: Client, name: str) -> None:
        try:
            path = find_recording(self.session.recordings, name)
            self.session.post(Play(await asyncio.to_thread(Recording, path)))
        except WorldlineError as error:
            client.tell({"t": "note", "text": str(error)})

    async def _verify(self, client: Client, name: str) -> None:
        if self._verification is not None and not self._verification.done():
            client.tell({"t": "note", "text": "A verification is running; wait for its verdict."})
            return
        try:
            path = find_recording(self.session.recordings, name or self.session.status()["last"] or "")
            recording = await asyncio.to_thread(Recording, path)
        except WorldlineError as error:
            self._tell_all({"t": "verified", "equal": False, "text": str(error)})
            return
        self._verification = asyncio.create_task(self._run_verification(str(path), recording.frames))

    async def _run_verification(self, path: str, frames: int) -> None:
        self._tell_all({"t": "verify", "done": 0, "total": frames})
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "worldline.serve.verify", self._checkpoint, path),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        last: dict[str, Any] = {}
        try:
            async for line in process.stdout:
                last = json.loads(line)
                if "done" in last:
                    self._tell_all({"t": "verify", **last})
            status = await process.wait()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if "equal" in last:
            self._tell_all({"t": "verified", **last})
        else:
            text = f"the verification ended with status {status}; see the server's output"
            self._tell_all({"t": "verified", "equal": False, "text": text})

    def _fan_out(self, message: bytearray, takers: list[Client]) -> None:
        for client in takers:
            client.offer(message)

    def _tell_all(self, event: dict[str, Any]) -> None:
        for client in self._clients:
            if event["t"] != "answer" or client is self.player:
                client.tell(self._status_for(client, event) if event["t"] == "status" else event)

    def _crowd_changed(self) -> None:
        """Somebody came, left, hid or showed up: pause if the player cannot see, and tell everybody."""
        player = self.player
        self.session.post(Pause(player is None or not player.visible))

    def _status_for(self, client: Client, status: dict[str, Any]) -> dict[str, Any]:
        truth = {**self._truth, "on": status["truth_on"]}
        return {**status, "truth": truth, "player": client is self.player, "viewers": len(self._clients)}


class _Refusal(Exception):
    """Why a client is let go: a close code, and the reason as text."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    try:
        await websocket.close(code, reason[:120])
    except (WebSocketDisconnect, RuntimeError):
        return  # it has gone already
