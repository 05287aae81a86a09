"""Video whose bytes were changed: refused in one way, by ingest and by who reads clips out of it."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from video_zoo import encode, good_files, pictures

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


@pytest.mark.parametrize("codec", ["h264", "source"])
def test_bytes_are_compared_when_a_video_is_first_read(codec: str, tmp_path: Path) -> None:
    """Pictures that differ and would be decoded without complaint."""
    source, path = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (source / name).write_bytes(encode(pictures(seed=1), codec="mpeg4"))
    (source / "short.mp4").write_bytes(encode(pictures(3)))
    ingest(IngestConfig(source=str(source), path=str(path), codec=codec, layout="video", **SMALL))
    videos = sorted((path / "videos").rglob("*.mp4")) if codec == "h264" else sorted(source.glob("?.mp4"))
    assert len(videos) == 2  # nothing is kept of the one that is too short
    assert [row["reason"] for row in read_ledger(path)] == ["too_short"]
    clips, content = open_clips(path), videos[1].read_bytes()
    in_b = clips.num_clips - 1
    whole = clips.read(np.array([0, in_b]))
    videos[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    clips = open_clips(path)
    assert np.array_equal(clips.read(np.array([0])), whole[:1])
    with pytest.raises(WorldlineError, match=r"not as it was when ingested \(damaged: its bytes are others\)"):
        clips.read(np.array([0, in_b]))
    videos[1].unlink()
    with pytest.raises(WorldlineError, match=r"not as it was when ingested \(missing: \)"):
        clips.read(np.array([in_b]))
    videos[1].write_bytes(content)
    assert np.array_equal(clips.read(np.array([0, in_b])), whole)


@pytest.mark.parametrize(
    ("codec", "name"),
    [(codec, name) for codec in ("raw", "source") for name in ("index.npy", "episodes.parquet")]
    + [("source", "videos.npy"), ("source", "videos.jsonl")],
)
def test_a_table_that_is_missing_or_nonsense_is_told(codec: str, name: str, tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "a.mp4").write_bytes(encode(pictures()))
    ingest(IngestConfig(source=str(source), path=str(path), codec=codec, **SMALL))

    def opened() -> None:
        clips = open_clips(path)
        clips.record()
        clips.read(np.array([0]))

    content = (path / name).read_bytes()
    spoiled = [("not a", b"nonsense"), ("not a", b""), ("not a", content[:-20]), ("missing", None)]
    if name == "videos.npy":
        spoiled.append(("not an index", (path / "index.npy").read_bytes()))  # an array, of another shape
    for told, new in spoiled:
        (path / name).unlink() if new is None else (path / name).write_bytes(new)
        with pytest.raises(WorldlineError, match=rf"{name}: {told}.*; copy the clips again"):
            opened()
    (path / name).write_bytes(content)
    opened()
