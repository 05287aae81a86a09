"""On a CUDA device: the feed's batches are those of a CPU, staged in pinned memory; an update's peak is as planned; a
world's training begins as on a CPU and ends in a world that a CPU can load."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_clips import ToyClips, toy_config

from worldline.cli import configure
from worldline.data.collect import CollectConfig, collect
from worldline.data.order import Order
from worldline.model.checkpoint import load_world
from worldline.model.video import VideoConfig
from worldline.train.feed import Batch, Feed, FeedConfig
from worldline.train.learner import Learner
from worldline.train.loop import train
from worldline.train.memory import measuring
from worldline.train.parallel import ParallelConfig, Ranks


@pytest.mark.gpu
def test_the_feed_gives_the_batches_of_a_cpu_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    original, pinned = torch.Tensor.pin_memory, []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        staged = original(tensor)
        pinned.append(staged.is_pinned())
        return staged

    def batches(device: str) -> list[Batch]:
        where = {"rank": 0, "ranks": 1, "image_size": 32, "device": device}
        config, order = FeedConfig(threads=2, pause_s=0.0), Order(ToyClips.num_clips, 8, 5)
        clips = ToyClips(broken={4: 10**6})
        with Feed(clips, order, config, start=0, stop=9, **where) as feed:  # type: ignore[arg-type]
            return list(feed)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    for there, here in zip(batches("cuda"), batches("cpu"), strict=True):
        assert (there.clips.device.type, there.weight.device.type) == ("cuda", "cuda")
        assert there.ids.tolist() == here.ids.tolist()
        assert torch.equal(there.clips.cpu(), here.clips)
        assert torch.equal(there.weight.cpu(), here.weight)
    assert pinned == [True] * 18  # clips and weights of nine batches


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_peaks_where_the_memory_plan_says(checkpointing: bool) -> None:
    """Within 15%: the device rounds every tensor up, and its attention keeps other things than a CPU's."""
    clips, parallel = 32, ParallelConfig(checkpointing=checkpointing)
    model = VideoConfig(image_size=64, frames=16, patch=8, width=192, depth=6, heads=3)
    config = toy_config(Path("none"), parallel=parallel)
    square = torch.ones(64, 64, device="cuda")
    _ = square @ square  # what the libraries keep for themselves is no tensor of ours
    before = torch.cuda.memory_allocated()
    learner = Learner(model, config.mask, config.learner, parallel, Ranks(0, 1, None, None), seed=3, device="cuda")
    pictures = torch.zeros((clips, model.frames, model.image_size, model.image_size, 3), dtype=torch.uint8)
    batch = Batch(0, np.arange(clips), pictures.cuda(), torch.ones(clips).cuda(), ())
    learner.update(batch)  # the first makes the optimiser's state
    torch.cuda.reset_peak_memory_stats()
    learner.update(batch)
    peak = torch.cuda.max_memory_allocated() - before
    with measuring(model, config.mask, config.learner, parallel, ranks=1) as measure:
        assert measure(clips).total == pytest.approx(peak, rel=0.15)


SIZES = """model.image_size=32 model.latent_dim=16 model.conv_width=8 model.conv_head=8 model.hidden=32
    model.decoder_width=8 model.context=3 joint.steps=3 joint.batch=8 joint.bfloat16=false frozen.bfloat16=false
    frozen.steps=3 frozen.batch=8 frozen.rollout=12 frozen.rollout_start=4 log_every=1 validation_windows=4"""


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["drift_aware", "lewm", "vjepa2_ac"])
def test_a_training_begins_as_on_a_cpu_and_a_cpu_loads_its_world(objective: str, tmp_path: Path) -> None:
    data = collect(CollectConfig(env="two_room", path=str(tmp_path / "data"), episodes=12, steps=40, seed=3, workers=1))

    def losses(device: str) -> list[float]:
        path = tmp_path / device
        options = [f"objective={objective}", f"data={data}", f"path={path}", f"device={device}"]
        train(configure("train", [*options, *SIZES.split()]))
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    here, there = losses("cpu"), losses("cuda")
    assert len(here) == 6
    assert there == pytest.approx(here, rel=0.02)  # products there may be in TF32, and differences grow
    frames = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    assert load_world(tmp_path / "cuda").encode(frames).isfinite().all()
