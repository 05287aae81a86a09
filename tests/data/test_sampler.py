"""The sampler's order is a pure function that visits each window once an epoch; the prefetcher keeps it."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldline.core.errors import WorldlineError
from worldline.data.sampler import Prefetcher, Sampler

LENGTHS = st.dictionaries(st.integers(0, 50), st.integers(1, 12), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, window=st.integers(1, 6), batch=st.integers(1, 40), seed=st.integers(0, 9))
def test_an_epoch_holds_every_window_once(lengths: dict[int, int], window: int, batch: int, seed: int) -> None:
    expected = [(episode, start) for episode in sorted(lengths) for start in range(lengths[episode] - window + 1)]
    if not expected:
        with pytest.raises(WorldlineError, match="no episode has"):
            Sampler(lengths, window, batch, seed)
        return
    sampler = Sampler(lengths, window, batch, seed)
    num_steps = -(-3 * len(expected) // batch)
    drawn = np.concatenate([sampler.indices(step) for step in range(num_steps)])
    assert drawn.dtype == np.int64
    for epoch in range(3):
        part = drawn[epoch * len(expected) : (epoch + 1) * len(expected)]
        assert sorted(map(tuple, part.tolist())) == expected


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, steps=st.lists(st.integers(0, 200), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_a_batch_depends_on_its_step_alone(lengths: dict[int, int], steps: list[int], seed: int) -> None:
    in_turn = Sampler(lengths, 1, 7, seed)
    expected = {step: in_turn.indices(step) for step in range(201)}
    jumping = Sampler(sorted(lengths.items(), reverse=True), 1, 7, seed)
    for step in steps:
        assert np.array_equal(jumping.indices(step), expected[step])


def test_seeds_and_epochs_differ() -> None:
    lengths = dict.fromkeys(range(4), 50)
    first = Sampler(lengths, 2, 196, seed=0)
    assert not np.array_equal(first.indices(0), first.indices(1))
    assert not np.array_equal(first.indices(0), Sampler(lengths, 2, 196, seed=1).indices(0))


def test_the_order_is_the_one_of_earlier_versions() -> None:
    drawn = Sampler({0: 5, 3: 4}, window=2, batch=7, seed=11).indices(0)
    assert drawn.tolist() == GOLDEN


GOLDEN = [[0, 2], [3, 1], [0, 3], [0, 1], [3, 0], [3, 2], [0, 0]]  # made by this sampler at version 0.1.0


def test_the_order_is_well_mixed() -> None:
    drawn = Sampler({0: 20_000}, window=1, batch=20_000, seed=5).indices(0)[:, 1].astype(float)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(drawn, np.arange(20_000))[0, 1]) < 0.03


def test_prefetcher_keeps_the_order_and_stops() -> None:
    def produce(step: int) -> int:
        time.sleep(0.002 * (step % 3))
        return step

    with Prefetcher(produce, start=5, stop=25, depth=4, num_threads=3) as items:
        assert list(items) == list(range(5, 25))


def test_prefetcher_is_bounded_and_counts_the_wait() -> None:
    made = []
    gate = threading.Event()

    def produce(step: int) -> int:
        made.append(step)
        gate.wait()
        return step

    with Prefetcher(produce, start=0, stop=100, depth=3, num_threads=8) as items:
        threading.Timer(0.05, gate.set).start()
        assert next(items) == 0
        assert items.waited_seconds >= 0.04
        assert max(made) <= 3


def test_prefetcher_raises_where_the_item_would_have_come() -> None:
    def produce(step: int) -> int:
        if step == 2:
            raise WorldlineError("frame 2 is damaged")
        return step

    with Prefetcher(produce, start=0, stop=5) as items:
        assert [next(items), next(items)] == [0, 1]
        with pytest.raises(WorldlineError, match="frame 2 is damaged"):
            next(items)
