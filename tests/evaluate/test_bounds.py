"""Gains against linear algebra, bounds against errors that are known."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jacrev

from worldline.core.types import WorldSpec
from worldline.evaluate import bounds
from worldline.evaluate.bounds import error_bound, largest_gain, measure_bound, tangent_spaces
from worldline.evaluate.charts import bound_chart
from worldline.evaluate.report import _bound_table
from worldline.model.world import State, World, WorldConfig

SPEC = WorldSpec(
    name="toy", image_size=16, step_seconds=0.1, action_names=("x", "y"), action_low=(-1, -1), action_high=(1, 1)
)


class Linear:
    """z' = A z + B m + a, m' = C z + D m: a world whose every gain is known."""

    def __init__(self, matrix: np.ndarray, latent: int) -> None:
        self.matrix, self.latent = torch.from_numpy(matrix).float(), latent
        self.config = SimpleNamespace(context=1)

    def begin(self, z: torch.Tensor, actions: torch.Tensor) -> State:
        return State(z[:, -1], (z.new_zeros(len(z), len(self.matrix) - self.latent),))

    def observe(self, state: State, z: torch.Tensor) -> State:
        return State(z, state.memory)

    def step(self, state: State, action: torch.Tensor) -> State:
        s = torch.cat([state.z, state.memory[0]], dim=1) @ self.matrix.T
        return State(s[:, : self.latent] + action, (s[:, self.latent :],))


def measured(world: Any, latent: int, steps: int = 12, seed: int = 0, noise: float = 0.1) -> bounds.Bound:
    """Measure a world on data of its own dynamics with its own memory, plus noise: so that it errs."""
    rng = np.random.default_rng(seed)
    n = 4
    z0 = rng.normal(size=(n, 1, latent)).astype(np.float32)
    actions = rng.normal(size=(n, steps, latent)).astype(np.float32)
    state, real = world.begin(torch.from_numpy(z0), torch.zeros(n, 0, latent)), [z0[:, 0]]
    with torch.no_grad():
        for k in range(steps):
            state = world.step(state, torch.from_numpy(actions[:, k]))
            state = world.observe(state, state.z + noise * torch.from_numpy(rng.normal(size=(n, latent))).float())
            real.append(state.z.numpy())
    latents = np.stack(real, axis=1)
    train = rng.normal(size=(200, latent)).astype(np.float32)
    return measure_bound(world, z0, np.zeros((n, 0, latent), np.float32), actions, latents, train)


def orthogonal(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def test_a_linear_predictor_has_the_singular_value_that_it_was_made_with() -> None:
    rng = np.random.default_rng(0)
    matrix = orthogonal(rng, 5) @ np.diag([1.7, 0.9, 0.6, 0.2, 0.0]) @ orthogonal(rng, 5)
    found = measured(Linear(matrix, 5), 5)
    np.testing.assert_allclose(found.gain, 1.7, rtol=2e-3)
    h = np.arange(12)
    expected = [(found.residual[:, : i + 1] * found.gain.mean() ** (i - h[: i + 1])).sum(axis=1) for i in h]
    np.testing.assert_allclose(found.bound.T, expected, rtol=1e-2)
    assert found.unconverged < 1e-3
    json.dumps(found.to_figures(), allow_nan=False)


def test_a_world_that_never_errs_can_be_drawn() -> None:
    found = measured(Linear(0.5 * np.eye(3), 3), 3, noise=0.0).to_figures()
    assert found["gain_held"] is None
    assert max(map(max, found["error"])) == 0.0
    assert "the bound held" in _bound_table(found)
    assert bound_chart({"bound": found}).startswith("<svg")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), size=st.floats(0.3, 1.4), memory=st.integers(0, 4))
def test_no_linear_system_errs_by_more_than_its_bound(seed: int, size: float, memory: int) -> None:
    rng = np.random.default_rng(seed)
    total = 3 + memory
    matrix = size * rng.normal(size=(total, total)) / np.sqrt(total)
    found = measured(Linear(matrix, 3), 3, seed=seed)
    assert (found.error <= found.bound * 1.002).all()
    assert (found.gain_seen <= found.gain * 1.002)[np.isfinite(found.gain_seen)].all()
    np.testing.assert_allclose(found.bound[:, 0], found.error[:, 0], rtol=1e-4)  # after one step they are one


def test_an_error_that_waits_in_the_memory_is_bounded_and_the_latent_alone_would_not_bound_it() -> None:
    # the latent forgets at once; the memory keeps what it saw and gives it back tenfold
    matrix = np.array([[0.0, 10.0], [1.0, 0.0]])
    found = measured(Linear(matrix, 1), 1)
    assert (found.error <= found.bound * 1.002).all()
    latent_alone = error_bound(found.residual, np.zeros_like(found.gain))
    assert (found.error[:, 3:] > latent_alone[:, 3:]).mean() > 0.9
    # balanced: latent and memory act on each other by sqrt(10) each, and so does the whole
    assert found.memory_scale == pytest.approx(10**0.5, rel=1e-3)
    np.testing.assert_allclose(found.gain, 10**0.5, rtol=2e-3)


@pytest.mark.parametrize("predictor", ["gru", "transformer"])
def test_power_iteration_finds_what_the_whole_jacobian_has(predictor: str) -> None:
    torch.manual_seed(0)
    config = WorldConfig(
        image_size=16,
        latent_dim=6,
        conv_width=4,
        decoder_width=4,
        predictor=predictor,  # type: ignore[arg-type]
        hidden=10,
        window=3,
        transformer_width=12,
        transformer_depth=2,
        context=1,
    )
    world = World(config, SPEC).eval().requires_grad_(False)
    for parameter in world.predictor.parameters():
        parameter.normal_(std=0.4)
    z, action = torch.randn(5, 6), torch.randn(5, 2)
    state = world.step(world.step(world.begin(z[:, None], torch.zeros(5, 0, 2)), action), action)
    flow = bounds._Flow(world, state, action)
    s = flow.pack(state)
    found, _ = flow.gain(s, keep=lambda v: v)

    def row(s: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        return flow.step(slice(None))(s[None].expand(5, -1))[which]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobians = torch.stack([jacrev(row)(s[i], torch.tensor(i)) for i in range(5)])
    whole = torch.linalg.svdvals(jacobians)[:, 0]
    assert (found <= whole * (1 + 1e-5)).all()
    torch.testing.assert_close(found, whole, rtol=5e-3, atol=0)
    rng = np.random.default_rng(0)
    real = rng.normal(size=(3, 11, 6)).astype(np.float32)
    measuring = measure_bound(
        world,
        real[:, :1],
        np.zeros((3, 0, 2), np.float32),
        rng.normal(size=(3, 10, 2)).astype(np.float32),
        real,
        rng.normal(size=(100, 6)).astype(np.float32),
    )
    assert (measuring.error <= measuring.bound * 1.002).all()
    assert measuring.gain_seen[:, 0].tolist() == pytest.approx([np.nan] * 3, nan_ok=True)


def test_tangent_and_off_are_told_apart() -> None:
    # real latents fill a plane of six dimensions; errors grow in it and die off it, and leak back by a tenth
    rng = np.random.default_rng(0)
    turn = orthogonal(rng, 6)
    core = np.diag([1.5, 1.2, 0.3, 0.2, 0.1, 0.1])
    core[0, 5] = 0.1
    plane = (np.concatenate([rng.normal(size=(500, 2)), np.zeros((500, 4))], axis=1) @ turn.T).astype(np.float32)
    matrix = torch.from_numpy(turn @ core @ turn.T).float()
    z = torch.from_numpy(plane[:7])
    spaces = tangent_spaces(z, torch.from_numpy(plane))
    np.testing.assert_allclose(spaces.diagonal(dim1=1, dim2=2).sum(dim=1), 2.0, atol=1e-4)
    tangent, off = bounds._projections(spaces)
    for keep, keep_out, expected in ((tangent, tangent, 1.5), (off, off, 0.3), (off, tangent, 0.1), (tangent, off, 0)):
        gain, _ = largest_gain(lambda x: x @ matrix.T, z, keep=keep, keep_out=keep_out)
        np.testing.assert_allclose(gain, expected, rtol=1e-2, atol=1e-4)


def test_the_recursion_is_the_sum_over_products() -> None:
    residual, gain = np.array([[1.0, 2.0, 4.0]]), np.array([[9.0, 3.0, 5.0]])
    assert error_bound(residual, gain).tolist() == [[1.0, 3.0 * 1 + 2, 5.0 * (3 * 1 + 2) + 4]]
