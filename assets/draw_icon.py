"""Draws the icon and the banner of the registry's entry: `python draw_icon.py [FOLDER]` writes icon.png and banner.png.

The portrait, and the loudness of the speech beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
ICON = (256, 256)
BANNER = (1008, 432)  # 21 : 9
SCALE = 4  # painted larger and scaled down, which smooths the edges
GROUND, BAR, RING = (24, 28, 38), (120, 200, 255), (243, 222, 196)


def icon() -> Image.Image:
    """The face in a round frame, five bars of sound below it."""
    image, draw = _canvas(ICON)
    _face(image, (24, 8, 232, 216))
    for i, level in enumerate((0.35, 0.7, 1.0, 0.7, 0.35)):
        x, half = 88 + 20 * i, 28 * level
        draw.rounded_rectangle(_scaled((x - 6, 220 - half, x + 6, 220 + half)), 6 * SCALE, fill=BAR, outline=GROUND)
    return image.resize(ICON, Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """The face on the left, the sound of `speech.wav` leaving it."""
    image, draw = _canvas(BANNER)
    _face(image, (48, 56, 368, 376))
    samples, _ = soundfile.read(HERE / "speech.wav", dtype="float32")
    levels = [float(np.abs(part).max()) for part in np.array_split(samples[: len(samples) // 2], 32)]
    for i, level in enumerate(levels):
        x, half = 410 + 17.5 * i, 6 + 140 * level / max(levels)
        draw.rounded_rectangle(_scaled((x, 216 - half, x + 9, 216 + half)), 4.5 * SCALE, fill=BAR)
    return image.resize(BANNER, Image.Resampling.LANCZOS)


def _canvas(size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), GROUND)
    return image, ImageDraw.Draw(image)


def _scaled(box: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(SCALE * side for side in box)


def _face(image: Image.Image, box: tuple[int, int, int, int]) -> None:
    """The portrait in a circle that fills `box`, with a ring around it."""
    left, top, right, bottom = (SCALE * side for side in box)
    size = (right - left, bottom - top)
    portrait = Image.open(HERE / "portrait.png").convert("RGB").resize(size, Image.Resampling.BICUBIC)
    hole = Image.new("L", size, 0)
    ImageDraw.Draw(hole).ellipse((0, 0, size[0] - 1, size[1] - 1), fill=255)
    image.paste(portrait, (left, top), hole)
    ImageDraw.Draw(image).ellipse((left, top, right, bottom), outline=RING, width=5 * SCALE)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "docs"
    icon().save(folder / "icon.png", optimize=True)
    banner().save(folder / "banner.png", optimize=True)
