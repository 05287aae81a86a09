"""The price list of determinism, on a small world and in real processes."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from toy_world import SPEC
from worldline.bench import determinism
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.engine.workloads.latent import Starts, save_starts
from worldline.model import World, WorldConfig, save_world


def test_levels_are_compared_and_a_chain_that_differs_is_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    world = World(WorldConfig(image_size=32, latent_dim=24, hidden=48), SPEC).eval()
    checkpoint = save_world(tmp_path / "world", world, training={})
    starts = Starts(
        frames=np.zeros((2, 3, 32, 32, 3), np.uint8),
        actions=np.zeros((2, 2, SPEC.action_dim), np.float32),
        seeds=np.zeros(2, np.int64),
        prefix=np.zeros((2, 1, SPEC.action_dim), np.float32),
        prefix_lengths=np.zeros(2, np.int64),
    )
    save_starts(checkpoint, starts)
    report = determinism.run(
        determinism.DeterminismBenchConfig(
            checkpoint=str(checkpoint),
            compare_seconds=0.02,
            frames=200,
            reports=str(tmp_path / "reports"),
            publish=str(tmp_path / "docs"),
        )
    )
    result = dict(read_json(report.with_name("result.json")))
    assert (tmp_path / "docs" / "determinism.md").read_text() == report.read_text() == determinism.render(result)
    assert [[found["names"] for found in pairs] for pairs in result["timing"].values()] == [
        [["off", "run"], ["run", "machine"], ["off", "machine"]]
    ] * 2
    assert "the same hash chain" in determinism.render(result)
    assert [found["differs"] for found in result["threads"].values()] == [["threads"]] * 2
    other = copy.deepcopy(result)
    other["chains"]["eager"][1] = "ff"
    assert f"DIFFERENT hash chains: {other['chains']['eager'][0]}, ff" in determinism.render(other)


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(WorldlineError, match="frames >= 200"):
        determinism.run(determinism.DeterminismBenchConfig(checkpoint="pusht", frames=10))


def test_a_price_is_told_only_where_the_interval_leaves_out_none() -> None:
    found = {"ratio": 1.05, "interval": (0.99, 1.1)}
    assert determinism._price("graph", found) == "- graph: no price could be told from noise (-1.0% to +10.0% a frame)."
    assert "+5.0% of its time more (+4.0% to +6.0%)" in determinism._price("graph", found | {"interval": (1.04, 1.06)})
