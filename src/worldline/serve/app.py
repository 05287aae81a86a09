"""The web application: who may reach it, what it serves, and `serve`, which runs it."""

from __future__ import annotations

import asyncio
import errno
import gc
import hmac
import ipaddress
import secrets
import socket
import webbrowser
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from worldline.core.errors import WorldlineError
from worldline.engine.determinism import Level
from worldline.engine.workloads import WorldWorkload, open_workload
from worldline.engine.workloads.device_world import Dtype
from worldline.engine.workloads.latent import LatentWorkload, Mode
from worldline.model.checkpoint import read_card, shipped_worlds
from worldline.model.int8 import is_bundle
from worldline.serve.gate import RECEIVE_BUFFER, Server, WebSocketProtocol
from worldline.serve.hub import POLICY, Hub
from worldline.serve.protocol import MAX_FPS, MAX_UP_BYTES, Codec
from worldline.serve.recordings import find_recording
from worldline.serve.session import Session
from worldline.serve.truth import find_true_world

STATIC = Path(__file__).resolve().parent / "static"
_SEND_BUFFER = 1 << 17  # a slow client lags by what the kernel holds for it: keep that to a few pictures
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
_TITLES = {
    "h2d": "action and state go to the device",
    "d2h": "state, picture and readings come back from the device",
    "input": "keys and pointer become an action",
    "event": "a reset or a re-anchor in place of a step",
    "gather": "waiting for the sessions that step together with this one",
    "turn": "waiting for the sessions that draw before this one",
    "step": "the model imagines one step ahead, in latents",
    "gauge": "how far the latent is from those seen in training",
    "cycle": "the picture is encoded again, to see how far it lands from its latent",
    "decode": "the latent becomes a picture",
    "hash": "picture, state and action are hashed onto the chain",
    "record": "the frame is handed to the replay file's writer",
    "ledger": "writing this table's row",
    "truth": "waiting for the simulator, which took the same action beside, and comparing its picture",
    "encode": "header and pictures become one message; with a codec: they are handed to the thread that encodes them",
    "send": "the message is handed to the connections",
}


