"""Faces through a video: by landmarks, by boxes that are given, or by the part of the image that moves most.

Every way of finding them gives the same: a `Face` with the opening of its mouth frame by frame, and where the eyes, the
face and the mouth are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .landmarks import LandmarkModel, Landmarks, cut

logger = logging.getLogger(__name__)

__all__ = ["Box", "Boxes", "Face", "Finder", "LandmarkFaces", "moving_mouths", "scaled"]

Floats = NDArray[np.float64]
Frame = NDArray[np.uint8]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom, pixels."""

LIPS = ((13, 14), (82, 87), (312, 317), (81, 178), (311, 402))
"""Upper and lower points of the inner lips."""

EYE_CORNERS = (33, 263)
LEFT_EYE, RIGHT_EYE = (33, 133, 159, 145), (362, 263, 386, 374)
"""In the image: both corners, the middle of the upper and of the lower lid."""

OVAL = (10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
        152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109)  # fmt: skip
"""Around the face, beginning at the forehead."""

STILL = (33, 133, 362, 263, 168, 6, 197, 4, 98, 327, 10, 151, 127, 356)
"""Corners of the eyes, ridge and wings of the nose, forehead, temples: what speech does not move."""

SIDE = 128
"""Pixels of the square in which a face is compared with the reference."""

REACH = 1
"""Pixels of that square by which a face is also shifted, to be compared where it fits best."""

AGAIN = 1.0
"""Seconds after which other faces are looked for."""

SMALLEST = 1 / 3
"""Of the largest face's size; smaller ones are people in the background."""


@dataclass
class Face:
    """One face: opening of the mouth [frames], NaN where it was not seen, and error of regions against the reference.

    Attributes:
        errors: region ("eyes", "face") -> mean squared error [frames] of values in 0 to 1, NaN where unknown.
        box: of the face in the middle of its frames.
        unit: what the opening is measured in.
        closed: opening of a closed mouth; None where that is not known.
    """

    opening: list[float] = field(default_factory=list)
    errors: dict[str, list[float]] = field(default_factory=lambda: {"eyes": [], "face": []})
    box: Box = (0, 0, 0, 0)
    unit: str = ""
    closed: float | None = None


class Finder(Protocol):
    """Follows faces from frame to frame."""

    how: str

    def see(self, index: int, frame: Frame) -> list[Box]:
        """Take in a frame; returns where faces are in it."""

    def faces(self) -> list[Face]:
        """From left to right, after the last frame."""


# ------------------------------------------------------------------------------------------------------------ landmarks


class _Track:
    """One face as landmarks follow it."""

    def __init__(self, begin: int) -> None:
        self.face = Face(opening=[float("nan")] * begin, unit="of the distance between the eyes", closed=0.0)
        for errors in self.face.errors.values():
            errors += [float("nan")] * begin
        self.last: Landmarks | None = None
        self.lost = False
        self.boxes: list[Box] = []
        self.reference: _Crop | None = None

    def add(self, frame: Frame, points: Landmarks | None) -> None:
        self.lost = points is None
        if points is None:
            self.face.opening.append(float("nan"))
            for errors in self.face.errors.values():
                errors.append(float("nan"))
            return
        self.last = points
        self.boxes.append((*points.min(0), *points.max(0)))
        between = np.linalg.norm(points[EYE_CORNERS[1]] - points[EYE_CORNERS[0]])
        gaps = [np.linalg.norm(points[upper] - points[lower]) for upper, lower in LIPS]
        self.face.opening.append(float(np.mean(gaps) / max(float(between), 1e-9)))
        if self.reference is None:  # the first frame in which it is seen
            self.reference = _Crop(frame, points)
        for name, error in self.reference.compared(frame, points).items():
            self.face.errors[name].append(error)


