"""The frame cache: every frame once, used again while it fits its dataset, and averaged by area."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from data_toys import make_episodes, write

from worldline.core.errors import WorldlineError
from worldline.data.cache import FrameCache, resize
from worldline.data.lerobot import open_dataset


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "toy", make_episodes(5))


def test_the_cache_holds_every_frame(path: Path) -> None:
    dataset = open_dataset(path)
    cache = FrameCache(dataset, 16)
    episodes = make_episodes(5)
    for episode in episodes:
        assert np.array_equal(cache.frames(episode.index), episode.frames)
    assert np.array_equal(cache.frames(3, 5, 4), episodes[3].frames[5:9])
    batch = cache.gather(np.array([[4, 20], [0, 0], [2, 3]]), 9)
    expected = [episodes[4].frames[20:29], episodes[0].frames[:9], episodes[2].frames[3:12]]
    assert np.array_equal(batch, np.stack(expected))
    with pytest.raises(WorldlineError, match="reaches beyond its episode"):
        cache.gather(np.array([[0, 1]]), 9)
    with pytest.raises(WorldlineError, match="episode 0 has 9 frames"):
        cache.frames(0, 5, 5)


def test_the_cache_is_used_again_and_renewed_when_stale(path: Path) -> None:
    dataset = open_dataset(path)
    cache = FrameCache(dataset, 8)
    made = cache.path.stat().st_mtime_ns
    assert FrameCache(open_dataset(path), 8).path.stat().st_mtime_ns == made
    (path / ".cache/.frames-8.npy.123.tmp").write_bytes(b"what a killed build leaves")
    kept = shutil.copytree(path / ".cache", path.parent / "kept")
    shutil.rmtree(path)
    write(path, make_episodes(5, seed=1))
    shutil.copytree(kept, path / ".cache")
    renewed = FrameCache(open_dataset(path), 8)
    assert np.array_equal(renewed.frames(2), resize(make_episodes(5, seed=1)[2].frames, 8))
    assert sorted(entry.name for entry in (path / ".cache").iterdir()) == ["frames-8.json", "frames-8.npy", "lock"]


def test_pictures_are_averaged_by_area() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    halved = frames.reshape(2, 16, 3, 16, 4, 3).astype(float).mean((2, 4))
    assert np.abs(resize(frames, 16) - halved).max() <= 0.51
    constant = np.full((1, 37, 50, 3), 201, dtype=np.uint8)
    assert (resize(constant, 16) == 201).all()
    assert (resize(constant, 64) == 201).all()
