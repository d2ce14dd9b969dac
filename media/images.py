"""Images for the model: any mode and size in, frames of one size in [-1, 1] out."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..wanvideo.errors import InputError

__all__ = ["SIZE_STEP", "cover_image", "cover_nearest", "fit_size", "load_image"]

logger = logging.getLogger(__name__)

SIZE_STEP = 16
"""Pixels. The VAE shrinks 8 times, the model's patches twice more."""

DEFAULT_AREA = 640 * 640
"""Pixels. InfiniteTalk's smaller size, in any aspect."""

MAX_ASPECT = 4.0
"""Of a video whose sides are not given; narrower images show their middle."""


def load_image(source: str | Path | Image.Image | np.ndarray | torch.Tensor) -> Image.Image:
    """An upright RGB image from a file, a PIL image of any mode, or pixels [H, W, 3] (uint8, or float in [0, 1]).

    Transparent parts become white. Raises InputError for what is no image.
    """
    if isinstance(source, torch.Tensor):
        source = (source if source.dtype == torch.uint8 else source.float()).cpu().numpy()
    if isinstance(source, np.ndarray):
        return _from_array(source)
    image = source if isinstance(source, Image.Image) else _open(source)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        # 16 and 32 bit gray: Pillow would clip at 255 instead of scaling.
        gray = np.asarray(upright, dtype=np.float32)
        upright = Image.fromarray(np.clip(gray / (257 if gray.max() > 255 else 1), 0, 255).astype(np.uint8))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("RGB")


def _open(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise InputError(f"There is no image at {path}: check the path.") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's ways to reject a file
        raise InputError(f"{path} cannot be read as an image ({error}): give a PNG, JPEG or WebP file.") from None


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise InputError(f"An image of shape {pixels.shape} cannot be used: give [height, width, 3].")
    if pixels.dtype != np.uint8:
        if not np.isfinite(pixels).all():
            raise InputError("The image holds NaN or infinite values: give numbers from 0 to 1.")
        pixels = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    return load_image(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def fit_size(
    image: tuple[int, int], width: int | None = None, height: int | None = None, area: int = DEFAULT_AREA
) -> tuple[int, int]:
    """Width and height of the video, both multiples of 16.

    Given sides are rounded to the nearest multiple (with a line in the log); a missing one follows the image's
    aspect; with neither, the image's aspect is kept within `area` pixels.

    Args:
        image: (width, height) of the image, pixels.
    """
    aspect = image[0] / image[1]
    if width is not None and height is not None:
        wanted = (float(width), float(height))
    elif width is not None:
        wanted = (width, width / aspect)
    elif height is not None:
        wanted = (height * aspect, height)
    else:
        aspect = min(max(aspect, 1 / MAX_ASPECT), MAX_ASPECT)
        wanted = (math.sqrt(area * aspect), math.sqrt(area / aspect))
    fitted = (_to_step(wanted[0]), _to_step(wanted[1]))
    if (width or fitted[0], height or fitted[1]) != fitted:
        logger.info(
            "Size %s x %s becomes %d x %d: the model works in steps of %d pixels.", width, height, *fitted, SIZE_STEP
        )
    return fitted


def _to_step(side: float) -> int:
    return max(1, math.floor(side / SIZE_STEP + 0.5)) * SIZE_STEP


def _cover(height: int, width: int, target: tuple[int, int]) -> tuple[int, int, int, int]:
    """(height, width) that cover the target (height, width) at this aspect, and the top and left of its center."""
    scale = max(target[0] / height, target[1] / width)
    # An image of one pixel's width at the target's height is still that wide, never narrower than the target.
    h, w = max(math.ceil(scale * height), target[0]), max(math.ceil(scale * width), target[1])
    return h, w, round((h - target[0]) / 2), round((w - target[1]) / 2)


def cover_image(image: Image.Image, width: int, height: int) -> torch.Tensor:
    """The image resized (bilinear) to cover the size, its center cut out: [3, height, width] float32 in [-1, 1]."""
    h, w, top, left = _cover(image.height, image.width, (height, width))
    # Only the part that is kept is resized, so that a 1 x 5000 image needs no 832 x 4,160,000 one on the way.
    if h * w > 4 * height * width:
        box = tuple(
            edge * old / new
            for edge, old, new in zip(
                (left, top, left + width, top + height),
                (image.width, image.height) * 2,
                (w, h) * 2,
                strict=True,
            )
        )
        cut = image.resize((width, height), Image.Resampling.BILINEAR, box=box)  # type: ignore[arg-type]
    else:
        covering = image.resize((w, h), Image.Resampling.BILINEAR)
        cut = covering.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(cut, dtype=np.float32)).permute(2, 0, 1)  # [3, height, width]
    return (pixels / 255 - 0.5) * 2


def cover_nearest(planes: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """The same cut as `cover_image` takes, by nearest neighbors: [N, H, W] -> [N, height, width]."""
    h, w, top, left = _cover(planes.shape[1], planes.shape[2], (height, width))
    # Nearest-neighbor resizing is a choice of rows and columns, so the cut is taken in the same go.
    rows = (torch.arange(top, top + height) * planes.shape[1]) // h
    columns = (torch.arange(left, left + width) * planes.shape[2]) // w
    return planes[:, rows][:, :, columns]