class LandmarkFaces:
    """Faces by landmarks.

    Args:
        reference: an image [H, W, 3] of the size of the frames that identity is compared with; None: each face as it is
            first seen.
    """

    how = "landmarks"

    def __init__(self, model: LandmarkModel, fps: float, reference: Frame | None = None) -> None:
        self._model, self._again = model, max(1, round(AGAIN * fps))
        self._tracks: list[_Track] = []
        self._wanted = [] if reference is None else [_Crop(reference, points) for points in model.faces(reference)]

    def see(self, index: int, frame: Frame) -> list[Box]:
        seen: list[Landmarks | None] = [
            None if track.last is None or track.lost else self._model.follow(frame, track.last)
            for track in self._tracks
        ]
        if index % self._again == 0 or any(points is None for points in seen):
            for points in self._model.faces(frame):
                if any(_same(points, other) for other in seen if other is not None):
                    continue
                absent = [at for at, other in enumerate(seen) if other is None]
                back = [at for at in absent if (last := self._tracks[at].last) is not None and _same(points, last)]
                if back:
                    seen[back[0]] = points
                else:
                    track = _Track(index)
                    track.reference = next((crop for crop in self._wanted if _same(points, crop.points)), None)
                    self._tracks.append(track)
                    seen.append(points)
        for track, found in zip(self._tracks, seen, strict=True):
            track.add(frame, found)
        return [track.boxes[-1] for track in self._tracks if not track.lost]

    def faces(self) -> list[Face]:
        found = []
        for track in self._tracks:
            if np.isfinite(track.face.opening).mean() < 0.5:
                continue
            track.face.box = _tuple(np.median(np.array(track.boxes), axis=0))
            found.append(track.face)
        largest = max((face.box[2] - face.box[0] for face in found), default=0.0)
        found = [face for face in found if face.box[2] - face.box[0] >= SMALLEST * largest]
        return sorted(found, key=lambda face: face.box[0] + face.box[2])


def _same(one: Landmarks, other: Landmarks) -> bool:
    """Whether two sets of landmarks lie on one face."""
    size = float(np.ptp(one[:, 0]) + np.ptp(other[:, 0])) / 2
    return float(np.linalg.norm(one.mean(0) - other.mean(0))) < size / 2


class _Crop:
    """A face upright in a square, and which parts of it are the eyes and the rest of the face."""

    def __init__(self, image: Frame, points: Landmarks) -> None:
        self.points = points
        low, high = points.min(0), points.max(0)
        side = 1.1 * float((high - low).max())
        self._corner, self._scale = (low + high) / 2 - side / 2, SIDE / side
        self._pixels = self._cut(image, points)
        local = (points - self._corner) * self._scale
        eyes, face = Image.new("1", (SIDE, SIDE)), Image.new("1", (SIDE, SIDE))
        ImageDraw.Draw(face).polygon([tuple(point) for point in local[list(OVAL)]], fill=1)
        for corners in (LEFT_EYE, RIGHT_EYE):
            eye = local[list(corners)]
            reach = 0.2 * np.ptp(eye[:, 0])
            left, right = eye[:, 0].min() - reach, eye[:, 0].max() + reach
            middle, half = eye[:, 1].mean(), 0.4 * (right - left)
            ImageDraw.Draw(eyes).rectangle((left, middle - half, right, middle + half), fill=1)
        mouth = local[[point for pair in LIPS for point in pair] + [61, 291]]
        low, high = mouth.min(0), mouth.max(0)
        below = local[152, 1]  # the chin, which follows the mouth
        margin = 0.25 * (high[0] - low[0])
        ImageDraw.Draw(face).rectangle((low[0] - margin, low[1] - margin, high[0] + margin, below + margin), fill=0)
        self._masks = {"eyes": np.array(eyes), "face": np.array(face) & ~np.array(eyes)}
        for mask in self._masks.values():
            mask[:REACH] = mask[-REACH:] = mask[:, :REACH] = mask[:, -REACH:] = False
        self._motions = {name: _motions(self._pixels, mask) for name, mask in self._masks.items()}

    def _cut(self, image: Frame, points: Landmarks) -> Floats:
        """The face of `image` where that of the reference is: moved, turned and scaled by what speech does not move."""
        scale, turn, shift = _similarity(self.points[list(STILL)], points[list(STILL)])
        corner = scale * turn @ self._corner + shift
        edge = scale * turn @ np.array([SIDE / self._scale, 0.0])
        return cut(image, corner, edge, SIDE).astype(np.float32) / 255

    def compared(self, image: Frame, points: Landmarks) -> dict[str, float]:
        """Region -> mean squared error that is left when the best shift and small affine motions are taken out."""
        here = self._cut(image, points)
        shifts = [(dy, dx) for dy in range(-REACH, REACH + 1) for dx in range(-REACH, REACH + 1)]
        moved = [np.roll(here, shift, (0, 1)) - self._pixels for shift in shifts]
        found = {}
        for name, mask in self._masks.items():
            errors = [one[mask].ravel() for one in moved]
            if not errors[0].size:
                found[name] = float("nan")
                continue
            best = min(errors, key=lambda one: float(one @ one))
            best = best - self._motions[name] @ (self._motions[name].T @ best)
            found[name] = float(best @ best) / best.size
        return found


