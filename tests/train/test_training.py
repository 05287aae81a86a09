"""Training runs: what they write, that they resume to the bit, and what they refuse."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import tiny_config

from worldline.core.errors import WorldlineError
from worldline.data.cache import FrameCache
from worldline.data.lerobot import open_dataset
from worldline.model import load_world, read_card
from worldline.train.checkpoint import append_line, open_run, truncate_lines
from worldline.train.config import StageConfig, TrainConfig, rollout_length
from worldline.train.loop import train
from worldline.train.windows import FrozenWindows, JointWindows

TRAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny_run import tiny_config
from worldline.train.loop import train
train(tiny_config(Path(sys.argv[2]), Path(sys.argv[3])))
"""


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_everything_in_its_place(finished_run: Path) -> None:
    metrics = lines(finished_run)
    joint = [line for line in metrics if line["stage"] == "joint" and "loss" in line]
    assert [line["step"] for line in joint] == list(range(1, 31))
    assert joint[0].keys() >= {
        *("one_step", "own_rollout", "sigreg", "grounding", "rollout_pixels"),
        "inverse_dynamics",
    }
    assert np.mean([line["features"] for line in joint[-5:]]) < 0.9 * joint[0]["features"]
    assert np.mean([line["grounding"] for line in joint[-5:]]) < 0.7 * np.mean(
        [line["grounding"] for line in joint[:5]]
    )
    validated = [line["step"] for line in metrics if "validation" in line]
    assert validated == [6, 12, 18, 24, 30, 36, 42, 48, 50]
    frozen = {
        line["step"]: line["validation"]["rollout_error"]
        for line in metrics
        if line["step"] > 30 and "validation" in line
    }
    result = json.loads((finished_run / "result.json").read_text())
    assert result["best_step"] == min(frozen, key=lambda step: frozen[step])
    assert (finished_run / "best").resolve().name == f"{result['best_step']:08d}"
    assert (finished_run / "last").resolve().name == "00000050"
    card = read_card(finished_run)
    assert card["training"]["data"]["name"] == "two_room"
    assert card["training"]["step"] == result["best_step"]
    timing = [json.loads(line) for line in (finished_run / "timing.jsonl").read_text().splitlines()]
    assert all(0 <= line["loader_share"] <= 1 for line in timing)


def test_the_world_is_ready_to_use(finished_run: Path) -> None:
    world = load_world(finished_run)
    assert world.gauge.fitted
    z = torch.zeros(1, 16) + world.gauge.mean
    assert world.gauge.region(z) < 1
    assert world.action_std.max() < 5  # statistics of the data, not the defaults of an unbounded world


def test_the_frozen_stage_changes_the_predictor_alone(finished_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "joint-only")
    joint_only = train(dataclasses.replace(config, frozen=dataclasses.replace(config.frozen, steps=0)))
    before, after = (load_world(run / "last").state_dict() for run in (joint_only, finished_run))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"predictor"}


def test_another_runs_encoder_is_taken_and_kept(finished_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "second")
    joint = dataclasses.replace(config.joint, steps=0)
    forced = dataclasses.replace(config.frozen, own_rollout=0.0, one_step=1.0)
    second = train(dataclasses.replace(config, joint=joint, frozen=forced, encoder=finished_run))
    assert "one_step" in lines(second)[0]
    assert "own_rollout" not in lines(second)[0]
    before, after = (load_world(run / "last").state_dict() for run in (finished_run, second))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"predictor"}
    wider = dataclasses.replace(config.model, conv_head=16)
    with pytest.raises(WorldlineError, match="its encoder does not fit this run's"):
        train(dataclasses.replace(config, model=wider, path=tmp_path / "third", encoder=finished_run))


