"""Frames of a video for a page, side by side or moving, by the ending of the output:

python tools/frame_strip.py out/demo.mp4 docs/demo.png
python tools/frame_strip.py out/demo.mp4 docs/demo.webp
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import numpy as np
from PIL import Image

FPS = 25
"""Of the videos that this project makes."""


def frames_of(video: Path) -> list[Image.Image]:
    with av.open(str(video)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def strip(frames: list[Image.Image], count: int, first: int, every: int) -> Image.Image:
    """`count` frames, the `first` one and every `every`-th after it, from left to right."""
    chosen = frames[first : first + every * count : every]
    return Image.fromarray(np.concatenate([np.asarray(frame) for frame in chosen], axis=1))


def write_animation(frames: list[Image.Image], out: Path, every: int, width: int) -> None:
    """Every `every`-th frame, `width` pixels wide, as an animated WebP that runs as fast as the video."""
    chosen = [frame.resize((width, frame.height * width // frame.width)) for frame in frames[::every]]
    first, *others = chosen
    first.save(out, save_all=True, append_images=others, duration=every * 1000 // FPS, loop=0, quality=60, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=8, help="of frames side by side (%(default)s)")
    parser.add_argument("--first", type=int, default=12, help="of them (%(default)s)")
    parser.add_argument("--every", type=int, help=f"{FPS} frames are a second (4 side by side, 2 moving)")
    parser.add_argument("--width", type=int, default=256, help="of a moving one, in pixels (%(default)s)")
    given = parser.parse_args()
    frames = frames_of(given.video)
    if given.out.suffix == ".webp":
        write_animation(frames, given.out, given.every or 2, given.width)
    else:
        strip(frames, given.count, given.first, given.every or 4).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
