"""Programs in a page's place: `Client`, and `AsyncClient` for code that awaits."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode, urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from worldline.core.errors import WorldlineError
from worldline.serve.protocol import KEYS, FrameMessage, ProtocolError, unpack

MAX_FRAMES = 256
"""Frames that wait for a program to ask for them; the oldest give way."""
_MAX_MESSAGE_BYTES = 1 << 24

T = TypeVar("T")


class Saved(NamedTuple):
    """A recording that the server has closed."""

    name: str
    frames: int


class AsyncClient:
    """Plays on a `worldline play` server; use it as an asynchronous context manager.

    Args:
        address: as the server printed it, with its token where there is one.
        token: of an address without one.
        session: which of the server's sessions; None takes the first without a player.
        timeout_seconds: how long the server may take for its greeting, a frame or an answer.
    """

    def __init__(
        self, address: str, *, token: str = "", session: int | None = None, timeout_seconds: float = 20.0
    ) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise WorldlineError(f"expected an address such as http://127.0.0.1:8765/, got {address!r}")
        given = {"token": token} if token else {}
        wish = {} if session is None else {"session": session}
        query = "&".join(filter(None, ("" if token else parts.query, urlencode({**given, **wish}))))
        self.hello: dict[str, Any] = {}
        """What the server says of its world: `world`, `fps`, `control`, `stages` (the names of `spans_us`), ..."""
        self.skipped = 0
        """Frames that came and gave way before they were asked for."""
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._url = f"{'wss' if parts.scheme == 'https' else 'ws'}://{parts.netloc}/ws" + (f"?{query}" if query else "")
        self._timeout_seconds = timeout_seconds
        self._frames: deque[FrameMessage] = deque()
        self._news = asyncio.Event()
        self._pending: dict[int, asyncio.Future[int]] = {}
        # Not from 0: a player that follows another one must not take an answer to it for its own.
        self._next_id = secrets.randbelow(2**52)
        self._saved: Saved | None = None
        self._end: WorldlineError | None = None
        self._socket: ClientConnection
        self._reader: asyncio.Task[None]

    async def __aenter__(self) -> AsyncClient:
        """Connect.

        Raises:
            WorldlineError: nobody answers there, or the server refuses.
        """
        try:
            self._socket = await connect(
                self._url,
                origin=self._origin,  # type: ignore[arg-type]  # websockets has a type of its own for these texts
                compression=None,
                max_size=_MAX_MESSAGE_BYTES,
                open_timeout=self._timeout_seconds,
            )
        except (OSError, WebSocketException, asyncio.TimeoutError) as error:
            text = f"no server answers at {self._origin} ({error}); start one with: worldline play"
            raise WorldlineError(text) from None
        self._reader = asyncio.create_task(self._read())
        try:
            await self._until(lambda: bool(self.hello), "no greeting")
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave; the next page plays."""
        await self._socket.close()
        await self._reader

    async def frame(self) -> FrameMessage:
        """Return the next frame; its picture is read-only.

        Raises:
            WorldlineError: none came in time, or the connection is closed and all that came have been returned.
        """
        await self._until(lambda: bool(self._frames), "no frame: is the session paused?")
        return self._frames.popleft()

    async def act(self, action: Sequence[float]) -> int:
        """Act for one frame, native units, and return that frame's id.

        Raises:
            WorldlineError: the size or range is wrong, another page plays, or a recording is being played.
        """
        return await self._ask("action", values=[float(value) for value in action])

    async def press(self, code: str) -> float:
        """Press a key, such as `ArrowLeft` or `KeyA`; return the time (ms) that frames echo as `input_time_ms`."""
        return await self._key(code, True)

    async def release(self, code: str) -> float:
        """Let a key go; return the time (ms) that frames echo as `input_time_ms`."""
        return await self._key(code, False)

    async def reset(self, seed: int) -> int:
        """Begin again from a start; return the id of its first frame."""
        return await self._ask("reset", seed=seed)

    async def anchor(self) -> int:
        """Correct the imagined state with the true world's frame; return the id of the frame that this made."""
        return await self._ask("anchor")

    async def start_recording(self) -> int:
        """Record from the next frame on; return the id of the newest one."""
        return await self._ask("record", on=True)

    async def stop_recording(self) -> Saved:
        """Close the recording.

        Raises:
            WorldlineError: there was none.
        """
        self._saved = None
        await self._ask("record", on=False)
        if self._saved is None:  # the server tells of the file before it answers
            raise WorldlineError("there was no recording to stop; begin one with start_recording()")
        return self._saved

    async def _key(self, code: str, down: bool) -> float:
        if code not in KEYS:
            raise WorldlineError(f"expected one of {', '.join(sorted(KEYS))}, got {code!r}")
        time_ms = time.monotonic() * 1000.0
        await self._send({"t": "key", "code": code, "down": down, "time": time_ms})
        return time_ms

    async def _ask(self, kind: str, **fields: Any) -> int:
        number = self._next_id
        self._next_id += 1
        answer = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send({"t": kind, "id": number, **fields})
            return await asyncio.wait_for(answer, self._timeout_seconds)
        except asyncio.TimeoutError:
            raise WorldlineError(f"no answer to {kind!r} in {self._timeout_seconds:g} s") from None
        finally:
            del self._pending[number]

    async def _send(self, message: dict[str, Any]) -> None:
        if self._end is not None:
            raise self._end
        try:
            await self._socket.send(json.dumps(message))
        except ConnectionClosed as error:
            raise _closed(error) from None

    async def _until(self, there: Any, missing: str) -> None:
        """Wait until `there()`; what has already come is still good after the end."""
        deadline = time.monotonic() + self._timeout_seconds
        while not there():
            if self._end is not None:
                raise self._end
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise WorldlineError(f"{missing} ({self._timeout_seconds:g} s)") from None

    async def _read(self) -> None:
        """Take in everything, always, so that a program that is busy elsewhere costs the server nothing."""
        try:
            while True:
                data = await self._socket.recv()
                if isinstance(data, bytes):
                    self._keep(unpack(data))
                else:
                    self._hear(json.loads(data))
                self._news.set()
        except ConnectionClosed as error:
            self._end = _closed(error)
        except (ProtocolError, ValueError) as error:
            self._end = WorldlineError(f"the server speaks another version than this client: {error}")
            await self._socket.close()
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(self._end)
        self._news.set()

    def _keep(self, frame: FrameMessage) -> None:
        if len(self._frames) >= MAX_FRAMES:
            self._frames.popleft()
            self.skipped += 1
        self._frames.append(frame)

    def _hear(self, event: dict[str, Any]) -> None:
        if event["t"] == "hello":
            self.hello = event
        elif event["t"] == "saved":
            self._saved = Saved(event["name"], event["frames"])
        elif event["t"] == "answer":
            answer = self._pending.get(event["id"])
            if answer is None or answer.done():
                return  # it was given up
            if event["frame"] is None:
                answer.set_exception(WorldlineError(event["why"]))
            else:
                answer.set_result(event["frame"])