def test_killed_twice_it_finishes_with_the_same_bits(finished_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    for step in (15, 45):  # in the first stage with averaged weights, and in the second, both between checkpoints
        _train_until(step, tiny_data, run)
    train(tiny_config(tiny_data, run))
    _assert_same(run, finished_run)


def test_killed_while_a_checkpoint_is_written(finished_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    _train_until(15, tiny_data, run)
    last = (run / "last").resolve()
    (last.parent / ".00000018.tmp").mkdir()  # half a checkpoint
    (last.parent / ".00000018.tmp" / "model.safetensors").write_bytes(b"half")
    shutil.copytree(last, last.parent / "00000018")  # a whole one, to which nothing points yet
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 17, "loss": 0.1')
    train(tiny_config(tiny_data, run))
    _assert_same(run, finished_run)


def _train_until(step: int, data: Path, run: Path) -> None:
    """Train in a process of its own, and kill it once its metrics reach `step`."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(Path(__file__).parent), str(data), str(run)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None:
            metrics = run / "metrics.jsonl"
            if metrics.exists() and any(f'"step": {step},' in line for line in metrics.read_text().splitlines()):
                break
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "result.json").exists()


def _assert_same(run: Path, whole: Path) -> None:
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for link in ("last", "best"):
        first, second = (load_file(place / link / "model.safetensors") for place in (run, whole))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == sorted(
        p.name for p in (whole / "checkpoints").iterdir()
    )


def test_a_finished_run_is_left_alone(finished_run: Path, tiny_data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.name != ".lock"}
    assert train(tiny_config(tiny_data, finished_run)) == finished_run
    config = tiny_config(tiny_data, finished_run)
    other = dataclasses.replace(config, seed=2, joint=dataclasses.replace(config.joint, steps=31))
    with pytest.raises(WorldlineError, match=r"finished run with other options \(joint.steps, seed\)"):
        train(other)
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.name != ".lock"} == before


def test_a_directory_of_something_else_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("my only copy")
    with pytest.raises(WorldlineError, match="holds other files"):
        train(tiny_config(tiny_data, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_process_killed_before_its_run_was_recorded_is_no_obstacle(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.123.tmp").write_text('{"format":')
    with open_run(tiny_config(tiny_data, tmp_path), "fingerprint") as finished:
        assert not finished


def test_two_processes_cannot_train_one_run(tiny_data: Path, tmp_path: Path) -> None:
    import fcntl

    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(WorldlineError, match="another process"):
            train(tiny_config(tiny_data, tmp_path))


def test_runs_from_before_an_option_go_on(finished_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = tiny_config(tiny_data, run)
    record = json.loads((finished_run / "run.json").read_text())
    del record["config"]["encoder"], record["config"]["joint"]["motion"], record["config"]["model"]["latent_norm"]
    (run / "run.json").write_text(json.dumps(record))
    with open_run(config, record["data"]) as finished:
        assert not finished
    joint = dataclasses.replace(config.joint, motion=1.0)
    with (
        pytest.raises(WorldlineError, match=r"an unfinished run with other options \(joint.motion\)"),
        open_run(dataclasses.replace(config, joint=joint), record["data"]),
    ):
        pass


def test_damaged_data_leave_a_run_that_mended_data_can_have(tiny_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data", ignore=shutil.ignore_patterns(".cache")))
    (video,) = data.rglob("*.mp4")
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) // 2])
    run = tmp_path / "run"
    with pytest.raises(WorldlineError):
        train(tiny_config(data, run))
    assert [p.name for p in run.iterdir()] == [".lock"]


def test_a_damaged_checkpoint_is_named(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _train_until(8, tiny_data, run)
    tensors = run / "last" / "training.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(WorldlineError, match=r"training\.safetensors is damaged"):
        train(tiny_config(tiny_data, run))


def test_a_loss_that_is_no_number_stops_at_its_step(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "nan")
    joint = dataclasses.replace(config.joint, lr_decoder=1e30, clip=1e30, warmup=0)
    with pytest.raises(WorldlineError, match=r"stopped at step \d+ \(joint\): loss"):
        train(dataclasses.replace(config, joint=joint))


def test_windows_hold_what_the_dataset_has(finished_run: Path, tiny_data: Path) -> None:
    dataset, config = open_dataset(tiny_data), tiny_config(tiny_data, Path("unused"))
    cache = FrameCache(dataset, 32)
    windows = JointWindows(cache, config.joint, 4, seed=1)
    batch = windows(20)  # full rollout of 12 at stride 2: frames 0-3, then 5, 7, ... 15
    assert batch.frames.shape == (4, 10, 32, 32, 3)
    assert batch.actions.shape == (4, 15, 2)
    trained = set(dataset.split("train"))
    for frames, actions in zip(batch.frames.numpy(), batch.actions.numpy(), strict=True):
        ((episode, start),) = [
            (e, s)
            for e in trained
            for s in range(dataset.lengths[e] - 15)
            if np.array_equal(dataset.actions(e)[s : s + 15], actions)
        ]
        assert np.array_equal(cache.frames(episode)[[start + i for i in (0, 1, 2, 3, 5, 7, 9, 11, 13, 15)]], frames)
    assert batch.loose.shape == (8, 32, 32, 3)
    assert batch.features.shape == (48, 0)
    known = np.concatenate([cache.frames(e) for e in trained])
    for frame in batch.loose.numpy():  # what is left of some frame, mirrored and moved by at most 6 pixels
        inner = [np.rot90(m, k)[6:26, 6:26] for m in (frame, frame[::-1]) for k in range(4)]
        assert any(
            (known[:, 6 + i : 26 + i, 6 + j : 26 + j] == seen).all(axis=(1, 2, 3)).any()
            for i in range(-6, 7)
            for j in range(-6, 7)
            for seen in inner
        )
    world = load_world(finished_run)
    stage = dataclasses.replace(config.frozen, rollout_pixels=1.0, pixel_frames=6)
    frozen = FrozenWindows(cache, stage, world, seed=1)(19)
    assert frozen.z.shape == (8, 34, 16)
    for back in (0, 1):  # each picture after the one before it
        seen = world.encode(frozen.pixel_frames[:, 1 - back])
        z = frozen.z[frozen.pixel_rows, frozen.pixel_steps - back]
        torch.testing.assert_close(seen, z, rtol=1e-4, atol=1e-4)


def test_truncation_keeps_whole_lines_up_to_the_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step})
    with open(path, "a") as file:
        file.write('{"step": 4')
    truncate_lines(path, 9)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    truncate_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_rollouts_grow_to_their_length() -> None:
    stage = StageConfig(steps=100, batch=1, rollout=50, rollout_start=10, rollout_ramp=0.5)
    lengths = [rollout_length(stage, step) for step in range(100)]
    assert lengths[0] == 10
    assert lengths[49] < 50
    assert set(lengths[50:]) == {50}
    assert lengths == sorted(lengths)


def test_a_rollout_holds_a_target() -> None:
    StageConfig(steps=1, batch=1, rollout=16, rollout_start=8, target_stride=8)
    for start in (0, 4):
        with pytest.raises(WorldlineError, match="target_stride must be at most the shortest rollout"):
            StageConfig(steps=1, batch=1, rollout=7, rollout_start=start, target_stride=8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"joint": StageConfig(steps=0, batch=1, rollout=1), "frozen": StageConfig(steps=0, batch=1, rollout=1)},
        {"frozen": StageConfig(steps=1, batch=1, rollout=1, sigreg=1.0)},
        {"frozen": StageConfig(steps=1, batch=1, rollout=2, target_stride=2)},
        {"frozen": StageConfig(steps=1, batch=1, rollout=1, rollout_inverse=1.0)},
        {"joint": StageConfig(steps=1, batch=1, rollout=1, excess_growth=1.0)},
        {"log_every": 0},
    ],
)
def test_impossible_runs_are_refused(wrong: dict) -> None:
    with pytest.raises(WorldlineError):
        TrainConfig(data=Path("a"), path=Path("b"), **wrong)
