"""A small real workload for the engine's tests: a recurrent net on 8 x 8 pictures, a tenth of a millisecond a frame."""

from __future__ import annotations

import time

import numpy as np
import torch

from worldline.core.seeding import seed_for
from worldline.engine.workload import Stage


class SmallWorld:
    fps = 25.0
    threads = 1

    def __init__(self, width: int = 24, weight_seed: int = 0, busy_ms: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(weight_seed)
        self.recur = torch.randn(2 * width, width, generator=generator) / width**0.5
        self.drive = torch.randn(2, width, generator=generator)
        self.paint = torch.randn(width, 8 * 8 * 3, generator=generator)
        self.busy_ms = busy_ms
        self.frame_noise = 0
        self.action = np.zeros(2, dtype=np.float32)
        self.frame = np.zeros((8, 8, 3), dtype=np.uint8)
        self.gauge_names = ("norm",)
        self.gauge = np.zeros(1, dtype=np.float32)
        self.z = torch.zeros(1, width)
        self.memory = torch.zeros(1, width)
        self.stages = (Stage("step", self._step, ("z", "memory")), Stage("decode", self._draw, ("frame",)))

    def reset(self, seed: int, prompt: str = "") -> None:
        generator = torch.Generator().manual_seed(seed_for(seed, prompt))
        self.z.copy_(torch.randn(self.z.shape, generator=generator))
        self.memory.zero_()
        self._draw()

    def anchor(self, frame: np.ndarray) -> None:
        self.z.copy_(torch.tensor(frame).float().mean() / 255.0 * torch.ones_like(self.z))
        self._draw()

    def state(self) -> dict[str, torch.Tensor]:
        return {"z": self.z, "memory": self.memory}

    def fingerprint(self) -> dict[str, str]:
        weights = torch.cat([t.flatten() for t in (self.recur, self.drive, self.paint)]).numpy().tobytes()
        return {"workload": "small", "weights": f"{seed_for(weights.hex()):x}", "threads": str(self.threads)}

    def _step(self) -> None:
        work_for(self.busy_ms)
        self.memory.mul_(0.9).add_(self.z, alpha=0.1)
        drive = torch.from_numpy(self.action)[None] @ self.drive
        self.z.copy_(torch.tanh(torch.cat((self.z, self.memory), dim=1) @ self.recur + drive))

    def _draw(self) -> None:
        work_for(self.busy_ms)
        picture = torch.sigmoid(self.z @ self.paint).mul(255).to(torch.uint8)
        torch.from_numpy(self.frame).copy_(picture.view(8, 8, 3))
        self.frame[3, 3, 1] ^= self.frame_noise
        self.gauge[0] = float(self.z.norm())


def work_for(milliseconds: float) -> None:
    """Keep a core busy."""
    end = time.perf_counter_ns() + int(milliseconds * 1e6)
    while time.perf_counter_ns() < end:
        pass


def actions(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 2)).astype(np.float32)
