"""Trajectories in HDF5 files, in the two shapes that are about: robomimic's groups and stable-worldmodel's columns.

robomimic: `data/DEMO/obs/CAMERA`, a group an episode. stable-worldmodel: `pixels`, one column over all episodes, with
`ep_offset` and `ep_len`; pictures channels first or last. Reading needs h5py, the extra `worldline[hdf5]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from worldline.core.errors import WorldlineError
from worldline.data.footage import Unusable

INSTALL = 'pip install "worldline[hdf5]"'


def list_episodes(path: Path, camera: str | None) -> list[tuple[str | None, str | None, str]]:
    """Return each episode's name, with a reason and its detail where it cannot be used.

    A file that cannot be used at all is one entry without a name.

    Raises:
        WorldlineError: h5py is not installed, or several cameras are there and none was chosen.
    """
    try:
        with _open(path) as file:
            if "data" in file:
                demos = sorted(file["data"], key=_natural)
                for demo in demos[:1]:
                    _camera(file["data"][demo], camera, path)
                return [(demo, None, "") for demo in demos]
            _column(file, camera, path)
            return [(str(number), None, "") for number in range(len(file["ep_len"]))]
    except Unusable as found:
        return [(None, found.reason, found.detail)]


def read_episode(path: Path, episode: str, camera: str | None) -> UInt8[np.ndarray, "t h w 3"]:
    """Return the pictures of one episode.

    Raises:
        Unusable: they are damaged, or no pictures.
    """
    with _open(path) as file:
        if "data" in file:
            pictures = file["data"][episode]["obs"][_camera(file["data"][episode], camera, path)][:]
        else:
            start, length = (int(file[name][int(episode)]) for name in ("ep_offset", "ep_len"))
            column = _column(file, camera, path)
            if not 0 <= start <= start + length <= len(column):
                raise Unusable("truncated", f"steps {start} to {start + length} of {len(column)}")
            pictures = column[start : start + length]
    if pictures.ndim == 4 and pictures.shape[1] == 3 != pictures.shape[3]:
        pictures = pictures.transpose(0, 2, 3, 1)
    if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8 or not len(pictures):
        raise Unusable("no_video_stream", f"expected (t, h, w, 3) uint8, got {pictures.shape} {pictures.dtype}")
    return np.ascontiguousarray(pictures)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a file and say of what goes wrong inside that the file is to blame, which h5py tells in many ways."""
    try:
        import h5py
    except ModuleNotFoundError:
        raise WorldlineError(f"reading HDF5 needs h5py, which is not installed; run: {INSTALL}") from None
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise Unusable("broken_index", str(error)) from None
    with file:
        try:
            yield file
        except (KeyError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise Unusable("damaged", str(error)) from None


def _camera(demo: Any, wanted: str | None, path: Path) -> str:
    cameras = [name for name, data in demo["obs"].items() if getattr(data, "ndim", 0) == 4]
    return _choose(cameras, wanted, path)


def _column(file: Any, wanted: str | None, path: Path) -> Any:
    if missing := [name for name in ("ep_len", "ep_offset") if name not in file]:
        raise Unusable("no_video_stream", f"neither data/ nor {' and '.join(missing)}")
    return file[_choose([name for name, data in file.items() if getattr(data, "ndim", 0) == 4], wanted, path)]


def _choose(cameras: list[str], wanted: str | None, path: Path) -> str:
    if not cameras:
        raise Unusable("no_video_stream", "no column of pictures")
    if wanted is None and len(cameras) > 1:
        raise WorldlineError(f"{path}: several cameras, choose one with camera=NAME: {', '.join(cameras)}")
    if wanted is not None and wanted not in cameras:
        raise WorldlineError(f"{path}: no camera called {wanted!r}; there are {', '.join(cameras)}")
    return wanted or cameras[0]


def _natural(name: str) -> tuple[int, str]:
    digits = "".join(filter(str.isdigit, name))
    return (int(digits) if digits else -1, name)
