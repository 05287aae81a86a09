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

PRETRAIN = """
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from toy_clips import ToyClips, toy_config
from worldline.train import pretrain as module
module.open_clips = lambda path: ToyClips()
config = dataclasses.replace(toy_config(Path(sys.argv[2]), steps=16), track=sys.argv[3])
update = module.Learner.update
def stop(self, batch):
    if batch.step == 13:
        raise KeyboardInterrupt
    return update(self, batch)
module.Learner.update = stop
try:
    module.pretrain(config)
except KeyboardInterrupt:
    module.Learner.update = update
    module.pretrain(config)
"""


def followed(script: str, *words: str) -> None:
    """Run a script with a tracker in a process of its own."""
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", script, str(Path(__file__).parent), *words]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def followed_run(data: Path, run: Path, kind: str) -> dict[tuple[int, str], float]:
    """Train, and return the numbers in its metrics by step and name."""
    followed(TRAIN, str(data), str(run), kind)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = {(line["step"], name): value for line in lines for name, value in line.items() if isinstance(value, float)}
    validations = [line for line in lines if "validation" in line]
    return told | {
        (line["step"], f"validation/{name}"): value
        for line in validations
        for name, value in line["validation"].items()
    }


def followed_pretraining(run: Path, kind: str) -> dict[tuple[int, str], float]:
    """Pre-train, interrupted after update 13 and resumed from the checkpoint at 8; return the numbers in its files."""
    followed(PRETRAIN, str(run), kind)
    told = {}
    for file, prefix in (("metrics.jsonl", ""), ("timing.jsonl", "timing/")):
        for line in map(json.loads, (run / file).read_text().splitlines()):
            numbers = {name: value for name, value in line.items() if isinstance(value, float) and name != "step"}
            told |= {(line["step"], prefix + name): value for name, value in numbers.items()}
    assert {step for step, _ in told} == {4, 8, 12, 16}
    return told


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
    shown = {(event.step, tag): event.value for tag in seen.Tags()["scalars"] for event in seen.Scalars(tag)}
    assert {key: shown[key] for key in told} == pytest.approx(told, rel=1e-6)
    validated = sorted({step for step, name in told if name == "validation/rollout_error"})
    assert [image.step for image in seen.Images("rollout")] == validated


def kept_by_wandb(*files: Path) -> tuple[dict[tuple[int, str], object], set[str]]:
    """Return what `wandb sync` would send of some files, one after the other: values, and names in artifacts."""
    from wandb.proto.wandb_internal_pb2 import Record

    shown, artifacts = {}, []
    for record in (Record.FromString(data) for file in files for data in leveldb_records(file.read_bytes(), header=7)):
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        shown |= {(record.history.step.num, name): value for name, value in items.items()}
        artifacts += [entry.path for entry in record.request.log_artifact.artifact.manifest.contents]
        artifacts += [entry.path for entry in record.artifact.manifest.contents]
    return shown, set(artifacts)


def test_wandb_keeps_the_same_offline_with_the_best_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb: pip install wandb")
    told = followed_run(tiny_data, tmp_path / "run", "wandb")
    (file,) = tmp_path.glob("run/wandb/offline-run-*/run-*.wandb")
    shown, artifacts = kept_by_wandb(file)
    assert {key: shown[key] for key in told} == pytest.approx(told, rel=1e-6)
    assert {"model.safetensors", "world.json"} <= artifacts


def test_tensorboard_goes_on_with_a_resumed_pretraining_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = followed_pretraining(tmp_path / "run", "tensorboard")
    seen = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"scalars": 0, "images": 0})
    seen.Reload()
    shown = [((event.step, tag), event.value) for tag in seen.Tags()["scalars"] for event in seen.Scalars(tag)]
    assert len(dict(shown)) == len(shown)  # what was told of updates 9 to 12 at first is taken back
    assert {key: dict(shown)[key] for key in told} == pytest.approx(told, rel=1e-6)
    assert [image.step for image in seen.Images("masks")] == [8, 16]


def test_wandb_goes_on_with_a_resumed_pretraining_and_keeps_the_encoder(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb: pip install wandb")
    told = followed_pretraining(tmp_path / "run", "wandb")
    files = sorted(tmp_path.glob("run/wandb/offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1 < len(files)  # one run, in two parts
    shown, artifacts = kept_by_wandb(*files)
    assert {key: shown[key] for key in told} == pytest.approx(told, rel=1e-6)
    assert artifacts >= {"encoder.json", "encoder.safetensors"}