class Client:
    """`AsyncClient` for code that waits: the same methods, in the calling thread; use it as a context manager.

    Connects at once. The connection is read in a thread of its own.
    """

    def __init__(
        self, address: str, *, token: str = "", session: int | None = None, timeout_seconds: float = 20.0
    ) -> None:
        async def opened() -> AsyncClient:  # in the loop's thread, where its events belong
            client = AsyncClient(address, token=token, session=session, timeout_seconds=timeout_seconds)
            return await client.__aenter__()

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client", daemon=True)
        self._thread.start()
        try:
            self._client = self._run(opened())
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def hello(self) -> dict[str, Any]:
        """What the server says of its world."""
        return self._client.hello

    @property
    def skipped(self) -> int:
        """Frames that came and gave way before they were asked for."""
        return self._client.skipped

    def close(self) -> None:
        """Leave; the next page plays."""
        if not self._loop.is_closed():
            try:
                self._run(self._client.close())
            finally:
                self._stop()

    def frame(self) -> FrameMessage:
        """See `AsyncClient.frame`."""
        return self._run(self._client.frame())

    def act(self, action: Sequence[float]) -> int:
        """See `AsyncClient.act`."""
        return self._run(self._client.act(action))

    def press(self, code: str) -> float:
        """See `AsyncClient.press`."""
        return self._run(self._client.press(code))

    def release(self, code: str) -> float:
        """See `AsyncClient.release`."""
        return self._run(self._client.release(code))

    def reset(self, seed: int) -> int:
        """See `AsyncClient.reset`."""
        return self._run(self._client.reset(seed))

    def anchor(self) -> int:
        """See `AsyncClient.anchor`."""
        return self._run(self._client.anchor())

    def start_recording(self) -> int:
        """See `AsyncClient.start_recording`."""
        return self._run(self._client.start_recording())

    def stop_recording(self) -> Saved:
        """See `AsyncClient.stop_recording`."""
        return self._run(self._client.stop_recording())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise WorldlineError("this client is closed; make a new one")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _closed(error: ConnectionClosed) -> WorldlineError:
    reason = error.rcvd.reason if error.rcvd is not None else ""
    return WorldlineError(f"the connection to the server is closed: {reason or 'it has ended, or this client left'}")
