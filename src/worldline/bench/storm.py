"""Play while others misbehave: input storms on one session, and hostile clients beside several."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from worldline.bench.harness import median_interval
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, write_bytes
from worldline.core.result import write_result
from worldline.core.seeding import rng_for
from worldline.model.checkpoint import find_world
from worldline.serve.client import AsyncClient
from worldline.serve.protocol import FrameMessage

KEPT = 0.99
"""Share of the deadlines that a session must keep."""
_PACE = 60.0
"""Of the session under an input storm."""
_STORM_RATE = 300.0
"""Key edges a second, below what the server lets one client send in the long run."""
_SPIKE = 1.25
"""Times the p99 of the busy time that are called a spike."""
_KEYS = ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown")
_WARM_UP_S = 3.0
_PARTS = ("alone", "spinning", "crowded")
"""Beside the sessions: nobody, a process that only keeps a core busy as the clients' own process does, the clients."""


@dataclass(frozen=True, kw_only=True)
class StormConfig:
    """How many play, how many misbehave, and for how long."""

    checkpoint: str
    """A checkpoint, a run, or a shipped world's name."""
    sessions: int = 8
    """Sessions that are played side by side."""
    fps: float = 24.0
    """Their pace."""
    clients: int = 200
    """Clients that misbehave, a quarter of each kind."""
    seconds: float = 20.0
    """Time of each turn with them, and of each without."""
    rounds: int = 3
    """Rounds of these turns."""
    turns: int = 10
    """Turns of a session with and without an input storm."""
    turn_seconds: float = 4.0
    """Time of each of these turns."""
    seed: int = 0
    """Of the hands."""
    reports: str = "reports"
    """Where `DATE-storm/` is written."""


