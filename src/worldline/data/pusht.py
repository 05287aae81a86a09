"""PushT (gym-pusht) at 25 Hz: a round pusher and a T-shaped block on a table, seen from above.

Source of the task: Chi et al., arXiv 2303.04137; the simulator is the `gym-pusht` package.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float32

from worldline.core.errors import WorldlineError
from worldline.core.seeding import rng_for
from worldline.core.types import Factor, WorldSpec
from worldline.data.simulators import Observation, Policy

IMAGE_SIZE = 64
TABLE = 512.0
SYSTEM_PACKAGES = "apt-get install libgl1 libglib2.0-0"
_REACH = (16.0, TABLE - 16.0)
_PUSH = (80.0, TABLE - 80.0)


class PushT:
    """gym-pusht with its native action, the pusher's target in table units (0 to 512), held for 40 ms.

    The table is drawn at 512 pixels and averaged down, so that a picture of 64 pixels keeps sub-pixel motion.
    """

    spec = WorldSpec(
        name="pusht",
        image_size=IMAGE_SIZE,
        step_seconds=0.04,
        action_names=("target_x", "target_y"),
        action_low=(0.0, 0.0),
        action_high=(TABLE, TABLE),
        control="target",
        state_names=("agent_x", "agent_y", "block_x", "block_y", "block_sin", "block_cos", "agent_vx", "agent_vy"),
        factors=(
            Factor(name="agent", columns=(0, 1)),
            Factor(name="block_position", columns=(2, 3)),
            Factor(name="block_angle", columns=(4, 5)),
        ),
    )

    def __init__(self, image_size: int | None = None) -> None:
        try:
            import cv2
            import gym_pusht.envs.pusht as package
        except ModuleNotFoundError:
            raise WorldlineError("the PushT simulator is not installed; run: pip install 'worldline[envs]'") from None
        except ImportError as error:  # a shared library that OpenCV links is not there
            raise WorldlineError(f"the PushT simulator does not load ({error}); run: {SYSTEM_PACKAGES}") from None
        self._cv2 = cv2
        self._size = image_size or IMAGE_SIZE
        self.spec = replace(self.spec, image_size=self._size)
        self._env: Any = package.PushTEnv(obs_type="state")
        self._env.control_hz = round(1 / self.spec.step_seconds)
        self._seed = 0
        self._done: list[Float32[np.ndarray, " 2"]] = []

    def reset(self, seed: int) -> Observation:
        return self.load((seed, np.zeros((0, 2), np.float32)))

    def step(self, action: Float32[np.ndarray, " a"]) -> Observation:
        self._advance(action)
        return self._observe()

    def save(self) -> tuple[int, Float32[np.ndarray, "t 2"]]:
        return self._seed, np.array(self._done, np.float32).reshape(-1, 2)

    def load(self, moment: tuple[int, Float32[np.ndarray, "t 2"]]) -> Observation:
        self._seed, actions = moment
        self._done = []
        self._env.reset(seed=self._seed % 2**32)
        for action in actions:
            self._advance(action)
        return self._observe()

    def _advance(self, action: Float32[np.ndarray, " a"]) -> None:
        self._done.append(np.array(action, np.float32))
        self._env.step(np.clip(np.asarray(action, dtype=np.float64), 0.0, TABLE))

    def policy(self, seed: int) -> Policy:
        return _Pusher(self._env, seed)

    def _observe(self) -> Observation:
        screen = self._env._draw()  # the env's own pictures hold the same pixels, but copy them colour by colour
        pixels = np.frombuffer(screen.get_buffer(), dtype=np.uint8).reshape(*screen.get_size(), 4)
        frame = self._cv2.resize(pixels, (self._size, self._size), interpolation=self._cv2.INTER_AREA)
        frame = np.ascontiguousarray(frame[..., [shift // 8 for shift in screen.get_shifts()[:3]]])
        agent, block = self._env.agent, self._env.block
        state = [*agent.position, *block.position, np.sin(block.angle), np.cos(block.angle), *agent.velocity]
        return Observation(frame, np.array(state, dtype=np.float32))


class _Pusher:
    """Alternates pushes through the block with free strokes across the table, at many speeds.

    A stroke moves the target along a straight line at a constant speed, with a little noise that changes slowly. A push
    goes through a point of the T drawn at random, so that it also turns the block, and stops short of the walls. When
    the block is far from the middle, the next push often first goes round to its outer side, and brings it back.
    """

    def __init__(self, env: Any, seed: int) -> None:
        self._env = env
        self._rng = rng_for(seed, "pusht-policy")
        self._target = np.array(env.agent.position)
        self._goals: list[Float32[np.ndarray, " 2"]] = []
        self._speed, self._pause = 1.0, 0
        self._noise = np.zeros(2)

    def __call__(self, observation: Observation) -> Float32[np.ndarray, " a"]:
        if not self._goals:
            if self._pause == 0:
                self._next_stroke()
            else:
                self._pause -= 1
        if self._goals:
            offset = self._goals[0] - self._target
            distance = float(np.linalg.norm(offset))
            if distance <= self._speed:
                self._target = self._goals.pop(0)
            else:
                self._target = self._target + offset * (self._speed / distance)
        self._noise = 0.9 * self._noise + self._rng.normal(0.0, 1.0, 2)
        return np.clip(self._target + self._noise, 0.0, TABLE).astype(np.float32)

    def _next_stroke(self) -> None:
        rng = self._rng
        self._speed = float(np.exp(rng.uniform(np.log(3.0), np.log(16.0))))  # table units a step
        self._pause = int(rng.integers(1, 8)) if rng.random() < 0.3 else 0
        if rng.random() < 0.2:
            self._goals = [rng.uniform(_REACH[0], _REACH[1], 2)]
            return
        local = (rng.uniform(-55.0, 55.0), 15.0) if rng.random() < 0.5 else (0.0, rng.uniform(0.0, 110.0))
        point = np.array(self._env.block.local_to_world(local))
        outward = np.array(self._env.block.local_to_world((0.0, 45.0))) - TABLE / 2
        eccentricity = float(np.linalg.norm(outward))
        start = self._target
        if eccentricity > rng.uniform(60.0, 200.0):
            side = outward / eccentricity
            tangent = np.array([-side[1], side[0]]) * (
                1.0 if side[0] * (start - point)[1] >= side[1] * (start - point)[0] else -1.0
            )
            beside = np.clip(point + 110.0 * tangent, *_REACH)
            start = np.clip(point + rng.uniform(70.0, 120.0) * side + rng.normal(0.0, 15.0, 2), *_REACH)
            self._goals = [beside, start]
        direction = point - start
        through = rng.uniform(10.0, 140.0) / (float(np.linalg.norm(direction)) + 1e-6)
        self._goals.append(np.clip(point + direction * through, *_PUSH))
