"""One reading of a video: a few numbers of each frame, and of the sound, from which all quantities are computed.

Frames are read one after the other, and none is kept but the first and, without landmarks, some in small.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..media.audio import load_speech
from ..media.color import rgb_to_lab
from ..media.containers import open_media
from ..media.images import cover_image, open_image
from ..media.video import VideoFrames
from ..multitalk.wav2vec import SAMPLE_RATE
from ..wanvideo.errors import InputError
from .faces import Box, Boxes, Face, Finder, LandmarkFaces, moving_mouths, scaled
from .landmarks import INSTALL, LandmarkModel, missing
from .sync import Curve, correlations, loudness

logger = logging.getLogger(__name__)

__all__ = ["SHORTEST", "Footage", "Speaker", "read_frames", "read_video"]

Floats = NDArray[np.float64]
Frame = NDArray[np.uint8]
Speech = NDArray[np.float32]

SHORTEST = 2.0
"""Seconds of a video that says anything."""

SMALL = 256
"""Pixels of the longer side of the images in which frames are compared with each other."""

SAMPLES, SAMPLE_SIDE = 250, 384
"""Frames that are looked at before the reading, where there are no landmarks, and about the pixels of their sides."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)

BLACK = 0.1
"""Luma below which 99 % of a black frame are."""

STILL = 0.02 / 255
"""Root of the mean squared difference below which a frame is the one before: less than what encoders leave."""

UNEVEN = 0.25
"""Of the usual time between frames, by which it may differ; and of at most one frame in fifty."""


@dataclass
class Speaker:
    """A face and the recording that it is to follow.

    Attributes:
        opening: of the mouth [frames]; where the face was not seen for a while, a line from before to after.
        loud: of the recording, at 100 Hz; None without one.
        curve: correlation over shifts; None where it cannot be computed.
        others: the same with each recording of another speaker.
    """

    face: Face
    opening: Floats
    loud: Floats | None
    curve: Curve | None = None
    others: list[Curve] = field(default_factory=list)


@dataclass
class Footage:
    """Numbers of each frame [frames] and what is known of the sound.

    Attributes:
        how: how faces were found, in words.
        change: root of the mean squared difference from each frame to the next, [frames - 1], values in 0 to 1.
        colors: mean L*a*b* [frames, 3]. sharpness: mean absolute Laplacian of luma.
        dark: whether a frame is black. still: whether a frame is the one before again, [frames - 1].
        background: mean squared error against the reference, outside all faces; NaN without a face.
        joins: frames with which a window begins; None where that is unknown.
        uneven: whether the file's frames come at uneven times.
        sound: seconds of the file's sound; None without one.
        sound_late: seconds by which the file's sound comes after the recordings; None where both are not there.
    """

    name: str
    fps: float
    width: int
    height: int
    how: str
    speakers: list[Speaker]
    change: Floats
    colors: Floats
    sharpness: Floats
    dark: NDArray[np.bool_]
    still: NDArray[np.bool_]
    background: Floats
    joins: list[int] | None
    uneven: bool
    sound: float | None
    sound_late: float | None
    no_face: str = ""
    no_speech: str = ""

    @property
    def frames(self) -> int:
        return len(self.dark)

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


