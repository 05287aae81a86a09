"""Which clips make global batch number `step`: a pure function in memory that does not grow with the data.

Resuming is asking for the next step, and so is going on with another number of ranks: each takes its share of the same
global batch. Unlike `sampler`, which sorts an array of all windows, the order is computed place by place.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int64, UInt64

from worldline.core.errors import WorldlineError
from worldline.core.seeding import seed_for
from worldline.data.sampler import mix

_ROUNDS = 8
_PERIOD = 10_000
"""Places, at most, after which every dataset of a mixture has had its exact share; weights are rounded to one."""


class Order:
    """An endless sequence of clip ids, in batches; with several datasets, a mixture of them.

    A dataset's clips come in epochs: each clip once an epoch, in an order that only (seed, dataset, epoch) decides.
    Which dataset the next place belongs to is drawn without replacement from a period in which each has its share, so
    that weights hold exactly over every period. A batch may straddle epochs; in a mixture, the last clips of an epoch
    may change places with the first of the next, within a period.

    Args:
        sizes: clips of each dataset; ids count through them one after the other, as in `join_clips`.
        batch: clips of a global batch, over all ranks.
        weights: share of each dataset; they need not add up to 1. None is in proportion to the sizes.

    Raises:
        WorldlineError: no clips, no batch, or weights that are not positive, one for each dataset.
    """

    def __init__(
        self, sizes: int | Sequence[int], batch: int, seed: int, weights: Sequence[float | int] | None = None
    ) -> None:
        self.sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
        self.batch_size, self.seed = batch, seed
        if batch < 1 or not self.sizes or min(self.sizes) < 1:
            raise WorldlineError(f"an order needs clips and a batch of at least 1, got {self.sizes} and {batch}")
        self._quotas = _quotas(self.sizes if weights is None else tuple(weights), len(self.sizes))
        self._period = sum(self._quotas)
        self._bounds = np.cumsum(self._quotas).astype(np.uint64)
        self._firsts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)
        self._turns = seed_for(seed, "turns")
        self._shuffles = [seed_for(seed, "epoch", dataset) for dataset in range(len(self.sizes))]

    @property
    def shares(self) -> tuple[float, ...]:
        """Each dataset's share of all places, as it really is."""
        return tuple(quota / self._period for quota in self._quotas)

    @property
    def steps_per_epoch(self) -> float:
        """Steps after which every clip of every dataset has come at least once."""
        return max(size / (share * self.batch_size) for size, share in zip(self.sizes, self.shares, strict=True))

    def batch(self, step: int) -> Int64[np.ndarray, " global_batch"]:
        """Return the clip ids of global batch number `step`, counted from 0."""
        return self._draw(step)[0]

    def share(self, step: int, rank: int, ranks: int) -> Int64[np.ndarray, " n"]:
        """Return this rank's part of a global batch; the parts in the order of ranks are the whole of it."""
        return self.batch(step)[self._part(rank, ranks)]

    def seeds(self, step: int, rank: int = 0, ranks: int = 1) -> UInt64[np.ndarray, " n"]:
        """Return a seed for each clip of `share`, of (seed, epoch, clip): what augmentation is to be drawn from.

        It follows the clip, whichever rank, worker or batch it comes to.
        """
        ids, epochs = (values[self._part(rank, ranks)] for values in self._draw(step))
        return mix(ids.astype(np.uint64), mix(epochs.astype(np.uint64), seed_for(self.seed, "augment")))

    def _part(self, rank: int, ranks: int) -> slice:
        if not 0 <= rank < ranks:
            raise WorldlineError(f"rank must be 0 to ranks - 1, got {rank} of {ranks}")
        return slice(self.batch_size * rank // ranks, self.batch_size * (rank + 1) // ranks)

    def _draw(self, step: int) -> tuple[Int64[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
        """Return ids and the epochs that they belong to."""
        if step < 0:
            raise WorldlineError(f"steps count from 0, got {step}")
        places = step * self.batch_size + np.arange(self.batch_size, dtype=np.uint64)
        cycle, slot = np.divmod(places, np.uint64(self._period))
        slot = permute(slot, self._period, mix(cycle, self._turns))
        dataset = np.searchsorted(self._bounds, slot, side="right")
        ids, epochs = np.empty(self.batch_size, dtype=np.int64), np.empty(self.batch_size, dtype=np.int64)
        for which, (size, quota) in enumerate(zip(self.sizes, self._quotas, strict=True)):
            here = dataset == which
            before = slot[here] - (self._bounds[which] - np.uint64(quota))
            epoch, within = np.divmod(cycle[here] * np.uint64(quota) + before, np.uint64(size))
            ids[here] = permute(within, size, mix(epoch, self._shuffles[which])).astype(np.int64) + self._firsts[which]
            epochs[here] = epoch
        return ids, epochs


def permute(values: UInt64[np.ndarray, " b"], size: int, keys: UInt64[np.ndarray, " b"]) -> UInt64[np.ndarray, " b"]:
    """Map each of `values`, under `size`, to its place in the permutation of `range(size)` that its key picks.

    Values are written as pairs (left, right) of a rectangle a little larger than `size`; each round adds a hash of one
    half to the other. Results outside go around again until they are inside (cycle walking): still a bijection.
    Source: the Feistel construction with modular addition, Black and Rogaway, CT-RSA 2002.
    """
    width = math.isqrt(size - 1) + 1
    a, b = np.uint64(-(-size // width)), np.uint64(width)
    result, todo = values.copy(), np.arange(len(values))
    rounds = [mix(keys, number) for number in range(_ROUNDS)]
    while len(todo):
        left, right = np.divmod(result[todo], b)
        for number in range(0, _ROUNDS, 2):
            left = (left + mix(right, rounds[number][todo]) % a) % a
            right = (right + mix(left, rounds[number + 1][todo]) % b) % b
        result[todo] = left * b + right
        todo = todo[result[todo] >= np.uint64(size)]
    return result


def batch_hash(ids: Int64[np.ndarray, " n"]) -> str:
    """Return 16 hex digits that tell batches apart, by their ids and the order of them, for a log of what was read."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i8").tobytes(), digest_size=8).hexdigest()


def _quotas(weights: Sequence[float | int], count: int) -> tuple[int, ...]:
    """Return how many places of a period each dataset has, by largest remainders, in lowest terms."""
    if len(weights) != count or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise WorldlineError(f"expected a positive weight for each of {count} datasets, got {list(weights)}")
    if count == 1:
        return (1,)
    # as they were written: 0.1 is a tenth
    exact = [Fraction(str(weight)) for weight in weights]
    ideal = [_PERIOD * weight / sum(exact) for weight in exact]
    quotas = [math.floor(places) for places in ideal]
    by_remainder = sorted(range(count), key=lambda i: quotas[i] - ideal[i])
    for i in by_remainder[: _PERIOD - sum(quotas)]:
        quotas[i] += 1
    if min(quotas) == 0:
        raise WorldlineError(f"weights {list(weights)}: the smallest share must be at least 1 in {_PERIOD:,}")
    divisor = math.gcd(*quotas)
    return tuple(quota // divisor for quota in quotas)
