"""Truth beside imagination: a filmstrip for a page, and a moving picture."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

MARKS = (0, 10, 25, 50, 75, 100)
TRUTH, IMAGINED = "#009e73", "#56b4e9"
_INK, _PAPER = "#1b1f24", "#ffffff"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One window as pictures, h = 0 ... T."""

    truth: UInt8[np.ndarray, "t1 h w 3"]
    imagined: UInt8[np.ndarray, "t1 s s 3"]
    drawn: bool = True
    """By the model's decoder; else these are the real frames of other episodes whose latents lie nearest."""
    episode: int
    start: int
    step_seconds: float


def filmstrip(scene: Scene, size: int = 160) -> Image.Image:
    """Draw truth above imagination at h = 0, 10, 25, 50, 75, 100."""
    marks = [h for h in MARKS if h < len(scene.truth)]
    gap, left, top = 8, 150, 38
    strip = Image.new("RGB", (left + len(marks) * (size + gap) + gap, top + 2 * (size + gap) + gap), _PAPER)
    draw, font = ImageDraw.Draw(strip), _font(19)
    for row, (label, frames, colour) in enumerate(
        (("truth", scene.truth, TRUTH), ("imagination", scene.imagined, IMAGINED))
    ):
        y = top + row * (size + gap)
        draw.rectangle((gap, y, gap + 6, y + size - 1), fill=colour)
        draw.text((gap + 16, y + size // 2), label, font=font, fill=_INK, anchor="lm")
        for column, h in enumerate(marks):
            x = left + column * (size + gap)
            strip.paste(scaled(frames[h], size), (x, y))
            if row == 0:
                text = f"{h * scene.step_seconds:.1f} s" if h else "now"
                draw.text((x, top // 2), f"h = {h}", font=font, fill=_INK, anchor="lm")
                draw.text((x + size, top // 2), text, font=font, fill="#6a737d", anchor="rm")
    return strip


def moving_picture(scene: Scene, size: int = 224) -> bytes:
    """Return a GIF of truth (left) beside imagination (right) at the world's pace, held for a second at the end."""
    border = 5
    colours = (TRUTH, IMAGINED)
    frames = []
    for truth, imagined in zip(scene.truth, scene.imagined, strict=True):
        frame = Image.new("RGB", (2 * (size + 2 * border), size + 2 * border), _PAPER)
        for side, (picture, colour) in enumerate(zip((truth, imagined), colours, strict=True)):
            x = side * (size + 2 * border)
            ImageDraw.Draw(frame).rectangle((x, 0, x + size + 2 * border - 1, size + 2 * border - 1), fill=colour)
            frame.paste(scaled(picture, size), (x + border, border))
        frames.append(frame)
    # one palette for all frames, so that colours do not flicker
    palette = frames[0].quantize(128)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    pace = max(round(scene.step_seconds * 100), 2) * 10  # GIF counts in hundredths of a second
    data = io.BytesIO()
    durations = [pace] * (len(indexed) - 1) + [1000]
    indexed[0].save(data, "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0)
    return data.getvalue()


def as_png(image: Image.Image) -> bytes:
    """Return an image's PNG file."""
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return data.getvalue()


def scaled(frame: UInt8[np.ndarray, "h w 3"], size: int) -> Image.Image:
    """Return a frame as an image of `size` pixels square."""
    return Image.fromarray(frame).resize((size, size), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib always brings this one
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)
