"""Small datasets for the tests: ours, written by our own writer, and one laid out as lerobot lays them out."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from worldline.core.types import Episode, Factor, WorldSpec
from worldline.data.lerobot import Dataset
from worldline.data.lerobot_writer import DatasetWriter

SPEC = WorldSpec(
    name="toy",
    image_size=16,
    step_seconds=0.04,
    action_names=("dx", "dy"),
    action_low=(-1.0, -1.0),
    action_high=(1.0, 1.0),
    control="velocity",
    state_names=("x", "y", "z"),
    factors=(Factor(name="agent", columns=(0, 1)),),
)


def make_episodes(num: int, seed: int = 0, height: int = 16, width: int = 16) -> list[Episode]:
    """Return episodes of noise, the hardest picture for a codec, of different lengths."""
    rng = np.random.default_rng(seed)
    return [
        Episode(
            index=index,
            frames=rng.integers(0, 256, (9 + 5 * index, height, width, 3), dtype=np.uint8),
            actions=rng.uniform(-1, 1, (9 + 5 * index, 2)).astype(np.float32),
            state=rng.normal(size=(9 + 5 * index, 3)).astype(np.float32),
            task=f"task {index % 2}",
        )
        for index in range(num)
    ]


def write(path: Path, episodes: list[Episode], **options: Any) -> Path:
    with DatasetWriter(path, SPEC, split_key="toy/0", **options) as writer:
        for episode in episodes:
            writer.add_episode(episode)
    return path


def encode(path: Path, frames: np.ndarray, codec: str, pixel_format: str, options: dict[str, str], rate: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(rate), options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixel_format
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def numbered_frames(num: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return pictures with their number in eight bars, black for 0 and white for 1, which survive any codec."""
    bits = np.arange(num)[:, None] >> np.arange(8) & 1
    bars = np.repeat(bits * 255, width // 8, axis=1).astype(np.uint8)
    return np.broadcast_to(bars[:, None, :, None], (num, height, width, 3)).copy()


def foreign_dataset(root: Path, cameras: tuple[str, ...] = ("observation.images.top",), state: bool = True) -> Path:
    """Lay out what lerobot writes: three episodes, two videos and two data files that break at different episodes."""
    lengths, rate = [20, 30, 25], 10
    starts = [0, 20, 50]
    rng = np.random.default_rng(0)
    action, joints = rng.normal(size=(75, 3)).astype(np.float32), rng.normal(size=(75, 2)).astype(np.float32)
    episode = np.repeat([0, 1, 2], lengths)
    frame = np.concatenate([np.arange(n) for n in lengths])
    columns: dict[str, Any] = {"action": list(action)} | ({"observation.state": list(joints)} if state else {})
    columns |= {"timestamp": (frame / rate).astype(np.float32), "frame_index": frame, "episode_index": episode}
    columns |= {"index": np.arange(75), "task_index": np.zeros(75, np.int64)}
    table = pa.table(columns)
    for index, (start, stop) in enumerate([(0, 50), (50, 75)]):
        path = root / f"data/chunk-000/file-{index:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(start, stop - start), path)
    frames = numbered_frames(75)
    rows = []
    for camera in cameras:
        b_frames = {"crf": "10", "g": "50", "bf": "3"}
        encode(root / f"videos/{camera}/chunk-000/file-000.mp4", frames[:20], "libx264", "yuv420p", b_frames, rate)
        encode(root / f"videos/{camera}/chunk-000/file-001.mp4", frames[20:], "libx264", "yuv420p", b_frames, rate)
    for index, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        row = {"episode_index": index, "tasks": ["pick"], "length": length}
        row |= {"dataset_from_index": start, "dataset_to_index": start + length}
        row |= {"data/chunk_index": 0, "data/file_index": 1 if index == 2 else 0}
        for camera in cameras:
            offset = 0 if index == 0 else start - 20
            row |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": 0 if index == 0 else 1}
            row |= {f"videos/{camera}/from_timestamp": offset / rate}
            row |= {f"videos/{camera}/to_timestamp": (offset + length) / rate}
        row |= {"stats/action/min": [0.0] * 3, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        rows.append(row)
    episodes = root / "meta/episodes/chunk-000/file-000.parquet"
    episodes.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), episodes)
    pq.write_table(pa.table({"task_index": [0], "__index_level_0__": ["pick"]}), root / "meta/tasks.parquet")
    video = {"dtype": "video", "shape": [48, 64, 3], "names": ["height", "width", "channels"], "info": None}
    features: dict[str, Any] = dict.fromkeys(cameras, video)
    features["action"] = {"dtype": "float32", "shape": [3], "names": {"motors": ["pan", "lift", "grip"]}}
    if state:
        features["observation.state"] = {"dtype": "float32", "shape": [2], "names": None}
    info = {
        "codebase_version": "v3.0",
        "robot_type": "so100",
        "total_episodes": 3,
        "total_frames": 75,
        "fps": rate,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": features,
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def frame_numbers(dataset: Dataset, episode: int) -> np.ndarray:
    frames = dataset.read_episode(episode).frames.astype(float)
    bars = frames.mean((1, 3)).reshape(len(frames), 8, -1).mean(2)
    return (bars > 127) @ (1 << np.arange(8))
