"""Training clips in latent space, drawn and encoded on the GPU, a part of them renewed all the time.

A clip is 81 frames (21 latent ones) of one or two people, the image that it starts from, and the speech of each.
Half of the clips begin with the image itself, as the first window of a video does; the others begin anywhere, as
later windows do, whose first frames are the last of the window before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...media.masks import default_masks
from ...wanvideo.encoders.clip import ClipVision
from ...wanvideo.encoders.vae import WanVAE
from .faces import Faces, Motion, draw, mouth_boxes, random_faces, random_motion, rest
from .whole_clip import encode

__all__ = ["FRAMES", "SIZE", "Bank", "Clips", "Sounds"]

FRAMES, LATENTS = 81, 21
SIZE = 128


@dataclass(frozen=True)
class Sounds:
    """Speech features of recordings, and the mouth that follows them, end to end."""

    features: Tensor  # [rows, layers, channels] float16
    mouth: Tensor  # [rows, 2] float32: opening, width
    ends: Tensor  # [recordings]

    @classmethod
    def load(cls, path: str | Path) -> Sounds:
        """Read what `prepare` wrote."""
        with np.load(path) as file:
            return cls(*(torch.from_numpy(file[name]) for name in ("features", "mouth", "ends")))

    def part(self, first: int, last: int) -> Sounds:
        """Recordings `first` to `last` - 1."""
        begin = 0 if first == 0 else int(self.ends[first - 1])
        end = int(self.ends[last - 1])
        return Sounds(self.features[begin:end], self.mouth[begin:end], self.ends[first:last] - begin)

    def pick(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random stretches of FRAMES: features' rows [count, FRAMES, 5] to gather, and the mouth [count, FRAMES, 2]."""
        starts = torch.cat([torch.zeros(1, dtype=torch.long), self.ends[:-1]])
        which = torch.randint(len(self.ends), (count,), generator=generator)
        begin, end = starts[which], self.ends[which]
        offset = (torch.rand(count, generator=generator) * (end - begin - FRAMES)).long()
        frame = (begin + offset)[:, None] + torch.arange(FRAMES)
        rows = frame[:, :, None] + torch.arange(-2, 3)
        rows = torch.minimum(torch.maximum(rows, begin[:, None, None]), end[:, None, None] - 1)
        return rows, self.mouth[frame]


@dataclass(frozen=True)
class Clips:
    """N clips with `people` in each, on the training device."""

    x: Tensor  # [N, 16, 21, h, w] float16, clean latents
    y: Tensor  # [N, 16, 21, h, w] float16, latents of the image followed by gray
    image: Tensor  # [N, 257, 64] float16, CLIP tokens
    rows: Tensor  # [N, people, 81, 5], the features of each frame, rows of Sounds.features
    front: Tensor  # [N], clean latent frames that a window is given at its beginning
    weight: Tensor  # [N, h, w], of the loss: more about the mouths
    masks: Tensor  # [N, people + 1, h/2 * w/2]
    mouth: Tensor  # [N, people, 81], the opening that was drawn
    boxes: Tensor  # [N, people, 4], pixels

    def fields(self) -> list[Tensor]:
        return [*vars(self).values()]


