"""The loader benchmark compares readers that give the same pixels, and its page comes from its result alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldline.bench import loader
from worldline.bench.loader import (
    LoaderBenchConfig,
    measure_curve,
    measure_index,
    measure_order,
    measure_readers,
    measure_video_index,
)
from worldline.bench.loader_report import draw, render

pytest.importorskip("h5py", reason='needs h5py: pip install "worldline[hdf5]"')


def test_readers_are_compared_on_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoaderBenchConfig(episodes=2, compare_seconds=0.01)
    monkeypatch.setattr(loader, "_EPISODE", 40)
    monkeypatch.setattr(loader, "_ENV", "two_room")
    found = measure_readers(tmp_path, 32, config)
    assert found["comparisons"][0]["names"] == ("mp4, PyAV", "worldline, raw")
    index = measure_index(tmp_path, 2_000_000)
    assert index is not None
    assert 11 < index["bytes_a_clip"] < 16
    of_videos = [measure_video_index(tmp_path, 400_000, codec) for codec in ("h264", "source")]
    assert all(row is not None and 10 < row["bytes_a_clip"] < 16 for row in of_videos)
    curve: list[dict[str, Any]] = [
        {"codec": codec, "gop": gop, "row_group": group, "stride": stride, "clips": 9, "bytes_a_frame": 1e3 * (gop + 1)}
        | {"cpu_ms_a_clip": 1.0 + group, "quartiles_ms": [1.0, 2.0 + group]}
        for codec, gop, group, stride in (
            ("raw", 0, 1, 0), ("jpeg", 0, 1, 0), ("source", 0, 1, 1), ("source", 0, 1, 4),
            ("jpeg by pyarrow", 0, 1, 0), ("jpeg by pyarrow", 0, 16, 0),
            ("h264", 1, 1, 1), ("h264", 1, 1, 4), ("h264", 250, 1, 1), ("h264", 250, 1, 4),
        )
    ]  # fmt: skip
    made = {"machine": {"processor": "p", "cores": 1}, "versions": {}, "commit": "c", "command": "x"}
    result = {"num_frames": 16, "batch": 16, "index": index, "order": measure_order(1000, 8), "curve": "yes"}
    result |= {"video_index": of_videos}
    result |= {"provenance": made, "timing": {"readers": [found], "curve": curve}}
    text = render(result)
    assert f"**{index['bytes_a_clip']:.2f} bytes a clip**" in text
    assert "`source`, 400,000 clips, 4 out of each video" in text
    assert "`h264` with gop=1, the cheapest to read at stride 4." in text
    assert "groups of 16" in draw(result)
    del result["timing"]["curve"]
    assert "Not drawn: real videos are missing" in render({**result, "curve": "real videos are missing"})


def test_the_curve_reads_the_same_clips_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worldline.data.collect import record_episode
    from worldline.data.simulators import make_simulator
    from worldline.data.video import frame_rate

    source = tmp_path / "source"
    source.mkdir()
    video = record_episode(make_simulator("two_room"), 0, 140, frame_rate(0.04))["video"]
    (source / "a.mp4").write_bytes(np.asarray(video).tobytes())
    monkeypatch.setattr(loader, "_GOPS", (12,))
    rows = measure_curve(source, tmp_path, rounds=1)
    assert {row["clips"] for row in rows} == {2}
    assert len(rows) == 9
    assert all(row["cpu_ms_a_clip"] > 0 for row in rows)
