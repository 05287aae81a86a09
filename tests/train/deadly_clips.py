"""Clips, one of which kills whoever reads it, as a fault in a decoder would; imported where no torch is wanted."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from worldline.data.clips import Record

DEADLY = 4


class DeadlyClips:
    num_clips, fingerprint, num_frames, image_size = 24, "deadly", 8, 32

    def read(self, ids: np.ndarray) -> np.ndarray:
        if DEADLY in ids:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # other threads may be reached first
        if 5 in ids:
            raise OSError("clip 5 has vanished")
        return np.stack([np.full((8, 32, 32, 3), 10 * clip, np.uint8) for clip in ids.tolist()])

    def record(self) -> Record:
        entry = {"data": ["deadly"], "item": [0], "path": ["a"], "episode": [None]}
        none: dict[str, list[object]] = {name: [] for name in (*entry, "reason", "detail", "clips_kept", "clips_lost")}
        return Record(pa.table(entry | {"first_clip": [0]}), pa.table(none))


def main(run: str, steps: int) -> None:
    from toy_clips import toy_config

    from worldline.train import pretrain as module

    module.open_clips = lambda path: DeadlyClips()  # type: ignore[assignment]
    module.pretrain(toy_config(Path(run), steps))


if __name__ == "__main__":
    from deadly_clips import main as imported  # so that its clips are not those of __main__

    imported(sys.argv[1], int(sys.argv[2]))
