"""Drawn faces that speak, blink and move a little: every image and video that the demo model is trained with.

A face is a row of numbers (`Faces`), what it does in a frame another (`Motion`); `draw` turns both into images. All
of it is arithmetic on tensors, so that a GPU draws a thousand clips in seconds. A unit is half of the image's height;
y points down and the middle of the image is (0, 0).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

__all__ = ["Faces", "Motion", "draw", "mouth_boxes", "random_faces", "random_motion", "rest"]


@dataclass(frozen=True)
class Faces:
    """B faces; colors [B, 3] in [0, 1], everything else [B]."""

    sky: Tensor
    ground: Tensor
    skin: Tensor
    hair: Tensor
    iris: Tensor
    shirt: Tensor
    lips: Tensor
    x: Tensor  # the middle of the head, units
    y: Tensor
    size: Tensor  # factor on everything about the head
    head_width: Tensor
    chin: Tensor  # from the middle of the head to the chin
    hair_volume: Tensor
    hair_length: Tensor  # how far it hangs down at the sides
    fringe: Tensor  # how far it hangs into the forehead
    parting: Tensor
    eye_distance: Tensor
    eye_size: Tensor
    brow: Tensor
    nose: Tensor
    mouth_y: Tensor
    mouth_width: Tensor
    lip: Tensor  # thickness
    blush: Tensor

    def to(self, device: torch.device | str) -> Faces:
        return Faces(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True)
class Motion:
    """What B faces do in T frames; all [B, T]."""

    opening: Tensor  # of the mouth, 0 to 1
    width: Tensor  # 0 round, 1 spread
    blink: Tensor  # 1 is closed
    x: Tensor  # of the head, units
    y: Tensor
    turn: Tensor  # in the image's plane, radians

    def to(self, device: torch.device | str) -> Motion:
        return Motion(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


# ------------------------------------------------------------------------------------------------------ random choices

SKINS = ((0.98, 0.84, 0.73), (0.94, 0.77, 0.64), (0.87, 0.67, 0.52), (0.76, 0.55, 0.40), (0.62, 0.43, 0.31))
HAIRS = (
    (0.16, 0.11, 0.10),
    (0.29, 0.18, 0.15),
    (0.46, 0.28, 0.17),
    (0.80, 0.62, 0.34),
    (0.58, 0.24, 0.13),
    (0.75,) * 3,
)


def random_faces(count: int, generator: torch.Generator, middle: float = 0.0) -> Faces:
    """`count` faces around x = `middle`, on the CPU."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def color(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 3, generator=generator)

    def one_of(table: tuple[tuple[float, ...], ...], spread: float) -> Tensor:
        chosen = torch.tensor(table)[torch.randint(len(table), (count,), generator=generator)]
        return (chosen + spread * (torch.rand(count, 3, generator=generator) - 0.5)).clamp(0.03, 0.98)

    skin = one_of(SKINS, 0.06)
    lips = (skin * torch.tensor([0.86, 0.52, 0.52]) + 0.05 * color(-1, 1)).clamp(0.1, 0.95)
    return Faces(
        sky=0.35 * uniform(0.3, 0.95)[:, None] + 0.65 * color(0.25, 0.95),
        ground=0.35 * uniform(0.3, 0.95)[:, None] + 0.65 * color(0.25, 0.95),
        skin=skin,
        hair=one_of(HAIRS, 0.08),
        iris=color(0.12, 0.5),
        shirt=color(0.1, 0.9),
        lips=lips,
        x=middle + uniform(-0.08, 0.08),
        y=uniform(-0.16, -0.02),
        size=uniform(0.82, 1.1),
        head_width=uniform(0.44, 0.53),
        chin=uniform(0.58, 0.68),
        hair_volume=uniform(0.03, 0.14),
        hair_length=torch.where(torch.rand(count, generator=generator) < 0.5, uniform(-0.2, 0.2), uniform(0.3, 0.8)),
        fringe=uniform(-0.02, 0.2),
        parting=uniform(-0.5, 0.5),
        eye_distance=uniform(0.19, 0.24),
        eye_size=uniform(0.065, 0.088),
        brow=uniform(0.02, 0.04),
        nose=uniform(0.03, 0.06),
        mouth_y=uniform(0.32, 0.38),
        mouth_width=uniform(0.2, 0.26),
        lip=uniform(0.025, 0.045),
        blush=uniform(0.0, 0.35),
    )


