"""Frames by time stamp, from PyAV and, where it imports, from torchcodec."""

from importlib import import_module
from pathlib import Path

import av
import numpy as np
import pytest

from worldline.bench.real_videos import INSTALL, real_videos
from worldline.core.errors import WorldlineError
from worldline.data.video import SegmentJoiner, decode_frames, encode_segment, frame_rate


@pytest.fixture(scope="module")
def _torchcodec() -> None:
    try:
        import_module("torchcodec.decoders")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchcodec does not import: {str(error).splitlines()[0]}")


@pytest.mark.usefixtures("_torchcodec")
def test_torchcodec_gives_the_frames_that_were_encoded(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    path, rate = tmp_path / "a.mp4", frame_rate(0.04)
    joiner = SegmentJoiner(path, rate)
    for start in (0, 20):
        joiner.append(encode_segment(frames[start : start + 20], rate))
    joiner.close()
    for first, count in ((0, 40), (17, 9), (39, 1)):
        found = decode_frames(path, first / 25, count, 25.0, "torchcodec")
        assert np.array_equal(found, frames[first : first + count])
    with pytest.raises(WorldlineError, match=r"expected 3 frames from 1.560 s on, got 1"):
        decode_frames(path, 39 / 25, 3, 25.0, "torchcodec")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(WorldlineError, match="cannot be decoded"):
        decode_frames(path, 0.0, 3, 25.0, "torchcodec")


@pytest.mark.usefixtures("_torchcodec")
def test_real_videos_are_the_same_to_the_last_bit_or_two(tmp_path: Path) -> None:
    videos = real_videos(tmp_path)
    if not {"cup.mp4", "vtest.avi"} <= videos.keys():
        pytest.skip(f"needs real videos: {INSTALL}")
    for name, most in (("cup.mp4", 0), ("vtest.avi", 2)):
        with av.open(str(videos[name])) as container:
            rate = float(container.streams.video[0].average_rate or 0)
        ours, theirs = (
            decode_frames(videos[name], 12 / rate, 10, rate, decoder).astype(np.int16)
            for decoder in ("pyav", "torchcodec")
        )
        assert np.abs(ours - theirs).max() <= most, name
        assert (ours != theirs).mean() < 1e-4, name