def read_video(
    path: str | Path,
    recordings: Sequence[str | Path] = (),
    *,
    reference: str | Path | None = None,
    faces: Sequence[Box] = (),
    window: int | None = None,
    motion: int | None = None,
    progress: Callable[[int, int], None] = lambda done, all_: None,
) -> Footage:
    """Read a video file.

    Args:
        recordings: one for all speakers, or one for each, from left to right; all begin with the video. None: the sound
            of the file.
        reference: an image that identity is compared with, cut to the video's aspect as `generate` cuts it; the first
            frame without one.
        faces: boxes of faces in pixels of the video, in place of landmarks.
        window, motion: frames of a window, and those of them that it shares with the one before.
        progress: called with frames read and frames in all.

    Raises InputError for files that cannot be read, a video below 2 s, and recordings that are not one for each face.
    """
    video = VideoFrames(path, fps=None)
    steps = np.diff(np.array([float(time) for time in video.times]))
    uneven = len(steps) > 0 and float((np.abs(steps / np.median(steps) - 1) > UNEVEN).mean()) > 0.02
    if uneven:
        logger.warning("%s has frames at uneven times: it is read at %.2f frames a second", path, float(video.fps))
    own = _own_sound(video.path)
    speech = [load_speech(recording) for recording in recordings]
    footage = read_frames(
        _Frames(video),
        float(video.fps),
        speech or ([] if own is None else [own]),
        name=str(path),
        reference=None if reference is None else np.array(open_image(reference).convert("RGB")),
        faces=faces,
        window=window,
        motion=motion,
        progress=progress,
    )
    footage.uneven = uneven
    footage.sound = None if own is None else len(own) / SAMPLE_RATE
    if own is not None and speech:
        together = np.zeros(max(map(len, speech)), np.float32)
        for one in speech:
            together[: len(one)] += one
        curve = correlations(loudness(own), 100, loudness(together))
        if curve is not None and curve.best > 0.5:
            footage.sound_late = curve.lag
    if own is None and not speech:
        footage.no_speech = "the video has no sound, and no recording was given"
    return footage


class _Frames(Sequence[Frame]):
    """The frames of a file, as a sequence."""

    def __init__(self, video: VideoFrames) -> None:
        self._video = video

    def __len__(self) -> int:
        return len(self._video)

    def __getitem__(self, index: Any) -> Any:
        return self._video[index]


def _own_sound(path: Path) -> Speech | None:
    with open_media(path) as container:
        if container.streams.best("audio") is None:
            return None
    return load_speech(path)


