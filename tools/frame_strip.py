"""Frames of a video side by side, as in the README: `python tools/frame_strip.py out/demo.mp4 docs/demo.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import numpy as np
from PIL import Image


def strip(video: Path, count: int, first: int, every: int) -> Image.Image:
    """`count` frames, the `first` one and every `every`-th after it, from left to right."""
    wanted = {first + every * i for i in range(count)}
    with av.open(str(video)) as container:
        frames = [f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(video=0)) if i in wanted]
    return Image.fromarray(np.concatenate(frames, axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--first", type=int, default=12)
    parser.add_argument("--every", type=int, default=4, help="25 frames are a second")
    given = parser.parse_args()
    strip(given.video, given.count, given.first, given.every).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
