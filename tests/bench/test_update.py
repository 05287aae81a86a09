"""The update's benchmark does updates, and tells of them what its result holds."""

from pathlib import Path

import pytest
import torch

from worldline.bench.update import UpdateBenchConfig, render, run
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.model.video import VideoConfig

SMALL = VideoConfig(
    image_size=32,
    frames=4,
    patch=8,
    width=32,
    depth=2,
    heads=2,
    predictor_width=16,
    predictor_depth=1,
    predictor_heads=2,
)


def test_its_rates_follow_from_the_clock_and_the_counted_operations(tmp_path: Path) -> None:
    report = run(UpdateBenchConfig(model=SMALL, batch=4, seconds=0.01, reports=tmp_path))
    result = read_json(report.with_name("result.json"))
    assert result["timing"]["update_ns"]["updates"] >= 8
    assert result["flops_per_clip"] > 6 * 8 * 32 * 32  # three passes of one product of 8 kept tokens
    result["timing"] = {"update_ns": {"median": 5e8, "quartiles": [4e8, 6e8], "updates": 8}, "peak_bytes": 2 * 10**9}
    result |= {"flops_per_clip": 1e12, "planned_bytes": 22 * 10**8}
    text = render(result)
    assert "8.0 clips/s" in text
    assert "are 8.0 TFLOP/s: 1% of 989 (MFU)" in text
    assert "2.00 GB at the worst moment; `worldline plan-memory` counts 2.20 GB, +10%" in text


def test_a_device_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(WorldlineError, match="device=cuda: torch sees no such device"):
        run(UpdateBenchConfig(model=SMALL, device="cuda"))
