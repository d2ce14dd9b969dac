"""Images for the model: any mode and size in, frames of one size in [-1, 1] out."""

from __future__ import annotations

import io
import logging
import math
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps

from ..wanvideo.errors import InputError

__all__ = ["SIZE_STEP", "cover_image", "cover_nearest", "fit_size", "load_image", "open_image", "pad_image"]

logger = logging.getLogger(__name__)

SIZE_STEP = 16
"""Pixels. The VAE shrinks 8 times, the model's patches twice more."""

DEFAULT_AREA = 640 * 640
"""Pixels. InfiniteTalk's smaller size, in any aspect."""

MAX_ASPECT = 4.0
"""Of a video whose sides are not given; narrower images show their middle."""

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000")
"""What is read. Pillow's other formats start programs (EPS), or hold no image of a person."""

MAX_PIXELS = 2**27
"""Of one image: 400 MB as RGB. Cameras make up to 10,000 x 10,000."""

DRAFT_SIZE = (4096, 4096)
"""Pixels that a JPEG file above `MAX_PIXELS` keeps at least, reduced by 2, 4 or 8."""

_PNG = b"\x89PNG\r\n\x1a\n"


def load_image(source: str | Path | Image.Image | np.ndarray | torch.Tensor) -> Image.Image:
    """An upright RGB image from a file, a PIL image of any mode, or pixels [H, W, 3] (uint8, or float in [0, 1]).

    Transparent parts become white. Raises InputError for what is no image.
    """
    if isinstance(source, torch.Tensor):
        source = (source if source.dtype == torch.uint8 else source.float()).cpu().numpy()
    if isinstance(source, np.ndarray):
        return _from_array(source)
    image = upright(source, "The image") if isinstance(source, Image.Image) else open_image(source)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(path: str | Path) -> Image.Image:
    """The image in a file, upright, as RGB, or as RGBA where it has transparency.

    Of an animation it is the first frame. Metadata that cannot be read (EXIF, color profiles, texts) is left out, with
    a line in the log. Raises InputError for what is no image, or one of too many pixels.
    """
    _check_is_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on metadata and on sizes, for which there is a limit below
            _check_sums(Path(path))
            try:
                with Path(path).open("rb") as file:
                    image = _decode(file)
            except Exception:  # Pillow raises what parsing damaged metadata ends in: ValueError, struct.error ...
                essential = _without_metadata(Path(path).read_bytes())
                if essential is None:
                    raise
                image = _decode(io.BytesIO(essential))
                logger.warning("%s: its metadata is damaged and left out", path)
            return upright(image, str(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # noqa: BLE001 - as above; whatever it is, the file is at fault
        raise InputError(f"{path} cannot be read as an image ({error}): give a PNG, JPEG or WebP file.") from None


def _check_is_file(path: str | Path) -> None:
    """Reject what is no regular file: opening a FIFO or a device would wait, or never end."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise InputError(f"There is no image at {path}: check the path.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}): check the path.") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise InputError(f"{path} cannot be read as an image (it is {kind}): give a PNG, JPEG or WebP file.")


def _decode(source: IO[bytes]) -> Image.Image:
    """The first image in an open file; large JPEG files are reduced while they are read.

    Of a path Pillow would map uncompressed TIFF files, with width and height exchanged where they are turned by 90°.
    """
    Image.init()
    image: Image.Image
    with Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        if image.width * image.height > MAX_PIXELS:
            image.draft(None, DRAFT_SIZE)  # of JPEG files alone
        if image.width * image.height > MAX_PIXELS:
            raise InputError(
                f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} that are read: make the image "
                "smaller."
            )
        image.load()
        return image


def _without_metadata(content: bytes) -> bytes | None:
    """A PNG or JPEG file without the parts that no pixel depends on; None for other files, and where it has none."""
    try:
        if content.startswith(_PNG):
            kept = _png_pixels(content)
        elif content.startswith(b"\xff\xd8"):
            kept = _jpeg_pixels(content)
        else:
            return None
    except (struct.error, IndexError):  # cut off
        return None
    return None if kept == content else kept


def _png_pixels(content: bytes) -> bytes:
    """What the pixels of a PNG depend on, and nothing else."""
    return b"".join([_PNG, *_pixel_chunks(content)])


def _pixel_chunks(content: bytes) -> Iterator[bytes]:
    """The critical chunks (names with a capital first) of a PNG, and transparency: length, name, data, checksum."""
    at, name = len(_PNG), b""
    while at < len(content) and name != b"IEND":
        length, name = struct.unpack_from(">I4s", content, at)
        if name[:1].isupper() or name == b"tRNS":
            yield content[at : at + length + 12]
        at += length + 12


def _check_sums(path: Path) -> None:
    """Raise ValueError for a PNG whose pixels are damaged: Pillow does not compare their checksums."""
    with path.open("rb") as file:
        if file.read(len(_PNG)) != _PNG:
            return
        content = _PNG + file.read()
    with suppress(struct.error):  # cut off between chunks: those that are there count
        for chunk in _pixel_chunks(content):
            length, name = struct.unpack_from(">I4s", chunk)
            if len(chunk) == length + 12 and zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
                raise ValueError("a checksum of its pixels is wrong")
            if len(chunk) < length + 12 and name != b"IEND":
                raise ValueError("it ends early")


def _jpeg_pixels(content: bytes) -> bytes:
    """All segments but comments and application data; of that, JFIF's and Adobe's (the color space) are kept."""
    kept, at = [content[:2]], 2
    while True:
        marker, length = struct.unpack_from(">HH", content, at)
        if marker == 0xFFDA:  # the scan: all the rest
            return b"".join([*kept, content[at:]])
        shortest = {0xFFE0: 16, 0xFFEE: 14}.get(marker, 2**16 if 0xFFE0 < marker <= 0xFFEF or marker == 0xFFFE else 0)
        if length >= shortest:
            kept.append(content[at : at + length + 2])
        at += length + 2


def upright(image: Image.Image, what: str) -> Image.Image:
    """A PIL image of any mode as RGB or, where it has transparency, RGBA, turned as its EXIF says."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - damaged EXIF ends in many errors, and is no reason to reject the image
        logger.warning("%s: its EXIF data is damaged and left out", what)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    for name in ("exif", "xmp", "XML:com.adobe.xmp"):  # so that nobody turns it again
        image.info.pop(name, None)
    return image


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits, or of floats, as 8 bits. Pillow would clip it at 255 instead of scaling."""
    gray = np.asarray(image, dtype=np.float64)
    if not np.isfinite(gray).all():
        raise InputError("The image holds NaN or infinite values: save it with 8 bits.")
    largest = float(gray.max())
    if image.mode == "F" and largest <= 1:
        scale = 255.0
    elif largest <= 255:
        scale = 1.0
    else:
        scale = 255 / max(largest, 65535)
    return Image.fromarray(np.clip(gray * scale, 0, 255).round().astype(np.uint8))


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


def pad_image(image: Image.Image, width: int, height: int) -> torch.Tensor:
    """The whole image in the middle of a white one, [3, height, width] in [-1, 1]."""
    ratio = image.width / image.height
    wide = ratio > width / height
    size = (width, max(1, int(width / ratio))) if wide else (max(1, int(height * ratio)), height)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS), ((width - size[0]) // 2, (height - size[1]) // 2))
    return torch.from_numpy(np.array(canvas, np.float32)).permute(2, 0, 1) / 127.5 - 1


def cover_nearest(planes: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """The same cut as `cover_image` takes, by nearest neighbors: [N, H, W] -> [N, height, width]."""
    h, w, top, left = _cover(planes.shape[1], planes.shape[2], (height, width))
    # Nearest-neighbor resizing is a choice of rows and columns, so the cut is taken in the same go.
    rows = (torch.arange(top, top + height) * planes.shape[1]) // h
    columns = (torch.arange(left, left + width) * planes.shape[2]) // w
    return planes[:, rows][:, :, columns]
