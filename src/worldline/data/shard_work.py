"""One shard of an ingest, made in a process of its own, because decoders of video die of some files."""

from __future__ import annotations

import functools
import multiprocessing
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import Float64, UInt8

from worldline.core.errors import WorldlineError
from worldline.core.files import atomic_path, read_json, sha256_file, write_json
from worldline.data.clip_cache import ShardWriter, encode_frame, pack, shard_path
from worldline.data.clip_videos import video_path
from worldline.data.clips import IN_TABLES
from worldline.data.footage import ArrayFootage, Fit, Footage, Unusable, VideoFootage, check_file
from worldline.data.sources import Entry

SAME_BYTES = {"threads": "1", "x264-params": "mbtree=0"}
"""Under which x264 gives the same bytes for the same frames: its macroblock tree gave others every tenth time or so."""
_DEATHS = 2
"""How often a process may die at an entry before the entry is left out."""


def plan_path(root: Path, shard: int) -> Path:
    return root / "plan" / f"{shard // 1000:03d}" / f"{shard % 1000:03d}.json"


def notes_path(root: Path, shard: int) -> Path:
    """Return where a finished shard's rows of all tables are; while it is not there, the shard is not finished."""
    return root / "notes" / f"{shard // 1000:03d}" / f"{shard % 1000:03d}.json"


def num_clips(num_frames: int, options: dict[str, Any]) -> int:
    """Return how many clips that many frames give."""
    span = (options["num_frames"] - 1) * options["stride"] + 1
    return 0 if num_frames < span else (num_frames - span) // hop_of(options) + 1


def hop_of(options: dict[str, Any]) -> int:
    return int(options["hop"] or options["num_frames"] * options["stride"])


def make_shard(root: Path, shard: int, deaths: dict[int, int], begin: Callable[[int], None]) -> None:
    """Ingest the entries of a shard and write it, then its notes. `begin` is told each item's number beforehand.

    Args:
        deaths: signal by item: entries at which a process has died too often.
    """
    plan = read_json(root / "plan.json")
    options = plan["identity"]
    entries = [Entry(**row) for row in read_json(plan_path(root, shard))]
    first = shard * int(options["items_per_shard"])
    episodes: list[dict[str, Any]] = []
    ledger: list[dict[str, Any]] = []
    reader = _Reader(plan)
    if options["codec"] in IN_TABLES:
        with ShardWriter(shard_path(root, shard)) as writer:
            for item, entry in enumerate(entries, start=first):
                begin(item)
                _ingest(item, entry, reader, _TableSink(writer, item, options), deaths, episodes, ledger)
        index: list[Any] = [list(row) for row in writer.index.tolist()]
    else:
        index = []
        for item, entry in enumerate(entries, start=first):
            begin(item)
            encoded = video_path(root, item) if options["codec"] == "h264" else None
            sink = _VideoSink(encoded, options)
            _ingest(item, entry, reader, sink, deaths, episodes, ledger)
            index += sink.stamps
    write_json(notes_path(root, shard), {"episodes": episodes, "ledger": ledger, "index": index})


def _ingest(
    item: int,
    entry: Entry,
    reader: _Reader,
    sink: _TableSink | _VideoSink,
    deaths: dict[int, int],
    episodes: list[dict[str, Any]],
    ledger: list[dict[str, Any]],
) -> None:
    """Take what there is of one entry."""
    row = {"item": item, "path": entry.path, "episode": entry.episode, "id": entry.id}
    row |= {"label": entry.label, "split": entry.split}
    footage, size, digest, kept = Footage(), None, None, 0
    found = None if entry.reason is None else Unusable(entry.reason, entry.detail)
    if found is None and item in deaths:
        found = Unusable("crashes_decoder", f"{_DEATHS} processes ended by signal {deaths[item]}")
    if found is None:
        try:
            size, digest = reader.identify(entry)
            footage = reader.open(entry)
            kept = sink.take(footage)
            if not kept:
                found = Unusable("too_short", f"{footage.num_frames} frames, a clip spans {sink.span}")
        except Unusable as problem:
            found, kept = problem, sink.finish()
    if kept:
        mean, std = sink.statistics()
        episodes.append(
            {
                **row,
                "num_clips": kept,
                "num_frames": footage.num_frames,
                "rate": footage.rate,
                "width": footage.width,
                "height": footage.height,
                "seekable": bool(footage.seekable),
                "size_bytes": size,
                "sha256": digest,
                "mean": mean.tolist(),
                "std": std.tolist(),
            }
        )
    if found is not None:
        promised = None if footage.declared is None else num_clips(footage.declared, sink.options)
        ledger.append(
            {
                **row,
                "reason": found.reason,
                "detail": found.detail,
                "size_bytes": size,
                "sha256": digest,
                "decodable_frames": footage.num_frames,
                "clips_kept": kept,
                "clips_lost": None if promised is None else max(0, promised - kept),
            }
        )


