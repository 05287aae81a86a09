"""Every preset of `objective=` trains by the terms that its recipe has, and by no others."""

import json
from pathlib import Path

import pytest
import torch

from toy_world import SPEC, TINY
from worldline.cli import CONF, main
from worldline.model.world import World
from worldline.train.config import StageConfig
from worldline.train.geometry import Geometry
from worldline.train.losses import sigreg
from worldline.train.objective import FrozenBatch, Heads, frozen_terms

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


def test_only_late_steps_are_spread_where_that_is_asked_for() -> None:
    torch.manual_seed(0)
    world = World(TINY, SPEC)
    c, rollout, first = world.config.context, 12, 9
    z, actions = torch.randn(32, c + rollout, 24), torch.rand(32, c + rollout, 2)
    none = torch.zeros(0, dtype=torch.int64)
    batch = FrozenBatch(z, actions, none, none, torch.zeros(0, 2, 32, 32, 3, dtype=torch.uint8))
    stage = StageConfig(
        steps=1, batch=32, own_rollout=0.0, rollout=rollout, rollout_sigreg=1.0, rollout_sigreg_from=first
    )
    geometry = Geometry(torch.full((24,), 0.3), 1.7 * torch.eye(24), torch.zeros(rollout))

    def terms(rollout: int) -> dict[str, torch.Tensor]:
        heads = Heads(inverse=False, latent_dim=24, action_dim=2, features=0)
        generator = torch.Generator().manual_seed(5)
        return frozen_terms(world, heads, batch, stage, rollout, torch.zeros(32, 32, 3), generator, geometry)

    z_hat = world.rollout(world.begin(z[:, :c], actions[:, : c - 1]), actions[:, c - 1 : c - 1 + rollout])
    late = (1.7 * (z_hat[:, first - 1 :] - 0.3)).transpose(0, 1)
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(len(late), generator=generator)
    assert torch.equal(terms(rollout)["rollout_sigreg"], sigreg(late[order], generator, projections=stage.projections))
    assert "rollout_sigreg" not in terms(first - 1)  # while rollouts are still short


def test_noise_is_on_what_the_predictor_is_given_and_not_on_its_targets() -> None:
    torch.manual_seed(0)
    world = World(TINY, SPEC)
    c, rollout = world.config.context, 6
    z, actions = torch.randn(8, c + rollout, 24), torch.rand(8, c + rollout, 2)
    none = torch.zeros(0, dtype=torch.int64)
    batch = FrozenBatch(z, actions, none, none, torch.zeros(0, 2, 32, 32, 3, dtype=torch.uint8))
    stage = StageConfig(steps=1, batch=8, one_step=1.0, rollout=rollout, pushforward_noise=0.5)
    heads = Heads(inverse=False, latent_dim=24, action_dim=2, features=0)
    generator = torch.Generator().manual_seed(5)
    terms = frozen_terms(world, heads, batch, stage, rollout, torch.zeros(32, 32, 3), generator, None)

    given = z + 0.5 * torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    steps = c + rollout - 1
    forced = world.teacher_forced(given[:, :steps], actions[:, :steps])
    rolled = world.rollout(world.begin(given[:, :c], actions[:, : c - 1]), actions[:, c - 1 : steps])
    assert terms["one_step"].item() == pytest.approx((forced - z[:, 1:]).square().mean().item(), rel=1e-5)
    assert terms["own_rollout"].item() == pytest.approx((rolled - z[:, c:]).square().mean().item(), rel=1e-5)
