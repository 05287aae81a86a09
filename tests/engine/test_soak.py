"""A short soak: the report says what was found, and a leak would show in it."""

from pathlib import Path

import pytest
import torch

from worldline.bench.soak import SoakConfig, render, run, trends
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.data.simulators import make_simulator
from worldline.engine.workloads.latent import make_starts, save_starts
from worldline.model.checkpoint import save_world
from worldline.model.world import World, WorldConfig


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soak")
    torch.manual_seed(0)
    world = World(WorldConfig(latent_dim=8, hidden=16, conv_width=4, decoder_width=4), make_simulator("two_room").spec)
    world.gauge.fit(world.eval(), torch.randn(200, 8))
    path = save_world(folder / "small", world, training={})
    save_starts(path, make_starts("two_room", context=4, count=1))
    return run(SoakConfig(checkpoint=str(path), frames=2000, reports=str(folder / "reports")))


def test_a_soak_repeats_and_can_be_taken_up(report: Path) -> None:
    result = read_json(report.with_name("result.json"))
    assert result["replay"] == "2001 frames, equal to the bit"
    assert result["resumed"]["equal"] == result["resumed"]["frames"] == 500
    assert result["broken_contracts"] == []
    assert len(result["timing"]["resident_bytes"]) == len(result["gauge"]["p5_p50_p95"]) == 100
    assert f"Taken up at frame {result['resumed']['frame']:,}" in report.read_text()
    assert report.with_name("soak.svg").read_text().startswith("<svg")


def test_a_leak_and_a_slowdown_would_show(report: Path) -> None:
    result = read_json(report.with_name("result.json"))
    timing = result["timing"]
    timing["resident_bytes"] = [10**8 + 4096 * block for block in range(100)]  # 20 frames a block
    timing["p50_p99_max_coverage"] = [[1e6, 2e6 * (1 + block / 100), 3e6, 0.999] for block in range(100)]
    found = trends(result)
    assert found["memory_low"] == found["memory_high"] == pytest.approx(50 * 4096)
    assert found["p99_ratio"] == pytest.approx(1.945 / 1.145)
    assert "Memory: +200.00 (99%: +200.00 to +200.00) KiB every 1,000 frames" in render(result)


def test_too_short_a_soak_is_refused() -> None:
    with pytest.raises(WorldlineError, match="at least 2,000 frames"):
        SoakConfig(checkpoint="pusht", frames=100)
