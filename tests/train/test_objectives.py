"""Every preset of `objective=` trains by the terms that its recipe has, and by no others."""

import json
from pathlib import Path

import pytest

from worldline.cli import CONF, main

TERMS = {  # of the joint and of the frozen stage
    "own_rollouts": (
        {"own_rollout", "sigreg", "features", "inverse_dynamics", "grounding"},
        {"own_rollout", "grounding"},
    ),
    "drift_aware": (
        {"one_step", "own_rollout", "sigreg", "features", "inverse_dynamics", "grounding"},
        {"own_rollout", "rollout_sigreg", "grounding"},
    ),
    "teacher_forced": (
        {"one_step", "sigreg", "features", "inverse_dynamics", "grounding"},
        {"one_step", "grounding"},
    ),
    "lewm": ({"one_step", "sigreg"}, {"grounding"}),
    "vjepa2_ac": (
        {"one_step", "sigreg", "features", "inverse_dynamics", "grounding"},
        {"one_step", "own_rollout", "grounding"},
    ),
    "eb_jepa": ({"own_rollout", "variance", "covariance", "time_similarity", "inverse_dynamics"}, {"grounding"}),
}


def test_every_preset_is_listed() -> None:
    assert set(TERMS) == {file.stem for file in (CONF / "objective").iterdir()}


@pytest.mark.parametrize("name", TERMS)
def test_a_preset_trains_by_its_recipes_terms(name: str, tiny_data: Path, tmp_path: Path) -> None:
    small = "model.image_size=32 model.latent_dim=16 model.conv_width=8 model.hidden=32 model.decoder_width=8"
    stages = (
        "joint.steps=2 joint.batch=4 joint.warmup=1 frozen.steps=2 frozen.batch=4 frozen.warmup=1 frozen.rollout=20"
    )
    if name == "vjepa2_ac":
        stages = stages.replace("frozen.rollout=20", "frozen.rollout=2")
    arguments = (
        f"data={tiny_data} path={tmp_path / 'run'} objective={name} log_every=1 validation_windows=4 {small} {stages}"
    )
    assert main(["train", *arguments.split()]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for stage, expected in zip(("joint", "frozen"), TERMS[name], strict=True):
        found = [set(line) - {"step", "stage", "loss", "gradient_norm"} for line in lines if line["stage"] == stage]
        assert [terms for terms in found if "validation" not in terms] == [expected] * 2
