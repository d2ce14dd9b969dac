"""Masks of the speakers, as the model takes them: one plane per speaker, then the background."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..wanvideo.errors import InputError
from .images import cover_nearest, open_image

logger = logging.getLogger(__name__)

__all__ = ["MAX_SPEAKERS", "box_mask", "default_masks", "latent_masks", "load_mask", "read_box", "speaker_planes"]

MAX_SPEAKERS = 4

INSET = 0.05
"""Share of each speaker's part of the image that is left free on every side."""


MAX_SIDE = 4096
"""Pixels. Larger masks are read at this size: the model's own are below 1,024."""

OVERLAP = 0.05
"""Share of the smaller of two masks that may lie in the other one without a word: soft brushes, rounding."""

SAME = 0.95
"""Share of two masks' union that both hold, above which they are one and the same."""


def load_mask(path: str | Path) -> torch.Tensor:
    """The mask in an image file, the speaker bright: [H, W] float32 in [0, 1]. Errors as `open_image`.

    An image without transparency is read by brightness, colors on black as well as white. Where a part is transparent,
    the rest decides (see `_by_alpha`): paint on a transparent layer marks the speaker, and so does the hole that
    ComfyUI's mask editor leaves in a photo.
    """
    image = open_image(path)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.NEAREST)
    pixels = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
    if pixels[..., 3].min() < 1:
        mask, how = _by_alpha(pixels[..., :3], pixels[..., 3])
        logger.info("Mask %s: %s is read as the speaker", path, how)
    else:
        mask = _by_brightness(pixels[..., :3])
    largest = float(mask.max())
    gray = float(((mask > 0.1 * largest) & (mask < 0.9 * largest)).mean())
    if gray > 0.2:
        logger.warning(
            "Mask %s: %.0f %% of it is neither black nor white; what is above half of its largest value is read as the "
            "speaker",
            path,
            100 * gray,
        )
    return torch.from_numpy(mask)