class _Reader:
    """Opens entries, whatever the source; what several of them lie in is opened once."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._layout, self._root, self._camera = plan["layout"], Path(plan["root"]), plan["identity"]["camera"]
        self._digests: dict[str, str] = {}

    def identify(self, entry: Entry) -> tuple[int | None, str]:
        """Return size and SHA-256 of the file that an entry lies in; of a dataset, its fingerprint."""
        if self._layout == "lerobot":
            return None, str(_dataset(self._root, self._camera).fingerprint)
        path = self._root / entry.path
        check_file(path)
        if entry.path not in self._digests:
            try:
                self._digests = {entry.path: sha256_file(path)}
            except OSError as error:
                raise Unusable("unreadable", error.strerror or "") from None
        return path.stat().st_size, self._digests[entry.path]

    def open(self, entry: Entry) -> Footage:
        if self._layout == "lerobot":
            dataset = _dataset(self._root, self._camera)
            try:
                frames = dataset.read_episode(int(str(entry.episode))).frames
            except WorldlineError as error:
                raise Unusable("damaged", str(error)) from None
            return ArrayFootage(frames, 1.0 / dataset.spec.step_seconds)
        if self._layout == "hdf5":
            from worldline.data.hdf5 import read_episode

            return ArrayFootage(read_episode(self._root / entry.path, str(entry.episode), self._camera), 1.0)
        return VideoFootage(self._root / entry.path)


@functools.lru_cache(maxsize=1)
def _dataset(root: Path, camera: str | None) -> Any:
    """Open a dataset once for all shards of a process: its files are hashed when they are first read."""
    from worldline.data.lerobot import open_dataset

    return open_dataset(root, camera)


class _Sink:
    """Sees every frame once, and makes those square that belong to a clip."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self._count, self._stride, self._hop = int(options["num_frames"]), int(options["stride"]), hop_of(options)
        self.span = (self._count - 1) * self._stride + 1
        self._fit = Fit(int(options["image_size"]))
        self._sums = np.zeros((2, 3), dtype=np.uint64)
        self._pixels = 0
        self._clips = 0

    def take(self, footage: Footage) -> int:
        """Take all frames; return how many clips they gave.

        Raises:
            Unusable: as the footage does; clips that were whole by then are taken.
        """
        for index, (time, stamp, frame) in enumerate(footage.frames()):
            self.see(index, time, stamp, frame, footage)
            begins = index % self._hop == 0
            backs = range(0, min(self.span, index + 1), self._stride)
            if any((index - back) % self._hop == 0 for back in backs):
                picture = self._fit(frame)
                values = picture.reshape(-1, 3).astype(np.uint32)
                self._sums += np.stack([values.sum(0, dtype=np.uint64), (values * values).sum(0, dtype=np.uint64)])
                self._pixels += len(values)
                self.keep(index, picture)
            if begins:
                self.begin(index, time, stamp)
            if index + 1 >= self.span and (index + 1 - self.span) % self._hop == 0:
                self._clips += 1
                self.end(index + 1 - self.span)
        return self.finish()

    def statistics(self) -> tuple[Float64[np.ndarray, " 3"], Float64[np.ndarray, " 3"]]:
        """Return mean and standard deviation of each colour, in [0, 1]."""
        total, squares = self._sums.astype(np.float64) / self._pixels
        return total / 255, np.sqrt(np.maximum(squares - total * total, 0)) / 255

    def see(self, index: int, time: float, stamp: int, frame: av.VideoFrame, footage: Footage) -> None: ...

    def keep(self, index: int, picture: UInt8[np.ndarray, "s s 3"]) -> None: ...

    def begin(self, index: int, time: float, stamp: int) -> None: ...

    def end(self, start: int) -> None: ...

    def finish(self) -> int:
        return self._clips


class _TableSink(_Sink):
    """Writes clips into a shard as soon as they are whole."""

    def __init__(self, writer: ShardWriter, item: int, options: dict[str, Any]) -> None:
        super().__init__(options)
        self._writer, self._item = writer, item
        self._codec, self._quality = str(options["codec"]), int(options["quality"])
        self._frames: dict[int, bytes] = {}
        self._times: dict[int, float] = {}

    def keep(self, index: int, picture: UInt8[np.ndarray, "s s 3"]) -> None:
        self._frames[index] = encode_frame(picture, self._codec, self._quality)

    def begin(self, index: int, time: float, stamp: int) -> None:
        self._times[index] = time

    def end(self, start: int) -> None:
        frames = [self._frames[start + place * self._stride] for place in range(self._count)]
        self._writer.add(self._item, start, self._times.pop(start), pack(frames, self._codec))
        self._frames = {index: frame for index, frame in self._frames.items() if index >= start + self._hop}


