"""Clips of a fixed number of frames, by number: what training on video reads, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json

CARD = "clips.json"
VERSION = 1
CODECS = ("jpeg", "raw", "h264", "source")
IN_TABLES = ("jpeg", "raw")
"""Codecs whose clips lie in the Parquet files of a cache; the others are decoded out of videos."""


class Record(NamedTuple):
    """Where clips come from, and what ingest could not take; `data` names the folder that a row is of."""

    episodes: pa.Table
    """`data`, `item`, `path`, `episode`, and `first_clip`, which rises."""
    ledger: pa.Table
    """`data`, `item`, `path`, `episode`, `reason`, `detail`, `clips_kept`, `clips_lost`."""


@runtime_checkable
class Clips(Protocol):
    """Numbered clips, each of `num_frames` frames, `image_size` pixels square.

    Several threads may read at once. Another process, to which they are pickled, opens them again.
    """

    num_clips: int
    fingerprint: str
    """A hash of the content: what the clips are made of and how."""
    num_frames: int
    image_size: int

    def read(self, ids: Int64[np.ndarray, " b"]) -> UInt8[np.ndarray, "b t h w 3"]:
        """Return the clips with these numbers, a pure function of them.

        Raises:
            WorldlineError: no such number, or what is read is damaged or missing.
        """
        ...

    def record(self) -> Record:
        """Return where the clips come from.

        Raises:
            WorldlineError: a table is missing.
        """
        ...


def open_clips(path: str | Path) -> Clips:
    """Open what `worldline ingest` wrote.

    Raises:
        WorldlineError: there is nothing of the kind, it is of another version, or files of it are missing.
    """
    path = Path(path)
    card = read_card(path)
    if card["codec"] in IN_TABLES:
        from worldline.data.clip_cache import CachedClips

        return CachedClips(path, card)
    from worldline.data.clip_videos import VideoClips

    return VideoClips(path, card)


def read_card(path: Path) -> dict[str, Any]:
    """Read and check what a folder of clips says of itself."""
    if not (path / CARD).exists():
        raise WorldlineError(f"{path}: no clips here (expected {CARD}); make them with `worldline ingest`")
    card = read_json(path / CARD)
    wanted = ("version", "codec", "num_clips", "num_frames", "image_size", "fingerprint")
    if not isinstance(card, dict) or (missing := [key for key in wanted if key not in card]):
        lacking = ", ".join(missing) if isinstance(card, dict) else "everything"
        raise WorldlineError(f"{path / CARD}: {lacking} is missing; ingest again")
    if card["version"] != VERSION or card["codec"] not in CODECS:
        raise WorldlineError(
            f"{path / CARD}: expected version {VERSION} and one of {', '.join(CODECS)}, got version {card['version']} "
            f"and {card['codec']!r}; ingest again, or take the worldline that wrote it"
        )
    return card


def without_files(card: dict[str, Any]) -> dict[str, Any]:
    """Return what an open folder of clips keeps of its card: all but the hash of each file, of which there are many."""
    return {key: value for key, value in card.items() if key != "files"}


def read_record(path: Path) -> Record:
    """Read where the clips of a folder come from."""
    entry = ["item", "path", "episode"]
    columns = {"episodes": [*entry, "first_clip"], "ledger": [*entry, "reason", "detail", "clips_kept", "clips_lost"]}
    tables = {}
    for name, wanted in columns.items():
        table = read_table(path / f"{name}.parquet", wanted)
        tables[name] = table.append_column("data", pa.repeat(str(path), len(table)))
    return Record(**tables)


def read_table(path: Path, columns: list[str]) -> pa.Table:
    """Read columns of a table that ingest wrote."""
    try:
        return pq.read_table(path, columns=columns)
    except FileNotFoundError:
        raise WorldlineError(f"{path}: missing; copy the clips again") from None
    except (OSError, pa.ArrowException) as error:
        told = " ".join(str(error).split())
        raise WorldlineError(f"{path}: not a table ({told}); copy the clips again") from None


def load_array(path: Path, mapped: bool) -> np.ndarray:
    """Load an index that ingest wrote, or map it into memory."""
    try:
        return np.asarray(np.load(path, mmap_mode="r" if mapped else None))
    except FileNotFoundError:
        raise WorldlineError(f"{path}: missing; copy the clips again") from None
    except (ValueError, EOFError) as error:
        raise WorldlineError(f"{path}: not an index ({error}); copy the clips again") from None


def check_ids(ids: Int64[np.ndarray, " b"], num_clips: int, what: object) -> None:
    """Refuse numbers that no clip has."""
    if len(ids) and (ids.min() < 0 or ids.max() >= num_clips):
        raise WorldlineError(
            f"{what}: there are {num_clips} clips, counted from 0; asked for {ids.min()} to {ids.max()}"
        )


class JoinedClips:
    """Several sets of clips as one, their numbers one after the other: what the ids of a mixture's `Order` mean.

    Raises:
        WorldlineError: they differ in the number of frames or the size of pictures.
    """

    def __init__(self, parts: Sequence[Clips]) -> None:
        shapes = {(part.num_frames, part.image_size) for part in parts}
        if len(shapes) != 1:
            told = ", ".join(f"{frames} frames of {size} px" for frames, size in sorted(shapes))
            raise WorldlineError(f"clips that are mixed must have one shape, got {told or 'none'}; ingest them alike")
        self.parts = tuple(parts)
        ((self.num_frames, self.image_size),) = shapes
        self.sizes = tuple(part.num_clips for part in parts)
        self.num_clips = sum(self.sizes)
        self.fingerprint = hashlib.sha256("\n".join(part.fingerprint for part in parts).encode()).hexdigest()
        self._firsts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    def read(self, ids: Int64[np.ndarray, " b"]) -> UInt8[np.ndarray, "b t h w 3"]:
        check_ids(ids, self.num_clips, "joined clips")
        clips = np.empty((len(ids), self.num_frames, self.image_size, self.image_size, 3), dtype=np.uint8)
        which = np.searchsorted(self._firsts, ids, side="right") - 1
        for number in np.unique(which).tolist():
            here = which == number
            clips[here] = self.parts[number].read(ids[here] - self._firsts[number])
        return clips

    def record(self) -> Record:
        parts, episodes = [part.record() for part in self.parts], []
        for part, first in zip(parts, self._firsts[:-1].tolist(), strict=True):
            place = part.episodes.column_names.index("first_clip")
            numbers = pc.add(part.episodes["first_clip"], first)
            episodes.append(part.episodes.set_column(place, "first_clip", numbers))
        return Record(pa.concat_tables(episodes), pa.concat_tables([part.ledger for part in parts]))
