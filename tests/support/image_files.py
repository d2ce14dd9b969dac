"""Image files of every form: modes, transparency and damaged metadata, for images and for masks."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (60, 40)


def photo(seed: int = 0, smooth: bool = False) -> np.ndarray:
    """Colors that vary like those of a photo, [40, 60, 3] uint8; `smooth`: without noise."""
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    colors = np.stack([60 + x * 2, 200 - y * 3, 90 + (x + y)], axis=-1)
    noise = 0 if smooth else np.random.default_rng(seed).integers(-9, 9, colors.shape)
    return (colors + noise).clip(0, 255).astype(np.uint8)


def area() -> np.ndarray:
    """Where the speaker is, [40, 60] bool: no symmetry, so that a turned or inverted mask shows."""
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    return ((x - 18) / 12) ** 2 + ((y - 15) / 9) ** 2 < 1


def _rgba(colors: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([colors, alpha]).astype(np.uint8))


def _gray(held: np.ndarray, white: int = 255) -> Image.Image:
    return Image.fromarray(held.astype(np.uint8) * white)


def _color(held: np.ndarray, color: tuple[int, int, int], ground: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    return Image.fromarray(np.where(held[..., None], color, ground).astype(np.uint8))


def _soft(held: np.ndarray) -> np.ndarray:
    """`held` with an edge of three pixels, [h, w] in [0, 255]."""
    padded = np.pad(held.astype(float), 1, mode="edge")
    rows, columns = held.shape
    return 255 * sum(padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3)) / 9


def _flat(level: int) -> np.ndarray:
    return np.full((*SIZE[::-1], 3), level, np.uint8)


MASKS: dict[str, Callable[[np.ndarray], Image.Image]] = {
    # Without transparency.
    "gray": _gray,
    "one bit": lambda held: _gray(held).convert("1"),
    "rgb": lambda held: _gray(held).convert("RGB"),
    "palette": lambda held: _gray(held).convert("P"),
    "16 bits": lambda held: Image.fromarray(held.astype(np.uint16) * 65535),
    "16 bits of 0 and 1": lambda held: Image.fromarray(held.astype(np.uint16)),
    "opaque alpha": lambda held: _gray(held).convert("RGBA"),
    "gray with opaque alpha": lambda held: _gray(held).convert("LA"),
    "values 0 and 1": lambda held: _gray(held, 1),
    "values 0 and 40": lambda held: _gray(held, 40),
    "red on black": lambda held: _color(held, (255, 0, 0)),
    "blue on black": lambda held: _color(held, (0, 0, 255)),
    "dark green on black": lambda held: _color(held, (0, 70, 0)),
    "white on blue": lambda held: _color(held, (255, 255, 255), (0, 0, 255)),
    "soft": lambda held: Image.fromarray(_soft(held).astype(np.uint8)),
    # Paint on a transparent layer.
    "white paint": lambda held: _rgba(_flat(255) * held[..., None], held * 255),
    "white paint on white": lambda held: _rgba(_flat(255), held * 255),
    "soft white paint": lambda held: _rgba(_flat(255), _soft(held)),
    "red paint": lambda held: _rgba(np.where(held[..., None], (230, 20, 20), 0), held * 255),
    "gray paint": lambda held: _rgba(_flat(255), held * 255).convert("LA"),
    "paint in a palette": lambda held: _palette(held),
    "black around a hole": lambda held: _rgba(_flat(0), 255 - held * 255),
    "black and white over nothing": lambda held: _rgba(_flat(255) * held[..., None], np.where(_bottom(held), 0, 255)),
    # A photo with a hole, or cut out.
    "mask editor": lambda held: _rgba(photo(), 255 - held * 255),
    "mask editor, soft": lambda held: _rgba(photo(), 255 - _soft(held)),
    "cut out of black": lambda held: _rgba(photo() * held[..., None], held * 255),
    "cut out of white": lambda held: _rgba(np.where(held[..., None], photo(), 255), held * 255),
}


def _bottom(held: np.ndarray) -> np.ndarray:
    """Rows below the speaker."""
    return np.arange(len(held))[:, None] * np.ones(held.shape[1]) > 30


def _palette(held: np.ndarray) -> Image.Image:
    image = Image.fromarray(held.astype(np.uint8))
    image.putpalette([255] * 6)  # nothing but transparency tells them apart
    image.info["transparency"] = 0
    return image


# --- damage


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _with_chunk(name: bytes, data: bytes) -> Callable[[bytes], bytes]:
    return lambda png: png[:33] + _chunk(name, data) + png[33:]  # behind IHDR


def _with_segment(marker: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda jpeg: jpeg[:2] + struct.pack(">HH", marker, len(data) + 2) + data + jpeg[2:]


_BOMB = zlib.compress(bytes(10**8))
_NOISE = np.random.default_rng(5).bytes(300)
_BAD_EXIF = b"MM\0\x2a\0\0\0\x08\0\x03" + bytes([1, 0x12, 0, 3, 0xFF, 0xFF, 0xFF, 0xFF]) + _NOISE

PNG_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "text that unpacks to 100 MB": _with_chunk(b"zTXt", b"a\0\0" + _BOMB),
    "international text likewise": _with_chunk(b"iTXt", b"a\0\x01\0\0\0" + _BOMB),
    "profile likewise": _with_chunk(b"iCCP", b"a\0\0" + _BOMB),
    "profile that is none": _with_chunk(b"iCCP", b"a\0\0" + _NOISE),
    "text of an unknown packing": _with_chunk(b"zTXt", b"a\0\x07" + _NOISE),
    "empty text": _with_chunk(b"zTXt", b""),
    "short resolution": _with_chunk(b"pHYs", b"\0"),
    "short gamma": _with_chunk(b"gAMA", b"\0"),
    "short colors": _with_chunk(b"cHRM", b"\0\0\0"),
    "short animation": _with_chunk(b"acTL", b"\0"),
    "short frame": _with_chunk(b"fcTL", b"\0"),
    "EXIF of noise": _with_chunk(b"eXIf", _NOISE),
    "EXIF that ends early": _with_chunk(b"eXIf", _BAD_EXIF),
    "something behind the end": lambda png: png + _NOISE,
}

JPEG_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "EXIF of noise": _with_segment(0xFFE1, b"Exif\0\0" + _NOISE),
    "EXIF that ends early": _with_segment(0xFFE1, b"Exif\0\0" + _BAD_EXIF),
    "XMP of noise": _with_segment(0xFFE1, b"http://ns.adobe.com/xap/1.0/\0" + _NOISE),
    "profile of noise": _with_segment(0xFFE2, b"ICC_PROFILE\0\x01\x09" + _NOISE),
    "several images of noise": _with_segment(0xFFE2, b"MPF\0" + _NOISE),
    "several images that end early": _with_segment(0xFFE2, b"MPF\0" + _BAD_EXIF),
    "Photoshop of noise": _with_segment(0xFFED, b"Photoshop 3.0\0" + b"8BIM" + _NOISE),
    "short JFIF": _with_segment(0xFFE0, b"JFIF"),
    "short Adobe": _with_segment(0xFFEE, b"Adobe"),
    "something behind the end": lambda jpeg: jpeg + _NOISE,
}


def png_of_16_bits(pixels: np.ndarray, exif: Image.Exif) -> bytes:
    """RGB of 16 bits, which Pillow does not write; `pixels` [H, W, 3] uint16."""
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [(b"IHDR", head), (b"eXIf", exif.tobytes()[6:]), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