class _VideoSink(_Sink):
    """Notes the time stamps that clips begin at; with a path, in a video that is encoded again."""

    def __init__(self, path: Path | None, options: dict[str, Any]) -> None:
        super().__init__(options)
        self._path = path
        self._begun: list[int] = []
        self.stamps: list[int] = []
        self._output: Any = None

    def see(self, index: int, time: float, stamp: int, frame: av.VideoFrame, footage: Footage) -> None:
        if self._path is None:
            return
        if self._output is None:
            self._atomic = atomic_path(self._path)
            self._temporary = self._atomic.__enter__()
            self._output = av.open(str(self._temporary), "w", format="mp4")
            rate = Fraction(footage.rate or 25).limit_denominator(1001)
            options = {"crf": str(self.options["crf"]), "g": str(self.options["gop"]), **SAME_BYTES}
            self._stream: Any = self._output.add_stream("libx264", rate=rate, options=options)
            self._stream.width, self._stream.height = self._fit.scaled(frame, even=True)
            self._stream.pix_fmt, self._unit = "yuv420p", 1 / rate
        scaled = self._fit.reformat(frame, self._stream.width, self._stream.height, "yuv420p")
        scaled.pts, scaled.time_base = index, self._unit
        self._output.mux(self._stream.encode(scaled))

    def begin(self, index: int, time: float, stamp: int) -> None:
        self._begun.append(index if self._path is not None else stamp)

    def finish(self) -> int:
        if self._output is not None and (video := self._path) is not None:
            self._output.mux(self._stream.encode())
            unit = self._stream.time_base  # as the container has it, now that it is written
            self._output.close()
            self._atomic.__exit__(None, None, None)
            step = round(self._unit / unit)
            self._begun = [index * step for index in self._begun]
            self._output = None
            if not self._clips:
                video.unlink()
        self.stamps = self._begun[: self._clips]
        return self._clips


class ShardMaker:
    """Makes shards in a process that it starts again when it dies; an entry that kills two is left out, and ledgered.

    The process is a fresh interpreter, so that a caller's script needs no main guard, in a session of its own: Ctrl-C
    reaches the caller only. It ends when the caller does.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Any = None
        self._closed = False

    def __call__(self, shard: int) -> None:
        """Make one shard.

        Raises:
            WorldlineError: processes die before they begin, or a mistake that a user can mend came up.
        """
        counts: Counter[int] = Counter()
        deaths: dict[int, int] = {}
        while True:
            if self._closed:
                raise WorldlineError("ingest was stopped; the same command goes on")
            if self._process is None:
                self._start()
            item = -1
            try:
                self._pipe.send((self._root, shard, deaths))
                while (answer := self._pipe.recv())[0] == "begin":
                    item = answer[1]
            except (EOFError, ConnectionError):
                signal = self._end()
                counts[item] += 1
                if counts[item] >= _DEATHS:
                    if item < 0 and not self._closed:
                        raise WorldlineError(
                            "ingest: worker processes die at their start (out of memory?); what is finished is kept, "
                            "run the same command again"
                        ) from None
                    deaths[item] = signal
                continue
            if answer[1] is not None:
                raise answer[1]
            return

    def stop(self) -> None:
        """Let the call that another thread is in fail soon."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End the process; no call may be going on."""
        self._closed = True
        self._end()

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            command = f"from worldline.data.shard_work import work; work({theirs.fileno()})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", command], pass_fds=[theirs.fileno()], start_new_session=True
            )
        self._pipe = ours

    def _end(self) -> int:
        """Clear away a process that has ended, or is about to; return the signal that ended it."""
        process, self._process = self._process, None
        if process is None:
            return 0
        self._pipe.close()
        return abs(process.wait())


def work(descriptor: int) -> None:
    """Live as a worker: make the shards that the other end of the pipe asks for, until it closes."""
    with Connection(descriptor) as pipe:
        try:
            while True:
                root, shard, deaths = pipe.recv()
                problem: Exception | None = None
                try:
                    make_shard(root, shard, deaths, lambda item: pipe.send(("begin", item)))
                except ConnectionError:
                    return
                except Exception as error:  # the other end raises it
                    problem = error
                pipe.send(("done", problem))
        except (EOFError, ConnectionError):
            return  # the other end has closed the pipe, or is gone
