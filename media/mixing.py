"""Several recordings become one conversation: who speaks when, and the sound of the video.

Everything is NumPy on mono samples; recordings of one conversation share a rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..wanvideo.errors import InputError

Waveform = NDArray[np.float32]

NOISE_FLOOR_DB = -60.0
"""Level of the faint noise that stands in for digital silence, dB relative to full scale."""

CLICK_FACTOR = 8.0
"""A sample whose step from the one before exceeds this many typical steps of its surroundings is a click."""


T = TypeVar("T")


def in_order(recordings: Mapping[str, T | None]) -> list[T]:
    """The recordings that are given, by the names of their options: speaker 1, 2, 3 ...

    Raises InputError for a gap, as everything after it would be another speaker's.
    """
    names = list(recordings)
    given = [name for name in names if recordings[name] is not None]
    gap = next((name for name in names[: len(given)] if recordings[name] is None), None)
    if gap is not None:
        raise InputError(f"{given[-1]} is given without {gap}: number the speakers without a gap.")
    return [recording for recording in recordings.values() if recording is not None]


def arrange(recordings: Sequence[Waveform], *, one_after_the_other: bool) -> list[Waveform]:
    """The recordings [n_i] on one time line: each [m], silent where that speaker does not speak.

    Together (all begin at once, the longest one gives m) or one after the other (m is the sum).
    Raises InputError without recordings.
    """
    if not recordings:
        raise InputError("There is no recording: connect at least one.")
    starts = np.zeros(len(recordings), dtype=np.int64)
    if one_after_the_other:
        starts[1:] = np.cumsum([len(r) for r in recordings])[:-1]
    length = max(int(start) + len(r) for start, r in zip(starts, recordings, strict=True))
    arranged = []
    for start, recording in zip(starts, recordings, strict=True):
        line = np.zeros(length, dtype=np.float32)
        line[start : start + len(recording)] = recording
        arranged.append(line)
    return arranged


def mix(recordings: Sequence[Waveform]) -> Waveform:
    """The sum of arranged recordings [m], scaled down as a whole where it would pass 1."""
    total: Waveform = np.asarray(np.sum(recordings, axis=0), dtype=np.float32)
    peak = float(np.abs(total).max(initial=0.0))
    return np.divide(total, peak, dtype=np.float32) if peak > 1 else total


def add_noise_floor(waveform: Waveform, level_db: float = NOISE_FLOOR_DB, seed: int = 0) -> Waveform:
    """`waveform` [n] with white noise of `level_db` (rms, dB relative to full scale); the same for the same seed."""
    noise = np.random.default_rng(seed).standard_normal(len(waveform), dtype=np.float32)
    noisy: Waveform = waveform + noise * np.float32(10 ** (level_db / 20))
    return noisy


def smooth_transients(waveform: Waveform, rate: int, window_ms: float = 2.0) -> Waveform:
    """`waveform` [n] with clicks and pops replaced by the median of their surroundings.

    A click is where the signal jumps by far more (`CLICK_FACTOR`) than the median jump within 50 ms on either side.
    """
    steps = np.abs(np.diff(waveform, prepend=waveform[:1]))
    reach = max(1, int(rate * 0.05))
    typical = np.array([np.median(steps[max(0, i - reach) : i + reach]) for i in range(0, len(steps), reach)])
    bound = np.repeat(typical, reach)[: len(steps)] * CLICK_FACTOR
    clicks = np.flatnonzero((steps > bound) & (steps > 0.1))
    smooth: Waveform = waveform.copy()
    half = max(1, int(rate * window_ms / 2000))
    for click in clicks:
        around = slice(max(0, click - half), click + half + 1)
        smooth[around] = np.median(waveform[max(0, click - 4 * half) : click + 4 * half + 1])
    return smooth
