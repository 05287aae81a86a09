"""The training benchmark compares the same step: same losses, near gradients, and a report from its result alone."""

from pathlib import Path

import pytest
import torch

from worldline.bench import train as bench
from worldline.bench.plain import plain_sigreg
from worldline.bench.train import TrainBenchConfig, measure, render
from worldline.cli import configure
from worldline.data.collect import CollectConfig, collect
from worldline.train.losses import sigreg

SMALL = (
    "model.image_size=32 model.latent_dim=16 model.conv_width=8 model.conv_head=8 model.hidden=32 "
    "model.decoder_width=8 joint.batch=16 joint.projections=32 validation_windows=4"
)


def test_the_plain_sigreg_is_ours() -> None:
    z = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    directions = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    ours = sigreg(z, torch.Generator().manual_seed(1), projections=12)
    torch.testing.assert_close(plain_sigreg(z, directions), ours, rtol=1e-5, atol=0)


def test_both_take_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = collect(CollectConfig(env="two_room", path=str(tmp_path / "data"), episodes=12, steps=24, seed=3, workers=1))
    asked = configure("train", ["objective=lewm", f"data={data}", f"path={tmp_path / 'run'}", *SMALL.split()])
    monkeypatch.setattr(bench, "_WARMUP_SECONDS", 0.0)
    figures, timed = measure(asked, TrainBenchConfig(compare_seconds=0.01, compiled=False))
    assert [row["names"][1] for row in timed] == ["worldline, bfloat16", "worldline, float32"]
    rough, exact = (figures["gradients"][row["names"][1]] for row in timed)
    assert exact["loss"] == pytest.approx(exact["plain_loss"], rel=1e-5)
    assert rough["loss"] != exact["loss"]
    for part in ("encoder", "predictor"):
        assert exact[part]["relative_error"] < 0.02
        assert rough[part]["cosine"] > 0.99
    made = {"machine": {"processor": "p", "cores": 1}, "versions": {"torch": "t"}, "commit": "c", "command": "x"}
    text = render({**figures, "timing": {"comparisons": timed}, "provenance": made})
    assert "`torch.compile`: n/a, it was not asked for." in text
    assert f"| worldline, float32 | {exact['loss']:.5f} |" in text
