"""Masked pre-training on one rank: the golden curve, resuming, clips that are lost, and what is refused."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_clips import ToyClips, toy_config

from worldline.core.errors import WorldlineError
from worldline.model.video import VideoConfig, load_encoder
from worldline.train import pretrain as module
from worldline.train.feed import FeedConfig
from worldline.train.learner import Learner
from worldline.train.parallel import ParallelConfig
from worldline.train.pretrain import RayConfig, pretrain

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from pretrain_curve import CURVE, read_curve


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_clips", lambda path: ToyClips())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_clips", lambda path: ToyClips())
        return pretrain(toy_config(tmp_path_factory.mktemp("pretrain") / "whole"))


def batches(run: Path) -> list[str]:
    return [json.loads(line)["batch"] for line in (run / "batches.jsonl").read_text().splitlines()]


def test_it_follows_the_recorded_curve(whole: Path) -> None:
    record = json.loads(CURVE.read_text())
    assert batches(whole) == record["batches"]
    assert read_curve(whole) == pytest.approx(record["loss"], rel=record["relative_tolerance"]), (
        f"the curve has changed; if that is meant, run `{record['generator']}` and say why in the changelog"
    )


def test_the_curve_falls_well_below_a_guess(whole: Path) -> None:
    """0.80 is E|x| of a normalised feature, what telling 0 everywhere would cost."""
    assert read_curve(whole)[-1] < 0.8 * read_curve(whole)[0]


def test_where_clips_come_from_is_read_when_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank holds 24 bytes a clip less for it."""
    read, times = ToyClips.record, []
    monkeypatch.setattr(ToyClips, "record", lambda self: (times.append(1), read(self))[1])
    monkeypatch.setattr(module, "open_clips", lambda path: ToyClips(broken={4: 4}))
    run = pretrain(replace(toy_config(tmp_path / "run", steps=6), log_every=1))
    assert len((run / "lost.jsonl").read_text().splitlines()) == 1
    assert len(times) == 2  # for the one that was lost, and for what was never seen


def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Learner.update

    def stop(self: Learner, batch: object) -> object:
        if batch.step == 22:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return original(self, batch)  # type: ignore[arg-type]

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(toy_config(run))
    assert not (run / "result.json").exists()
    pretrain(toy_config(run))
    assert json.loads((run / "result.json").read_text())["timing"]["resumed_at"] >= 8
    for name in ("metrics.jsonl", "batches.jsonl", "encoder.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_other_ways_of_computing_it_give_the_same_curve(tmp_path: Path) -> None:
    how = ParallelConfig(checkpointing=True, accumulate=4)
    run = pretrain(toy_config(tmp_path / "run", steps=8, parallel=how))
    plain = pretrain(toy_config(tmp_path / "plain", steps=8))
    assert read_curve(run) == pytest.approx(read_curve(plain), rel=1e-4)


def test_lost_clips_are_told_and_change_nothing_else(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_clips", lambda path: ToyClips(broken={7: 10**6}))
    run = pretrain(toy_config(tmp_path / "run"))
    assert batches(run) == batches(whole)
    lost = [json.loads(line) for line in (run / "lost.jsonl").read_text().splitlines()]
    assert {(line["clip"], line["reason"]) for line in lost} == {(7, "OSError: clip 7 has vanished")}
    result = json.loads((run / "result.json").read_text())
    assert (result["lost"], result["lost_clips"]) == (len(lost), [7])
    assert read_curve(run)[-1] == pytest.approx(read_curve(whole)[-1], rel=0.1)


def test_a_mixture_keeps_its_shares(tmp_path: Path) -> None:
    config = replace(toy_config(tmp_path / "run", steps=4), also=(Path("more"),), weights=(3.0, 1.0))
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "batch_hash", lambda ids: seen.extend(ids.tolist()))
        pretrain(config)
    assert sum(clip >= ToyClips.num_clips for clip in seen) == len(seen) // 4 == 8


def test_a_run_ends_when_nothing_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_clips", lambda path: ToyClips(broken=dict.fromkeys(range(24), 10**6)))
    with pytest.raises(WorldlineError, match="none of the clips of the last 4 updates could be read"):
        pretrain(toy_config(tmp_path / "run"))


def test_sigreg_holds_features_apart_without_an_averaged_encoder(tmp_path: Path) -> None:
    def spread(run: Path) -> float:
        encoder = load_encoder(run)
        clips = torch.stack([torch.from_numpy(ToyClips().clip(n)) for n in range(16)])
        with torch.inference_mode():
            return float(encoder(clips).std(dim=0).mean())

    runs = [
        pretrain(toy_config(tmp_path / f"{weight}", steps=12, target="sigreg", sigreg=weight, lr=1e-2))
        for weight in (0.0, 0.5)
    ]
    assert spread(runs[1]) > 2 * spread(runs[0])


def test_what_does_not_fit_is_refused(whole: Path, tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run")
    other = VideoConfig(**{**config.model.to_json(), "frames": 16})
    with pytest.raises(WorldlineError, match=r"give model.frames=8 and model.image_size=32"):
        pretrain(replace(config, model=other))
    with pytest.raises(WorldlineError, match=r"batch must be a multiple of ranks x parallel.accumulate, 1 x 3, got 8"):
        pretrain(replace(config, parallel=ParallelConfig(accumulate=3)))
    with pytest.raises(WorldlineError, match=r"parallel.accumulate must be 1 with learner.target=sigreg"):
        toy_config(tmp_path / "run", target="sigreg", parallel=ParallelConfig(accumulate=2))
    with pytest.raises(WorldlineError, match=r"of every number of workers .* got 8 and 3"):
        replace(config, ray=RayConfig(workers=4, least=1))
    with pytest.raises(WorldlineError, match=r"ray.least must be 1 to ray.workers, got 3 of 2"):
        replace(config, ray=RayConfig(workers=2, least=3))
    with pytest.raises(WorldlineError, match=r"give ray.workers=N with it"):
        replace(config, feed=FeedConfig(by="ray"))
    with pytest.raises(WorldlineError, match="start with torchrun"):
        pretrain(replace(config, parallel=ParallelConfig(offload=True)))
    with pytest.raises(WorldlineError, match=r"a finished run with other options \(seed\)"):
        pretrain(replace(toy_config(whole), seed=4))
    (tmp_path / "run" / "encoder.json").write_text("{}")
    with pytest.raises(WorldlineError, match="no pre-trained encoder"):
        load_encoder(tmp_path / "run")
