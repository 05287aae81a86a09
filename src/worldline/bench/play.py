"""Play in a real browser: does it keep its pace, how long from press to pixel, is every millisecond accounted for."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, write_bytes
from worldline.core.result import write_result
from worldline.core.seeding import rng_for
from worldline.model.checkpoint import find_world

FAST = 60
BARS = {
    "fast_ids_per_second_min": (">=", 59.0),
    "fast_deadlines_kept": (">=", 0.995),
    "unpaced_frames_per_second": (">=", 240.0),
    "fast_between_frames_p99_ms": ("<=", 41.7),
    "press_to_pixel_p50_ms": ("<=", 60.0),
    "coverage": (">=", 0.99),
    "start_to_first_frame_s": ("<=", 5.0),
}
_WARM_UP_S = 3.0
_REAL_S, _UNPACED_S = 60.0, 30.0
_ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync"),
)
_WATCH = """() => {
    window.seen = { frames: [], paints: [] };
    document.addEventListener("worldline:frame", ({ detail }) => window.seen.frames.push(detail));
    document.addEventListener("worldline:paint", ({ detail }) => window.seen.paints.push(detail));
}"""
_TAKE = """() => {
    const taken = { frames: window.seen.frames, paints: window.seen.paints };
    window.seen.frames = [];
    window.seen.paints = [];
    return taken;
}"""


@dataclass(frozen=True, kw_only=True)
class PlayBenchConfig:
    """What to play, and for how long."""

    checkpoint: str
    """A checkpoint, a run, or a shipped world's name."""
    seconds: float = 60.0
    """Time at 60 FPS; as long in real time, but a minute at most, and without a pace, but half a minute at most."""
    seed: int = 0
    """Of the start and of the hand that presses keys."""
    chromium: str = "/usr/bin/chromium"
    """The browser's program."""
    reports: str = "reports"
    """Where `DATE-play/` is written."""


def run(config: PlayBenchConfig) -> Path:
    """Play in headless Chromium at 60 FPS, in real time and without a pace; write `result.json` and `report.md`.

    Returns the report's path.

    Raises:
        WorldlineError: no such checkpoint, no browser, or too short a time to say anything.
    """
    if config.seconds < 3:
        raise WorldlineError(f"the play benchmark wants at least 3 seconds at each pace, got {config.seconds:g}")
    find_world(config.checkpoint)
    with tempfile.TemporaryDirectory() as folder, _browser(config.chromium) as browser:
        timing = _play(config, browser, folder)
    out = Path(config.reports) / f"{date.today():%Y-%m-%d}-play"
    figures = {"checkpoint": config.checkpoint, "seconds": config.seconds, "seed": config.seed, "fast_fps": FAST}
    write_result(out / "result.json", "bench-play", figures, timing)
    report = out / "report.md"
    write_bytes(report, render(read_json(out / "result.json")).encode())
    return report


def _play(config: PlayBenchConfig, browser: Any, folder: str) -> dict[str, Any]:
    began = time.time()
    with _server(config, folder) as address:
        page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        page.add_init_script(f"({_WATCH})()")
        page.goto(address)
        _until(page, "window.seen.paints.length > 0")
        first = page.evaluate("(performance.timeOrigin + window.seen.paints[0].time) / 1000")
        hand = _Hand(page, config.seed)
        page.select_option("#pace", str(FAST))
        fast = _measure(page, hand, config.seconds)
        page.select_option("#pace", index=1)
        real = _measure(page, hand, min(config.seconds, _REAL_S))
        page.select_option("#pace", "0")
        unpaced = _measure(page, hand, min(config.seconds, _UNPACED_S))
        page.uncheck("#truth-on")
        alone = _measure(page, hand, min(config.seconds, _UNPACED_S))
    gaps = np.diff(_column(fast["paints"], "time"))
    latencies = _column(real["paints"], "latency")
    latencies = latencies[np.isfinite(latencies)]
    if len(latencies) < 10:
        raise WorldlineError(f"only {len(latencies)} presses were painted; give the benchmark more seconds")
    frames = fast["frames"] + real["frames"] + unpaced["frames"] + alone["frames"]
    busy, unattributed = _column(frames, "busy"), _column(frames, "unattributed")
    received, painted = _per_second(fast["frames"]), _per_second(fast["paints"])
    return {
        "fast_ids_per_second_min": float(received.min()),
        "fast_ids_per_second_mean": float(received.mean()),
        "fast_painted_per_second_min": float(painted.min()),
        "fast_painted_per_second_mean": float(painted.mean()),
        "fast_deadlines_kept": _kept(fast["frames"]),
        "fast_between_frames_p50_ms": float(np.percentile(gaps, 50)),
        "fast_between_frames_p99_ms": float(np.percentile(gaps, 99)),
        "press_to_pixel_p50_ms": float(np.percentile(latencies, 50)),
        "press_to_pixel_p99_ms": float(np.percentile(latencies, 99)),
        "presses": len(latencies),
        "fast_busy_p50_ms": float(np.percentile(_column(fast["frames"], "busy"), 50)),
        "fast_busy_p99_ms": float(np.percentile(_column(fast["frames"], "busy"), 99)),
        "unpaced_frames_per_second": _made_per_second(alone["frames"]),
        "unpaced_with_true_world": _made_per_second(unpaced["frames"]),
        "coverage": float(1.0 - unattributed.sum() / busy.sum()),
        "start_to_first_frame_s": float(first - began),
    }