def run(config: StormConfig) -> Path:
    """Play through both storms; write `result.json` and `report.md`, and return the report's path.

    Raises:
        WorldlineError: no such checkpoint, or too short a time to say anything.
    """
    least = {"sessions": 1, "clients": 4, "seconds": 2, "rounds": 1, "turns": 2, "turn_seconds": 0.5}
    if any(getattr(config, name) < value for name, value in least.items()):
        raise WorldlineError(f"bench storm wants at least {', '.join(f'{n}={v:g}' for n, v in least.items())}")
    find_world(config.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        with _server(config.checkpoint, folder, f"fps={_PACE}") as (address, _):
            inputs = asyncio.run(_input_storm(config, address))
        with _server(config.checkpoint, folder, f"fps={config.fps}", f"sessions={config.sessions}") as (address, pid):
            crowd = asyncio.run(_crowd(config, address, pid))
        replays = [_replay(Path(folder) / name, config.checkpoint) for name in crowd.pop("recordings")]
    figures = {
        "config": {
            name: getattr(config, name) for name in ("checkpoint", "sessions", "fps", "clients", "seconds", "rounds")
        },
        "replays": replays,
    }
    out = Path(config.reports) / f"{date.today():%Y-%m-%d}-storm"
    write_result(out / "result.json", "bench-storm", figures, {"inputs": inputs, "crowd": crowd})
    report = out / "report.md"
    write_bytes(report, render(read_json(out / "result.json")).encode())
    return report


async def _input_storm(config: StormConfig, address: str) -> dict[str, Any]:
    """Take turns without input and with key edges as fast as allowed; return each turn's frame times."""
    rows: dict[str, list[dict[str, float]]] = {"quiet": [], "storm": []}
    async with AsyncClient(address) as client:
        await _take(client, _WARM_UP_S, _PACE)
        for turn in range(config.turns):
            for name in ("quiet", "storm") if turn % 2 == 0 else ("storm", "quiet"):
                hand = asyncio.create_task(_press(client, _STORM_RATE, config.seed)) if name == "storm" else None
                frames = await _take(client, config.turn_seconds, _PACE)
                if hand is not None:
                    hand.cancel()
                    await asyncio.gather(hand, return_exceptions=True)
                rows[name].append(_summary(frames))
    return rows


async def _crowd(config: StormConfig, address: str, pid: int) -> dict[str, Any]:
    """Play all sessions, first among themselves, then with the hostile clients beside them."""
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(address, session=number if config.sessions > 1 else None))
            for number in range(config.sessions)
        ]
        for number, client in enumerate(clients):
            await client.reset(number)
            await client.start_recording()
        hands = [asyncio.create_task(_press(client, 8.0, number)) for number, client in enumerate(clients)]
        await asyncio.gather(*(_take(client, _WARM_UP_S, config.fps) for client in clients))
        memory = [_resident_bytes(pid)]
        parts: dict[str, list[list[dict[str, float]]]] = {name: [[] for _ in clients] for name in _PARTS}
        hostile: list[dict[str, dict[str, int]]] = []
        for turn in range(config.rounds * len(_PARTS)):
            name = _PARTS[(turn + turn // len(_PARTS)) % len(_PARTS)]
            async with _beside(name, config, address, hostile) as begin:
                await asyncio.gather(*(_take(client, _WARM_UP_S, config.fps) for client in clients))
                begin()
                taken = await asyncio.gather(*(_take(client, config.seconds, config.fps) for client in clients))
            for rows, frames in zip(parts[name], taken, strict=True):
                rows.append(_summary(frames))
            memory.append(_resident_bytes(pid))
        for hand in hands:
            hand.cancel()
        await asyncio.gather(*hands, return_exceptions=True)
        recordings = [(await client.stop_recording()).name for client in clients]
    return {**parts, "hostile": hostile, "resident_bytes": memory, "recordings": recordings}


@asynccontextmanager
async def _beside(
    name: str, config: StormConfig, address: str, hostile: list[dict[str, dict[str, int]]]
) -> AsyncIterator[Callable[[], None]]:
    """Run what a part has beside the sessions; yields what lets it begin."""
    spin = "import time; input(); end = time.monotonic() + {}\nwhile time.monotonic() < end: pass"
    commands = {
        "spinning": ("-c", spin.format(config.seconds)),
        "crowded": ("-m", "worldline.bench.storm_clients", address, str(config.clients), str(config.seconds)),
    }
    if name not in commands:
        yield lambda: None
        return
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, *commands[name], stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    stdin = process.stdin
    try:
        yield lambda: stdin.write(b"begin\n")
    finally:
        told, _ = await process.communicate()
    if told:
        hostile.append(json.loads(told))


async def _press(client: AsyncClient, rate: float, seed: int) -> None:
    """Press and release keys at `rate` edges a second, until cancelled."""
    rng = rng_for(seed, "bench-storm")
    while True:
        key = str(rng.choice(_KEYS))
        await client.press(key)
        await asyncio.sleep(1.0 / rate)
        await client.release(key)
        await asyncio.sleep(1.0 / rate)


async def _take(client: AsyncClient, seconds: float, fps: float) -> list[FrameMessage]:
    """Return the frames of so many slots, however long they take."""
    first = await client.frame()
    frames = [first]
    while frames[-1].frame_id - first.frame_id + frames[-1].missed - first.missed < seconds * fps:
        frames.append(await client.frame())
    return frames


def _summary(frames: list[FrameMessage]) -> dict[str, float]:
    """Deadlines by what the server says of them: a frame that was late, or a slot that had none, is missed."""
    busy = np.array([frame.busy_us for frame in frames[1:]]) / 1e3
    period = np.array([frame.period_us for frame in frames[1:]]) / 1e3
    missed = frames[-1].missed - frames[0].missed
    return {
        "frames": frames[-1].frame_id - frames[0].frame_id,
        "missed": missed,
        "kept": 1.0 - missed / max(1, frames[-1].frame_id - frames[0].frame_id),
        "busy_p50_ms": float(np.percentile(busy, 50)),
        "busy_p99_ms": float(np.percentile(busy, 99)),
        "busy_max_ms": float(busy.max()),
        "jitter_p99_ms": float(np.percentile(np.abs(period - np.median(period)), 99)),
        "dropped": frames[-1].dropped - frames[0].dropped,
    }


def _over_rounds(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return one session's row over all rounds: sums, and the median round's percentile."""
    frames, missed, dropped = (sum(row[key] for row in rows) for key in ("frames", "missed", "dropped"))
    p99 = float(np.median([row["busy_p99_ms"] for row in rows]))
    return {"kept": 1.0 - missed / max(1, frames), "busy_p99_ms": p99, "dropped": dropped}


def _replay(path: Path, checkpoint: str) -> dict[str, Any]:
    from worldline.engine.recording import Recording
    from worldline.engine.replay import verify
    from worldline.engine.workloads.latent import LatentWorkload

    verdict = verify(path, LatentWorkload.open_for(Recording(path), checkpoint))
    return {"ok": verdict.ok, "text": str(verdict)}


def _resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * 4096


@contextmanager
def _server(checkpoint: str, folder: str, *options: str) -> Iterator[tuple[str, int]]:
    command = (sys.executable, "-m", "worldline", "play", checkpoint, "port=0", f"recordings={folder}", *options)
    process = subprocess.Popen([*command, "open_browser=false"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                yield found.group(), process.pid
                return
        raise WorldlineError(f"the server ended before it printed its address; run: worldline play {checkpoint}")
    finally:
        process.terminate()
        process.wait(timeout=30)
        process.stdout.close()


def render(result: dict[str, Any]) -> str:
    """Write the report from `result.json` alone."""
    config, made = result["config"], result["provenance"]
    inputs, crowd = result["timing"]["inputs"], result["timing"]["crowd"]
    memory = " -> ".join(f"{nbytes / 2**20:.0f}" for nbytes in crowd["resident_bytes"])
    table = {name: [_over_rounds(rows) for rows in crowd[name]] for name in _PARTS}
    worst = {name: min(row["kept"] for row in rows) for name, rows in table.items()}
    equal = sum(replay["ok"] for replay in result["replays"])
    good = worst["crowded"] >= KEPT and equal == config["sessions"]
    ratios = [storm["busy_p99_ms"] / quiet["busy_p99_ms"] for quiet, storm in zip(*inputs.values(), strict=True)]
    low, high = median_interval(np.array(ratios))
    spikes = "does not spike" if high <= _SPIKE else "SPIKES" if low > _SPIKE else "may spike"
    lines = [
        f"# Storms: {'every session keeps its deadlines and its bits' if good else 'NOT every session holds'}",
        "",
        f"## {config['clients']} hostile clients beside {config['sessions']} sessions at {config['fps']:g} FPS",
        "",
        f"{config['rounds']} rounds of three turns of {config['seconds']:g} s: alone, beside a process that only keeps "
        "a core busy, and beside the hostile clients, whose own process keeps a core of the same machine busy, too. No "
        "session has its true world beside.",
        "",
        "| session | deadlines kept alone | spinning | crowded | busy p99 alone, ms | spinning | crowded | "
        "pictures dropped | replay |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for number, replay in enumerate(result["replays"]):
        rows = [table[name][number] for name in _PARTS]
        cells = [f"{100 * row['kept']:.2f}%" for row in rows] + [f"{row['busy_p99_ms']:.1f}" for row in rows]
        lines.append(f"| {number} | {' | '.join(cells)} | {rows[-1]['dropped']:.0f} | {replay['text']} |")
    ends: dict[str, Counter[str]] = {}
    for told in crowd["hostile"]:
        for kind, found in told.items():
            ends.setdefault(kind, Counter()).update(found)
    lines += [
        "",
        f"The worst session keeps {100 * worst['crowded']:.2f}% of its deadlines beside the crowd "
        f"({'at least' if worst['crowded'] >= KEPT else 'NOT'} {100 * KEPT:g}%), {100 * worst['spinning']:.2f}% beside "
        f"the spinning process and {100 * worst['alone']:.2f}% alone; {equal} of {config['sessions']} recordings "
        f"repeat to the bit. Server memory at the start and after each turn: {memory} MiB.",
        "",
        "| kind | how attempts ended |",
        "|---|---|",
        *(
            f"| {kind} | {', '.join(f'{name}: {count}' for name, count in sorted(found.items()))} |"
            for kind, found in ends.items()
        ),
        "",
        f"## {_STORM_RATE:g} key edges a second on one session at {_PACE:g} FPS",
        "",
        "| | busy p50 ms | p99 | longest | period off its median, p99 | deadlines kept |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in inputs.items():
        cells = [np.median([row[key] for row in rows]) for key in ("busy_p50_ms", "busy_p99_ms")]
        longest, jitter = max(r["busy_max_ms"] for r in rows), np.median([r["jitter_p99_ms"] for r in rows])
        kept = 1.0 - sum(row["missed"] for row in rows) / sum(row["frames"] for row in rows)
        lines.append(f"| {name} | {cells[0]:.2f} | {cells[1]:.2f} | {longest:.1f} | {jitter:.2f} | {100 * kept:.2f}% |")
    lines += [
        "",
        f"Under input p99 of the busy time is {np.median(ratios):.2f} times that without ({low:.2f} to {high:.2f}, "
        f"{len(ratios)} turns each): latency {spikes} when actions arrive.",
        "",
        f"Machine: {made['machine']['processor']}, {made['machine']['cores']} cores; commit {made['commit']}.",
        "",
        f"Again: `{made['command']}`",
        "",
    ]
    return "\n".join(lines)