def random_motion(opening: Tensor, width: Tensor, generator: torch.Generator, still_start: bool = False) -> Motion:
    """Blinks and a slight sway, and the given mouth; `opening` and `width` are [B, T] at 25 frames per second.

    The head sways by about a hundredth of the image's height and a third of a degree, in periods of 1.2 to 5 s; it
    blinks about every three seconds, for a fifth of one. `still_start`: all of that is at rest in frame 0 and comes
    in over half a second.
    """
    batch, frames = opening.shape
    seconds = torch.arange(frames) / 25

    def sway(size: float) -> Tensor:
        total = torch.zeros(batch, frames)
        for _ in range(3):
            period = 1.2 + 3.8 * torch.rand(batch, 1, generator=generator)
            phase = torch.rand(batch, 1, generator=generator)
            strength = size * torch.rand(batch, 1, generator=generator)
            total += strength * torch.sin(2 * torch.pi * (seconds / period + phase))
        return total

    starts = torch.rand(batch, frames, generator=generator) < 1 / 75
    blink = torch.zeros(batch, frames)
    for offset, closed in enumerate((0.5, 1.0, 1.0, 0.6, 0.2)):
        shifted = torch.zeros(batch, frames, dtype=torch.bool)
        shifted[:, offset:] = starts[:, : frames - offset]
        blink = torch.maximum(blink, closed * shifted)
    x, y, turn = sway(0.007), sway(0.009), sway(0.005)
    if still_start:
        ramp = (seconds / 0.5).clamp(max=1)
        x, y, turn, blink = x * ramp, y * ramp, turn * ramp, blink * (seconds > 0.1)
    return Motion(opening, width, blink, x, y, turn)


def rest(count: int, opening: float | Tensor = 0.0) -> Motion:
    """One frame of `count` faces that do nothing: the image that a video starts from."""
    zeros = torch.zeros(count, 1)
    return Motion(zeros + torch.as_tensor(opening).reshape(-1, 1), zeros + 0.5, zeros, zeros, zeros, zeros)


# -------------------------------------------------------------------------------------------------------------- drawing


@torch.no_grad()
def draw(faces: list[Faces], motions: list[Motion], height: int, width: int) -> Tensor:
    """Videos [B, 3, T, height, width] in [-1, 1], float32, of one or more faces in front of the first one's background.

    `faces` and `motions` belong together, one for each person in the image; all have the same B and T.
    """
    first, frames = faces[0], motions[0].opening.shape[1]
    device = first.x.device
    rows = (torch.arange(height, device=device) + 0.5) / height * 2 - 1
    columns = ((torch.arange(width, device=device) + 0.5) / width * 2 - 1) * (width / height)
    y, x = torch.meshgrid(rows, columns, indexing="ij")  # [H, W]
    pen = _Pen(2 / height)

    def each(color: Tensor) -> Tensor:  # [B, 3] -> [B, 3, 1, 1, 1]
        return color[:, :, None, None, None]

    fall = ((y + 1) / 2)[None, None, None]
    canvas = each(first.sky) + (each(first.ground) - each(first.sky)) * fall
    canvas = canvas.expand(-1, -1, frames, -1, -1)
    for face, motion in zip(faces, motions, strict=True):
        canvas = _body(pen, canvas, face, motion, x, y)
    return canvas.clamp(0, 1) * 2 - 1


@dataclass(frozen=True)
class _Pen:
    """Shapes as coverages in [0, 1], with edges `pixel` units wide."""

    pixel: float

    def fill(self, distance: Tensor, blur: float | Tensor = 0.0) -> Tensor:
        return (0.5 - distance / (self.pixel + blur)).clamp(0, 1)

    def ellipse(
        self, x: Tensor, y: Tensor, width: Tensor | float, height: Tensor | float, blur: float | Tensor = 0.0
    ) -> Tensor:
        """Of half axes `width` and `height` around (0, 0)."""
        u, v = x / width, y / height
        norm = torch.sqrt(u * u + v * v + 1e-9)
        slope = torch.sqrt((u / width) ** 2 + (v / height) ** 2 + 1e-9)
        return self.fill((norm - 1) * norm / slope, blur)

    def box(self, x: Tensor, y: Tensor, width: Tensor | float, height: Tensor | float, round_: float) -> Tensor:
        """With rounded corners, of half sides `width` and `height` around (0, 0)."""
        u, v = x.abs() - width + round_, y.abs() - height + round_
        outside = torch.sqrt(u.clamp(min=0) ** 2 + v.clamp(min=0) ** 2)
        return self.fill(outside + torch.maximum(u, v).clamp(max=0) - round_)


def _paint(canvas: Tensor, coverage: Tensor, color: Tensor) -> Tensor:
    """canvas [B, 3, T, H, W], coverage [B, T, H, W], color [B, 3]."""
    cover = coverage[:, None]
    return canvas + cover * (color[:, :, None, None, None] - canvas)


