"""A world in integers as a frame loop: the bytes that its firmware computes, too.

Every value of the state is a whole number and every sum exact, so neither the number of threads nor the order of
arithmetic can change a bit; versions and processors do not count either.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from worldline.core.errors import WorldlineError
from worldline.engine.workload import Stage
from worldline.engine.workloads.latent import Starts, load_starts
from worldline.model.checkpoint import find_world, load_world
from worldline.model.int8 import Int8World, is_bundle


class Int8Workload:
    """A bundle of `worldline export`, played frame by frame.

    An action is clipped to the spec's range. The gauge reads `region`, in integers, relative to the 99% quantile over
    real frames.
    """

    device, dtype, mode = "cpu", "int8", "int8"

    def __init__(self, world: Int8World, starts: Starts, name: str = "") -> None:
        self.world, self.starts, self.name = world, starts, name
        spec, size, program = world.spec, world.config.image_size, world.program
        self.fps, self.threads = 1.0 / spec.step_seconds, 1
        self.action = np.zeros(spec.action_dim, dtype=np.float32)
        self.frame = np.zeros((size, size, 3), dtype=np.uint8)
        self.gauge_names: tuple[str, ...] = ("region",)
        self.gauge = np.zeros(1, dtype=np.float32)
        self._states = np.zeros((1, program.state), np.int16)
        self._latent, self._memory = program.parts(self._states)
        self._z, self._h = (torch.zeros(1, n, dtype=torch.int16) for n in (program.latent, program.memory))
        self.stages: tuple[Stage, ...] = (
            Stage("step", self._step, tuple(self.state())),
            Stage("decode", self._draw, ("frame",)),
            Stage("gauge", self._gauge),
        )

    @classmethod
    def open(cls, path: str | Path) -> Int8Workload:
        """Open a bundle, ready to play.

        Raises:
            WorldlineError: no bundle, an incomplete or damaged one, or its world has no starts.
        """
        if not is_bundle(path):
            raise WorldlineError(f"{path}: no world in integers; make one with worldline export CHECKPOINT out=PATH")
        world = load_world(path)
        assert isinstance(world, Int8World)
        return cls(world, load_starts(find_world(path), world.spec), name=str(path))

    def reset(self, seed: int, prompt: str = "") -> None:
        if prompt:
            raise WorldlineError(f"this world takes no prompt, got {prompt!r}")
        start, program = seed % len(self.starts), self.world.program
        z = program.encode(self.starts.frames[start])
        actions = program.actions(self.starts.actions[start])
        self._states[...] = 0
        self._latent[0] = z[0]
        for real, action in zip(z[1:], actions, strict=True):
            program.step(self._states, action[None])
            self._latent[0] = real
        self._show()

    def anchor(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        self._take()
        self._latent[0] = self.world.program.encode(frame[None])[0]
        self._show()

    def state(self) -> dict[str, Tensor]:
        return {"z": self._z, "h": self._h}

    def fingerprint(self) -> dict[str, str]:
        starts = hashlib.sha256()
        for name, value in vars(self.starts).items():
            starts.update(name.encode() + value.tobytes())
        return {
            "workload": "int8",
            "weights": self.world.program.sha256,
            "config": self.world.program.sha256,
            "starts": starts.hexdigest(),
            "checkpoint": self.name,
            "device": self.device,
            "dtype": self.dtype,
            "mode": self.mode,
            "threads": str(self.threads),
            "cpu": platform.machine(),
            "system": os.uname().sysname if hasattr(os, "uname") else platform.system(),
        }

    def _take(self) -> None:
        """Take the state from the tensors, which a snapshot may have been written into."""
        self._latent[...], self._memory[...] = self._z.numpy(), self._h.numpy()

    def _show(self) -> None:
        self._z.numpy()[...], self._h.numpy()[...] = self._latent, self._memory
        self._draw()
        self._gauge()

    def _step(self) -> None:
        self._take()
        self.world.program.step(self._states, self.world.program.actions(self.action[None]))
        self._z.numpy()[...], self._h.numpy()[...] = self._latent, self._memory

    def _draw(self) -> None:
        self.world.program.decode(self._z.numpy(), self.frame[None])

    def _gauge(self) -> None:
        self.gauge[0] = self.world.program.region(self._z.numpy()) / 256
