"""Which clips a run never saw: `unseen.parquet` lists them all, by file and reason.

Never seen is what ingest could not take (the reasons of its ledger), what could not be read whenever its turn came
(`not_read`), and what had no turn in a run shorter than an epoch (`no_turn`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from worldline.data.clips import Record
from worldline.data.order import Order

UNSEEN = "unseen.parquet"
NOT_READ, NO_TURN = "not_read", "no_turn"
_TEXT, _INT = pa.string(), pa.int64()
SCHEMA = pa.schema(
    {
        "data": _TEXT, "item": _INT, "path": _TEXT, "episode": _TEXT, "first": _INT, "clips": _INT, "reason": _TEXT,
        "detail": _TEXT,
    }
)  # fmt: skip
"""A row for clips `first` to `first + clips - 1` of an entry, counted from 0; `clips` is null where nobody knows how
many there would have been."""
_LOOK = 1000
_SHOWN = 20


def entry_of(record: Record, clip: int) -> dict[str, Any]:
    """Return the entry that a clip is of, by name, and its number in it."""
    row = int(np.searchsorted(record.episodes["first_clip"].to_numpy(), clip, side="right")) - 1
    found: dict[str, Any] = record.episodes.slice(row, 1).to_pylist()[0]
    number = clip - found.pop("first_clip")
    return {**found, "number": number}


def list_unseen(record: Record, order: Order, steps: int, lost: Sequence[dict[str, Any]]) -> pa.Table:
    """Return all that updates 0 to `steps - 1` never saw.

    `lost` are the lines of `lost.jsonl`, whose steps count from 1.
    """
    entry = ("data", "item", "path", "episode")
    renamed = {"first": "clips_kept", "clips": "clips_lost"}
    at_ingest = pa.table({name: record.ledger[renamed.get(name, name)] for name in SCHEMA.names})
    ids = np.flatnonzero(~_seen(order, steps, lost))
    details = {each["clip"]: each["reason"] for each in lost}
    reasons = {reason: number for number, reason in enumerate(["", *dict.fromkeys(details.values())])}
    unread = np.intersect1d(ids, np.array(list(details), dtype=np.int64))
    why = np.zeros(len(ids), dtype=np.int64)
    why[np.searchsorted(ids, unread)] = [reasons[details[clip]] for clip in unread.tolist()]
    firsts = record.episodes["first_clip"].to_numpy()
    episodes = np.searchsorted(firsts, ids, side="right") - 1
    changes = [np.diff(values, prepend=-2) != same for values, same in ((ids, 1), (episodes, 0), (why, 0))]
    begins = np.flatnonzero(np.logical_or.reduce(changes))
    rows = record.episodes.take(episodes[begins])
    columns = {
        **{name: rows[name] for name in entry},
        "first": ids[begins] - firsts[episodes[begins]],
        "clips": np.diff(begins, append=len(ids)),
        "reason": np.where(why[begins] > 0, NOT_READ, NO_TURN),
        "detail": pa.array(list(reasons)).take(why[begins]),
    }
    found = pa.table(columns).cast(SCHEMA)
    no_turn = pc.equal(found["reason"], NO_TURN)
    return pa.concat_tables([found.filter(pc.invert(no_turn)), at_ingest.cast(SCHEMA), found.filter(no_turn)])


def _seen(order: Order, steps: int, lost: Sequence[dict[str, Any]]) -> Bool[np.ndarray, " n"]:
    seen = np.zeros(sum(order.sizes), dtype=bool)
    missed: dict[int, list[int]] = defaultdict(list)
    for each in lost:
        missed[each["step"] - 1].append(each["clip"])
    for step in range(steps):
        ids = order.batch(step)
        seen[ids[~np.isin(ids, missed[step])] if step in missed else ids] = True
        if step % _LOOK == 0 and seen.all():
            break
    return seen


def sum_up(unseen: pa.Table) -> dict[str, Any]:
    """Return entries and clips by reason (null where nobody knows), and the first rows but for those without a turn."""
    entries = unseen.group_by(["reason", "data", "item"], use_threads=False).aggregate([("clips", "sum")])
    sums = entries.group_by("reason", use_threads=False).aggregate([("clips_sum", "sum"), ([], "count_all")])
    shown = unseen.filter(pc.not_equal(unseen["reason"], NO_TURN))
    return {
        "by_reason": {
            row["reason"]: {"entries": row["count_all"], "clips": row["clips_sum_sum"]} for row in sums.to_pylist()
        },
        "rows": len(unseen),
        "shown": shown.slice(0, _SHOWN).to_pylist(),
    }


def told(summary: dict[str, Any]) -> str:
    """Say it in one line."""
    parts = []
    for reason, row in summary["by_reason"].items():
        clips = "nobody knows how many" if row["clips"] is None else row["clips"]
        parts.append(f"{reason} ({clips} clips of {row['entries']} entries)")
    return ", ".join(parts)
