"""Which frames and which audio rows each window of a long video uses. Pure integers.

A video of `total` frames is made in windows of `frames` = 4n + 1. Each window after the first begins with the last
`motion` = 4m + 1 frames of the one before, so that starts advance by `frames - motion`. What runs past `total` is made
for the recording's tail played backwards, and cut off.

Where the first window gives out none of its `motion` frames either (`early`), it begins so many frames before the
video.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..wanvideo.errors import InputError

__all__ = ["AUDIO_CONTEXT", "Window", "audio_rows", "latent_frames", "plan_windows", "windows_from"]

AUDIO_CONTEXT = 5
"""Rows of speech features for each frame: its own, and two on either side."""


@dataclass(frozen=True)
class Window:
    """One window of a plan. All numbers are video frames, counted from the beginning of the video.

    Attributes:
        index: place in the plan, from 0.
        start: first frame.
        frames: length, the part that is cut off included.
        overlap: frames at the front that are not given out: the window before has (the motion; 0 in the first window
            unless it begins early).
        new: frames that this window gives out; they follow the overlap.
        is_last: whether the plan ends here.
    """

    index: int
    start: int
    frames: int
    overlap: int
    new: int
    is_last: bool

    @property
    def end(self) -> int:
        """One past the last frame."""
        return self.start + self.frames


def latent_frames(frames: int) -> int:
    """Latent frames of `frames` = 4n + 1 video frames: the first one alone, then groups of four."""
    return (frames - 1) // 4 + 1


def plan_windows(total: int, frames: int, motion: int, *, early: bool = False) -> list[Window]:
    """The windows of a video of `total` frames; one is enough when it covers them all.

    Args:
        total: frames of the finished video, at least 1.
        frames: window length, 4n + 1 (InfiniteTalk is trained on 81).
        motion: frames carried over, 4n + 1 and below `frames` (9 or 25).
        early: the first window begins `motion` frames before the video.

    Raises:
        InputError: lengths of another form.
    """
    if total < 1:
        raise InputError("The recording is shorter than one video frame: give a longer one.")
    for name, value in (("window", frames), ("motion", motion)):
        if value < 1 or value % 4 != 1:
            near = max(1, 4 * round((value - 1) / 4) + 1)
            raise InputError(f"The {name} length of {value} frames is not of the form 4n + 1: set it to {near}, say.")
    if motion >= frames:
        raise InputError(
            f"Each window of {frames} frames would begin with {motion} frames of the one before and leave no room for "
            "new ones: set the motion frames below the window's."
        )
    plan: list[Window] = []
    for window in windows_from(frames, motion, early=early):
        plan.append(window)
        if window.end >= total:
            break
    plan[-1] = replace(window, new=total - window.start - window.overlap, is_last=True)
    return plan


def windows_from(frames: int, motion: int, *, early: bool = False) -> Iterator[Window]:
    """The windows of a video without an end, arguments as in `plan_windows`."""
    for index in itertools.count():
        overlap = motion if index or early else 0
        start = index * (frames - motion) - (motion if early else 0)
        yield Window(index, start, frames, overlap, frames - overlap, is_last=False)


def audio_rows(window: Window, total: int) -> list[list[int]]:
    """Rows of the recording's features [total, ...] for each frame of the window: [frames][5].

    Frame f takes rows f - 2 ... f + 2. Before the beginning that is row 0. The last window may run past the end: there
    the recording goes back from its last row (and to and fro when it is shorter than that); in earlier windows, where
    only the two rows of context can pass the end, it is the last row.
    """

    def row(i: int) -> int:
        i = max(i, 0)
        if not window.is_last:
            return min(i, total - 1)
        there_and_back = i % (2 * total)
        return min(there_and_back, 2 * total - 1 - there_and_back)

    side = AUDIO_CONTEXT // 2
    return [[row(f + w) for w in range(-side, side + 1)] for f in range(window.start, window.end)]
