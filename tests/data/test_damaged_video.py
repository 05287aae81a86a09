"""Video whose bytes were changed: refused in one way, by ingest and by who reads clips out of it."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from video_zoo import good_files

from worldline.core.errors import WorldlineError
from worldline.data.clips import Clips, open_clips
from worldline.data.ingest import IngestConfig, ingest, read_ledger

SMALL: dict[str, Any] = {"num_frames": 4, "stride": 2, "image_size": 32, "workers": 1}


def changed(content: bytes, rng: np.random.Generator) -> bytes:
    """Change a few bytes, in half of all cases only of the head."""
    bytes_ = np.frombuffer(content, np.uint8).copy()
    among = len(content) if rng.integers(2) else min(len(content), 2000)
    places = rng.integers(among, size=rng.integers(1, 40))
    bytes_[places] = rng.integers(256, size=len(places))
    return bytes_.tobytes()


def refused(clips: Clips, clip: int) -> bool:
    """Read one clip; say whether it was refused as it ought to be. Anything else that is raised is a mistake."""
    with suppress(WorldlineError):
        clips.read(np.array([clip]))
        return False
    return True


def test_ingest_tells_what_is_wrong_with_any_file(tmp_path: Path) -> None:
    rng, source = np.random.default_rng(0), tmp_path / "source"
    source.mkdir()
    for name, content in good_files().items():
        for number in range(25):
            (source / f"{number} {name.replace('jpg', 'mp4')}").write_bytes(changed(content, rng))
    out = ingest(IngestConfig(source=str(source), path=str(tmp_path / "out"), layout="video", **SMALL))
    ledger, episodes = read_ledger(out), pq.read_table(out / "episodes.parquet")["path"].to_pylist()
    reasons = {row["reason"] for row in ledger}
    assert reasons >= {"no_frames", "damaged", "broken_index", "unknown_codec", "truncated"}
    assert "crashes_decoder" not in reasons
    assert {row["path"] for row in ledger} | set(episodes) == {path.name for path in source.iterdir()}


def test_a_reader_knows_one_error_for_any_bytes(tmp_path: Path) -> None:
    """The change comes after the first reading, at which the bytes are compared with their checksum."""
    source = tmp_path / "source"
    source.mkdir()
    for name, content in good_files().items():
        (source / name).write_bytes(content)
    clips = open_clips(
        ingest(IngestConfig(source=str(source), path=str(tmp_path / "out"), codec="source", layout="video", **SMALL))
    )
    everything = np.arange(clips.num_clips)
    whole = clips.read(everything)
    rng, count = np.random.default_rng(1), 0
    for _ in range(15):
        for name, content in good_files().items():
            (source / name).write_bytes(changed(content, rng))
        count += sum(refused(clips, clip) for clip in everything[::3])
    assert count > 50
    for name, content in good_files().items():
        (source / name).write_bytes(content)
    assert np.array_equal(clips.read(everything), whole)
