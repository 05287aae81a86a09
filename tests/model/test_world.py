"""The World protocol, for every encoder and predictor."""

from dataclasses import replace

import pytest
import torch

from toy_world import SPEC, TINY
from worldline.core.errors import WorldlineError
from worldline.model import State, World, WorldConfig

CONFIGS = {
    "conv-gru": TINY,
    "conv-gru-normalised": replace(TINY, projection="normalise"),
    "conv-gru-quantised": replace(TINY, projection="quantise", levels=9),
    "conv-gru-window": replace(TINY, predictor="gru_window"),
    "vit-transformer": WorldConfig(
        image_size=32,
        latent_dim=24,
        encoder="vit",
        vit_width=24,
        vit_depth=2,
        predictor="transformer",
        transformer_width=24,
        transformer_depth=2,
        window=5,
        decoder_width=8,
        latent_norm=False,
    ),
}


def make_world(name: str) -> World:
    torch.manual_seed(3)
    world = World(CONFIGS[name], SPEC).eval()
    for parameter in world.predictor.parameters():  # zeros, as in AdaLN-zero, would hide what does not reach the output
        torch.nn.init.normal_(parameter, std=0.2)
    return world


@pytest.fixture(params=CONFIGS)
def world(request: pytest.FixtureRequest) -> World:
    return make_world(request.param)


