"""The table of what is measured: every report, as text, JSON or a page, is made from it.

A quantity is a number or, where it cannot be computed, the reason why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import theilslopes

from .footage import Footage, Speaker
from .sync import open_in_silence

__all__ = ["OF_SPEAKERS", "OF_VIDEOS", "Absent", "Quantity", "Value", "measured"]

Floats = NDArray[np.float64]

FOLLOWS = 0.3
"""Correlation from which a mouth follows a recording: of foreign ones 95 in 100 stay below it (docs/measure.md)."""

END = 2.0
"""Seconds at the end of a video whose identity counts."""

LEAST_DRIFT = 6.0
"""Seconds from which a drift per minute is computed."""


@dataclass(frozen=True)
class Absent:
    """Why a quantity has no value."""

    reason: str


Value = float | Absent


@dataclass(frozen=True)
class Quantity:
    """What is measured: in words, in what unit ("" for a ratio), what a good video has, and how it is computed.

    `of` is given the footage and, where it is of a speaker, the speaker.
    """

    title: str
    unit: str
    good: str
    of: Callable[..., Value]


def measured(footage: Footage) -> tuple[dict[str, Value], list[dict[str, Value]]]:
    """Values of the video, and of each speaker from left to right."""
    of_video = {name: quantity.of(footage) for name, quantity in OF_VIDEOS.items()}
    of_speakers = [
        {name: quantity.of(footage, speaker) for name, quantity in OF_SPEAKERS.items()} for speaker in footage.speakers
    ]
    return of_video, of_speakers


# ---------------------------------------------------------------------------------------------------------- of speakers


def _correlation(footage: Footage, speaker: Speaker) -> Value:
    if speaker.loud is None:
        return Absent(footage.no_speech)
    if not speaker.loud.any():
        return Absent("the recording is silent")
    if np.ptp(speaker.opening) == 0:
        return Absent("the mouth does not move")
    if speaker.curve is None:
        return Absent("the recording is shorter than a second, or as loud all the time")
    return speaker.curve.best


def _lag(footage: Footage, speaker: Speaker) -> Value:
    best = _correlation(footage, speaker)
    if isinstance(best, Absent) or speaker.curve is None:
        return best
    if best < FOLLOWS:
        return Absent(f"the mouth does not follow the recording: the correlation is below {FOLLOWS:g}")
    if best <= speaker.curve.chance:
        return Absent("the mouth does not follow the recording: the correlation is no higher than by chance")
    return 1000 * speaker.curve.lag


def _chance(footage: Footage, speaker: Speaker) -> Value:
    best = _correlation(footage, speaker)
    if isinstance(best, Absent) or speaker.curve is None:
        return best
    return Absent("it needs 6 s") if np.isnan(speaker.curve.chance) else speaker.curve.chance


def _correlation_with_others(footage: Footage, speaker: Speaker) -> Value:
    if not speaker.others:
        return Absent("there is no recording of another speaker")
    return max(curve.best for curve in speaker.others)


def _open_in_silence(footage: Footage, speaker: Speaker) -> Value:
    lag = _lag(footage, speaker)
    if isinstance(lag, Absent) or speaker.loud is None:
        return lag
    share = open_in_silence(speaker.opening, footage.fps, speaker.loud, lag / 1000, speaker.face.closed)
    return Absent("the recording has no quarter of a second of both pauses and loud speech") if share is None else share


def _identity(region: str) -> Callable[[Footage, Speaker], Value]:
    return lambda footage, speaker: _decibels(np.array(speaker.face.errors[region]), footage.fps, NO_REGION)


NO_REGION = "eyes and face were not found: it needs landmarks, or a box of the face (--face)"


def _decibels(errors: Floats, fps: float, reason: str) -> Value:
    """PSNR of the median of the last two seconds, in which a blink does not count; at most 100 dB."""
    end = errors[-round(END * fps) :]
    end = end[np.isfinite(end)]
    return float(-10 * np.log10(max(float(np.median(end)), 1e-10))) if len(end) else Absent(reason)


# ------------------------------------------------------------------------------------------------------------ of videos


def _background(footage: Footage) -> Value:
    return _decibels(footage.background, footage.fps, footage.no_face or "no part of the image lies outside the faces")


def _per_minute(values: Floats, fps: float) -> Value:
    """Slope per minute of values [frames]: Theil-Sen of the medians of half seconds; few frames do not count."""
    if len(values) < LEAST_DRIFT * fps:
        return Absent(f"a drift needs {LEAST_DRIFT:g} s")
    each = max(1, round(fps / 2))
    halves = np.array([np.median(values[at : at + each]) for at in range(0, len(values) - each + 1, each)])
    halves = halves[:: max(1, len(halves) // 500)]  # the slopes of all pairs are computed
    minutes = np.linspace(each / 2, len(values) - each / 2, len(halves)) / fps / 60
    return float(theilslopes(halves, minutes).slope)


def _color_drift(footage: Footage) -> Value:
    slopes = [_per_minute(channel, footage.fps) for channel in footage.colors.T]
    absent = next((slope for slope in slopes if isinstance(slope, Absent)), None)
    return absent or float(np.linalg.norm([slope for slope in slopes if not isinstance(slope, Absent)]))


def _sharpness_drift(footage: Footage) -> Value:
    slope = _per_minute(np.log(np.maximum(footage.sharpness, 1e-6)), footage.fps)
    return slope if isinstance(slope, Absent) else 100 * float(np.expm1(min(slope, 50)))


def _join_ratios(footage: Footage) -> Floats | Absent:
    """The change into each join over the median change elsewhere."""
    if footage.joins is None:
        return Absent("the lengths of the windows are unknown: give --frames and --motion-frames")
    if not footage.joins:
        return Absent("the video is one window, and has no join")
    elsewhere = np.ones(len(footage.change), bool)
    elsewhere[[join - 1 for join in footage.joins]] = False
    usual = float(np.median(footage.change[elsewhere]))
    if usual == 0:
        return Absent("most frames are the one before again")
    ratios: Floats = footage.change[[join - 1 for join in footage.joins]] / usual
    return ratios


def _join(summary: Callable[[Floats], np.floating]) -> Callable[[Footage], Value]:
    def of(footage: Footage) -> Value:
        ratios = _join_ratios(footage)
        return ratios if isinstance(ratios, Absent) else float(summary(ratios))

    return of


def _largest_elsewhere(footage: Footage) -> Value:
    elsewhere = np.ones(len(footage.change), bool)
    elsewhere[[join - 1 for join in footage.joins or ()]] = False
    usual = float(np.median(footage.change[elsewhere]))
    if usual == 0:
        return Absent("most frames are the one before again")
    return float(footage.change[elsewhere].max()) / usual


def _frozen(footage: Footage) -> Value:
    if footage.uneven:
        return Absent("the file's frames come at uneven times, and were repeated to be read")
    return float(footage.still.sum())


def _sound_longer(footage: Footage) -> Value:
    if footage.sound is None:
        return Absent("the video has no sound")
    return 1000 * (footage.sound - footage.seconds)


def _sound_late(footage: Footage) -> Value:
    if footage.sound_late is None:
        return Absent("there are no recordings that the video's own sound is like")
    return 1000 * footage.sound_late


OF_SPEAKERS = {
    "correlation": Quantity("mouth follows the speech", "", "0.6 and more; foreign speech: below 0.3", _correlation),
    "correlation_by_chance": Quantity("the same by chance", "", "far below the correlation", _chance),
    "lag": Quantity("mouth comes after the sound by", "ms", "-40 to 40", _lag),
    "correlation_with_others": Quantity("mouth follows another's speech", "", "below 0.3", _correlation_with_others),
    "open_in_silence": Quantity("open in pauses (0 closed, 1 as in speech)", "", "below 0.2", _open_in_silence),
    "eyes_identity": Quantity("eyes like the reference's", "dB", "22 and more, of a still head", _identity("eyes")),
    "face_identity": Quantity("face without mouth, likewise", "dB", "26 and more, of a still head", _identity("face")),
}
"""Name -> what is measured of each speaker."""

OF_VIDEOS = {
    "background_identity": Quantity(
        "background like the reference's", "dB", "24 and more, of a still camera", _background
    ),
    "color_drift": Quantity("colors move by", "dE/min", "below 3", _color_drift),
    "sharpness_drift": Quantity("sharpness changes by", "%/min", "-10 to 10", _sharpness_drift),
    "join_change": Quantity("change at joins, of that elsewhere: median", "", "below 2", _join(np.median)),
    "join_change_largest": Quantity("the same: largest", "", "no more than the largest elsewhere", _join(np.max)),
    "elsewhere_change_largest": Quantity(
        "largest change elsewhere, likewise", "", "no cut is in it", _largest_elsewhere
    ),
    "black_frames": Quantity("black frames", "", "0", lambda footage: float(footage.dark.sum())),
    "frozen_frames": Quantity("frames that are the one before again", "", "0", _frozen),
    "sound_longer": Quantity("sound is longer than the images by", "ms", "-40 to 40", _sound_longer),
    "sound_late": Quantity("sound comes after the recordings by", "ms", "-10 to 10", _sound_late),
}
"""Name -> what is measured of the whole video."""