@dataclass(frozen=True, kw_only=True)
class PlayConfig:
    """What to play, and for whom."""

    checkpoint: str = ""
    """A checkpoint, a run, or a shipped world's name; "" is the first shipped one."""
    host: str = "127.0.0.1"
    """Anything but this machine's own loopback needs a token in the address."""
    port: int = 8765
    """0 takes any free one."""
    fps: float | None = None
    """Frames per second; None is the world's real time, 0 is no limit."""
    seed: int = 0
    """Of the first start; each seed is another one."""
    sessions: int = 1
    """Sessions that are played side by side; a page joins the first without a player, or ?session=K, from 0 on."""
    truth: bool | None = None
    """Begin with the true world beside, where there is one; null: if it is one session. A page can switch it."""
    mode: Mode = "auto"
    """auto, eager, graph or compile; auto is graph where the world has one."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: Dtype = "float32"
    """float32, and on cuda bfloat16 or float16."""
    precision: Literal["float", "int8"] = "float"
    """int8 plays the checkpoint's bundle (worldline export), and makes it first where there is none."""
    recordings: str = "recordings"
    """Folder of replay files."""
    determinism: Level = "machine"
    """off, run or machine: no promise about bits, within this process, or on this machine."""
    codec: Codec = "raw"
    """How pictures travel: raw, webp (no loss, a twentieth of the bytes) or jpeg (some loss); for slow connections."""
    open_browser: bool = False
    """Open the page in this machine's browser."""
    token: str | None = None
    """None makes one where it is needed."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise WorldlineError(f"port: expected 0 to 65535, got {self.port}")
        if self.fps is not None and self.fps != 0 and not 1 <= self.fps <= MAX_FPS:
            raise WorldlineError(
                f"fps: expected 1 to {MAX_FPS:g}, 0 for no limit or null for real time, got {self.fps}"
            )
        if not 1 <= self.sessions <= 64:
            raise WorldlineError(f"sessions: expected 1 to 64, got {self.sessions}")
        if self.sessions > 1 and (self.mode not in ("auto", "graph") or self.device != "cpu"):
            raise WorldlineError("several sessions play together with mode=graph and device=cpu only")
        if not 0 <= self.seed < 2**31:
            raise WorldlineError(f"seed: expected 0 to 2147483647, got {self.seed}")


def serve(config: PlayConfig) -> None:
    """Play a world in browsers until interrupted.

    Raises:
        WorldlineError: no such checkpoint, the address cannot be used, or the session ended by itself.
    """
    listener = _listen(config.host, config.port)
    with listener:
        port = listener.getsockname()[1]
        local = _is_loopback(config.host)
        token = config.token or ("" if local else secrets.token_urlsafe(16))
        url = f"http://{_for_url('127.0.0.1' if config.host == 'localhost' else config.host)}:{port}/"
        url += f"?token={token}" if token else ""
        hubs, sessions, name = _open(config)

        def ready() -> None:
            print(f"worldline plays {name}: {url}", flush=True)
            if local:
                machine = socket.gethostname()
                print(f"from another machine: ssh -L {port}:127.0.0.1:{port} USER@{machine}, then the same address")
            print(f"recordings go to {config.recordings}/ ; Ctrl-C ends", flush=True)
            if config.open_browser:
                webbrowser.open(url)

        gc.collect()
        gc.freeze()  # a full collection looks at all that torch has loaded: several frames' time, each time
        app = make_app(hubs, sessions, local=local, token=token, ready=ready)
        server = Server(
            uvicorn.Config(
                app,
                ws=WebSocketProtocol,
                ws_max_size=4 * MAX_UP_BYTES,
                ws_per_message_deflate=False,
                access_log=False,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            print("ended", flush=True)
    for session in sessions:
        if session.failure is not None:
            raise session.failure


def make_app(
    hubs: list[Hub],
    sessions: list[Session],
    *,
    local: bool,
    token: str = "",
    ready: Callable[[], None] = lambda: None,
) -> Starlette:
    """Return the application: the page, its files, recordings to download, and the WebSocket of every session."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for hub, session in zip(hubs, sessions, strict=True):
            hub.start(session)
        ready()
        yield
        await asyncio.gather(*(hub.stop() for hub in hubs))

    async def page(request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def recording(request: Request) -> Response:
        try:
            path = find_recording(sessions[0].recordings, request.path_params["name"])
        except WorldlineError as error:
            return PlainTextResponse(str(error), status_code=404)
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)

    async def play(websocket: WebSocket) -> None:
        await websocket.accept()
        if not _own_origin(websocket):
            await websocket.close(POLICY, "open the page of this server; other origins are refused")
            return
        wish = websocket.query_params.get("session")
        if wish is not None and wish not in map(str, range(len(hubs))):
            await websocket.close(POLICY, f"session: expected 0 to {len(hubs) - 1}")
            return
        free = (hub for hub in hubs if hub.player is None)
        await (hubs[int(wish)] if wish else next(free, hubs[0])).attend(websocket)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/recordings/{name}", recording),
            WebSocketRoute("/ws", play),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(Guard, local=local, token=token)],
        lifespan=lifespan,
    )


class Guard:
    """Lets through only who asked for this server by its name and, where there is a token, knows it.

    A page of another site that points its own name at this address (DNS rebinding) still sends its own name.
    """

    def __init__(self, app: ASGIApp, local: bool, token: str) -> None:
        self._app, self._local, self._token = app, local, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        refusal = self._refusal(connection)
        if refusal is None:
            await self._app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            websocket = WebSocket(scope, receive, send)
            await websocket.accept()
            await websocket.close(POLICY, refusal)
        else:
            await PlainTextResponse(f"{refusal}\n", status_code=403)(scope, receive, _with_headers(send))

    def _refusal(self, connection: HTTPConnection) -> str | None:
        if self._local and urlsplit(f"//{connection.headers.get('host', '')}").hostname not in _LOOPBACK_NAMES:
            return "this server answers to localhost and 127.0.0.1 only"
        needs_token = self._token and not connection.scope["path"].startswith("/static/")
        if needs_token and not hmac.compare_digest(connection.query_params.get("token", ""), self._token):
            return "the address needs ?token=..., as the server printed it"
        return None