class Bank:
    """Makes clips of `people` people."""

    def __init__(self, vae: WanVAE, clip: ClipVision, sounds: Sounds, people: int, seed: int) -> None:
        self.vae, self.clip, self.sounds, self.people = vae, clip, sounds, people
        self.device = vae.device
        self.generator = torch.Generator().manual_seed(seed)
        self.width = SIZE * people

    @torch.no_grad()
    def make(self, count: int) -> Clips:
        generator = self.generator
        first = torch.rand(count, generator=generator) < 0.5  # begins with the image
        middles = [0.0] if self.people == 1 else [-1.0, 1.0]
        people = [self._person(first, middle) for middle in middles]
        faces = [face for face, _, _, _ in people]
        moved = [face.to(self.device) for face in faces]
        video = draw(moved, [motion.to(self.device) for _, motion, _, _ in people], SIZE, self.width)
        image = draw(moved, [still.to(self.device) for _, _, still, _ in people], SIZE, self.width)  # [N, 3, 1, H, W]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            x = encode(self.vae, video)
            y = encode(self.vae, F.pad(image, (0, 0, 0, 0, 0, FRAMES - 1)))
        front = torch.where(first, 1, 3)
        seven = ~first & (torch.rand(count, generator=generator) < 0.1)  # 25 motion frames
        boxes = torch.stack([mouth_boxes(face, SIZE, self.width) for face in faces], dim=1)
        clips = Clips(
            x=x.half(),
            y=y.half(),
            image=self.clip.encode(image[:, :, 0]).half(),
            rows=torch.stack([rows for _, _, _, rows in people], dim=1),
            front=torch.where(seven, 7, front),
            weight=_weights(boxes, self.width),
            masks=self._masks(faces),
            mouth=torch.stack([motion.opening for _, motion, _, _ in people], dim=1),
            boxes=boxes,
        )
        return Clips(*(tensor.to(self.device) for tensor in clips.fields()))

    def _person(self, first: Tensor, middle: float) -> tuple[Faces, Motion, Motion, Tensor]:
        """One person of each clip around x = `middle`: face, motion, what it does in the image, rows of features."""
        count, generator = len(first), self.generator
        rows, mouth = self.sounds.pick(count, generator)
        opening, width = mouth.unbind(-1)
        start = torch.where(
            torch.rand(count, generator=generator) < 0.12, 0.4 * torch.rand(count, generator=generator), 0.0
        )
        ramp = (torch.arange(FRAMES) / 3).clamp(max=1)[None]
        opening = torch.where(first[:, None], ramp * opening + (1 - ramp) * start[:, None], opening)
        width = torch.where(first[:, None], ramp * width + (1 - ramp) * 0.5, width)
        still = random_motion(opening, width, generator, still_start=True)
        moving = random_motion(opening, width, generator)
        both = zip(vars(still).values(), vars(moving).values(), strict=True)
        motion = Motion(*(torch.where(first[:, None], a, b) for a, b in both))
        return random_faces(count, generator, middle), motion, rest(count, start), rows

    def _masks(self, faces: list[Faces]) -> Tensor:
        """[N, people + 1, S]: for each clip the default halves, or boxes about the heads."""
        count = faces[0].x.shape[0]
        height, width = SIZE // 16, self.width // 16
        halves = F.interpolate(default_masks(max(2, self.people), SIZE, self.width)[None], (height, width))[0]
        if self.people == 1:
            return torch.ones(count, 2, height * width)
        y, x = torch.meshgrid(
            (torch.arange(height) + 0.5) / height * 2 - 1,
            ((torch.arange(width) + 0.5) / width * 2 - 1) * width / height,
            indexing="ij",
        )
        tight = []
        for face in faces:
            dx = (x - face.x[:, None, None]).abs() / face.size[:, None, None]
            dy = (y - face.y[:, None, None]).abs() / face.size[:, None, None]
            tight.append((dx < 0.7) & (dy < 0.8))
        planes = torch.stack(tight, dim=1).float()
        planes = torch.cat([planes, (planes.sum(1, keepdim=True) == 0).float()], dim=1)
        choose = torch.rand(count, 1, 1, 1, generator=self.generator) < 0.6
        return torch.where(choose, halves[None], planes).flatten(2)


def join(parts: list[Clips]) -> Clips:
    return Clips(*(torch.cat(tensors) for tensors in zip(*(part.fields() for part in parts), strict=True)))


def renew(clips: Clips, fresh: Clips, at: int) -> None:
    """Write `fresh` over the clips from `at` on."""
    count = fresh.x.shape[0]
    for old, new in zip(clips.fields(), fresh.fields(), strict=True):
        old[at : at + count] = new


def _weights(boxes: Tensor, width: int) -> Tensor:
    """[N, h, w], the share of each latent position that is mouth, times 5, plus 1."""
    y = torch.arange(SIZE // 8)[:, None] * 8.0
    x = torch.arange(width // 8)[None] * 8.0
    weight = torch.ones(len(boxes), SIZE // 8, width // 8)
    for box in boxes.unbind(1):
        left, top, right, bottom = (side[:, None, None] for side in box.unbind(1))
        wide = (torch.minimum(x + 8, right) - torch.maximum(x, left)).clamp(min=0)
        tall = (torch.minimum(y + 8, bottom) - torch.maximum(y, top)).clamp(min=0)
        weight += 5 * wide * tall / 64
    return weight
