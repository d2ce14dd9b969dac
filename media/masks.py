"""Masks of the speakers, as the model takes them: one plane per speaker, then the background."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..wanvideo.errors import InputError
from .images import cover_nearest, load_image

__all__ = ["MAX_SPEAKERS", "default_masks", "latent_masks", "load_mask", "speaker_planes"]

MAX_SPEAKERS = 4

INSET = 0.05
"""Share of each speaker's part of the image that is left free on every side."""


def load_mask(path: str | Path) -> torch.Tensor:
    """The mask in an image file, white where the speaker is: [H, W] float32 in [0, 1]. Errors as `load_image`."""
    return torch.from_numpy(np.asarray(load_image(path).convert("L"), dtype=np.float32) / 255)


def speaker_planes(masks: torch.Tensor, speakers: int) -> list[torch.Tensor]:
    """[H, W] or [N, H, W] as one plane per speaker, without the background that may follow them."""
    planes = masks if masks.ndim == 3 else masks[None]
    return list(planes[: speakers if len(planes) == speakers + 1 else None].float().cpu())


def default_masks(speakers: int, height: int, width: int) -> torch.Tensor:
    """Speakers side by side in equal parts of the image, each inset by 5 %: [speakers + 1, height, width] of 0, 1.

    The last plane is the background, where no speaker is. One speaker needs no place: three planes of ones.

    Args:
        height, width: of the image, pixels.
    """
    _check_speakers(speakers)
    if speakers == 1:
        return torch.ones(3, height, width)
    part = width // speakers
    planes = torch.zeros(speakers, height, width)
    rows = slice(int(height * INSET), int(height * (1 - INSET)))
    for speaker, plane in enumerate(planes):
        left = speaker * part
        plane[rows, left + int(part * INSET) : left + int(part * (1 - INSET))] = 1
    return with_background(planes)


def _check_speakers(speakers: int) -> None:
    if not 1 <= speakers <= MAX_SPEAKERS:
        raise InputError(f"{speakers} recordings are given: give one to {MAX_SPEAKERS}, one per speaker.")


def with_background(planes: torch.Tensor) -> torch.Tensor:
    """[speakers, H, W] of 0, 1 with one more plane: what none of them holds."""
    return torch.cat([planes, (planes.sum(0, keepdim=True) == 0).to(planes)])


def latent_masks(
    masks: Sequence[torch.Tensor] | torch.Tensor | None,
    speakers: int,
    image: tuple[int, int],
    width: int,
    height: int,
) -> torch.Tensor:
    """The masks cut like the image and brought to latent size: [speakers + 1, height / 8, width / 8] float32 of 0, 1.

    Args:
        masks: one plane [H, W] per speaker (0..1 or 0..255 or bool, true where the speaker is), or None: side by
            side. Not read for one speaker.
        speakers: number of recordings, 1 to 4.
        image: (width, height) of the image that the masks belong to, pixels.
        width, height: of the video, pixels.

    Raises:
        InputError: another number of masks than speakers, or one that holds no part of the visible image.
    """
    _check_speakers(speakers)
    if masks is not None and len(masks) != speakers:
        raise InputError(f"{len(masks)} masks for {speakers} speakers: give one mask to each speaker, in order.")
    if masks is None or speakers == 1:
        planes = default_masks(speakers, image[1], image[0])
    else:
        planes = with_background(torch.stack([_plane(mask, image) for mask in masks]))
    cut = cover_nearest(planes, width, height)
    small = F.interpolate(cut[None], size=(height // 8, width // 8), mode="nearest")[0]
    # The model's tokens take every other row and column of these.
    for speaker, plane in enumerate(small[:speakers, ::2, ::2]):
        if not plane.any():
            raise InputError(
                f"The mask of speaker {speaker + 1} covers no part of the {width} x {height} video: make it larger, or "
                "move it into the middle part of the image, which is what the video shows."
            )
    return small


def _plane(mask: torch.Tensor, image: tuple[int, int]) -> torch.Tensor:
    """One mask [H, W] of any scale as 0, 1 at the image's size."""
    if mask.ndim != 2 or 0 in mask.shape:
        raise InputError(f"A mask of shape {tuple(mask.shape)} cannot be used: give [height, width].")
    values = mask.float().cpu()
    held = (values > 0.5 * max(1.0, float(values.max()))).float()
    return F.interpolate(held[None, None], size=(image[1], image[0]), mode="nearest")[0, 0]
