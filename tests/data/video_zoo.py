"""Videos for the tests: good ones in many containers, and broken ones, each with the reason the ledger should give."""

import io
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from worldline.data.shard_work import SAME_BYTES

FRAMES = 24


def pictures(count: int = FRAMES, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Return smooth colours that drift, with some noise so that every frame has bytes of its own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [
        np.stack([np.sin(x / 9 + t / 5 + c + seed) + np.cos(y / 7 - t / 8) for c in range(3)], -1) for t in range(count)
    ]
    return np.clip(128 + 50 * np.stack(waves) + rng.normal(0, 12, (count, height, width, 3)), 0, 255).astype(np.uint8)


def encode(
    frames: np.ndarray, form: str = "mp4", codec: str = "libx264", options: dict[str, str] | None = None, gop: int = 8
) -> bytes:
    """Return a video's bytes; `options` are the container's."""
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=form, options=options or {}) as container:
            stream: Any = container.add_stream(codec, rate=Fraction(25), options={"g": str(gop), **SAME_BYTES})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        return Path(file.name).read_bytes()


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        for start in range(0, 16000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@dataclass(frozen=True)
class Broken:
    """A broken file: how it comes to lie somewhere, why it is refused, and how many good frames it begins with."""

    name: str
    make: Callable[[Path], object]
    reason: str
    frames: int | None = 0
    """None where it depends on the decoder's delay."""


def good_files() -> dict[str, bytes]:
    front = {"movflags": "faststart"}
    return {
        "abcdefghij0_000000_000010.mp4": encode(pictures(seed=1), options=front),
        "abcdefghij1_000005_000015.mp4": encode(pictures(seed=2)),
        "abcdefghij2_000000_000010.mkv": encode(pictures(seed=3), "matroska"),
        "abcdefghij3_000000_000010.avi": encode(pictures(seed=4), "avi", "mjpeg"),
        "abcdefghij4_000000_000010.mpg": encode(pictures(seed=5), "mpeg", "mpeg2video"),
        "abcdefghij5_000000_000010.ts": encode(pictures(seed=6), "mpegts"),
        'it\'s "good", a b.mp4': encode(pictures(seed=7)),
        "looks like.jpg": encode(pictures(seed=8)),
    }


def broken_files() -> list[Broken]:
    """Return over 30 ways to be broken."""
    frames = pictures()
    front, back = encode(frames, options={"movflags": "faststart"}), encode(frames)
    avi, mkv, mpg = encode(frames, "avi", "mjpeg"), encode(frames, "matroska"), encode(frames, "mpeg", "mpeg2video")
    many = encode(pictures(60), options={"movflags": "faststart"})
    data = front.index(b"mdat") + 4
    noise = np.random.default_rng(0).bytes(4096)

    def cut(whole: bytes, share: float) -> bytes:
        """Keep a share of what follows the index."""
        start = whole.index(b"mdat") + 4 if b"ftyp" in whole[:16] else 0
        return whole[: start + int((len(whole) - start) * share)]

    def patched(whole: bytes, at: int, new: bytes) -> bytes:
        return whole[:at] + new + whole[at + len(new) :]

    def picture() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(frames[0]).save(buffer, "JPEG")
        return buffer.getvalue()

    def cover() -> bytes:
        """Return sound with a picture on its cover, which is no video."""
        buffer = io.BytesIO()
        source = av.open(io.BytesIO(sound()))
        with av.open(buffer, "w", format="mp4") as container:
            audio = container.add_stream_from_template(source.streams.audio[0])
            image: Any = container.add_stream("mjpeg", rate=1)
            image.width, image.height, image.pix_fmt = 64, 48, "yuvj420p"
            image.disposition = av.stream.Disposition.attached_pic
            for packet in source.demux(audio=0):
                if packet.dts is not None:
                    packet.stream = audio
                    container.mux(packet)
            container.mux(image.encode(av.VideoFrame.from_ndarray(frames[0], format="rgb24")))
        return buffer.getvalue()

    def two_sizes() -> bytes:
        with tempfile.NamedTemporaryFile() as file:
            with av.open(file.name, "w", format="avi") as container:
                stream: Any = container.add_stream("mjpeg", rate=25)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
                for shown in (frames, pictures(height=96, width=128)):
                    coder: Any = av.CodecContext.create("mjpeg", "w")
                    coder.height, coder.width = shown.shape[1:3]
                    coder.pix_fmt, coder.time_base = "yuvj420p", Fraction(1, 25)
                    for number, frame in enumerate(shown, start=0 if shown is frames else FRAMES):
                        image = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuvj420p")
                        image.pts, image.time_base = number, Fraction(1, 25)
                        for packet in coder.encode(image):
                            packet.stream = stream
                            container.mux(packet)
            return Path(file.name).read_bytes()

    def another_stream() -> bytes:
        """Return one whose last picture belongs to a stream that nothing announced."""
        whole = bytearray(encode(frames, "mpegts"))
        starts = [at for at in range(0, len(whole), 188) if whole[at + 1 : at + 3] == b"\x41\x00"]
        whole[starts[-1] + 2] = 36
        return bytes(whole)

    def bytes_of(content: bytes) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(content)

    middle = data + int((len(front) - data) * 0.6)
    offsets = front.index(b"stco") + 12
    plain = encode(frames[:12], "avi", "rawvideo")
    bitmap, length = plain.index(b"strf") + 8, avi.index(b"strh") + 8 + 32
    files = {
        "empty.mp4": (b"", "empty", 0),
        "text.mp4": (b"404 Not Found\n" * 40, "not_a_video", 0),
        "picture.mp4": (picture(), "not_a_video", 0),
        "noise.webm": (noise, "not_a_video", 0),
        "zeros.avi": (bytes(5000), "not_a_video", 0),
        "cut without index.mp4": (back[: len(back) // 2], "broken_index", 0),
        "cut in the index.mp4": (front[:300], "broken_index", 0),
        "first box only.mp4": (front[:32], "broken_index", 0),
        "huge first box.mp4": (patched(front, 0, b"\x7f\xff\xff\xff"), "broken_index", 0),
        "noise for index.mp4": (patched(front, front.index(b"moov") + 4, noise[:600]), "broken_index", 0),
        "riff alone.avi": (avi[:12], "broken_index", 0),
        "head alone.mkv": (mkv[:40], "broken_index", 0),
        "cut at 5%.mp4": (cut(front, 0.02), "no_frames", 0),
        "cut at 30%.mp4": (cut(front, 0.3), "truncated", None),
        "cut at 60%.mp4": (cut(front, 0.6), "truncated", None),
        "cut at 95%.mp4": (cut(front, 0.95), "truncated", None),
        "last byte lost.mp4": (front[:-1], "truncated", None),
        "cut.avi": (avi[: int(len(avi) * 0.6)], "truncated", None),
        "cut.mkv": (mkv[: int(len(mkv) * 0.6)], "truncated", None),
        "cut.mpg": (mpg[: int(len(mpg) * 0.6)], "truncated", None),
        "index to nowhere.mp4": (patched(front, offsets, b"\x7f\xff\xff\xff" * 1), "no_frames", 0),
        "zeros inside.mp4": (patched(front, middle, bytes(1500)), "damaged", None),
        "noise inside.mp4": (patched(front, middle, noise[:1500]), "damaged", None),
        "first frame lost.mp4": (patched(front, data, bytes(1500)), "no_frames", 0),
        "huge header.avi": (patched(plain, bitmap + 4, b"\x10\x27\x00\x00" * 2), "too_large", 0),
        "more promised.avi": (patched(avi, length, b"\x0f\x27\x00\x00"), "truncated", FRAMES),
        "sound.mp4": (sound(), "no_video_stream", 0),
        "cover.m4v": (cover(), "no_video_stream", 0),
        "unknown codec.mp4": (front.replace(b"avc1", b"zzzz"), "unknown_codec", 0),
        "another stream.ts": (another_stream(), "truncated", None),
        "another size.avi": (two_sizes(), "size_changes", FRAMES),
        "four frames.mp4": (encode(frames[:4]), "too_short", 4),
        "one frame.mp4": (encode(frames[:1]), "too_short", 1),
        'it\'s "bad",  a b .mp4': (cut(many, 0.6), "truncated", None),
    }
    broken = [Broken(name, bytes_of(content), reason, count) for name, (content, reason, count) in files.items()]
    return [
        *broken,
        Broken("a folder.mp4", lambda path: path.mkdir(), "not_a_file"),
        Broken("a pipe.mp4", os.mkfifo, "not_a_file"),
        Broken("nowhere.mp4", lambda path: path.symlink_to("gone.mp4"), "missing"),
        Broken("itself.mp4", lambda path: path.symlink_to(path.name), "symlink_loop"),
        Broken("abcdefghij0_000000_000010.webm", bytes_of(front), "duplicate_id"),
    ]


@dataclass(frozen=True)
class Laid:
    """A source as `lay_out` made it."""

    source: Path
    good: dict[str, str]
    """Label by path; empty where the layout has none."""
    bad: dict[str, tuple[str, int | None]]
    """Reason, and good frames, by path."""


def lay_out(root: Path, layout: str, good: dict[str, Path], broken: list[Broken]) -> Laid:
    """Lay files out as Kinetics comes: "cvdf", "folders", "spaces" and "colons" (lists)."""
    names = {name: f"class {number % 3}" if layout != "spaces" else str(number % 3) for number, name in enumerate(good)}
    places: dict[str, Path] = {}
    for name in [*good, *(each.name for each in broken)]:
        label = names.get(name, "last")
        folder = {"cvdf": "train", "folders": f"train/{label}"}.get(layout, "videos")
        places[name] = Path(folder) / name
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, content in good.items():
        shutil.copy(content, root / places[name])
    for each in broken:
        each.make(root / places[each.name])
    bad = {places[each.name].as_posix(): (each.reason, each.frames) for each in broken}
    labels = {places[name].as_posix(): label for name, label in names.items()}
    if layout in ("spaces", "colons"):
        between = " " if layout == "spaces" else "::"
        lines = [f"{place.as_posix()}{between}{names.get(name, '0')}" for name, place in places.items()]
        lines += ["", "alone", f"videos/absent.mp4{between}1", f"{lines[0]}"]
        (root / "list.csv").write_text("\n".join(lines) + "\n")
        again = places[next(iter(good))].as_posix()
        bad |= {f"list.csv:{len(lines) - 2}": ("malformed_entry", 0), "videos/absent.mp4": ("missing", 0)}
        return Laid(root / "list.csv", labels, bad | {f"{again} again": ("duplicate_id", 0)})
    (root / "train" / "above").symlink_to("..", target_is_directory=True)
    (root / "README.txt").write_text("not a video\n")
    # links are followed, so the folder above is met once more before the loop is seen
    bad["train/above"] = ("symlink_loop", 0)
    if layout == "cvdf":
        (root / "annotations").mkdir()
        rows = ["label,youtube_id,time_start,time_end,split,is_cc"]
        for name in good:
            if len(name) == 29 or name[11:12] == "_":
                rows.append(f"{names[name]},{name[:11]},{int(name[12:18])},{int(name[19:25])},train,0")
            else:
                labels[places[name].as_posix()] = ""
        rows += ["gone,neverhere00,0,10,train,0", rows[1], "no,times,at,all"]
        (root / "annotations/train.csv").write_text("\n".join(rows) + "\n")
        bad["train/neverhere00_000000_000010.mp4"] = ("missing", 0)
        bad[f"annotations/train.csv:{len(rows) - 1}"] = ("duplicate_id", 0)
        bad[f"annotations/train.csv:{len(rows)}"] = ("malformed_entry", 0)
    return Laid(root, labels, bad)
