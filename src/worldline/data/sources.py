"""What there is to ingest: an entry for each file or episode, bad ones with their reason, in one order."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from worldline.core.errors import WorldlineError
from worldline.data.footage import Unusable, check_file, looks_like_video

Layout = Literal["auto", "cvdf", "folders", "list", "video", "lerobot", "hdf5"]
VIDEO_NAMES = (
    ".3gp", ".asf", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogg", ".ogv", ".ts",
    ".vob", ".webm", ".wmv",
)  # fmt: skip
LIST_NAMES = (".txt", ".csv", ".list")
HDF5_NAMES = (".h5", ".hdf5")
SPLITS = ("train", "val", "validation", "test")
_KINETICS = re.compile(r"(.{11}_\d{6}_\d{6})(?:_\w+)?")
"""A video's id on its site and the seconds that the clip was cut from."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file, or an episode in one."""

    path: str
    """From the source's root on, in lists as it is written there. Bytes that are not UTF-8 are surrogates."""
    id: str = ""
    """What tells it from others; an entry whose id came before is not used."""
    label: str | None = None
    split: str | None = None
    episode: str | None = None
    """Which episode of the file, or of the dataset."""
    reason: str | None = None
    """Why it cannot be used, if that is known already."""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All entries of a source, and where their paths begin."""

    layout: Layout
    root: Path
    entries: list[Entry]
    passed_over: int = 0
    """Files that are no videos, neither by name nor by their first bytes."""


def list_source(source: str | Path, layout: Layout = "auto", camera: str | None = None) -> Listing:
    """Find what a source holds.

    Raises:
        WorldlineError: it is not there, it holds nothing of that layout, or `auto` cannot tell.
    """
    source = Path(source)
    if not source.exists():
        raise WorldlineError(f"{source}: no such file or folder; source= takes a dataset, a folder or a list of videos")
    layout = _guess(source) if layout == "auto" else layout
    if layout in ("lerobot", "hdf5"):
        listing = _episodes(source, layout, camera)
    elif layout == "list":
        if not source.is_file():
            raise WorldlineError(f"{source}: layout=list takes a file with a path and a label in each line")
        listing = Listing(layout=layout, root=source.parent, entries=list(_lines(source)))
    elif not source.is_dir():
        listing = Listing(layout=layout, root=source.parent, entries=[Entry(path=source.name, id=source.stem)])
    else:
        found, passed_over = _walk(source)
        entries = _cvdf(source, found) if layout == "cvdf" else [_labelled(entry, layout) for entry in found]
        listing = Listing(layout=layout, root=source, entries=entries, passed_over=passed_over)
    if not listing.entries:
        raise WorldlineError(
            f"{source}: nothing to ingest as layout={layout}; choose another layout, or another folder"
        )
    return replace(listing, entries=_without_duplicates(listing.entries))


def printable(path: str) -> str:
    """Write out what no table can hold: the bytes of a file's name that are not UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode()


def as_on_disk(path: str) -> str:
    """Undo `printable`."""
    return re.sub(r"\\udc([89a-f][0-9a-f])", lambda found: chr(0xDC00 + int(found[1], 16)), path)


def _guess(source: Path) -> Layout:
    if source.is_file():
        suffix = source.suffix.lower()
        return "hdf5" if suffix in HDF5_NAMES else "list" if suffix in LIST_NAMES else "video"
    if (source / "meta/info.json").exists():
        return "lerobot"
    if any(path.suffix.lower() in HDF5_NAMES for path in source.iterdir()):
        return "hdf5"
    if _annotations(source):
        return "cvdf"
    folders = [entry for split in (*SPLITS, ".") for entry in _folders(source / split)]
    splits = [source / split for split in SPLITS if (source / split).is_dir()]
    if any(_has_videos(split) for split in splits):
        return "cvdf"
    if not _has_videos(source) and any(_has_videos(folder) for folder in folders if folder.name not in SPLITS):
        return "folders"
    return "video"


