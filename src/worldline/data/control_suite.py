"""Two worlds of the DeepMind Control Suite, 50 actions a second: a two-link arm, and a point that is pushed about.

Source: Tassa et al., arXiv 2006.12983; simulated by the `dm_control` and `mujoco` packages. Lengths are in metres and
places as in the picture, x to the right and y down, with the origin in its middle; angles turn counter-clockwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from worldline.core.seeding import rng_for
from worldline.core.types import Factor, WorldSpec
from worldline.data.mujoco_screen import Screen, import_suite
from worldline.data.simulators import Observation, Policy

IMAGE_SIZE = 64
STEP_SECONDS = 0.02


class _SuiteWorld:
    """A task of the suite without its rewards and its end: it goes on for as long as somebody acts."""

    spec: WorldSpec

    def __init__(self, domain: str, task: str, options: dict[str, Any], image_size: int | None) -> None:
        suite: Any = import_suite(domain)
        size = image_size or IMAGE_SIZE
        self.spec = replace(self.spec, image_size=size)
        self._physics = suite.Physics.from_xml_string(*suite.get_model_and_assets())
        self._task = getattr(suite, task)(random=0, **options)
        self._screen = Screen(self._physics.model.ptr, size)

    def reset(self, seed: int) -> Observation:
        self._task.random.seed(seed % 2**32)
        with self._physics.reset_context():
            self._task.initialize_episode(self._physics)
        return self._observe()

    def step(self, action: Float32[np.ndarray, " a"]) -> Observation:
        self._physics.set_control(self._controls(np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)))
        self._physics.step()
        return self._observe()

    def policy(self, seed: int) -> Policy:
        return _Strokes(rng_for(seed, f"{self.spec.name}-policy"), self._draw_goal, self._gap)

    def save(self) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " 3"]]:
        return self._physics.get_state(sig=_moment()), np.array(self._physics.named.model.geom_pos["target"])

    def load(self, moment: tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " 3"]]) -> Observation:
        from mujoco import mj_step1

        state, target = moment
        self._physics.named.model.geom_pos["target"] = target
        self._physics.set_state(state, sig=_moment())
        mj_step1(self._physics.model.ptr, self._physics.data.ptr)  # a step begins where this half of the last one ended
        return self._observe()

    def futures(self, actions: Float32[np.ndarray, "n t a"]) -> Float64[np.ndarray, "n t s"]:
        """Return the states that each row of actions would lead through. Nothing moves and nothing is drawn."""
        from mujoco import MjData, mjtState, rollout

        model, now = self._physics.model.ptr, self._physics.get_state(sig=mjtState.mjSTATE_FULLPHYSICS)
        controls = self._controls(np.clip(actions.astype(np.float64), -1.0, 1.0))
        guess = self._physics.data.qacc_warmstart[None].copy()
        rows, _ = rollout.rollout(model, MjData(model), now[None], controls, initial_warmstart=guess)
        places = rows[..., 1:]  # behind the time
        return self._states(places[..., : model.nq], places[..., model.nq : model.nq + model.nv])

    def _observe(self) -> Observation:
        return Observation(self._screen.draw(self._physics.data.ptr), self._state().astype(np.float32))

    def _place(self, geom: str) -> tuple[float, float]:
        x, y = self._physics.named.data.geom_xpos[geom, :2]
        return x, -y

    def _controls(self, action: Float64[np.ndarray, "*n a"]) -> Float64[np.ndarray, "*n a"]:
        """Turn an action into what the motors are told."""
        raise NotImplementedError

    def _state(self) -> Float64[np.ndarray, " s"]:
        raise NotImplementedError

    def _states(
        self, qpos: Float64[np.ndarray, "n t q"], qvel: Float64[np.ndarray, "n t q"]
    ) -> Float64[np.ndarray, "n t s"]:
        """Return what `_state` would be at other places and speeds."""
        raise NotImplementedError

    def _draw_goal(self, rng: np.random.Generator) -> Float64[np.ndarray, " 2"]:
        """Draw a goal of the collecting policy."""
        raise NotImplementedError

    def _gap(self, state: Float32[np.ndarray, " s"], goal: Float64[np.ndarray, " 2"]) -> Float64[np.ndarray, " 2"]:
        """Return how far the goal is from where the momentum will lead; from a length of 1 on it takes full force."""
        raise NotImplementedError


class Reacher(_SuiteWorld):
    """An arm of two links in the plane; the action is a torque at each joint.

    The target, a small ball that nothing touches, stays where the seed put it. The shoulder turns without end, the
    wrist by 160 degrees to either side. At full torque a joint reaches about 5 radians a second.
    """

    spec = WorldSpec(
        name="reacher",
        image_size=IMAGE_SIZE,
        step_seconds=STEP_SECONDS,
        action_names=("shoulder", "wrist"),
        action_low=(-1.0, -1.0),
        action_high=(1.0, 1.0),
        control="velocity",
        state_names=(
            *("shoulder_sin", "shoulder_cos", "wrist_sin", "wrist_cos"),
            *("target_x", "target_y", "finger_x", "finger_y", "shoulder_velocity", "wrist_velocity"),
        ),
        factors=(
            Factor(name="shoulder", columns=(0, 1)),
            Factor(name="wrist", columns=(2, 3)),
            Factor(name="target", columns=(4, 5)),
        ),
    )

    def __init__(self, image_size: int | None = None) -> None:
        super().__init__("reacher", "Reacher", {"target_size": 0.015}, image_size)

    def _controls(self, action: Float64[np.ndarray, "*n a"]) -> Float64[np.ndarray, "*n a"]:
        return action

    def _state(self) -> Float64[np.ndarray, " s"]:
        shoulder, wrist = self._physics.data.qpos
        angles = (np.sin(shoulder), np.cos(shoulder), np.sin(wrist), np.cos(wrist))
        return np.array([*angles, *self._place("target"), *self._place("finger"), *self._physics.data.qvel])

    def _states(
        self, qpos: Float64[np.ndarray, "n t q"], qvel: Float64[np.ndarray, "n t q"]
    ) -> Float64[np.ndarray, "n t s"]:
        model, (shoulder, wrist) = self._physics.named.model, np.moveaxis(qpos, -1, 0)
        arm = model.body_pos["hand", "x"]
        hand = model.body_pos["finger", "x"] + model.geom_pos["finger", "x"]
        x = arm * np.cos(shoulder) + hand * np.cos(shoulder + wrist)
        y = arm * np.sin(shoulder) + hand * np.sin(shoulder + wrist)
        target = (np.full_like(x, value) for value in self._place("target"))
        angles = (np.sin(shoulder), np.cos(shoulder), np.sin(wrist), np.cos(wrist))
        return np.concatenate((np.stack([*angles, *target, x, -y], axis=-1), qvel), axis=-1)

    def _draw_goal(self, rng: np.random.Generator) -> Float64[np.ndarray, " 2"]:
        shoulder, wrist = rng.uniform((-np.pi, -3.6), (np.pi, 3.6))
        return np.array([shoulder, np.clip(wrist, -2.75, 2.75)])  # often right at its end, which is seldom passed

    def _gap(self, state: Float32[np.ndarray, " s"], goal: Float64[np.ndarray, " 2"]) -> Float64[np.ndarray, " 2"]:
        joints = np.arctan2(state[[0, 2]], state[[1, 3]]).astype(np.float64)
        gap = goal - joints - 0.1 * state[8:10]
        gap[0] = (gap[0] + np.pi) % (2 * np.pi) - np.pi
        return np.asarray(gap / 0.5)


class PointMass(_SuiteWorld):
    """A small ball in a square box, pushed with a force: slow, and with a momentum that lasts for some 15 steps."""

    spec = WorldSpec(
        name="point_mass",
        image_size=IMAGE_SIZE,
        step_seconds=STEP_SECONDS,
        action_names=("force_x", "force_y"),
        action_low=(-1.0, -1.0),
        action_high=(1.0, 1.0),
        control="velocity",
        state_names=("mass_x", "mass_y", "mass_vx", "mass_vy"),
        factors=(Factor(name="mass", columns=(0, 1)),),
    )

    def __init__(self, image_size: int | None = None) -> None:
        super().__init__("point_mass", "PointMass", {"randomize_gains": False}, image_size)

    def _controls(self, action: Float64[np.ndarray, "*n a"]) -> Float64[np.ndarray, "*n a"]:
        return action * (1.0, -1.0)

    def _state(self) -> Float64[np.ndarray, " s"]:
        vx, vy = self._physics.data.qvel
        return np.array([*self._place("pointmass"), vx, -vy])

    def _states(
        self, qpos: Float64[np.ndarray, "n t q"], qvel: Float64[np.ndarray, "n t q"]
    ) -> Float64[np.ndarray, "n t s"]:
        return np.concatenate((qpos, qvel), axis=-1) * (1.0, -1.0, 1.0, -1.0)

    def _draw_goal(self, rng: np.random.Generator) -> Float64[np.ndarray, " 2"]:
        return rng.uniform(-0.29, 0.29, 2)

    def _gap(self, state: Float32[np.ndarray, " s"], goal: Float64[np.ndarray, " 2"]) -> Float64[np.ndarray, " 2"]:
        return np.asarray((goal - state[:2] - 0.3 * state[2:4]) / 0.03)


class _Strokes:
    """Makes long strokes to goals drawn at random, at many speeds: everything is reached and little stands still.

    One in four strokes is a blind push that lasts a while, so that the ends of the range are met at speed. A stroke
    ends in a rest of a few steps at most. A little noise that changes slowly lies on top.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        draw_goal: Callable[[np.random.Generator], Float64[np.ndarray, " 2"]],
        gap: Callable[[Float32[np.ndarray, " s"], Float64[np.ndarray, " 2"]], Float64[np.ndarray, " 2"]],
    ) -> None:
        self._rng, self._draw_goal, self._gap = rng, draw_goal, gap
        self._goal: Float64[np.ndarray, " 2"] | None = None
        self._push = np.zeros(2)
        self._vigour, self._left = 0.0, 0
        self._noise = np.zeros(2)

    def __call__(self, observation: Observation) -> Float32[np.ndarray, " a"]:
        self._left -= 1
        if self._left <= 0:
            self._next_stroke()
        if self._goal is not None:
            gap = self._gap(observation.state, self._goal)
            distance = float(np.linalg.norm(gap))
            if distance < 0.3:
                self._left = min(self._left, int(self._rng.integers(1, 6)))
            self._push = gap * (self._vigour / max(distance, 1.0))
        self._noise = 0.9 * self._noise + self._rng.normal(0.0, 0.05, 2)
        return np.clip(self._push + self._noise, -1.0, 1.0).astype(np.float32)

    def _next_stroke(self) -> None:
        rng = self._rng
        self._vigour = float(rng.uniform(0.3, 1.5))  # beyond 1 the clip makes both forces full
        if rng.random() < 0.25:
            self._goal, self._left = None, int(rng.integers(5, 30))
            self._push = rng.uniform(-1.0, 1.0, 2) * self._vigour
        else:
            self._goal, self._left = self._draw_goal(rng), 150


def _moment() -> Any:
    """Return MuJoCo's name for all that a step goes on from: its solver's first guess too, hence to the bit."""
    from mujoco import mjtState

    return mjtState.mjSTATE_INTEGRATION
