"""Checkpoints that are not whole: the process is killed while it writes one, the disk is full, bytes are lost."""

import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from toy_clips import ToyClips, toy_config

from worldline.core.errors import WorldlineError
from worldline.train import pretrain as module
from worldline.train.feed import Batch
from worldline.train.learner import Learner
from worldline.train.parallel import Ranks
from worldline.train.pretrain import pretrain
from worldline.train.shards import Shards


def killed_in_the_second_checkpoint(run: Path) -> None:
    original, saves = FileSystemWriter.finish, []

    def finish(self: FileSystemWriter, **arguments: object) -> None:  # the rank's file is there, the metadata are not
        saves.append(1)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, **arguments)  # type: ignore[arg-type]

    FileSystemWriter.finish = finish  # type: ignore[assignment, method-assign]
    module.open_clips = lambda path: ToyClips()  # type: ignore[assignment]
    pretrain(toy_config(run))


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written_it_goes_on_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = multiprocessing.get_context("spawn").Process(target=killed_in_the_second_checkpoint, args=(run,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert os.readlink(run / "last") == "checkpoints/00000008"
    assert [file.suffix for file in (run / "checkpoints/00000016").iterdir()] == [".distcp"]

    original, begun = Learner.update, []

    def update(self: Learner, batch: Batch) -> object:
        begun.append((batch.step, sorted(os.listdir(run / "checkpoints")) if not begun else []))
        return original(self, batch)

    monkeypatch.setattr(module, "open_clips", lambda path: ToyClips())
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", update)
        pretrain(toy_config(run))
    assert begun[0] == (8, ["00000008"])
    pretrain(toy_config(whole))
    for name in ("metrics.jsonl", "batches.jsonl", "encoder.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return Shards(tmp_path, Ranks(0, 1, None, None))


def model_and_optimizer() -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    model = nn.Linear(100, 100)
    return {"model": model}, torch.optim.AdamW(model.parameters())


def test_a_full_disk_is_told_in_one_line(tmp_path: Path, shards: Shards) -> None:
    shards.save(1, *model_and_optimizer())
    shards.finish()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        shards.save(2, *model_and_optimizer())
        with pytest.raises(WorldlineError, match=r"00000002 could not be written \(RuntimeError: .*; make") as told:
            shards.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(told.value)
    assert os.readlink(tmp_path / "last") == "checkpoints/00000001"


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_damaged_checkpoint_is_told_with_its_reason(tmp_path: Path, shards: Shards, name: str) -> None:
    shards.save(1, *model_and_optimizer())
    shards.finish()
    os.truncate(tmp_path / "last" / name, 100)
    with pytest.raises(WorldlineError, match=r"00000001 is damaged \(\w+: .*\); start again") as told:
        shards.load(*model_and_optimizer())
    assert "\n" not in str(told.value)
    assert "ranks" not in str(told.value)
