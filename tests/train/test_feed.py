"""The feed: order, retries, and clips that cannot be read, which are missing and not replaced."""

import numpy as np
from toy_clips import ToyClips

from worldline.data.order import Order
from worldline.train.feed import Batch, Feed, FeedConfig


def batches(clips: ToyClips, rank: int = 0, ranks: int = 1, size: int = 32, attempts: int = 3) -> list[Batch]:
    config = FeedConfig(threads=2, attempts=attempts, pause_s=0.0)
    order = Order(clips.num_clips, 8, 5)
    where = {"rank": rank, "ranks": ranks, "image_size": size, "device": "cpu"}
    with Feed(clips, order, config, start=2, stop=6, **where) as feed:  # type: ignore[arg-type]
        return list(feed)


def test_batches_come_in_order_and_ranks_share_them() -> None:
    whole, parts = batches(ToyClips()), [batches(ToyClips(), rank, 2) for rank in (0, 1)]
    assert [batch.step for batch in whole] == [2, 3, 4, 5]
    for batch, *halves in zip(whole, *parts, strict=True):
        assert np.array_equal(batch.ids, np.concatenate([half.ids for half in halves]))
        assert np.array_equal(batch.clips, np.concatenate([half.clips for half in halves]))
        assert all(np.array_equal(batch.clips[i], ToyClips().clip(n)) for i, n in enumerate(batch.ids.tolist()))


def test_a_clip_that_comes_back_is_not_lost() -> None:
    clips = ToyClips(broken=dict.fromkeys(range(24), 2))
    assert all(not batch.lost for batch in batches(clips))


def test_a_vanished_clip_leaves_its_place_empty() -> None:
    clips = ToyClips(broken={4: 10**6})
    found, whole = batches(clips), batches(ToyClips())
    lost = [each for batch in found for each in batch.lost]
    assert [each.clip for each in lost] == [4] * sum(4 in batch.ids for batch in whole) != []
    assert {(each.attempts, each.reason) for each in lost} == {(3, "OSError: clip 4 has vanished")}
    for batch, other in zip(found, whole, strict=True):
        assert np.array_equal(batch.ids, other.ids)  # the order goes on as if nothing had happened
        gone = batch.ids == 4
        assert np.array_equal(batch.weight, (~gone).astype(np.float32))
        assert not batch.clips[gone].any()
        assert np.array_equal(batch.clips[~gone], other.clips[~gone])


def test_smaller_pictures_are_cut_where_epoch_and_clip_say() -> None:
    whole, cut, half = batches(ToyClips()), batches(ToyClips(), size=24), batches(ToyClips(), 1, 2, size=24)
    assert cut[0].clips.shape == (8, 8, 24, 24, 3)
    assert np.array_equal(cut[1].clips[4:], half[1].clips)
    places = set()
    for i in range(8):
        inside = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if np.array_equal(whole[0].clips[i, :, top : top + 24, left : left + 24], cut[0].clips[i])
        ]
        assert inside
        places |= set(inside[:1])
    assert all(len(set(sides)) > 1 for sides in zip(*places, strict=True))
