"""Models built by hand, honest and cheating: each must get the score that it deserves.

The world: an agent follows its action's target, and pushes a block when it touches it. Latents are a fixed random
nonlinear map of the true state, so that no network is trained but the probe.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest

from worldline.core.types import Factor, WorldSpec
from worldline.evaluate.drift import Measurement, RealFrames, Rollouts, measure, swap_across_episodes
from worldline.evaluate.figures import to_figures

FACTORS = (Factor(name="agent", columns=(0, 1)), Factor(name="block", columns=(2, 3)))
SPEC = WorldSpec(
    name="pushing", image_size=16, step_seconds=0.1, action_names=("x", "y"), action_low=(-1, -1), action_high=(1, 1)
)
STEPS, WINDOWS_PER_EPISODE, CONTEXT = 50, 12, 3
REACH = 0.35


def advance(state: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Move agents towards their targets and push the blocks that they touch; (n, 4), (n, 2) -> (n, 4)."""
    agent, block = state[:, :2], state[:, 2:]
    agent = agent + 0.3 * (action - agent)
    offset = block - agent
    distance = np.linalg.norm(offset, axis=1, keepdims=True)
    pushed = agent + offset / np.maximum(distance, 1e-6) * REACH
    return np.concatenate([agent, np.where(distance < REACH, pushed, block)], axis=1)


def play(start: np.ndarray, actions: np.ndarray) -> np.ndarray:
    states = [start]
    for t in range(actions.shape[1]):
        states.append(advance(states[-1], actions[:, t]))
    return np.stack(states, axis=1)


