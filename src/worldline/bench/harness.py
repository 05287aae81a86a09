"""Two ways of doing the same thing, timed in turns: drift of the machine meets both alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from worldline.core.errors import WorldlineError

SAME_WITHIN = 0.02
"""Ratios this close to 1 count as no difference."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How B compares with A; times in nanoseconds a call."""

    names: tuple[str, str]
    rounds: int
    medians: tuple[float, float]
    quartiles: tuple[tuple[float, float], tuple[float, float]]
    ratio: float
    """Median over rounds of B's time over A's."""
    interval: tuple[float, float]
    """95% interval of that median, from order statistics."""

    @property
    def verdict(self) -> Literal["faster", "slower", "same", "ambiguous"]:
        """What B is beside A, as far as the interval tells."""
        low, high = self.interval
        if high < 1.0 - SAME_WITHIN:
            return "faster"
        if low > 1.0 + SAME_WITHIN:
            return "slower"
        return "same" if low >= 1.0 - SAME_WITHIN and high <= 1.0 + SAME_WITHIN else "ambiguous"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def compare(
    a: tuple[str, Callable[[], object]],
    b: tuple[str, Callable[[], object]],
    budget_s: float = 2.0,
    warmup_s: float = 0.2,
    clock: Callable[[], int] = time.perf_counter_ns,
    calls_a_turn: int = 1,
) -> Comparison:
    """Time `a` and `b` in the order AB BA AB ... until the budget is spent; at least 8 rounds.

    Warm-up lasts for a time, not for a number of calls. With several `calls_a_turn` a time is their mean, and
    most find the caches as the last call left them, as in a loop.
    """
    if budget_s <= 0 or warmup_s < 0 or calls_a_turn < 1:
        raise WorldlineError(
            f"a comparison needs a positive time budget and at least a call a turn, got {budget_s} s after "
            f"{warmup_s} s and {calls_a_turn} calls"
        )
    calls = (a[1], b[1])
    until = clock() + round(warmup_s * 1e9)
    while clock() < until:
        for call in calls:
            call()
    rows: list[list[int]] = []
    until = clock() + round(budget_s * 1e9)
    while len(rows) < 8 or clock() < until:
        row = [0, 0]
        for which in (0, 1) if len(rows) % 2 == 0 else (1, 0):
            started = clock()
            for _ in range(calls_a_turn):
                calls[which]()
            row[which] = clock() - started
        rows.append(row)
    times = np.array(rows, dtype=np.float64) / calls_a_turn
    ratios = times[:, 1] / np.maximum(times[:, 0], 1.0)
    first, second = ((float(q[0]), float(q[1])) for q in np.percentile(times, (25, 75), axis=0).T)
    return Comparison(
        names=(a[0], b[0]),
        rounds=len(rows),
        medians=(float(np.median(times[:, 0])), float(np.median(times[:, 1]))),
        quartiles=(first, second),
        ratio=float(np.median(ratios)),
        interval=median_interval(ratios),
    )


def median_interval(values: Float64[np.ndarray, " n"]) -> tuple[float, float]:
    """Return the 95% interval of the median: order statistics by the normal approximation of the binomial."""
    ordered, count = np.sort(values), len(values)
    half = 1.96 * math.sqrt(count) / 2
    low = max(0, math.floor(count / 2 - half))
    high = min(count - 1, math.ceil(count / 2 + half))
    return float(ordered[low]), float(ordered[high])