def _motions(pixels: Floats, mask: NDArray[np.bool_]) -> Floats:
    """An orthonormal basis [pixels x 3, 6] of how a region changes when it moves, turns or stretches a little.

    Landmarks are exact to about a pixel, which at the edges of an eye is worth more than any change of its looks.
    """
    down, right = np.gradient(pixels, axis=(0, 1))
    y, x = (axis[..., None] / SIDE - 0.5 for axis in np.mgrid[:SIDE, :SIDE])
    columns = [gradient * factor for gradient in (down, right) for factor in (np.ones_like(x), x, y)]
    basis: Floats = np.linalg.qr(np.stack([column[mask].ravel() for column in columns], 1))[0]
    return basis


def _similarity(source: Floats, target: Floats) -> tuple[float, Floats, Floats]:
    """Scale, rotation [2, 2] and shift [2] that bring points [n, 2] closest to others (Umeyama 1991)."""
    one, other = source - source.mean(0), target - target.mean(0)
    # For points of the plane: the least-squares rotation and scale are one complex number.
    numbers, targets = one[:, 0] + 1j * one[:, 1], other[:, 0] + 1j * other[:, 1]
    factor = complex((numbers.conj() @ targets) / max(float((np.abs(numbers) ** 2).sum()), 1e-12))
    scale = max(abs(factor), 1e-9)
    turn = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]]) / scale
    return scale, turn, target.mean(0) - scale * turn @ source.mean(0)


# ---------------------------------------------------------------------------------------------------------------- boxes


