"""A world on a pre-trained video encoder: frozen, tuned, read back, and refused where it does not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_config
from toy_clips import MODEL

from worldline.core.errors import WorldlineError
from worldline.model.checkpoint import load_world
from worldline.model.video import VideoConfig, VideoEncoder, load_encoder, save_encoder
from worldline.train.config import TrainConfig
from worldline.train.loop import train


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    save_encoder(path, MODEL, VideoEncoder(MODEL).state_dict(), None)
    return path


def short(data: Path, path: Path, pretrained: Path, **options: float) -> TrainConfig:
    config = tiny_config(data, path)
    joint, frozen = replace(config.joint, steps=4), replace(config.frozen, steps=2)
    return replace(config, joint=joint, frozen=frozen, pretrained=pretrained, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("tune", [0.0, 0.1])
def test_it_is_frozen_or_tuned(tiny_data: Path, pretrained: Path, tmp_path: Path, tune: float) -> None:
    world = load_world(train(short(tiny_data, tmp_path / "run", pretrained, tune=tune)))
    before, after = load_encoder(pretrained).state_dict(), world.get_submodule("encoder.video").state_dict()
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert (len(moved) == len(before)) if tune else not moved
    assert world.config.encoder == "video"
    assert world.encode(torch.zeros(3, 32, 32, 3, dtype=torch.uint8)).shape == (3, 16)


def test_a_picture_is_seen_as_a_clip_that_stands_still(pretrained: Path, tiny_data: Path, tmp_path: Path) -> None:
    world = load_world(train(short(tiny_data, tmp_path / "run", pretrained)))
    picture = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    still = VideoEncoder(VideoConfig(**{**MODEL.to_json(), "frames": MODEL.tubelet}))
    still.load_state_dict(load_encoder(pretrained).state_dict())
    features = still(picture[:, None].expand(-1, MODEL.tubelet, -1, -1, -1))
    encoder = world.encoder
    wanted = encoder.linear(encoder.narrow(features).flatten(1))  # type: ignore[operator, union-attr]
    torch.testing.assert_close(encoder(picture.permute(0, 3, 1, 2) / 127.5 - 1.0), wanted)


def test_what_does_not_fit_is_refused(tiny_data: Path, pretrained: Path, tmp_path: Path) -> None:
    config = short(tiny_data, tmp_path / "run", pretrained)
    with pytest.raises(WorldlineError, match=r"give model\.image_size=32"):
        train(replace(config, model=replace(config.model, image_size=64)))
    with pytest.raises(WorldlineError, match="give one of them"):
        replace(config, encoder=tmp_path)
    with pytest.raises(WorldlineError, match="tune must lie between 0 and 1"):
        replace(config, tune=2.0)
