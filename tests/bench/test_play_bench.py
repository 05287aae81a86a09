"""The figures of the play benchmark; the playing itself is `worldline bench play`."""

from __future__ import annotations

from typing import Any

import pytest

from worldline.bench.play import BARS, _kept, _made_per_second, _per_second, render

RESULT: dict[str, Any] = {
    "checkpoint": "rooms",
    "seconds": 60,
    "fast_fps": 60,
    "provenance": {"machine": {"cores": 2, "processor": "some"}, "commit": "abc", "command": "worldline bench play"},
}
KEPT = {name: limit for name, (_, limit) in BARS.items()}  # a value at its bar keeps it


def test_ids_are_counted_once_a_second_and_the_torn_last_second_is_left_out() -> None:
    rows: list[dict[str, float | None]] = [{"time": 500.0 + 10 * i, "id": float(i // 2)} for i in range(250)]
    assert _per_second(rows).tolist() == [50.0, 50.0]


def test_deadlines_and_frames_are_counted_by_what_the_engine_says_not_by_what_came() -> None:
    came = [
        {"time": 10.0 * i, "id": 100.0 + 3 * i, "missed": float(7 + i // 50)} for i in range(201)
    ]  # each third frame
    assert _kept(came) == pytest.approx(1 - 4 / 600)
    assert _made_per_second(came) == pytest.approx(300.0)


def test_a_report_says_which_bars_are_kept() -> None:
    assert render({**RESULT, "timing": KEPT}).startswith("# Play in a browser: every bar is kept")


@pytest.mark.parametrize("name", BARS)
def test_a_report_names_a_bar_that_is_not_kept(name: str) -> None:
    sign, limit = BARS[name]
    timing = {**KEPT, name: limit - 0.01 if sign == ">=" else limit + 0.01}
    first = render({**RESULT, "timing": timing}).splitlines()[0]
    assert first == f"# Play in a browser: not kept: {name}"
