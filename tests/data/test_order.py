"""The order of clips: each once an epoch, the same global batches for any number of ranks, weights kept."""

import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldline.core.errors import WorldlineError
from worldline.data.order import Order, batch_hash, permute


@settings(deadline=None)
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_holds_every_number_once(size: int, key: int) -> None:
    keys = np.full(size, key, dtype=np.uint64)
    assert sorted(permute(np.arange(size, dtype=np.uint64), size, keys).tolist()) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(2, 2**40), value=st.integers(0, 2**40), key=st.integers(0, 2**64 - 1))
def test_a_permutation_stays_inside(size: int, value: int, key: int) -> None:
    values = np.array([value % size, (value + 1) % size], dtype=np.uint64)
    found = permute(values, size, np.full(2, key, dtype=np.uint64))
    assert found.max() < size
    assert found[0] != found[1]


def test_permutations_look_like_chance() -> None:
    """Where a number lands, and where its neighbour lands beside it, by chi-square; four numbers in all orders."""
    size, tables = 60, 4000
    keys = np.repeat(np.random.default_rng(0).integers(0, 2**63, tables, dtype=np.uint64), size)
    found = permute(np.tile(np.arange(size, dtype=np.uint64), tables), size, keys).reshape(tables, size).astype(int)
    landed = np.stack([np.bincount(column, minlength=size) for column in found.T])
    apart = np.bincount(((found[:, 1:] - found[:, :-1]) % size).ravel(), minlength=size)[1:]
    orders = Counter(map(tuple, permute_all(4, 24_000)))
    for counts, freedom in (
        (landed, (size - 1) ** 2),
        (apart, size - 2),
        (np.array(list(orders.values())), 23),
    ):
        chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)
    assert len(orders) == 24


def permute_all(size: int, tables: int) -> list[list[int]]:
    keys = np.repeat(np.arange(tables, dtype=np.uint64), size)
    return permute(np.tile(np.arange(size, dtype=np.uint64), tables), size, keys).reshape(tables, size).tolist()


@settings(max_examples=20, deadline=None)
@given(
    size=st.integers(1, 300),
    batch=st.integers(1, 64),
    seed=st.integers(0, 2**31),
    ranks=st.sampled_from([1, 2, 3, 4, 7]),
)
def test_shares_are_the_batch_whatever_the_number_of_ranks(size: int, batch: int, seed: int, ranks: int) -> None:
    order = Order(size, batch, seed)
    for step in (0, 10_000):
        whole = order.batch(step)
        assert np.array_equal(np.concatenate([order.share(step, rank, ranks) for rank in range(ranks)]), whole)
        seeds = np.concatenate([order.seeds(step, rank, ranks) for rank in range(ranks)])
        assert np.array_equal(seeds, order.seeds(step))