def _measure(page: Any, hand: _Hand, seconds: float) -> dict[str, Any]:
    """Press keys for `seconds` after a warm-up; return what the page received and painted meanwhile."""
    hand.press(_WARM_UP_S)
    page.evaluate(_TAKE)
    hand.press(seconds)
    taken: dict[str, Any] = page.evaluate(_TAKE)
    return taken


class _Hand:
    """Presses arrow keys, one at a time, held for 40 to 300 ms."""

    def __init__(self, page: Any, seed: int) -> None:
        self._page, self._rng = page, rng_for(seed, "bench-play")

    def press(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            key = str(self._rng.choice(["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"]))
            self._page.keyboard.down(key)
            self._page.wait_for_timeout(float(self._rng.uniform(40, 300)))
            self._page.keyboard.up(key)
            self._page.wait_for_timeout(float(self._rng.uniform(40, 200)))


@contextmanager
def _browser(executable: str) -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise WorldlineError("the play benchmark needs Playwright; run: pip install 'worldline[dev]'") from None
    if not Path(executable).exists():
        raise WorldlineError(
            f"{executable}: no browser there; run: apt-get install chromium, or name one: chromium=PATH"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def _server(config: PlayBenchConfig, folder: str) -> Iterator[str]:
    options = (config.checkpoint, "port=0", f"seed={config.seed}", f"recordings={folder}")
    process = subprocess.Popen(
        [sys.executable, "-m", "worldline", "play", *options, "open_browser=false"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                yield found.group()
                return
        raise WorldlineError(f"the server ended before it printed its address; run: worldline play {config.checkpoint}")
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()


def _until(page: Any, condition: str) -> None:
    end = time.monotonic() + 60
    while not page.evaluate(condition):
        if time.monotonic() > end:
            raise WorldlineError(
                f"the page showed no frame within 60 seconds; its state is {page.inner_text('#state')!r}"
            )
        page.wait_for_timeout(5)


def _column(rows: list[dict[str, float | None]], name: str) -> Float64[np.ndarray, " n"]:
    return np.array([np.nan if row[name] is None else row[name] for row in rows], dtype=np.float64)


def _per_second(rows: list[dict[str, float | None]]) -> Float64[np.ndarray, " n"]:
    """Return how many distinct ids came in each whole second."""
    times, ids = _column(rows, "time"), _column(rows, "id")
    seconds = ((times - times[0]) // 1000).astype(int)
    return np.array([len(np.unique(ids[seconds == second])) for second in range(seconds.max())], dtype=np.float64)


def _kept(rows: list[dict[str, float | None]]) -> float:
    """Return the share of the pace's slots whose frame was done before the next one began."""
    ids, missed = _column(rows, "id"), _column(rows, "missed")
    return float(1.0 - (missed[-1] - missed[0]) / (ids[-1] - ids[0]))


def _made_per_second(rows: list[dict[str, float | None]]) -> float:
    """Return how many frames the engine made in a second, received or not."""
    ids, times = _column(rows, "id"), _column(rows, "time")
    return float(1000.0 * (ids[-1] - ids[0]) / (times[-1] - times[0]))


def render(result: dict[str, Any]) -> str:
    timing, made = result["timing"], result["provenance"]
    real, unpaced = min(result["seconds"], _REAL_S), min(result["seconds"], _UNPACED_S)
    kept = {name: keeps(timing[name], bar) for name, bar in BARS.items()}
    verdict = (
        "every bar is kept" if all(kept.values()) else "not kept: " + ", ".join(n for n, ok in kept.items() if not ok)
    )
    lines = [
        f"# Play in a browser: {verdict}",
        "",
        f"{result['checkpoint']}, {result['seconds']:g} s at {result['fast_fps']} FPS, {real:g} s in real time and "
        f"twice {unpaced:g} s unpaced, keys going down and up, headless Chromium on {made['machine']['cores']} cores "
        f"({made['machine']['processor']}), commit {made['commit']}.",
        "",
        "| figure | value | bar | kept |",
        "|---|---|---|---|",
    ]
    for name, value in timing.items():
        sign, limit = BARS.get(name, ("", None))
        bar = "" if limit is None else f"{sign} {limit:g}"
        lines.append(f"| {name} | {value:.4g} | {bar} | {'' if name not in kept else 'yes' if kept[name] else 'no'} |")
    lines += [
        "",
        "`ids` are distinct frames that the page received, `painted` those that it drew: of three that arrive between "
        "two refreshes of the display it skips one. Between frames is measured from painting to painting; press to "
        "pixel from a key's event time to the painting of the first frame that applied it. A deadline is kept by a "
        "frame that is made, packed and handed over before the next one is due; a slot without a frame keeps none. "
        "Unpaced frames are those that the engine made, whether the page took them or not; the bar is for the engine, "
        "with the true world switched off: its simulator takes a share of the cores. Coverage is the sum of the "
        "leaf spans over the busy time.",
        "",
        f"Again: `{made['command']}`",
        "",
    ]
    return "\n".join(lines)


def keeps(value: float, bar: tuple[str, float]) -> bool:
    """Return whether a figure keeps its bar, one of `BARS`."""
    return value >= bar[1] if bar[0] == ">=" else value <= bar[1]