def _body(pen: _Pen, canvas: Tensor, face: Faces, motion: Motion, x: Tensor, y: Tensor) -> Tensor:
    def row(value: Tensor) -> Tensor:  # [B] or [B, T] -> [B, 1 or T, 1, 1]
        return value[(...,) + (None,) * (4 - value.ndim)]

    f = replace(face, **{k.name: row(getattr(face, k.name)) for k in fields(face) if getattr(face, k.name).ndim == 1})
    m = Motion(**{k.name: row(getattr(motion, k.name)) for k in fields(motion)})

    # the shoulders stay where they are
    bx, by = (x - f.x) / f.size, (y - f.y) / f.size
    # the head turns about the neck
    hx, hy = bx - m.x, by - m.y - 0.55
    cos, sin = torch.cos(m.turn), torch.sin(m.turn)
    hx, hy = hx * cos + hy * sin, hy * cos - hx * sin + 0.55

    wide, chin, brow_up = f.head_width, f.chin, 0.6
    shade = f.skin * 0.86
    volume, length = f.hair_volume, f.hair_length
    back = pen.ellipse(hx, hy + 0.08, wide + volume, brow_up + volume)
    hanging = pen.box(hx, hy - length / 2, wide + 0.9 * volume, (length / 2 + 0.05).clamp(min=0.02), 0.1)
    hanging = hanging * (length > 0)
    canvas = _paint(canvas, torch.maximum(back, hanging), face.hair * 0.85)
    canvas = _paint(canvas, pen.box(bx, by - 0.75, 0.17, 0.3, 0.05), shade)
    canvas = _paint(canvas, pen.ellipse(bx, by - 1.5, 0.85, 0.68), face.shirt)
    canvas = _paint(canvas, pen.ellipse(bx, by - 0.86, 0.2, 0.13), shade)
    ears = torch.maximum(pen.ellipse(hx - wide, hy - 0.05, 0.06, 0.11), pen.ellipse(hx + wide, hy - 0.05, 0.06, 0.11))
    canvas = _paint(canvas, ears, shade)

    down = torch.where(hy > 0, chin, torch.full_like(chin, brow_up))
    head = pen.ellipse(hx, hy, wide, down)
    canvas = _paint(canvas, head, face.skin)
    cheeks = pen.ellipse(hx.abs() - 0.27, hy - 0.17, 0.1, 0.07, 0.12)
    canvas = _paint(canvas, cheeks * f.blush, face.lips)
    line = -0.36 + f.fringe + 0.5 * (hx - 0.3 * f.parting).abs() ** 1.5 * (0.4 + f.parting.abs())
    top = pen.ellipse(hx, hy + 0.03, wide + volume * 0.8, brow_up + volume * 0.7)
    canvas = _paint(canvas, top * pen.fill(hy - line), face.hair)

    dark = face.hair * 0.25 + 0.03
    ex, ey = hx.abs() - f.eye_distance, hy + 0.03
    open_ = 1 - 0.93 * m.blink
    white = pen.ellipse(ex, ey, f.eye_size * 1.25, f.eye_size * open_)
    lashes = pen.ellipse(ex, ey + 0.012, f.eye_size * 1.38, f.eye_size * open_ + 0.022)
    canvas = _paint(canvas, lashes, dark)
    canvas = _paint(canvas, white, torch.full_like(face.skin, 0.97))
    canvas = _paint(canvas, white * pen.ellipse(ex, ey, f.eye_size * 0.72, f.eye_size * 0.72), face.iris)
    canvas = _paint(canvas, white * pen.ellipse(ex, ey, f.eye_size * 0.36, f.eye_size * 0.36), dark * 0.5)
    # the light falls from one side: not mirrored
    for side in (-1, 1):
        glint = pen.ellipse(hx - side * f.eye_distance + 0.02, ey + 0.025, 0.017, 0.017)
        canvas = _paint(canvas, white * glint, torch.ones_like(face.skin))
    arch = hy + 0.19 + f.eye_size * 0.3 + 1.0 * ex**2
    brows = pen.fill((arch.abs() - f.brow * 0.6).clamp(min=-1)) * pen.fill((ex + 0.01).abs() - 0.12)
    canvas = _paint(canvas, brows, face.hair * 0.6)
    canvas = _paint(canvas, pen.ellipse(hx, hy - 0.2, f.nose, f.nose * 0.5, 0.02), face.skin * 0.78)

    # the mouth: lips, the dark inside, teeth above and tongue below
    mx, my = hx, hy - f.mouth_y - 0.03 * m.opening
    half = f.mouth_width * (0.72 + 0.36 * m.width)
    gap = 0.14 * m.opening
    canvas = _paint(canvas, pen.ellipse(mx, my, half + f.lip * 0.6, gap + f.lip), face.lips)
    inside = pen.ellipse(mx, my, half * 0.92, gap + 0.006)
    canvas = _paint(canvas, inside, torch.tensor([[0.2, 0.05, 0.07]], device=face.skin.device).expand_as(face.skin))
    teeth = inside * pen.fill(my + gap * 0.55) * (gap * 12).clamp(max=1)
    canvas = _paint(canvas, teeth, torch.full_like(face.skin, 0.95))
    tongue = inside * pen.ellipse(mx, my - gap * 0.85, half * 0.5, gap * 0.45 + 1e-3) * (gap * 12).clamp(max=1)
    return _paint(canvas, tongue, torch.tensor([[0.62, 0.25, 0.27]], device=face.skin.device).expand_as(face.skin))


def mouth_boxes(face: Faces, height: int, width: int) -> Tensor:
    """Where each mouth is, the head at rest and the mouth wide open: [B, 4] of left, top, right, bottom in pixels."""
    half_height, half_width = height / 2, height / 2
    x = face.x * half_width + width / 2
    y = (face.y + face.size * (face.mouth_y + 0.02)) * half_height + height / 2
    wide = face.size * (face.mouth_width * 1.1 + face.lip) * half_width
    tall = face.size * (0.16 + face.lip) * half_height
    return torch.stack([x - wide, y - tall, x + wide, y + tall], dim=1)
