"""Clips of a coloured square that moves, made from their number alone, and a pre-training that takes a second."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from worldline.core.seeding import rng_for
from worldline.data.clips import Record
from worldline.model.video import VideoConfig
from worldline.train.feed import FeedConfig
from worldline.train.learner import LearnerConfig
from worldline.train.parallel import ParallelConfig
from worldline.train.pretrain import PretrainConfig

SIDE = 8
MODEL = VideoConfig(
    image_size=32,
    frames=8,
    patch=8,
    width=32,
    depth=2,
    heads=2,
    predictor_width=16,
    predictor_depth=1,
    predictor_heads=2,
)


class ToyClips:
    """Some of them can be made unreadable."""

    num_clips, fingerprint, num_frames, image_size = 24, "toy", 8, 32

    def __init__(self, broken: dict[int, int] | None = None) -> None:
        self.broken = dict(broken or {})  # id -> how many times reading it fails
        self.tries: list[int] = []

    def read(self, ids: np.ndarray) -> np.ndarray:
        self.tries += ids.tolist()
        for clip in ids.tolist():
            if self.broken.get(clip, 0):
                self.broken[clip] -= 1
                raise OSError(f"clip {clip} has vanished")
        return np.stack([self.clip(clip) for clip in ids.tolist()])

    def record(self) -> Record:
        """Say that they are of two files, and that nothing was rejected."""
        entry = {"data": ["toy"] * 2, "item": [0, 1], "path": ["a", "b"], "episode": [None] * 2}
        return Record(
            pa.table(entry | {"first_clip": [0, 16]}),
            pa.table({name: [] for name in (*entry, "reason", "detail", "clips_kept", "clips_lost")}),
        )

    def clip(self, number: int) -> np.ndarray:
        rng = rng_for("toy", number)
        start, speed = rng.integers(0, self.image_size - SIDE, 2), rng.integers(-2, 3, 2)
        frames = np.zeros((self.num_frames, self.image_size, self.image_size, 3), np.uint8)
        colour = rng.integers(60, 255, 3)
        for t, frame in enumerate(frames):
            y, x = np.clip(start + speed * t, 0, self.image_size - SIDE)
            frame[y : y + SIDE, x : x + SIDE] = colour
        return frames


def toy_config(
    path: Path, steps: int = 32, parallel: ParallelConfig | None = None, **learner: float | str | bool
) -> PretrainConfig:
    options = {"warmup": 5, "bfloat16": False, "projections": 16, **learner}
    return PretrainConfig(
        data=Path("toy"),
        path=path,
        model=MODEL,
        learner=LearnerConfig(steps=steps, **options),  # type: ignore[arg-type]
        parallel=parallel or ParallelConfig(),
        feed=FeedConfig(pause_s=0.0),
        batch=8,
        seed=3,
        log_every=4,
        checkpoint_every=8,
    )
