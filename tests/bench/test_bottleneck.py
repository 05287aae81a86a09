"""What limits is found where it was planted, and what a clip costs is counted as by hand."""

import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from worldline.bench import bottleneck
from worldline.bench.bottleneck import BottleneckConfig, TargetConfig, flops_per_clip, read_waiting, run
from worldline.bench.bottleneck_report import demand, limit, rates
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.data.clip_cache import CachedClips
from worldline.data.ingest import IngestConfig, ingest
from worldline.model.video import VideoConfig
from worldline.train.feed import FeedConfig
from worldline.train.learner import LearnerConfig
from worldline.train.masks import MaskConfig, masks
from worldline.train.pretrain import PretrainConfig, pretrain

MODEL = VideoConfig(
    image_size=32, frames=4, patch=8, tubelet=2, width=32, depth=2, heads=2,
    predictor_width=16, predictor_depth=1, predictor_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    with av.open(str(folder / "noise.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"threads": "1"})
        stream.height = stream.width = 32
        for frame in np.random.default_rng(0).integers(0, 255, (120, 32, 32, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    path = folder.parent / "clips"
    return ingest(IngestConfig(source=str(folder), path=str(path), num_frames=4, stride=1, image_size=32, workers=1))


def measured(clips: Path, reports: Path, trained: Path | None = None) -> dict:
    config = BottleneckConfig(
        data=clips, model=MODEL, target=TargetConfig(model=MODEL), batch=4, rounds=3, seconds=0.05, run=trained,
        reports=reports,
    )  # fmt: skip
    report = run(config)
    assert "*not yet measured*" in report.read_text()
    assert trained is None or f"In the run {trained}, on 1 rank, 6 updates waited" in report.read_text()
    return read_json(report.with_name("result.json"))


def test_a_slow_decoder_is_named(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = CachedClips.read

    def slow(self: CachedClips, ids: np.ndarray) -> np.ndarray:
        time.sleep(0.3)
        return read(self, ids)

    monkeypatch.setattr(CachedClips, "read", slow)
    where = {"data": clips, "path": tmp_path / "run", "model": MODEL, "batch": 4, "log_every": 2}
    trained = pretrain(PretrainConfig(**where, learner=LearnerConfig(steps=6), feed=FeedConfig(depth=1)))
    result = measured(clips, tmp_path, trained)
    assert limit(result) == "decode"
    told = result["timing"]["run"]
    assert (told["ranks"], told["updates"]) == (1, 6)
    assert 1.0 >= told["stall"]["p50"] > 0.5 < told["stall_over_ranks"]["max"] <= 1.0
    assert told["ready_batches"] < 1 > result["timing"]["ready_batches"]["all"]
    assert result["timing"]["stall"]["p50"] > 0.5
    assert rates(result)["all"][0] < 4 / 0.3 * 1.1
    assert result["bytes_per_clip"] == pytest.approx(
        np.mean([size for _, _, size in CachedClips(clips, read_json(clips / "clips.json")).pieces(np.arange(30))])
    )


def test_what_ranks_waited_is_summed_up_over_updates_and_over_ranks(clips: Path, tmp_path: Path) -> None:
    """Three ranks, 0.5 s an update, the waiting drawn at random; an earlier part on two ranks does not count."""
    waited = np.random.default_rng(0).uniform(0, 0.4, (10, 3))
    lines = [{"stalls": [1.0], "ranks": 2, "seconds": 9.0, "waited_by_rank": [9.0, 9.0], "ready": 0.0}]
    for part, ready in ((waited[:4], 1.0), (waited[4:], 2.0)):
        sums = {"seconds": 0.5 * len(part), "waited_by_rank": part.sum(axis=0).tolist(), "ready": ready}
        lines.append({"stalls": (part.max(axis=1) / 0.5).tolist(), "ranks": 3, **sums})
    (tmp_path / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{")
    found = read_waiting(tmp_path)
    longest, of_rank = (
        sorted(2 * max(row) for row in waited.tolist()),
        sorted(sum(waited.tolist()[i][r] for i in range(10)) / 5 for r in range(3)),
    )
    assert (found["ranks"], found["updates"]) == (3, 10)
    assert found["stall"]["p50"] == pytest.approx((longest[4] + longest[5]) / 2)
    assert (found["stall"]["max"], found["stall_over_ranks"]["max"]) == pytest.approx((longest[-1], of_rank[-1]))
    assert found["stall_over_ranks"]["p50"] == pytest.approx(of_rank[1])
    assert found["ready_batches"] == pytest.approx(1.6)
    with pytest.raises(WorldlineError, match="expected a folder of worldline pretrain"):
        measured(clips, tmp_path, tmp_path / "nowhere")


def test_slow_updates_are_named(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = bottleneck.Learner.update

    def slow(self: bottleneck.Learner, batch: object) -> object:
        time.sleep(0.3)
        return update(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(bottleneck.Learner, "update", slow)
    result = measured(clips, tmp_path)
    assert limit(result) == "update"
    assert result["timing"]["stall"]["p50"] < 0.5

    need = demand(result)  # the target's arithmetic, by hand
    wanted = 8 * 989e12 * 0.4 / result["target_flops_per_clip"]
    assert need["clips_per_second"] == pytest.approx(wanted)
    assert need["mb_per_second"] == pytest.approx(wanted * result["bytes_per_clip"] / 1e6)
    assert need["epoch_hours"] == pytest.approx(2e12 / result["bytes_per_clip"] / wanted / 3600)
    of_one, parameters = wanted / 8, result["target_parameters"]
    moved = 7 / 8 * (8 * sum(parameters.values()) + 2 * parameters["encoder"]) / 1e9
    assert need["moved_gb"] == pytest.approx(moved)
    assert need["clips_to_hide_it"] == pytest.approx(moved / 50 * of_one)
    assert demand(result, gpus=64)["clips_per_second"] == pytest.approx(8 * wanted)
    cheaper = copy.deepcopy(result)
    for turn in cheaper["timing"]["turns"]["decode"]:
        turn["cpu_seconds_per_clip"] /= 2
    assert demand(cheaper)["cores"] == pytest.approx(need["cores"] / 2)


def test_flops_are_those_of_the_tokens_that_are_there() -> None:
    """Forward and backward of the matrices and of attention, counted from the sizes alone."""
    mask, learner = MaskConfig(), LearnerConfig(bfloat16=False)
    tokens = int(np.prod(MODEL.grid))
    wide, narrow = MODEL.width, MODEL.predictor_width

    def block(count: int, width: int) -> float:
        return 2 * count * width * 12 * width + 2 * 2 * count**2 * width

    patch = MODEL.tubelet * MODEL.patch**2 * 3
    expected = 2 * tokens * patch * wide + MODEL.depth * block(tokens, wide)  # the target: forward, everything
    for kind in range(len(mask.block)):
        kept, hidden = (place.shape[1] for place in masks(mask, kind, MODEL.grid, np.arange(2), 0, 0))
        # a product's backward pass is two products, but the pixels want no gradient
        expected += 2 * 2 * kept * patch * wide + 3 * MODEL.depth * block(kept, wide)
        both = kept + hidden
        expected += 3 * (2 * kept * wide * narrow + MODEL.predictor_depth * block(both, narrow))
        expected += 3 * 2 * hidden * narrow * wide
    assert flops_per_clip(MODEL, mask, learner) == expected


def test_a_target_of_other_clips_is_refused(clips: Path) -> None:
    with pytest.raises(WorldlineError, match="ingest some"):
        run(BottleneckConfig(data=clips, model=MODEL, target=TargetConfig(model=replace(MODEL, image_size=64))))
