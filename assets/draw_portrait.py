"""Draws portrait.png, the demo's image: `python draw_portrait.py [FILE]`.

Everything is painted at four times the size and scaled down, which smooths the edges.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 256
SCALE = 4

SKY_TOP, SKY_BOTTOM = (142, 178, 205), (243, 222, 196)
SKIN, SKIN_SHADE, BLUSH = (238, 196, 164), (214, 160, 128), (226, 140, 122)
HAIR, HAIR_LIGHT = (74, 47, 38), (112, 74, 56)
SHIRT = (52, 98, 110)
EYE_WHITE, IRIS, DARK, LIPS = (250, 247, 242), (72, 104, 92), (38, 28, 26), (178, 82, 78)

Box = tuple[float, float, float, float]


class Canvas:
    """Drawing in units of the final image, painted SCALE times larger."""

    def __init__(self) -> None:
        self.image = gradient(SKY_TOP, SKY_BOTTOM)

    def ellipse(self, box: Box, color: tuple[int, int, int], soft: float = 0.0, opacity: float = 1.0) -> None:
        mask = Image.new("L", self.image.size, 0)
        ImageDraw.Draw(mask).ellipse([v * SCALE for v in box], fill=round(255 * opacity))
        self._paint(mask, color, soft)

    def polygon(self, points: list[tuple[float, float]], color: tuple[int, int, int], soft: float = 0.0) -> None:
        mask = Image.new("L", self.image.size, 0)
        ImageDraw.Draw(mask).polygon([(x * SCALE, y * SCALE) for x, y in points], fill=255)
        self._paint(mask, color, soft)

    def arc(self, box: Box, start: float, end: float, color: tuple[int, int, int], width: float) -> None:
        draw = ImageDraw.Draw(self.image)
        draw.arc([v * SCALE for v in box], start, end, fill=color, width=round(width * SCALE))

    def _paint(self, mask: Image.Image, color: tuple[int, int, int], soft: float) -> None:
        if soft:
            mask = mask.filter(ImageFilter.GaussianBlur(soft * SCALE))
        self.image.paste(Image.new("RGB", self.image.size, color), mask=mask)

    def finish(self) -> Image.Image:
        return self.image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def gradient(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Image.Image:
    ramp = Image.linear_gradient("L").resize((SIZE * SCALE, SIZE * SCALE))
    upper = Image.new("RGB", ramp.size, top)
    lower = Image.new("RGB", ramp.size, bottom)
    return ImageChops.composite(lower, upper, ramp)


def draw_portrait() -> Image.Image:
    """A woman before an evening sky, looking at the viewer, lips closed."""
    c = Canvas()
    c.ellipse((170, 20, 230, 80), (255, 236, 200), soft=12, opacity=0.8)  # low sun
    # hair behind the head, shoulders, neck
    c.ellipse((72, 38, 184, 200), HAIR)
    c.ellipse((28, 194, 228, 360), SHIRT)
    c.polygon([(108, 160), (148, 160), (152, 206), (128, 222), (104, 206)], SKIN_SHADE)
    c.polygon([(104, 202), (128, 224), (152, 202), (160, 210), (128, 242), (96, 210)], (236, 230, 220))
    # face
    c.ellipse((84, 62, 172, 186), SKIN)
    c.ellipse((80, 112, 92, 136), SKIN)
    c.ellipse((164, 112, 176, 136), SKIN)
    c.ellipse((88, 130, 112, 152), BLUSH, soft=5, opacity=0.5)
    c.ellipse((144, 130, 168, 152), BLUSH, soft=5, opacity=0.5)
    # bangs
    c.polygon([(80, 122), (86, 70), (128, 44), (172, 70), (178, 122), (160, 88), (132, 76), (112, 90), (94, 94)], HAIR)
    c.arc((90, 50, 170, 130), 200, 290, HAIR_LIGHT, 2)
    c.arc((84, 46, 164, 136), 210, 280, HAIR_LIGHT, 1.5)
    for x in (108, 148):
        c.ellipse((x - 10, 112, x + 10, 125), EYE_WHITE)
        c.ellipse((x - 6, 112, x + 6, 125), IRIS)
        c.ellipse((x - 3, 115, x + 3, 122), DARK)
        c.ellipse((x + 1, 115, x + 3, 117), EYE_WHITE)
        c.arc((x - 11, 110, x + 11, 130), 200, 340, DARK, 1.6)  # upper lid
        c.arc((x - 13, 101, x + 13, 123), 215, 325, HAIR, 2.4)  # eyebrow
    c.arc((120, 120, 140, 148), 60, 150, SKIN_SHADE, 2)  # nose
    # lips, closed, with a little smile
    c.ellipse((112, 157, 144, 170), LIPS)
    c.polygon([(110, 154), (121, 159), (128, 161), (135, 159), (146, 154), (146, 150), (110, 150)], SKIN)
    c.arc((108, 142, 148, 165), 35, 145, (120, 48, 48), 1.4)
    return c.finish()


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("portrait.png")
    draw_portrait().save(target, optimize=True)