def episodes_of(count: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """States (count, length, 4) and actions (count, length - 1, 2): strokes through the block, and free ones."""
    rng = np.random.default_rng(seed)
    state = rng.uniform(-1, 1, (count, 4))
    states, actions = [state], []
    target = state[:, :2]
    for t in range(length - 1):
        if t % 8 == 0:
            through = state[:, 2:] * rng.uniform(0.3, 1.2, (count, 1)) + rng.normal(0, 0.3, (count, 2))
            goal = np.where(rng.random((count, 1)) < 0.6, through, rng.uniform(-1, 1, (count, 2)))
        target = target + 0.25 * (goal - target)
        actions.append(target)
        state = advance(state, target)
        states.append(state)
    return np.stack(states, axis=1), np.stack(actions, axis=1)


_MIX = np.random.default_rng(99)
_A, _B, _C = _MIX.normal(0, 1.2, (4, 24)), _MIX.normal(0, 0.6, 24), _MIX.normal(0, 0.4, (24, 16))


def encode(state: np.ndarray) -> np.ndarray:
    return (np.tanh(state @ _A + _B) @ _C + state @ _A[:, :16] * 0.1).astype(np.float32)


@dataclass(frozen=True)
class Scene:
    train: np.ndarray
    validation: np.ndarray
    state: np.ndarray  # (n, STEPS + 1, 4), h = 0 first
    context: np.ndarray  # (n, CONTEXT, 4)
    actions: np.ndarray
    swapped: np.ndarray
    episodes: np.ndarray
    actions_only: dict[str, np.ndarray]


@lru_cache
def scene() -> Scene:
    train, _ = episodes_of(60, 110, 1)
    validation, _ = episodes_of(10, 110, 2)
    test, test_actions = episodes_of(24, 110, 3)
    starts = np.linspace(CONTEXT - 1, 109 - STEPS, WINDOWS_PER_EPISODE).astype(int)
    index = [(e, s) for e in range(24) for s in starts]
    episodes = np.array([e for e, _ in index])
    actions = np.stack([test_actions[e, s : s + STEPS] for e, s in index])
    # an agent that starts in the middle and follows the same targets, a block at its mean: all that actions tell
    blind = play(np.tile([0.0, 0.0, 9.0, 9.0], (len(index), 1)), actions)
    mean = np.broadcast_to(train[..., 2:].mean((0, 1)), blind[..., 2:].shape)
    return Scene(
        train=train.reshape(-1, 4),
        validation=validation.reshape(-1, 4),
        state=np.stack([test[e, s : s + STEPS + 1] for e, s in index]),
        context=np.stack([test[e, s - CONTEXT + 1 : s + 1] for e, s in index]),
        actions=actions,
        swapped=actions[swap_across_episodes(episodes)],
        episodes=episodes,
        actions_only={"agent": blind[..., :2], "block": mean},
    )


Imagine = Callable[[np.ndarray, np.ndarray], np.ndarray]  # states at h = 0, actions -> states at h = 0 ... T


def judge(imagine: Imagine, encoder: Callable[[np.ndarray], np.ndarray] = encode) -> Measurement:
    s = scene()
    now = s.state[:, 0]
    rollouts = Rollouts(
        context=encoder(s.context),
        real=encoder(s.state),
        imagined=encoder(imagine(now, s.actions)),
        swapped=encoder(imagine(now, s.swapped)),
    )
    return verdict(rollouts, encoder)


def verdict(rollouts: Rollouts, encoder: Callable[[np.ndarray], np.ndarray]) -> Measurement:
    s = scene()
    return measure(
        factors=FACTORS,
        train=RealFrames(encoder(s.train), s.train.astype(np.float32)),
        validation=RealFrames(encoder(s.validation), s.validation.astype(np.float32)),
        rollouts=rollouts,
        state=s.state.astype(np.float32),
        episodes=s.episodes,
        canonical={"agent": (0.99, 0.05), "block": (0.99, 0.05)},
        actions_only=s.actions_only,
        draws=300,
    )


def still(now: np.ndarray, actions: np.ndarray) -> np.ndarray:
    return np.repeat(now[:, None], actions.shape[1] + 1, axis=1)


def constant(now: np.ndarray, actions: np.ndarray) -> np.ndarray:
    return np.broadcast_to(scene().train.mean(0), (len(now), actions.shape[1] + 1, 4))


def deaf(now: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Plays the same average stroke, whatever the actions are."""
    return play(now, np.broadcast_to(scene().actions.mean(0), actions.shape))


def agent_only(now: np.ndarray, actions: np.ndarray) -> np.ndarray:
    states = play(now, actions)
    return np.concatenate([states[..., :2], np.broadcast_to(now[:, None, 2:], states[..., 2:].shape)], axis=-1)


def hri(measurement: Measurement, horizon: int = 50) -> float:
    value = measurement.reliability.hri[horizon]
    assert value is not None
    return value.value


@lru_cache
def oracle() -> Measurement:
    return judge(play)


def test_oracle_is_trusted_to_the_end() -> None:
    result = oracle().reliability
    assert result.invalid is None
    assert hri(oracle()) > 0.93
    assert result.horizon.censored
    assert all(f.g1 and f.g2 and f.g3 for f in result.factors)
    assert all(np.allclose(f.r, f.r_real, equal_nan=True) for f in result.factors)
    block = result.factors[1]
    assert 0 < block.num_moved[50] < result.num_windows, "some blocks must be left alone for this test to mean anything"


@pytest.mark.parametrize(
    ("imagine", "at_most"), [(still, 0.0), (constant, 0.0), (deaf, 0.2)], ids=["persistence", "constant", "deaf"]
)
def test_a_model_that_ignores_actions_is_invalid(imagine: Imagine, at_most: float) -> None:
    result = judge(imagine)
    assert result.reliability.invalid is not None
    assert "G2" in result.reliability.invalid
    assert hri(result) <= at_most
    assert result.reliability.horizon.steps < 10
    for f in result.reliability.factors:  # no more than the best naive forecast is worth
        best = np.max(list(f.r_naive.values()), axis=0)[f.scored]
        assert (f.credit[f.scored] <= np.maximum(best, 0) + 0.05).all()


def test_a_collapsed_encoder_earns_nothing() -> None:
    tiny = np.random.default_rng(0)
    result = judge(play, lambda state: (1.0 + 1e-7 * tiny.normal(size=(*state.shape[:-1], 16))).astype(np.float32))
    assert hri(result) == 0.0
    assert result.reliability.invalid is not None
    assert not any(f.g1 for f in result.reliability.factors)


def test_an_encoder_that_forgets_the_block_loses_its_half() -> None:
    result = judge(play, lambda state: encode(state * [1, 1, 0, 0]))
    agent, block = result.reliability.factors
    assert agent.g1
    assert not block.g1
    assert block.scored.any()
    assert np.nanmax(block.credit) == 0.0
    assert hri(result) == pytest.approx(np.nanmean(agent.credit) / 2)
    assert result.reliability.horizon.ended_by == "block"


def test_knowing_only_the_actions_earns_the_agent_and_no_block() -> None:
    result = judge(agent_only)
    agent, block = result.reliability.factors
    assert np.nanmean(agent.credit) > 0.9
    assert (agent.g2, agent.g3) == (True, True)
    assert block.scored[21:].all()
    assert np.nanmax(block.credit) == 0.0
    assert not block.g2
    assert result.reliability.horizon.ended_by == "block"
    assert hri(result) == pytest.approx(np.nanmean(agent.credit) / 2)


def test_standing_still_earns_nothing_however_it_is_dressed() -> None:
    """A block that is frozen near its mean errs less than one frozen where it is; a model that notices swapped actions
    and plays the fool passes G2."""
    centre = scene().train[:, 2:].mean(0)

    def near_the_mean(now: np.ndarray, actions: np.ndarray) -> np.ndarray:
        states = agent_only(now, actions)
        share = np.linspace(1, 0.3, states.shape[1])[:, None]
        return np.concatenate([states[..., :2], centre + share * (states[..., 2:] - centre)], axis=-1)

    def noticing(now: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return constant(now, actions) if actions is scene().swapped else agent_only(now, actions)

    for imagine in (near_the_mean, noticing):
        # the state itself as the latent: nothing of the agent's motion blurs what the block is read to do
        agent, block = judge(imagine, lambda state: state.astype(np.float32)).reliability.factors
        assert np.nanmean(agent.credit) > 0.9
        assert block.r[block.scored].min() > 0.3, "it must look like something"
        assert np.nanmax(block.credit) == 0.0


def test_the_size_of_the_latent_does_not_matter() -> None:
    shrunken = judge(play, lambda state: encode(state) * np.float32(1e-3))
    assert hri(shrunken) == pytest.approx(hri(oracle()), abs=0.01)
    assert shrunken.reliability.invalid is None
    assert shrunken.latents.effective_rank == pytest.approx(oracle().latents.effective_rank, rel=1e-3)


def test_noise_dimensions_neither_help_nor_hide() -> None:
    noise = np.random.default_rng(5)
    noisy = judge(play, lambda s: np.concatenate([encode(s), noise.normal(0, 1, (*s.shape[:-1], 8)).astype("f4")], -1))
    assert noisy.reliability.invalid is None
    assert hri(oracle()) - 0.1 < hri(noisy) < hri(oracle()) + 0.01
    still_noisy = judge(
        still, lambda s: np.concatenate([encode(s), noise.normal(0, 1, (*s.shape[:-1], 8)).astype("f4")], -1)
    )
    assert still_noisy.reliability.invalid is not None
    assert noisy.latents.effective_rank > oracle().latents.effective_rank


def test_a_diverging_rollout_is_a_bad_score_and_not_a_crash() -> None:
    s = scene()
    good = encode(play(s.state[:, 0], s.actions))
    bad = good * np.exp(np.arange(STEPS + 1.0))[:, None].astype(np.float32)
    bad[:, 40:45], bad[:, 45:] = np.inf, np.nan
    rollouts = Rollouts(context=encode(s.context), real=encode(s.state), imagined=bad, swapped=bad)
    result = verdict(rollouts, encode)
    assert result.reliability.horizon.steps < 10
    assert np.nanmax([f.credit[20:] for f in result.reliability.factors]) == 0.0


def test_swapping_never_keeps_an_episode_its_own_actions() -> None:
    episodes = np.array([4, 4, 4, 7, 9, 9])
    donor = swap_across_episodes(episodes, seed=2)
    assert (episodes[donor] != episodes).all()
    assert len({*episodes[donor]}) == 3


def test_the_same_seed_gives_the_same_figures() -> None:
    def figures(measurement: Measurement) -> str:
        return json.dumps(to_figures(measurement, SPEC))

    assert figures(judge(play)) == figures(oracle())
