"""What a run never saw is told to the clip: damaged files, one that vanishes while training goes on, and no turn."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_clips import ToyClips, toy_config

from worldline.data.clip_videos import VideoClips
from worldline.data.clips import JoinedClips, Record
from worldline.data.ingest import IngestConfig, ingest
from worldline.data.order import Order
from worldline.train.learner import Learner
from worldline.train.pretrain import pretrain
from worldline.train.unseen import list_unseen, sum_up

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from video_zoo import encode, pictures


def clips_of(rows: list[dict], *reasons: str) -> Counter[tuple[str, int]]:
    """Return every clip of some rows, by path and number."""
    chosen = [row for row in rows if row["reason"] in reasons]
    return Counter((row["path"], row["first"] + n) for row in chosen for n in range(row["clips"]))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for number, name in enumerate(("first", "second", "vanishing")):
        (folder / f"{name}.mp4").write_bytes(encode(pictures(40, seed=number), gop=4))
    whole = encode(pictures(40, seed=3), options={"movflags": "faststart"}, gop=4)
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").touch()
    return folder


def test_damaged_and_vanished_files_are_told_to_the_clip(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = tmp_path / "clips", tmp_path / "run"
    ingest(
        IngestConfig(
            source=str(source), path=str(data), codec="source", num_frames=8, stride=1, image_size=32, workers=1
        )
    )
    update, read, seen = Learner.update, VideoClips.read, set()

    def vanish(self: Learner, batch: object) -> object:
        if batch.step == 1:  # type: ignore[attr-defined]
            (source / "vanishing.mp4").unlink()
        return update(self, batch)  # type: ignore[arg-type]

    def note(self: VideoClips, ids: np.ndarray) -> np.ndarray:
        found = read(self, ids)
        seen.update(ids.tolist())
        return found

    monkeypatch.setattr(Learner, "update", vanish)
    monkeypatch.setattr(VideoClips, "read", note)
    config = toy_config(run, steps=9)
    config = replace(config, data=data, batch=2, feed=replace(config.feed, depth=1))
    pretrain(config)

    episodes = pq.read_table(data / "episodes.parquet").to_pylist()
    every = {row["first_clip"] + n: (row["path"], n) for row in episodes for n in range(row["num_clips"])}
    rows = pq.read_table(run / "unseen.parquet").to_pylist()
    unread = {every[clip] for clip in every.keys() - seen}
    assert clips_of(rows, "not_read") == Counter(unread)
    assert {path for path, _ in unread} == {"vanishing.mp4"}
    assert len(unread) < 5
    ((kept,),) = ([row["num_clips"] for row in episodes if row["path"] == "cut.mp4"],)
    assert 0 < kept < 5
    assert clips_of(rows, "truncated") == Counter(("cut.mp4", n) for n in range(kept, 5))
    (empty,) = (row for row in rows if row["reason"] == "empty")
    assert (empty["path"], empty["clips"], empty["data"]) == ("empty.mp4", None, str(data))

    lost = [json.loads(line) for line in (run / "lost.jsonl").read_text().splitlines()]
    assert all((line["path"], line["number"]) == every[line["clip"]] for line in lost)
    told = json.loads((run / "result.json").read_text())["never_seen"]
    assert told["by_reason"] == {
        "not_read": {"entries": 1, "clips": len(unread)},
        "truncated": {"entries": 1, "clips": 5 - kept},
        "empty": {"entries": 1, "clips": None},
    }
    assert sorted(told["shown"], key=str) == sorted(rows, key=str)


class Part(ToyClips):
    def __init__(self, name: str, num_clips: int) -> None:
        super().__init__()
        self.name, self.num_clips = name, num_clips

    def record(self) -> Record:
        found = super().record()
        return Record(found.episodes.set_column(2, "path", pa.array([f"{self.name}0", f"{self.name}1"])), found.ledger)


@pytest.mark.parametrize("steps", [0, 1, 3, 40])
def test_a_mixture_too_short_for_an_epoch_lists_who_had_no_turn(steps: int) -> None:
    clips = JoinedClips([Part("a", 30), Part("b", 20)])
    order = Order(clips.sizes, 4, seed=1, weights=(1.0, 3.0))
    lost = [{"step": step + 1, "clip": 33, "reason": "gone"} for step in range(steps) if 33 in order.batch(step)]
    rows = list_unseen(clips.record(), order, steps, lost).to_pylist()
    names = [*(("a0", n) for n in range(16)), *(("a1", n) for n in range(14))]
    names += [*(("b0", n) for n in range(16)), *(("b1", n) for n in range(4))]
    turns = np.unique([order.batch(step) for step in range(steps)]).tolist()
    assert clips_of(rows, "no_turn") == Counter(name for clip, name in enumerate(names) if clip not in turns)
    assert clips_of(rows, "not_read") == Counter([names[33]] if lost else [])
    assert sum_up(list_unseen(clips.record(), order, steps, lost))["shown"] == rows[: bool(lost)]