def _by_brightness(rgb: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [H, W]: the largest channel, so that any color on black counts; luminance on a light ground."""
    largest: np.ndarray = rgb.max(axis=2)
    if largest.min() > 0.5 * largest.max():
        return np.asarray(Image.fromarray((rgb * 255).astype(np.uint8)).convert("L"), dtype=np.float32) / 255
    return largest


def _by_alpha(rgb: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, str]:
    """(mask, what it is) of a partly transparent image; `rgb` [H, W, 3], `alpha` [H, W], all in [0, 1].

    1. Opaque parts of one color are paint on a transparent layer; black paint is what lies around the speaker.
    2. Opaque parts of black and white are a mask already; nobody is in the transparent ones.
    3. Otherwise they are a photo. ComfyUI's mask editor leaves the colors under its hole: the hole is the mask.
       Programs that cut a person out fill the rest with black or white: the person is the mask.
    """
    shown, hidden = rgb[alpha >= 0.5], rgb[alpha < 0.5]
    cut_out = _is_flat(hidden) and len(hidden) > 0 and not 0.05 < float(np.median(hidden)) < 0.95
    if len(shown) == 0:
        return (alpha, "the opaque part") if cut_out else (1 - alpha, "the transparent part")
    if _is_flat(shown):
        if np.median(shown, axis=0).max() > 0.25:
            return alpha, "the painted part"
        return 1 - alpha, "the transparent part"
    brightness = shown.max(axis=1)
    if float(((brightness < 0.1) | (brightness > 0.9 * brightness.max())).mean()) > 0.95 and brightness.min() < 0.1:
        return _by_brightness(rgb * alpha[..., None]), "the bright part"
    return (alpha, "the opaque part") if cut_out else (1 - alpha, "the transparent part")


def _is_flat(colors: np.ndarray) -> bool:
    """Whether colors [N, 3] are one, up to noise and edges."""
    if len(colors) == 0:
        return True
    low, high = np.percentile(colors, [1, 99], axis=0)
    return bool((high - low).max() < 0.125)


def read_box(text: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a box in percent of the image's width and height, as in "10, 5, 45, 95".

    Raises InputError for anything else, and for a box that is empty or reaches beyond the image.
    """
    parts = [part for part in re.split(r"[\s,;%，、；]+", text) if part]
    try:
        left, top, right, bottom = map(float, parts)
    except ValueError:
        left = top = right = bottom = math.nan
    if not (0 <= left < right <= 100 and 0 <= top < bottom <= 100):
        raise InputError(
            f"The box {text.strip()[:60]} cannot be used: give left, top, right and bottom in percent of the image, "
            "such as 10, 5, 45, 95."
        )
    return left, top, right, bottom


def box_mask(box: tuple[float, float, float, float], width: int, height: int) -> torch.Tensor:
    """The mask of a box as `read_box` gives it: [height, width] of 0, 1; each pixel that it touches is in it."""
    left, top, right, bottom = box
    mask = torch.zeros(height, width)
    rows = slice(math.floor(top / 100 * height), math.ceil(bottom / 100 * height))
    mask[rows, math.floor(left / 100 * width) : math.ceil(right / 100 * width)] = 1
    return mask


def speaker_planes(masks: torch.Tensor, speakers: int) -> list[torch.Tensor]:
    """[H, W] or [N, H, W] as one plane per speaker, without the background that may follow them.

    A last plane that overlaps the others is no background; it is kept, for `latent_masks` to reject their number.
    """
    planes = list((masks if masks.ndim == 3 else masks[None]).float().cpu())
    if len(planes) == speakers + 1:
        *people, background = planes
        shared = torch.minimum(torch.stack(people).amax(0), background).sum()
        if shared <= OVERLAP * background.sum():
            return people
    return planes


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

    The background is the last plane. A single speaker has three: of ones, or with a mask as below.

    Args:
        masks: one plane [H, W] per speaker, bool or of any scale (the speaker is where it is above half of its largest
            value), or None: side by side. The mask of a single speaker is followed by its complement, the place of a
            second speaker who is silent.
        speakers: number of recordings, 1 to 4.
        image: (width, height) of the image that the masks belong to, pixels.
        width, height: of the video, pixels.

    Raises:
        InputError: another number of masks than speakers, one that holds no part of the visible image, or two that
            hold the same.
    """
    _check_speakers(speakers)
    if masks is not None and len(masks) != speakers:
        raise InputError(f"{len(masks)} masks for {speakers} speakers: give one mask to each speaker, in order.")
    if masks is None:
        planes = default_masks(speakers, image[1], image[0])
    else:
        planes = with_background(torch.stack([_plane(mask, image) for mask in masks]))
    cut = cover_nearest(planes, width, height)
    small = F.interpolate(cut[None], size=(height // 8, width // 8), mode="nearest")[0]
    # The model's tokens take every other row and column of these.
    for number, plane in enumerate(small[:speakers, ::2, ::2], 1):
        if plane.any():
            continue
        if masks is None:
            raise InputError(
                f"The {width} x {height} video shows the middle of the {image[0]} x {image[1]} image only, and not "
                f"speaker {number}, as {speakers} speakers are taken to be side by side: choose a size of the image's "
                "aspect, or give masks."
            )
        raise InputError(
            f"The mask of speaker {number} covers no part of the {width} x {height} video: make it larger, or "
            "move it into the middle part of the image, which is what the video shows; or give no masks."
        )
    if masks is None:
        return small
    _check_apart(small[:speakers])
    if speakers > 1:
        return small
    if small[0].all():
        logger.warning("The mask covers the whole video: the speaker is everywhere, as without it")
    else:
        logger.info("The mask confines the speaker; everywhere else is a second one, who is silent")
    return torch.cat([small, torch.zeros_like(small[:1])])


def _check_apart(planes: torch.Tensor) -> None:
    """Reject masks [speakers, h, w] that are the same, and log those that overlap."""
    for one, two in combinations(range(len(planes)), 2):
        both = float((planes[one] * planes[two]).sum())
        smaller = float(torch.minimum(planes[one].sum(), planes[two].sum()))
        union = float(torch.maximum(planes[one], planes[two]).sum())
        names = f"The masks of speakers {one + 1} and {two + 1}"
        if both >= SAME * union:
            raise InputError(
                f"{names} cover the same part of the video: give each speaker a mask that is white where that speaker "
                "is, and black elsewhere."
            )
        if both > OVERLAP * smaller:
            logger.warning(
                "%s overlap in %.0f %% of the video (%.0f %% of the smaller one), where it is open who speaks; white "
                "marks the speaker, black all the rest",
                names,
                100 * both / planes[one].numel(),
                100 * both / smaller,
            )


def _plane(mask: torch.Tensor, image: tuple[int, int]) -> torch.Tensor:
    """One mask [H, W] of any scale as 0, 1 at the image's size."""
    if mask.ndim != 2 or 0 in mask.shape:
        raise InputError(f"A mask of shape {tuple(mask.shape)} cannot be used: give [height, width].")
    values = mask.float().cpu()
    largest = float(values.max())
    if not math.isfinite(largest):
        raise InputError("A mask holds NaN or infinite values: give numbers from 0 to 1.")
    held = ((values > 0.5 * largest) if largest > 0 else torch.zeros_like(values)).float()
    height, width = mask.shape
    if abs(width * image[1] - height * image[0]) > 0.05 * width * image[1]:
        logger.warning(
            "A mask of %d x %d is stretched over the image of %d x %d, which has another aspect", width, height, *image
        )
    return F.interpolate(held[None, None], size=(image[1], image[0]), mode="nearest")[0, 0]
