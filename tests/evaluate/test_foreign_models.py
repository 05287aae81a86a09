"""Other people's models are scored by the same gates, at equal time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_dataset import world_at

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.data.lerobot import Dataset
from worldline.evaluate.run import EvaluateConfig, evaluate

THEIRS = """
from worldline.model.checkpoint import load_world

class Theirs:
    def __init__(self, context, frame_skip):
        self.world = load_world("ours")
        self.context, self.frame_skip, self.image_size = context, frame_skip, 64
        self.encode = self.world.encode
    def begin(self, z, actions):
        return self.world.begin(z, actions)
    def step(self, state, action):
        for each in action.unflatten(-1, (self.frame_skip, -1)).unbind(1):
            state = self.world.step(state, each)
        return state

def same():
    return Theirs(2, 1)

def from_one_frame():
    return Theirs(1, 1)

def in_fives():
    return Theirs(1, 5)
"""


@pytest.fixture
def place(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    world_at(tmp_path / "ours", dataset, 0)
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "theirs", raising=False)
    return tmp_path


def scored(checkpoint: str, dataset: Dataset, **options: object) -> dict:
    config = EvaluateConfig(
        checkpoint=checkpoint,
        data=str(dataset.path),
        horizon=20,
        windows=220,
        draws=100,
        train_frames=1500,
        **options,  # type: ignore[arg-type]
    )
    return read_json(evaluate(config) / "result.json")


def test_the_same_weights_get_the_same_verdict_through_an_entry_point(dataset: Dataset, place: Path) -> None:
    ours, theirs = scored("ours", dataset), scored("theirs:same", dataset)
    for part in ("verdict", "factors", "latents", "windows", "long_rollouts", "dataset"):
        assert json.dumps(ours[part]) == json.dumps(theirs[part]), part
    assert ours["gauge"] is not None
    assert theirs["gauge"] is None
    html = (place / "evaluations" / "theirs-same" / "report.html").read_text()
    assert "It has no decoder" in html
    assert "It has no decoder" not in (place / "ours" / "evaluation" / "report.html").read_text()


def test_another_frame_skip_is_compared_at_equal_time(dataset: Dataset, place: Path) -> None:
    alone = scored("theirs:from_one_frame", dataset)
    both = scored("theirs:in_fives", dataset, compare="theirs:from_one_frame")
    assert (alone["windows"]["every"], both["windows"]["every"]) == (1, 5)
    # five steps of the one are one step of the other: on common ground nothing may differ
    assert both["compare"]["hri_difference"]["10"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert json.dumps(both["verdict"]) == json.dumps(both["compare"]["verdict"])
    for name, factor in both["factors"].items():
        on_grid = [h % 5 == 0 for h in range(21)]
        assert factor["scored"] == [a and b for a, b in zip(alone["factors"][name]["scored"], on_grid, strict=True)]
        for curve in ("r", "r_real_latents", "num_moved"):
            assert factor[curve][::5] == alone["factors"][name][curve][::5]
        assert not any(value is not None for value, asked in zip(factor["r"], on_grid, strict=True) if not asked)
    assert both["latents"]["error"][::5] == alone["latents"]["error"][::5]
    assert both["latents"]["error"][7] is None
    assert both["latents"]["error_one_step"] == alone["latents"]["error"][5]
    assert both["verdict"]["h_star"]["steps"] % 5 == 0


def test_frame_skips_that_never_meet_are_refused(dataset: Dataset, place: Path) -> None:
    with open(place / "theirs.py", "a") as file:
        file.write("def in_sevens():\n    return Theirs(1, 7)\n")
    with pytest.raises(WorldlineError, match="meet every 35 steps, expected at most the horizon, 20"):
        scored("theirs:in_fives", dataset, compare="theirs:in_sevens")