def _folders(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []


def _has_videos(folder: Path) -> bool:
    return any(entry.suffix.lower() in VIDEO_NAMES for entry in folder.iterdir())


def _walk(root: Path) -> tuple[list[Entry], int]:
    """Return every video below `root`, links followed, and how many other files there are."""
    found: list[Entry] = []
    passed_over = 0

    def visit(folder: Path, above: tuple[tuple[int, int], ...]) -> None:
        nonlocal passed_over
        try:
            here = folder.stat()
            names = sorted(os.listdir(folder))
        except OSError as error:
            found.append(_entry(root, folder, "unreadable", error.strerror or ""))
            return
        mark = (here.st_dev, here.st_ino)
        if mark in above:
            found.append(_entry(root, folder, "symlink_loop", "it leads to a folder above it"))
            return
        for name in names:
            path = folder / name
            if path.is_dir() and path.suffix.lower() not in VIDEO_NAMES:
                visit(path, (*above, mark))
            elif path.suffix.lower() in VIDEO_NAMES or _is_video(path):
                found.append(_entry(root, path))
            else:
                passed_over += 1

    visit(root, ())
    return found, passed_over


def _is_video(path: Path) -> bool:
    try:
        check_file(path)
        return looks_like_video(path)
    except (Unusable, OSError):
        return path.is_symlink() and not path.exists()  # where it leads, nobody knows: the ledger should


def _entry(root: Path, path: Path, reason: str | None = None, detail: str = "") -> Entry:
    relative = path.relative_to(root).as_posix()
    return Entry(path=relative, id=_kinetics_id(path.stem) or relative, reason=reason, detail=detail)


def _kinetics_id(stem: str) -> str | None:
    matched = _KINETICS.fullmatch(stem)
    return matched[1] if matched else None


def _labelled(entry: Entry, layout: Layout) -> Entry:
    """Read split and class from the folders that an entry lies in."""
    *folders, _ = entry.path.split("/")
    split = folders.pop(0) if folders and folders[0] in SPLITS else None
    return replace(entry, split=split, label="/".join(folders) or None if layout == "folders" else None)


def _annotations(source: Path) -> dict[str, Path]:
    """Return the tables of annotations, by the split in their names."""
    places = [source, source / "annotations"]  # the latter goes before
    tables = [(split, place / f"{split}.csv") for place in places for split in SPLITS]
    return {split: path for split, path in tables if path.is_file()}


def _cvdf(source: Path, found: list[Entry]) -> list[Entry]:
    """Join files with their annotations: an annotation without a file is an entry too, one that is missing."""
    labels: dict[str, tuple[str, str | None]] = {}
    bad: list[Entry] = []
    for split, table in _annotations(source).items():
        relative = table.relative_to(source).as_posix()
        with open(table, newline="", encoding="utf-8", errors="backslashreplace") as file:
            rows = csv.DictReader(file)
            while True:
                where = Entry(path=f"{relative}:{rows.line_num + 1}", split=split)
                try:
                    if (row := next(rows, None)) is None:
                        break
                    where = replace(where, path=f"{relative}:{rows.line_num}", label=row.get("label") or None)
                    start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
                    id_ = f"{row['youtube_id']}_{start:06d}_{end:06d}"
                except (csv.Error, KeyError, TypeError, ValueError, OverflowError) as error:
                    told = f"{type(error).__name__}: {error}"
                    bad.append(replace(where, reason="malformed_entry", detail=told))
                    continue
                if id_ in labels:
                    told = f"annotated before, in {labels[id_][0]}"
                    bad.append(replace(where, id=id_, reason="duplicate_id", detail=told))
                else:
                    labels[id_] = (split, where.label)
    entries = []
    for entry in found:
        first = entry.path.split("/")[0]
        annotated = labels.get(entry.id)
        label = annotated[1] if annotated else None
        entries.append(replace(entry, split=first if first in SPLITS else None, label=label))
    there = {entry.id for entry in found}
    absent = [
        Entry(path=f"{split}/{id_}.mp4", id=id_, label=label, split=split, reason="missing", detail="annotated")
        for id_, (split, label) in labels.items()
        if id_ not in there
    ]
    return sorted([*entries, *absent], key=lambda entry: entry.path) + bad


def _lines(source: Path) -> Iterator[Entry]:
    """Read `path label`, or `path::label` where a path or label has spaces."""
    with open(source, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            text = line.rstrip("\r\n")
            if not text.strip():
                continue
            path, _, label = text.rpartition("::") if "::" in text else text.rpartition(" ")
            label = label.strip()
            if not path.strip() or not label or "\0" in path:
                where = f"{source.name}:{number}"
                yield Entry(path=where, reason="malformed_entry", detail=f"no path and label in {text!r}"[:200])
            else:
                yield Entry(path=path, id=_kinetics_id(Path(path).stem) or path, label=label)


def _without_duplicates(entries: list[Entry]) -> list[Entry]:
    """Mark all but the first entry of each id. A later one never stands in for the first, however bad that is."""
    first: dict[str, str] = {}
    kept = []
    for entry in entries:
        if entry.reason is None and entry.id in first:
            entry = replace(entry, reason="duplicate_id", detail=f"the id of {first[entry.id]}")
        elif entry.id and entry.reason is None:
            first[entry.id] = entry.path
        kept.append(entry)
    return kept


def _episodes(source: Path, layout: Layout, camera: str | None) -> Listing:
    if layout == "lerobot":
        from worldline.data.lerobot import SPLITS as PARTS
        from worldline.data.lerobot import open_dataset

        dataset = open_dataset(source, camera)
        split_of = {episode: name for name in PARTS for episode in dataset.split(name)}
        entries = [
            Entry(path=".", id=str(episode), split=split_of[episode], episode=str(episode))
            for episode in range(dataset.num_episodes)
        ]
        return Listing(layout=layout, root=source, entries=entries)
    from worldline.data.hdf5 import list_episodes

    files = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.suffix.lower() in HDF5_NAMES)
    root = source.parent if source.is_file() else source
    entries = [
        Entry(path=file.name, id=f"{file.name}/{episode}", episode=episode, reason=reason, detail=detail)
        for file in files
        for episode, reason, detail in list_episodes(file, camera)
    ]
    return Listing(layout=layout, root=root, entries=entries)
