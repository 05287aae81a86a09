"""The engine's benchmark and the harness beneath it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from worldline.bench.engine import EngineBenchConfig, hand, run
from worldline.bench.harness import compare, median_interval
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.data.simulators import make_simulator
from worldline.engine.workloads.latent import make_starts, save_starts
from worldline.model.checkpoint import save_world
from worldline.model.world import World, WorldConfig


class FakeClock:
    """A clock that calls move on; the machine slows down steadily, and stalls now and then."""

    def __init__(self) -> None:
        self.now, self.calls = 0, 0

    def __call__(self) -> int:
        return self.now

    def spend(self, nanoseconds: float):
        def call() -> None:
            self.calls += 1
            drift = 1.0 + self.calls / 500
            self.now += round(nanoseconds * drift * (20 if self.calls % 37 == 0 else 1))

        return call


@pytest.mark.parametrize(
    ("cost", "verdict"), [(1_000_000, "same"), (1_200_000, "slower"), (700_000, "faster"), (1_010_000, "same")]
)
def test_comparison_in_turns_survives_drift_and_stalls(cost: float, verdict: str) -> None:
    clock = FakeClock()
    found = compare(("a", clock.spend(1e6)), ("b", clock.spend(cost)), budget_s=1.0, warmup_s=0.01, clock=clock)
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(cost / 1e6, rel=0.01)


def test_interval_of_a_median() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        low, high = median_interval(rng.exponential(1.0, 60))
        covered += low <= np.log(2) <= high
    assert 0.93 <= covered / 300 <= 0.99


def test_the_hand_stays_in_range() -> None:
    spec = make_simulator("two_room").spec
    drawn = hand(spec, 200, 0)
    assert drawn.shape == (200, 2)
    assert np.abs(drawn).max() <= 1.0
    assert np.array_equal(drawn, hand(spec, 200, 0))
    assert not np.array_equal(drawn, hand(spec, 200, 1))


@pytest.mark.slow
def test_a_run_writes_its_report_from_its_result(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = WorldConfig(latent_dim=8, hidden=16, conv_width=4, decoder_width=4)
    path = save_world(tmp_path / "small", World(small, make_simulator("two_room").spec), training={})
    save_starts(path, make_starts("two_room", context=2, count=1))
    report = run(
        EngineBenchConfig(checkpoint=str(path), frames=200, compare_seconds=0.05, reports=str(tmp_path / "reports"))
    )
    result = read_json(report.with_name("result.json"))
    assert result["runs_equal"]
    assert result["replay_ok"]
    for run_tensors in result["tensors"]:
        assert run_tensors["end"] == run_tensors["after_warmup"]
    assert result["chain"][0] in report.read_text()
    assert result["timing"]["comparisons"][0]["names"] == ["plain loop", "engine"]


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(WorldlineError, match="at least 200 frames"):
        run(EngineBenchConfig(checkpoint="x", frames=10, reports=str(tmp_path)))
    with pytest.raises(WorldlineError, match="no such world"):
        run(EngineBenchConfig(checkpoint=str(tmp_path / "none"), frames=1000, reports=str(tmp_path)))
