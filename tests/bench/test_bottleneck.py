"""What limits is found where it was planted, and what a clip costs is counted as by hand."""

import copy
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from worldline.bench import bottleneck
from worldline.bench.bottleneck import BottleneckConfig, TargetConfig, flops_per_clip, run
from worldline.bench.bottleneck_report import demand, limit, rates
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.data.clip_cache import CachedClips
from worldline.data.ingest import IngestConfig, ingest
from worldline.model.video import VideoConfig
from worldline.train.learner import LearnerConfig
from worldline.train.masks import MaskConfig, masks

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


def measured(clips: Path, reports: Path) -> dict:
    config = BottleneckConfig(
        data=clips, model=MODEL, target=TargetConfig(model=MODEL), batch=4, rounds=3, seconds=0.05, reports=reports
    )
    report = run(config)
    assert "*not yet measured*" in report.read_text()
    return read_json(report.with_name("result.json"))


def test_a_slow_decoder_is_named(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = CachedClips.read

    def slow(self: CachedClips, ids: np.ndarray) -> np.ndarray:
        time.sleep(0.3)
        return read(self, ids)

    monkeypatch.setattr(CachedClips, "read", slow)
    result = measured(clips, tmp_path)
    assert limit(result) == "decode"
    assert result["timing"]["stall"]["p50"] > 0.5
    assert rates(result)["all"][0] < 4 / 0.3 * 1.1
    assert result["bytes_per_clip"] == pytest.approx(
        np.mean([size for _, _, size in CachedClips(clips, read_json(clips / "clips.json")).pieces(np.arange(30))])
    )


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