def _open(config: PlayConfig) -> tuple[list[Hub], list[Session], str]:
    """Load the world and put its sessions together."""
    checkpoint = config.checkpoint
    if not checkpoint:
        names = shipped_worlds()
        if not names:
            raise WorldlineError("no world is shipped with this version; name a checkpoint: worldline play CHECKPOINT")
        checkpoint = names[0]
    if config.sessions == 1:
        workloads: list[WorldWorkload] = [open_workload(checkpoint, config.mode, config.device, config.dtype)]
    elif is_bundle(checkpoint):
        raise WorldlineError(f"{checkpoint}: a world in integers plays one session at a time; leave sessions= out")
    else:
        workloads = list(LatentWorkload.open_company(checkpoint, config.sessions))
    spec = workloads[0].world.spec
    name = (
        f"{spec.name}-{Path(checkpoint).name}" if Path(checkpoint).name in ("best", "last") else Path(checkpoint).name
    )
    hubs, sessions = [], []
    for number, workload in enumerate(workloads):
        truth, why = find_true_world(spec, workload.starts)
        hello: dict[str, Any] = {
            "t": "hello",
            "world": spec.name,
            "model": name,
            "device": workload.device,
            "dtype": workload.dtype,
            "fps": workload.fps,
            "control": spec.control,
            "can_anchor": True,
            "horizon_seconds": _horizon(checkpoint),
            "session": number,
            "sessions": config.sessions,
        }
        hub = Hub(checkpoint, hello, {"available": truth is not None, "why": why})
        session = Session(
            workload,
            truth=truth,
            truth_on=config.sessions == 1 if config.truth is None else config.truth,
            recordings=Path(config.recordings),
            seed=config.seed,
            fps=config.fps,
            label=f"-s{number}" if config.sessions > 1 else "",
            codec=config.codec,
            determinism=config.determinism,
            publish=hub.publish,
            notify=hub.notify,
        )
        hello["stages"] = [{"name": stage, "title": _TITLES.get(stage, "")} for stage in session.stages]
        hello["snapshot_every"] = session.engine.snapshot_every
        hubs.append(hub)
        sessions.append(session)
    return hubs, sessions, name


def _horizon(checkpoint: str) -> float | None:
    """Return H* in seconds from a checkpoint's card, None where it has not been measured."""
    seconds = read_card(checkpoint)["result"].get("h_star_seconds")
    return float(seconds) if isinstance(seconds, int | float) else None


def _listen(host: str, port: int) -> socket.socket:
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise WorldlineError(f"host {host!r} is not an address of this machine ({error.strerror})") from None
    # With its protocol named: asyncio switches Nagle's algorithm off only where it reads TCP, and a frame that waits
    # for the acknowledgement of the one before it is 40 ms late.
    listener = socket.socket(*address[:3])
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        listener.bind(address[4])
        listener.listen(64)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise WorldlineError(
                f"port {port} is in use; choose another: port={port % 65535 + 1}, or port=0 for any"
            ) from None
        raise WorldlineError(
            f"cannot listen on {host} port {port} ({error.strerror}); choose another port or host"
        ) from None
    return listener


def _is_loopback(host: str) -> bool:
    if host in _LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _for_url(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _own_origin(websocket: WebSocket) -> bool:
    """Return whether a WebSocket comes from a page that this very server, by this name and port, has served."""
    host = websocket.headers.get("host", "")
    return websocket.headers.get("origin", "") in (f"http://{host}", f"https://{host}")


def _with_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message["headers"] = [*message["headers"], *extra]
        await send(message)

    return with_headers
