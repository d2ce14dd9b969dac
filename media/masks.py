"""Where each speaker is in the picture, as the model wants it: one plane per speaker, then the background."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..wanvideo.errors import InputError
from .images import cover_nearest

__all__ = ["MAX_SPEAKERS", "default_masks", "latent_masks"]

MAX_SPEAKERS = 4

INSET = 0.05
"""Share of each speaker's part of the picture that is left free on every side."""


def default_masks(speakers: int, height: int, width: int) -> torch.Tensor:
    """Speakers side by side in equal parts of the picture, each inset by 5 %: [speakers + 1, height, width] of 0, 1.

    The last plane is the background, what no speaker holds. One voice needs no place: three planes of ones.

    Args:
        height, width: of the picture, pixels.
    """
    if not 1 <= speakers <= MAX_SPEAKERS:
        raise InputError(f"{speakers} speakers cannot be told apart: give one to {MAX_SPEAKERS} recordings.")
    if speakers == 1:
        return torch.ones(3, height, width)
    part = width // speakers
    planes = torch.zeros(speakers, height, width)
    rows = slice(int(height * INSET), int(height * (1 - INSET)))
    for speaker, plane in enumerate(planes):
        left = speaker * part
        plane[rows, left + int(part * INSET) : left + int(part * (1 - INSET))] = 1
    return with_background(planes)


def with_background(planes: torch.Tensor) -> torch.Tensor:
    """[speakers, H, W] of 0, 1 with one more plane: what none of them holds."""
    return torch.cat([planes, (planes.sum(0, keepdim=True) == 0).to(planes)])


def latent_masks(
    masks: Sequence[torch.Tensor] | torch.Tensor | None,
    speakers: int,
    picture: tuple[int, int],
    width: int,
    height: int,
) -> torch.Tensor:
    """The masks cut like the picture and brought to latent size: [speakers + 1, height / 8, width / 8] float32 of 0, 1.

    Args:
        masks: one plane [H, W] per speaker (0..1 or 0..255 or bool, true where the speaker is), or None: side by side.
        speakers: number of recordings, 1 to 4.
        picture: (width, height) of the picture that the masks belong to, pixels.
        width, height: of the video, pixels.

    Raises:
        InputError: another number of masks than speakers, or one that holds no part of the visible picture.
    """
    if masks is None or speakers == 1:
        planes = default_masks(speakers, picture[1], picture[0])
    else:
        if len(masks) != speakers:
            raise InputError(f"{len(masks)} masks for {speakers} speakers: give one mask to each speaker, in order.")
        planes = with_background(torch.stack([_plane(mask, picture) for mask in masks]))
    cut = cover_nearest(planes, width, height)
    small = F.interpolate(cut[None], size=(height // 8, width // 8), mode="nearest")[0]
    # The model's tokens take every other row and column of these.
    for speaker, plane in enumerate(small[:speakers, ::2, ::2]):
        if not plane.any():
            raise InputError(
                f"The mask of speaker {speaker + 1} covers no part of the {width} x {height} video: make it larger, or "
                "move it into the middle part of the picture, which is what the video shows."
            )
    return small


def _plane(mask: torch.Tensor, picture: tuple[int, int]) -> torch.Tensor:
    """One mask [H, W] of any scale as 0, 1 at the picture's size."""
    if mask.ndim != 2 or 0 in mask.shape:
        raise InputError(f"A mask of shape {tuple(mask.shape)} cannot be used: give [height, width].")
    values = mask.float().cpu()
    held = (values > 0.5 * max(1.0, float(values.max()))).float()
    return F.interpolate(held[None, None], size=(picture[1], picture[0]), mode="nearest")[0, 0]
