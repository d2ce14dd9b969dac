"""Images of every kind, and the public pipeline's way to the video's size."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from wanvideo_infinitetalk.media.images import cover_image, cover_nearest, load_image
from wanvideo_infinitetalk.wanvideo.errors import InputError


def gradient(width: int = 60, height: int = 40) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)


def cover(source: np.ndarray, width: int, height: int) -> torch.Tensor:
    return cover_image(load_image(source), width, height)


def test_frames_as_the_public_loop_prepares_them(golden):
    """Golden item 11b: the condition image of each window; equal to the bit."""
    item = golden("official_loop")
    frames, seen = item.inputs["src_frames_u8"].numpy(), item.outputs["one_cfg3.clip_in"]
    step = item.config["frames"] - item.config["motion"]
    for number, expected in enumerate(seen[:, :, 0]):
        height, width = expected.shape[-2:]
        assert torch.equal(cover(frames[min(number * step, len(frames) - 1)], width, height), expected)


@pytest.mark.parametrize(("width", "height"), [(48, 64), (64, 48), (60, 40), (16, 16), (96, 33)])
def test_cover_scales_and_crops_at_the_center(width, height):
    source = gradient()
    got = cover(source, width, height)
    assert got.shape == (3, height, width)
    assert got.dtype == torch.float32
    scale = max(width / 60, height / 40)
    size = (int(np.ceil(60 * scale)), int(np.ceil(40 * scale)))
    whole = np.asarray(Image.fromarray(source).resize(size, Image.Resampling.BILINEAR))
    top, left = round((size[1] - height) / 2), round((size[0] - width) / 2)
    expected = whole[top : top + height, left : left + width]
    assert np.array_equal(np.moveaxis(((got.numpy() + 1) * 127.5).round(), 0, -1), expected)


def test_the_range_is_minus_one_to_one():
    assert (cover(np.zeros((8, 8, 3), np.uint8), 16, 16) == -1).all()
    assert (cover(np.full((8, 8, 3), 255, np.uint8), 16, 16) == 1).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (1, 4000), (4000, 1)])
def test_the_smallest_and_the_thinnest(size):
    source = np.full((size[1], size[0], 3), 200, np.uint8)
    got = cover(source, 64, 48)
    assert got.shape == (3, 48, 64)
    assert torch.allclose(got, torch.full_like(got, 200 / 127.5 - 1))


def test_a_long_strip_keeps_its_middle():
    strip = np.zeros((900, 9, 3), np.uint8)
    strip[440:460] = 255
    assert (cover(strip, 64, 48) == 1).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "YCbCr", "HSV", "RGBA", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 11:
        pytest.skip("this Pillow cannot read back the YCbCr TIFF that it writes")
    image = Image.fromarray(gradient()).convert(mode)
    name = "a.tiff" if mode in ("CMYK", "YCbCr") else "a.png"
    if mode == "HSV":  # no file format stores it
        got = load_image(image)
    else:
        image.save(tmp_path / name)
        got = load_image(tmp_path / name)
    assert (got.mode, got.size) == ("RGB", (60, 40))
    if mode in ("RGB", "RGBA"):
        assert np.array_equal(np.asarray(got), gradient())
    elif mode in ("L", "LA"):
        assert np.array_equal(np.asarray(got)[..., 0], np.asarray(Image.fromarray(gradient()).convert("L")))


def test_transparent_parts_become_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (255, 0, 0, 255)
    pixels[2:] = (9, 9, 9, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = np.asarray(load_image(tmp_path / "a.png"))
    assert (got[:2] == (255, 0, 0)).all()
    assert (got[2:] == 255).all()
    palette = Image.fromarray(pixels[..., :3]).quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 3))
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 3)))
    assert (np.asarray(load_image(tmp_path / "p.png"))[2:] == 255).all()


def test_16_bit_grayscale_keeps_its_tones(tmp_path):
    levels = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(levels).save(tmp_path / "a.png")
    got = np.asarray(load_image(tmp_path / "a.png"))
    assert np.array_equal(got[0, :, 0], np.arange(256))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_of_cameras_stand_upright(tmp_path, orientation):
    upright = Image.fromarray(gradient())
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), gradient())


def test_arrays_and_open_images():
    pixels = gradient()
    assert np.array_equal(np.asarray(load_image(pixels)), pixels)
    assert np.array_equal(np.asarray(load_image(pixels / 255)), pixels)
    assert np.array_equal(np.asarray(load_image(Image.fromarray(pixels))), pixels)
    assert load_image(pixels[..., :1]).mode == "RGB"
    for bad in (np.zeros((2, 2, 2), np.uint8), np.zeros((4,), np.uint8), np.zeros((0, 2, 3))):
        with pytest.raises(InputError):
            load_image(bad)
    with pytest.raises(InputError, match="NaN"):
        load_image(np.full((2, 2, 3), np.nan))


def test_files_that_are_no_images(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png"):
        load_image(tmp_path / "nowhere.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("words")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    for bad in (tmp_path, tmp_path / "empty.png", tmp_path / "text.png", tmp_path / "cut.png"):
        with pytest.raises(InputError, match="cannot be read as an image"):
            load_image(bad)


def test_a_bomb_is_rejected(tmp_path, monkeypatch):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="cannot be read as an image"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize(("width", "height"), [(96, 32), (64, 64), (30, 20)])
def test_masks_are_cut_as_images_are(width, height):
    """The edge of a mask stays where the edge in the image is."""
    half = np.zeros((40, 60, 3), np.uint8)
    half[:, :20] = 255
    mask = cover_nearest(torch.from_numpy(half[None, ..., 0] / 255).float(), width, height)
    assert mask.shape == (1, height, width)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    bright = cover(half, width, height)[0] > 0
    assert (mask[0].bool() != bright).float().mean() < 0.04