def test_every_clip_comes_once_an_epoch_in_another_order() -> None:
    order = Order(97, 10, seed=3)
    sequence = np.concatenate([order.batch(step) for step in range(97)])  # ten epochs
    epochs = sequence.reshape(10, 97)
    assert all(sorted(epoch.tolist()) == list(range(97)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 10
    assert not np.array_equal(sequence, np.concatenate([Order(97, 10, seed=4).batch(step) for step in range(97)]))
    # another batch size deals the same sequence
    assert np.array_equal(sequence, np.concatenate([Order(97, 97, seed=3).batch(step) for step in range(10)]))


def test_the_order_is_this_one() -> None:
    """Recorded by this test at version 0.1.0: whoever resumes a run after an update goes on in the same order."""
    order = Order([1000, 77], 16, seed=5, weights=[3, 1])
    assert [batch_hash(order.batch(step)) for step in (0, 1, 1_000_000)] == RECORDED
    assert [int(value) for value in order.seeds(3)[:2]] == RECORDED_SEEDS


RECORDED = ["1b0316859e9330c3", "b47307dd6a5c4528", "2a4d4dd5e391bd50"]
RECORDED_SEEDS = [5395653045937491097, 17706982733965059326]


def test_augmentation_follows_the_clip() -> None:
    """The same clip in the same epoch has the same seed whatever batch it comes in; in another epoch another one."""
    seeds: dict[int, list[set[int]]] = {}
    for batch in (8, 5):
        order = Order(40, batch, seed=1)
        for step in range(80 // batch):
            for place, (clip, seed) in enumerate(
                zip(order.batch(step).tolist(), order.seeds(step).tolist(), strict=True)
            ):
                epoch = (step * batch + place) // 40
                seeds.setdefault(clip, [set(), set()])[epoch].add(seed)
    assert all(len(first) == len(second) == 1 and first != second for first, second in seeds.values())


def test_a_mixture_keeps_its_weights_and_every_datasets_epochs() -> None:
    order = Order([100, 30, 7], 12, seed=0, weights=[0.5, 0.3, 0.2])
    assert order.shares == (0.5, 0.3, 0.2)
    ids = np.concatenate([order.batch(step) for step in range(200)])
    which = np.searchsorted([100, 130], ids, side="right")
    counts = np.stack([np.cumsum(which == dataset) for dataset in range(3)])
    wanted = np.outer([0.5, 0.3, 0.2], np.arange(1, len(ids) + 1))
    assert np.abs(counts - wanted).max() <= 5  # exact after every ten places
    seeds = np.concatenate([order.seeds(step) for step in range(200)])
    assert len(np.unique(seeds)) == len(seeds)  # no clip comes twice in an epoch of its dataset
    for first, size in [(0, 100), (100, 30), (130, 7)]:
        times = np.bincount(ids, minlength=137)[first : first + size]
        assert times.min() >= 5
        assert times.max() - times.min() <= 2


@pytest.mark.parametrize(
    ("sizes", "weights", "told"),
    [
        ([3, 0], None, "clips and a batch of at least 1"),
        ([3, 4], [1.0], "a positive weight for each of 2"),
        ([3, 4], [1.0, 0.0], "a positive weight for each of 2"),
        ([3, 4], [1.0, 1e-9], "smallest share must be at least 1 in 10,000"),
    ],
)
def test_what_cannot_be_ordered_is_told(sizes: list[int], weights: list[float] | None, told: str) -> None:
    with pytest.raises(WorldlineError, match=told):
        Order(sizes, 4, 0, weights)


def test_memory_does_not_grow_with_the_data() -> None:
    order = Order([10**9, 10**11], 256, seed=0, weights=[1, 2])
    order.batch(0)
    tracemalloc.start()
    order.batch(10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


RANK = """
import json, sys
from worldline.data.order import Order, batch_hash
rank, ranks, start, stop, log = *map(int, sys.argv[1:5]), sys.argv[5]
order = Order([1000, 300], 24, seed=9, weights=[2, 1])
with open(log, "a") as file:
    for step in range(start, stop):
        print(json.dumps([step, rank, order.share(step, rank, ranks).tolist()]), file=file, flush=True)
"""


def test_two_then_one_then_four_ranks_see_the_same_batches(tmp_path: Path) -> None:
    """Each rank is a process of its own that logs what it read; hashes of the joined logs are those of one rank."""

    def hashes(phases: list[tuple[int, int, int]]) -> list[str]:
        read: dict[int, dict[int, list[int]]] = {}
        for ranks, start, stop in phases:
            logs = [tmp_path / f"{len(phases)}-{ranks}-{rank}" for rank in range(ranks)]
            words = [[str(rank), str(ranks), str(start), str(stop), str(log)] for rank, log in enumerate(logs)]
            running = [subprocess.Popen([sys.executable, "-c", RANK, *each]) for each in words]
            assert all(process.wait() == 0 for process in running)
            for line in "".join(log.read_text() for log in logs).splitlines():
                step, rank, ids = json.loads(line)
                read.setdefault(step, {})[rank] = ids
        return [batch_hash(np.concatenate([np.array(read[s][r]) for r in sorted(read[s])])) for s in sorted(read)]

    once = hashes([(1, 0, 90)])
    assert len(set(once)) == 90
    assert hashes([(2, 0, 30), (1, 30, 60), (4, 60, 90)]) == once