def some(world: World, batch: int = 3, steps: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(batch, steps, world.config.latent_dim, generator=generator)
    return z, 512 * torch.rand(batch, steps, 2, generator=generator)


def test_shapes_and_types(world: World) -> None:
    frames = torch.randint(0, 256, (2, 6, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        z = world.encode(frames)
        assert z.shape == (2, 6, 24)
        assert world.encode(frames[0, 0]).shape == (24,)
        state = world.begin(z[:, :4], torch.zeros(2, 3, 2))
        assert state.z.shape == (2, 24)
        z_hat = world.rollout(state, torch.zeros(2, 7, 2))
        assert z_hat.shape == (2, 7, 24)
        pictures = world.decode(z_hat)
        assert pictures.shape == (2, 7, 32, 32, 3)
        assert pictures.dtype == torch.uint8
        soft = world.decode_float(z_hat)
        assert soft.min() >= 0
        assert soft.max() <= 1
        assert torch.equal((soft * 255).round().to(torch.uint8), pictures)


def test_encode_is_deterministic_and_sees_every_row_alone(world: World) -> None:
    frames = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        together = world.encode(frames)
        assert torch.equal(together, world.encode(frames))
        for i in range(5):
            torch.testing.assert_close(world.encode(frames[i]), together[i], rtol=1e-5, atol=1e-5)


def test_rollout_is_repeated_step_to_the_bit(world: World) -> None:
    z, actions = some(world)
    state = world.begin(z[:, :4], actions[:, :3])
    z_hat = world.rollout(state, actions[:, 3:])
    for i in range(actions.shape[1] - 3):
        state = world.step(state, actions[:, 3 + i])
        assert torch.equal(state.z, z_hat[:, i])


def test_begin_is_the_fold_of_step_and_observe(world: World) -> None:
    z, actions = some(world)
    state = world.begin(z[:, :1], actions[:, :0])
    for i in range(3):
        state = world.observe(world.step(state, actions[:, i]), z[:, i + 1])
    begun = world.begin(z[:, :4], actions[:, :3])
    assert torch.equal(state.z, begun.z)
    assert all(torch.equal(a, b) for a, b in zip(state.memory, begun.memory, strict=True))


def test_teacher_forcing_in_one_go_equals_step_and_observe(world: World) -> None:
    z, actions = some(world)  # 12 steps, beyond every window
    at_once = world.teacher_forced(z, actions)
    for i in range(z.shape[1]):
        state = world.begin(z[:, : i + 1], actions[:, :i])
        torch.testing.assert_close(world.step(state, actions[:, i]).z, at_once[:, i], rtol=1e-4, atol=1e-4)


def test_a_window_forgets_what_lies_before_it() -> None:
    """And within it, it is the GRU."""
    world = make_world("conv-gru-window")
    z, actions = some(world)
    context = world.config.context
    begun = [world.begin(z[:, first:], actions[:, first:-1]) for first in (0, 12 - context)]
    first, short = (world.step(state, actions[:, -1]).z for state in begun)
    assert torch.equal(first, short)
    plain = make_world("conv-gru")
    plain.predictor.load_state_dict(world.predictor.gru.state_dict())
    assert torch.equal(plain.teacher_forced(z, actions)[:, :context], world.teacher_forced(z, actions)[:, :context])
    carried = plain.step(plain.begin(z, actions[:, :-1]), actions[:, -1]).z
    assert (carried - first).abs().max() > 1e-3


@pytest.mark.parametrize("projection", ["normalise", "quantise"])
def test_projected_latents_stay_on_their_manifold(projection: str) -> None:
    """After any number of steps, and the gradient still reaches the first latent."""
    world = make_world(f"conv-gru-{projection}d")
    z, actions = some(world)
    z.requires_grad_(True)
    rolled = world.rollout(world.begin(z[:, :4], actions[:, :3]), actions[:, 3:])
    seen = world.encode(torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8))
    for latents in (rolled, seen):
        if projection == "normalise":
            assert torch.allclose(latents.norm(dim=-1), torch.tensor(24.0).sqrt())
        else:
            assert torch.allclose(latents, (latents / 0.75).round() * 0.75, atol=1e-6)
            assert latents.abs().max() <= 3
            assert len(latents.detach().unique()) <= 9
    (gradient,) = torch.autograd.grad(rolled[:, -1].sum(), z)
    assert gradient.abs().sum() > 0


def test_batch_rows_do_not_see_each_other(world: World) -> None:
    z, actions = some(world)
    z_hat = world.rollout(world.begin(z[:, :4], actions[:, :3]), actions[:, 3:])
    other = z.clone()
    other[1:] += 1.0
    again = world.rollout(world.begin(other[:, :4], actions[:, :3]), actions[:, 3:])
    torch.testing.assert_close(again[0], z_hat[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(again[1], z_hat[1])


def test_state_is_all_that_the_next_step_depends_on(world: World) -> None:
    z, actions = some(world)
    state = world.begin(z[:, :4], actions[:, :3])
    copied = State(state.z.clone(), tuple(part.clone() for part in state.memory))
    world.rollout(state, actions)  # whatever happens in between
    assert torch.equal(world.step(copied, actions[:, 4]).z, world.step(state, actions[:, 4]).z)
    assert [part.shape for part in world.step(state, actions[:, 4]).memory] == [part.shape for part in state.memory]


def test_the_past_and_the_action_matter(world: World) -> None:
    z, actions = some(world)
    state = world.begin(z[:, :4], actions[:, :3])
    forgetful = State(state.z, world.begin(z[:, :1], actions[:, :0]).memory)
    assert not torch.allclose(world.step(state, actions[:, 3]).z, world.step(forgetful, actions[:, 3]).z)
    assert not torch.allclose(world.step(state, actions[:, 3]).z, world.step(state, actions[:, 3] + 100).z)


def test_actions_are_in_native_units() -> None:
    world = make_world("conv-gru")
    z, actions = some(world)
    before = world.step(world.begin(z[:, :1], actions[:, :0]), actions[:, 0]).z
    world.set_action_statistics(world.action_mean / 2, world.action_std / 2)
    torch.testing.assert_close(
        world.step(world.begin(z[:, :1], actions[:, :0]), actions[:, 0] / 2).z, before, rtol=1e-4, atol=1e-5
    )


def test_wrong_pictures_are_refused(world: World) -> None:
    with pytest.raises(WorldlineError, match=r"\(\.\.\., 32, 32, 3\), got uint8 \(1, 64, 64, 3\)"):
        world.encode(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    z, actions = some(world)
    with pytest.raises(WorldlineError, match="one action fewer"):
        world.begin(z[:, :4], actions[:, :4])


def test_wrong_widths_are_refused(world: World) -> None:
    """A single value an action would be broadcast, a latent of half the width reshaped."""
    z, actions = some(world)
    state = world.begin(z[:, :4], actions[:, :3])
    with pytest.raises(WorldlineError, match=r"has 2 values \(.*\), got actions of shape \(3, 1\)"):
        world.rollout(state, actions[:, :5, :1])
    with pytest.raises(WorldlineError, match=r"got actions of shape \(3, 3\)"):
        world.step(state, torch.zeros(3, 3))
    with pytest.raises(WorldlineError, match=r"got actions of shape \(3, 12, 1\)"):
        world.teacher_forced(z, actions[..., :1])
    with pytest.raises(WorldlineError, match=r"has 24 values, got latents of shape \(2, 12\)"):
        world.decode(torch.zeros(2, 12))
    with pytest.raises(WorldlineError, match=r"got latents of shape \(3, 4, 23\)"):
        world.begin(z[:, :4, :23], actions[:, :3])


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 50},
        {"encoder": "mlp"},
        {"context": 0},
        {"vit_width": 100},
        {"window": 1},
        {"projection": "ball"},
        {"levels": 1},
    ],
)
def test_wrong_configurations_are_refused(wrong: dict) -> None:
    with pytest.raises((WorldlineError, TypeError)):  # the type checker of the tests may be the first to see it
        WorldConfig(**wrong)
