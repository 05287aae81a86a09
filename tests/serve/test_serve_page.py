"""The page in a real browser. Behaviour only; how fast it is, `worldline bench play` says."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_client import Server, running

from worldline.engine.replay import verify
from worldline.engine.workloads.latent import LatentWorkload
from worldline.serve import Client

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync"),
)
WATCH = """() => {
    window.paints = [];
    document.addEventListener("worldline:paint", ({ detail }) => window.paints.push(detail));
}"""
TIMEOUT_MS = 180_000  # for machines that do much else; nothing here is about speed


def until(page: Any, condition: str) -> None:
    """Wait until a JavaScript expression is true. (Playwright's own waiting needs `eval`, which the page forbids.)"""
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"waited in vain for {condition}"
        page.wait_for_timeout(50)


def more_frames(page: Any, count: int) -> None:
    until(page, f"window.paints.length > {page.evaluate('window.paints.length') + count}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is missing; run: apt-get install chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    context.set_default_timeout(TIMEOUT_MS)
    made = context.new_page()
    complaints: list[str] = []
    made.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.goto(server.url)
    made.evaluate(WATCH)
    until(made, "window.paints.length > 2")
    yield made
    context.close()
    assert complaints == []


def test_frames_arrive_and_the_page_fits_the_screen(page: Any) -> None:
    until(page, "window.paints.length > 20")
    ids = page.evaluate("window.paints.map((paint) => paint.id)")
    assert ids == sorted(set(ids))
    assert page.inner_text("#state") in ("live", "behind")  # behind, where the machine does much else
    size = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    assert size[0] <= 1280
    assert size[1] <= 800
    page.set_viewport_size({"width": 900, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 900


def test_of_frames_that_come_between_two_refreshes_the_last_two_are_painted_in_turn(page: Any) -> None:
    painted, received = page.evaluate("""async () => {
        const refresh = window.requestAnimationFrame, received = [], painted = [];
        let paint = null;
        window.requestAnimationFrame = (callback) => { paint = callback; };
        while (!paint) await new Promise((done) => setTimeout(done, 5));
        document.addEventListener("worldline:frame", ({ detail }) => received.push(detail.id));
        document.addEventListener("worldline:paint", ({ detail }) => painted.push(detail.id));
        while (received.length < 3) await new Promise((done) => setTimeout(done, 5));
        for (let i = 0; i < 4; i++) paint(performance.now());
        window.requestAnimationFrame = refresh;
        refresh(paint);
        return [painted.slice(), received.slice()];
    }""")
    assert painted == received[-2:]


def test_a_key_moves_the_true_agent_and_is_timed(page: Any) -> None:
    picture = "document.getElementById('truth').toDataURL()"
    before = page.evaluate(picture)
    for key in ("ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp"):  # two of them are not against a wall
        page.keyboard.down(key)
        more_frames(page, 6)
        page.keyboard.up(key)
    assert page.evaluate(picture) != before
    page.keyboard.press("KeyA")  # down and up at once
    until(page, "window.paints.filter((paint) => Number.isFinite(paint.latency)).length >= 5")
    latencies = page.evaluate("window.paints.map((paint) => paint.latency).filter(Number.isFinite)")
    assert all(latency > 0 for latency in latencies)
    until(page, "document.getElementById('press-count').textContent >= 5")


def test_the_pointer_moves_the_true_agent(page: Any) -> None:
    picture = "document.getElementById('truth').toDataURL()"
    before = page.evaluate(picture)
    box = page.locator("#imagined").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    for dx, dy in ((120, 90), (-120, -90)):
        page.mouse.move(x + dx, y + dy)
        more_frames(page, 6)
    page.mouse.up()
    assert page.evaluate(picture) != before


def test_record_stop_download_verify(page: Any, server: Server, tmp_path: Path) -> None:
    page.click("#record")
    until(page, "document.getElementById('record').getAttribute('aria-pressed') === 'true'")
    page.keyboard.press("KeyS")
    more_frames(page, 10)
    page.click("#record")
    until(page, "document.getElementById('verdict').textContent.includes('frames in')")
    with page.expect_download() as download:
        page.click("#save")
    path = tmp_path / "downloaded.wlr"
    download.value.save_as(path)
    assert verify(path, LatentWorkload.open(server.checkpoint)).ok
    page.click("#verify")
    until(page, "document.getElementById('verdict').textContent.includes('equal to the bit')")
    assert page.get_attribute("#verdict", "class") == "equal"


def test_reset_begins_again_from_the_seed(page: Any) -> None:
    for seed in ("1", "2", "1"):
        page.fill("#seed", seed)
        page.keyboard.press("Enter")
        until(page, f"document.getElementById('about').textContent.includes('seed {seed}')")
    more_frames(page, 3)


def test_the_keyboard_reaches_every_control(page: Any) -> None:
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    wanted = {"help-open", "imagined", "Reset", "seed", "pace", "anchor", "truth-on", "diff-on", "record", "open"}
    assert wanted <= reached


def test_the_recordings_and_the_help_open_and_close(page: Any) -> None:
    page.click("#open")
    page.wait_for_selector("#files[open]")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.wait_for_selector("#help[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#help:not([open])", state="hidden")


def test_a_second_page_watches(page: Any, server: Server) -> None:
    second = page.context.new_page()
    second.goto(server.url)
    until(second, "document.getElementById('state').textContent === 'watching'")
    assert second.is_disabled("#record")
    page.close()
    until(second, "!document.getElementById('record').disabled")


def test_every_number_says_what_it_is(page: Any) -> None:
    untitled = """[...document.querySelectorAll("dd, .number, tbody tr, #chain, #about, .chart, .meter")]
        .filter((element) => !element.closest("dialog") && !element.closest("[title]")?.title)
        .map((element) => element.outerHTML)"""
    assert page.evaluate(untitled) == []


PICTURES = """() => {
    window.pictures = {};
    document.addEventListener("worldline:paint", ({ detail }) => {
        const canvas = document.getElementById("imagined");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        window.pictures[detail.id] = Array.from(data);
    });
}"""


def test_encoded_pictures_are_painted_as_they_were_made(browser: Any, checkpoint: Path, tmp_path: Path) -> None:
    with running(checkpoint, tmp_path, codec="webp", fps=5.0) as server:
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(server.url)
        page.evaluate(PICTURES)
        with Client(server.url) as client:
            frames = [client.frame() for _ in range(12)]
        until(page, f"window.pictures[{frames[-1].frame_id}] !== undefined")
        painted = page.evaluate("window.pictures")
        page.close()
    compared = 0
    for frame in frames:
        if (data := painted.get(str(frame.frame_id))) is not None:
            side = frame.picture.shape[0]
            assert np.array_equal(np.array(data, np.uint8).reshape(side, side, 4)[..., :3], frame.picture)
            compared += 1
    assert compared >= 5