class Boxes:
    """Faces, or mouths alone, in boxes that stay where they are: a mouth is as open as its middle is dark.

    Args:
        faces: boxes of whole faces; the mouth is taken to be in their lower third.
        mouths: in place of them, boxes of mouths, with nothing known of eyes and faces.
        samples: frames of the video, reduced by `factor`, from which it is read what is light and dark in each box.
    """

    def __init__(
        self,
        how: str,
        samples: Sequence[Frame],
        factor: int,
        faces: Sequence[Box] = (),
        mouths: Sequence[Box] = (),
        reference: Frame | None = None,
    ) -> None:
        self.how = how
        self._areas = [_part(box, 0, 0, 1, 1) for box in faces]
        self._mouths = [_part(box, 0.25, 0.62, 0.75, 0.95) for box in faces] or list(mouths)
        self._eyes = [_part(box, 0.1, 0.25, 0.9, 0.55) for box in faces]
        self._reference = reference
        self._range = []
        for box in self._mouths:
            luma = np.stack([_luma(_inside(frame, scaled(box, 1 / factor))) for frame in samples])
            dark, light = float(np.percentile(luma, 1)), float(np.median(luma))
            self._range.append((dark, max(light, dark + 1)))
        self._faces = [Face(unit="share of the mouth's box that is dark", box=box) for box in faces or mouths]

    def see(self, index: int, frame: Frame) -> list[Box]:
        self._reference = frame if self._reference is None else self._reference
        for at, face in enumerate(self._faces):
            dark, light = self._range[at]
            values = np.clip((light - _luma(_inside(frame, self._mouths[at]))) / (light - dark), 0, 1)
            face.opening.append(float(np.clip(2 * values - 1, 0, 1).mean()))  # what is nearer to dark than to light
            errors = self._errors(at, frame) if self._areas else {"eyes": float("nan"), "face": float("nan")}
            for name, error in errors.items():
                face.errors[name].append(error)
        return self._areas or self._mouths

    def _errors(self, at: int, frame: Frame) -> dict[str, float]:
        assert self._reference is not None
        left, top, _, _ = (round(side) for side in self._areas[at])
        here, there = (_inside(one, self._areas[at]).astype(np.float64) / 255 for one in (frame, self._reference))
        eyes, outside = np.zeros(here.shape[:2], bool), np.ones(here.shape[:2], bool)
        for mask, box, value in ((eyes, self._eyes[at], True), (outside, self._mouths[at], False)):
            x, y, right, bottom = (round(side) for side in box)
            mask[y - top : bottom - top, x - left : right - left] = value
        outside[int(0.6 * len(outside)) :] = False  # the chin, which follows the mouth
        error = np.square(here - there).mean(2)
        return {"eyes": float(error[eyes].mean()), "face": float(error[outside & ~eyes].mean())}

    def faces(self) -> list[Face]:
        return self._faces


def scaled(box: Box, factor: float) -> Box:
    return _tuple(np.array(box) * factor)


def _part(box: Box, left: float, top: float, right: float, bottom: float) -> Box:
    """A part of a box, whose sides are 0 to 1 of the whole."""
    width, height = box[2] - box[0], box[3] - box[1]
    return (box[0] + left * width, box[1] + top * height, box[0] + right * width, box[1] + bottom * height)


def _inside(frame: Frame, box: Box) -> Frame:
    """At least one pixel of it, where a box reaches out of the image."""
    height, width = frame.shape[:2]
    left, top = min(max(0, round(box[0])), width - 1), min(max(0, round(box[1])), height - 1)
    return frame[top : max(top + 1, round(box[3])), left : max(left + 1, round(box[2]))]


def _luma(pixels: Frame) -> Floats:
    result: Floats = pixels @ np.array([0.299, 0.587, 0.114])
    return result


def moving_mouths(samples: Sequence[Frame], fps: float, count: int) -> list[Box]:
    """Where the image changes most, in boxes of two ninths by one ninth of its shorter side: [count], left first.

    It knows nothing of faces. What speech moves most is a mouth, as long as hands, hair and camera keep still.

    Args:
        samples: consecutive frames, of one size.
        fps: their rate.
    """
    height, width = samples[0].shape[:2]
    factor = max(1, min(height, width) // 96)
    small = np.stack([_luma(np.asarray(Image.fromarray(frame).reduce(factor))) for frame in samples])
    # The difference over a fifth of a second: syllables change by then, and slow drifts do not.
    step = max(1, round(fps / 5))
    energy = np.abs(small[step:] - small[:-step]).mean(0)
    sides = max(3, round(min(energy.shape) / 9 * 2)), max(2, round(min(energy.shape) / 9))  # width, height
    sums = np.pad(energy, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    w, h = sides
    inside = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
    boxes: list[Box] = []
    for _ in range(count):
        top, left = (int(at) for at in np.unravel_index(int(inside.argmax()), inside.shape))
        boxes.append(_tuple(np.array([left, top, left + w, top + h]) * float(factor)))
        inside[max(0, top - 2 * h) : top + 2 * h, max(0, left - w) : left + w] = -1
    return sorted(boxes)


def _tuple(box: Floats) -> Box:
    left, top, right, bottom = (float(side) for side in box)
    return left, top, right, bottom