def read_frames(
    frames: Sequence[Frame],
    fps: float,
    speech: Sequence[Speech],
    *,
    name: str = "The video",
    reference: Frame | None = None,
    faces: Sequence[Box] = (),
    window: int | None = None,
    motion: int | None = None,
    progress: Callable[[int, int], None] = lambda done, all_: None,
) -> Footage:
    """Read frames [H, W, 3] uint8 of one size at `fps`; `speech`: mono samples at 16 kHz each, -23 LUFS.

    The rest as `read_video`.
    """
    count = len(frames)
    if count < SHORTEST * fps:
        raise InputError(
            f"{name} is too short to be measured: {count / fps:.1f} s, at least {SHORTEST:g} s are needed."
        )
    height, width = frames[0].shape[:2]
    for box in faces:
        left, top, right, bottom = box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height) or min(right - left, bottom - top) < 8:
            raise InputError(
                f"The face {left:g},{top:g},{right:g},{bottom:g} is no box of left, top, right, bottom of 8 pixels or "
                f"more within the {width} x {height} of the video."
            )
    if reference is not None:
        covered = cover_image(Image.fromarray(reference), width, height)
        reference = ((covered.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    if faces and len(speech) > 1:
        _check_recordings(name, len(faces), len(speech))
    finder = _finder(frames, fps, max(1, len(speech)), faces, reference)
    small = max(1, max(width, height) // SMALL)
    wanted = _reduced(frames[0] if reference is None else reference, small)
    change, colors, sharpness, dark, background = [], [], [], [], []
    before: Floats | None = None
    for index in range(count):
        frame = frames[index]
        reduced = _reduced(frame, small)
        seen = finder.see(index, frame)
        background.append(_outside(reduced, wanted, [scaled(box, 1 / small) for box in seen]))
        coarse = torch.from_numpy(_reduced(frame, 4 * small))
        colors.append(rgb_to_lab(coarse.permute(2, 0, 1)).mean((1, 2)).numpy())
        dark.append(float(np.percentile(reduced @ LUMA, 99)) < BLACK)
        sharpness.append(_sharpness(frame @ LUMA / 255))
        if before is not None:
            change.append(float(np.sqrt(np.square(reduced - before).mean())))
        before = reduced
        progress(index + 1, count)
    found = finder.faces()
    if len(speech) > 1:
        _check_recordings(name, len(found), len(speech))
    loud = [loudness(one) for one in speech]
    changes = np.array(change)
    return Footage(
        name=name,
        fps=fps,
        width=width,
        height=height,
        how=finder.how,
        speakers=[_speaker(face, at, loud, fps) for at, face in enumerate(found)],
        change=changes,
        colors=np.array(colors, np.float64),
        sharpness=np.array(sharpness),
        dark=np.array(dark),
        still=changes < STILL,
        background=np.array(background),
        joins=None if window is None else _joins(count, window, motion or 0),
        uneven=False,
        sound=None,
        sound_late=None,
        no_face="" if found else "no face was found: say with --face where one is",
        no_speech="" if speech else "no recording was given",
    )


def _finder(frames: Sequence[Frame], fps: float, count: int, faces: Sequence[Box], reference: Frame | None) -> Finder:
    """Boxes that are given; landmarks where their packages are installed; or else what moves most."""
    if not faces and missing() is None:
        return LandmarkFaces(LandmarkModel(), fps, reference)
    # Consecutive ones, from the middle: what moves is seen in differences.
    factor = max(1, max(frames[0].shape) // SAMPLE_SIDE)
    begin = max(0, (len(frames) - SAMPLES) // 2)
    samples = [
        np.asarray(Image.fromarray(frames[index]).reduce(factor))
        for index in range(begin, min(len(frames), begin + SAMPLES))
    ]
    if faces:
        return Boxes("the given boxes", samples, factor, faces=faces, reference=reference)
    logger.warning("Without landmarks the mouth is taken to be where the image moves most; for landmarks: %s", INSTALL)
    mouths = [scaled(box, factor) for box in moving_mouths(samples, fps, count)]
    return Boxes("the part that moves most", samples, factor, mouths=mouths, reference=reference)


def _check_recordings(name: str, faces: int, recordings: int) -> None:
    if faces != recordings:
        raise InputError(
            f"Faces in {name}: {faces}, recordings: {recordings}. Give one recording for all, or one for each face "
            "from left to right; --face says where faces are."
        )


def _reduced(frame: Frame, factor: int) -> Floats:
    result: Floats = np.asarray(Image.fromarray(frame).reduce(factor)).astype(np.float32) / 255
    return result


def _sharpness(luma: Floats) -> float:
    """Mean absolute Laplacian of an image [H, W]."""
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float(np.abs(4 * luma[1:-1, 1:-1] - around).mean())


def _outside(frame: Floats, wanted: Floats, boxes: Sequence[Box]) -> float:
    """Mean squared error outside of boxes, which reach a quarter further to hold hair and chin; NaN without any."""
    if not boxes:
        return float("nan")
    keep = np.ones(frame.shape[:2], bool)
    for left, top, right, bottom in boxes:
        x, y = (right - left) / 4, (bottom - top) / 4
        keep[max(0, int(top - y)) : int(bottom + y) + 1, max(0, int(left - x)) : int(right + x) + 1] = False
    return float(np.square(frame - wanted)[keep].mean()) if keep.any() else float("nan")


def _speaker(face: Face, at: int, loud: Sequence[Floats], fps: float) -> Speaker:
    opening = np.array(face.opening)
    known = np.isfinite(opening)
    filled = np.interp(np.arange(len(opening)), np.flatnonzero(known), opening[known])
    own = None if not loud else loud[min(at, len(loud) - 1)]
    others = [one for index, one in enumerate(loud) if len(loud) > 1 and index != at]
    curves = [correlations(filled, fps, one) for one in others]
    return Speaker(
        face,
        filled,
        own,
        None if own is None else correlations(filled, fps, own),
        [curve for curve in curves if curve is not None],
    )


def _joins(count: int, window: int, motion: int) -> list[int]:
    """The first new frame of every window but the first."""
    if not 0 <= motion < window:
        raise InputError(f"A window of {window} frames cannot share {motion} with the one before: give fewer.")
    return list(range(window, count, window - motion))
