"""The probe of a frozen encoder: a small run from end to end, and its paired intervals on errors that are known."""

import json
from pathlib import Path

import numpy as np

from worldline.bench.pretrain import PretrainBenchConfig, _scores, run
from worldline.core.result import write_result
from worldline.core.seeding import rng_for
from worldline.data.collect import CollectConfig, collect
from worldline.model.video import VideoConfig, save_encoder
from worldline.train.learner import Learner, LearnerConfig
from worldline.train.masks import MaskConfig
from worldline.train.parallel import ParallelConfig, Ranks


def test_it_reads_states_and_writes_a_report(tmp_path: Path) -> None:
    data = collect(CollectConfig(env="two_room", path=str(tmp_path / "data"), episodes=12, steps=20, seed=3, workers=1))
    model = VideoConfig(image_size=32, frames=4, width=16, depth=1, heads=2, predictor_width=8, predictor_heads=2)
    training = {
        "step": 5,
        "config": {"seed": 3, "batch": 8, "model": model.to_json(), "learner": {"target": "ema"}},
        "provenance": {"command": "worldline pretrain clips"},
    }
    finished = {"steps": 5, "loss": 0.5, "clips": 9, "parameters": 1000, "lost": 0, "never_seen": {"by_reason": {}}}
    timing = {"seconds": 240.0, "cpu_seconds": 60.0, "resumed_at": 0}
    write_result(tmp_path / "encoder" / "result.json", "pretraining", finished, timing)
    learning = LearnerConfig(target="ema")
    learner = Learner(model, MaskConfig(), learning, ParallelConfig(), Ranks(0, 1, None, None), seed=3, device="cpu")
    save_encoder(tmp_path / "encoder", model, learner.kept_encoder.state_dict(), training)
    config = PretrainBenchConfig(
        encoder=tmp_path / "encoder", data=data, clips=60, probes=1, reports=tmp_path / "reports"
    )
    report = run(config)
    result = json.loads((report.parent / "result.json").read_text())
    factors = result["factors"]
    assert len(factors) > 0
    # nothing was learned yet: the baseline is this very network
    assert all(row["random"] == row["pretrained"] and row["interval"] == [0.0, 0.0] for row in factors.values())
    assert "gain, 95% interval over test episodes" in report.read_text()
    assert "1.0 minutes of CPU time in 4.0 minutes" in report.read_text()


def test_gains_are_paired_by_episode() -> None:
    """Episodes differ far more than the encoders do; pairing sees the difference, and whole episodes are drawn."""
    rng = rng_for("paired")
    episode = np.repeat(np.arange(20), 10)
    base = np.exp(rng.normal(0, 1, 20))[episode]
    better = {"random": {"x": 0.9 * base}, "pretrained": {"x": 0.8 * base}}
    row = _scores(better, {"x": base}, episode, seed=0)["x"]
    np.testing.assert_allclose([row["random"], row["pretrained"], *row["interval"]], [0.1, 0.2, 0.1, 0.1])
    one = np.where(episode == 3, 5.0, 0.9) * base  # worse in a single episode: nobody can tell what others would do
    row = _scores({"random": {"x": 0.9 * base}, "pretrained": {"x": one}}, {"x": base}, episode, seed=0)["x"]
    assert row["gain"] < 0
    assert row["interval"][1] == 0
