"""What trackers are told is what the run's own files say, read back from what they keep on disk without a network."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TRAIN = """
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny_run import tiny_config
from worldline.train.loop import train
train(dataclasses.replace(tiny_config(Path(sys.argv[2]), Path(sys.argv[3])), track=sys.argv[4]))
"""


def followed_run(data: Path, run: Path, kind: str) -> dict[tuple[int, str], float]:
    """Train with a tracker in a process of its own, and return the numbers in its metrics by step and name."""
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    words = [sys.executable, "-c", TRAIN, str(Path(__file__).parent), str(data), str(run), kind]
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = {(line["step"], name): value for line in lines for name, value in line.items() if isinstance(value, float)}
    validations = [line for line in lines if "validation" in line]
    return told | {
        (line["step"], f"validation/{name}"): value
        for line in validations
        for name, value in line["validation"].items()
    }


def leveldb_records(data: bytes, header: int) -> Iterator[bytes]:
    """Yield the records of a LevelDB log, in which what does not fit a block of 32 KiB goes on in the next."""
    position, parts = header, []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + 7 : position + 7 + size])
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def test_tensorboard_shows_every_number_and_a_picture_of_every_validation(tiny_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = followed_run(tiny_data, tmp_path / "run", "tensorboard")
    seen = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"scalars": 0, "images": 0})
    seen.Reload()
    tags = seen.Tags()
    shown = {(event.step, tag): event.value for tag in tags["scalars"] for event in seen.Scalars(tag)}
    assert {key: shown[key] for key in told} == pytest.approx(told, rel=1e-6)
    validated = sorted({step for step, name in told if name == "validation/rollout_error"})
    assert [image.step for image in seen.Images("rollout")] == validated


def test_wandb_keeps_the_same_offline_with_the_best_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb: pip install wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    told = followed_run(tiny_data, tmp_path / "run", "wandb")
    (file,) = tmp_path.glob("run/wandb/offline-run-*/run-*.wandb")
    shown, artifacts = {}, []
    for record in map(Record.FromString, leveldb_records(file.read_bytes(), header=7)):
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        shown |= {(record.history.step.num, name): value for name, value in items.items()}
        artifacts += [entry.path for entry in record.request.log_artifact.artifact.manifest.contents]
        artifacts += [entry.path for entry in record.artifact.manifest.contents]
    assert {key: shown[key] for key in told} == pytest.approx(told, rel=1e-6)
    assert {"model.safetensors", "world.json"} <= set(artifacts)
