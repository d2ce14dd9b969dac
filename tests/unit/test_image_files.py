"""Image files as people bring them: damaged metadata, formats, sizes, and masks of every form."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.image_files import JPEG_DAMAGE, MASKS, PNG_DAMAGE, area, encoded, photo, write
from wanvideo_infinitetalk.media import images, masks
from wanvideo_infinitetalk.media.images import load_image, open_image
from wanvideo_infinitetalk.media.masks import load_mask
from wanvideo_infinitetalk.wanvideo.errors import InputError

PHOTO = Image.fromarray(photo())


def differing(mask: np.ndarray, held: np.ndarray) -> float:
    """Share of the pixels that are on one side of half the mask's largest value and should be on the other."""
    return float(((mask > 0.5 * mask.max()) != held).mean())


# --- masks


@pytest.mark.parametrize("form", MASKS)
def test_the_speaker_is_where_the_mask_says(tmp_path: Path, form: str) -> None:
    path = tmp_path / "mask.png"
    MASKS[form](area()).save(path)
    mask = load_mask(path).numpy()
    assert mask.dtype == np.float32
    assert differing(mask, area()) <= 0.01


@pytest.mark.parametrize(
    "form", ["gray", "white paint", "mask editor", "cut out of black", "16 bits", "paint in a palette"]
)
@pytest.mark.parametrize("damage", PNG_DAMAGE)
def test_masks_with_damaged_metadata(tmp_path: Path, form: str, damage: str) -> None:
    path = write(tmp_path / "mask.png", PNG_DAMAGE[damage](encoded(MASKS[form](area()), "PNG")))
    assert differing(load_mask(path).numpy(), area()) <= 0.01


@pytest.mark.parametrize(
    ("kind", "form", "options"),
    [
        ("JPEG", "gray", {"quality": 75}),
        ("JPEG", "red on black", {"quality": 75}),
        ("WEBP", "gray", {"quality": 60}),
        ("WEBP", "white paint", {"lossless": True}),
        ("WEBP", "mask editor", {"lossless": True, "exact": True}),
        ("TIFF", "mask editor", {}),
        ("TIFF", "16 bits", {}),
        ("BMP", "red on black", {}),
        ("GIF", "gray", {}),
        ("GIF", "paint in a palette", {}),
        ("PPM", "gray", {}),
    ],
)
def test_masks_in_other_formats(tmp_path: Path, kind: str, form: str, options: dict[str, object]) -> None:
    path = write(tmp_path / "mask.any", encoded(MASKS[form](area()), kind, **options))
    assert differing(load_mask(path).numpy(), area()) <= 0.01


@pytest.mark.parametrize("form", ["gray", "white paint", "mask editor"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_masks_are_turned_like_images(tmp_path: Path, form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    MASKS[form](area()).save(tmp_path / "mask.png", exif=exif)
    turned = np.rot90(area(), {3: 2, 6: 3, 8: 1}[orientation])
    assert differing(load_mask(tmp_path / "mask.png").numpy(), turned) <= 0.01


def test_how_transparency_is_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for form, how in (("mask editor", "the transparent part"), ("red paint", "the painted part")):
        MASKS[form](area()).save(tmp_path / "mask.png")
        load_mask(tmp_path / "mask.png")
        assert f"{how} is read as the speaker" in caplog.messages[-1]


def test_a_photo_in_the_place_of_a_mask_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    PHOTO.save(tmp_path / "mask.png")
    load_mask(tmp_path / "mask.png")
    assert "neither black nor white" in caplog.text
    caplog.clear()
    MASKS["soft"](area()).save(tmp_path / "mask.png")
    load_mask(tmp_path / "mask.png")
    assert not caplog.messages


def test_large_masks_are_read_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "MAX_SIDE", 30)
    MASKS["mask editor"](area()).save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png").numpy()
    assert mask.shape == (20, 30)
    assert abs(float(mask.mean()) - area().mean()) < 0.01


def test_an_empty_layer_is_no_mask(tmp_path: Path) -> None:
    Image.new("RGBA", (60, 40), (0, 0, 0, 0)).save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png").eq(0).all()


# --- images


@pytest.mark.parametrize("damage", PNG_DAMAGE)
def test_png_files_with_damaged_metadata(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "a.png", PNG_DAMAGE[damage](encoded(PHOTO, "PNG")))
    assert np.array_equal(np.asarray(load_image(path)), photo())


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("damage", JPEG_DAMAGE)
def test_jpeg_files_with_damaged_metadata(tmp_path: Path, damage: str, mode: str) -> None:
    content = encoded(PHOTO.convert(mode), "JPEG", quality=90)
    expected = load_image(write(tmp_path / "a.jpg", content))
    got = load_image(write(tmp_path / "b.jpg", JPEG_DAMAGE[damage](content)))
    if mode == "CMYK" and damage == "short Adobe":  # which says how CMYK is stored
        assert got.size == expected.size
    else:
        assert np.array_equal(np.asarray(got), np.asarray(expected))


def test_webp_with_damaged_exif(tmp_path: Path) -> None:
    noise = b"Exif\0\0" + np.random.default_rng(0).bytes(200)
    path = write(tmp_path / "a.webp", encoded(PHOTO, "WEBP", exif=noise, lossless=True))
    assert np.array_equal(np.asarray(load_image(path)), photo())


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "YCbCr", "F", "I", "I;16"])
def test_turned_tiff_files_of_every_mode(tmp_path: Path, mode: str, orientation: int) -> None:
    """Pillow maps some of them, and mistakes width for height where they are turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    gray = PHOTO.convert("L")
    image = Image.fromarray(np.asarray(gray, np.uint16) * 257) if mode == "I;16" else PHOTO.convert(mode)
    path = write(tmp_path / "a.tif", encoded(image, "TIFF", exif=exif))
    seen = np.asarray((gray if mode in ("L", "F", "I", "I;16") else PHOTO).convert("RGB"), np.float64)
    expected = np.rot90(seen, {3: 2, 6: 3, 8: 1}[orientation])
    got = np.asarray(load_image(path), np.float64)
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() < 2


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage = PNG_DAMAGE["profile likewise"]
    path = write(tmp_path / "a.png", damage(encoded(PHOTO, "PNG")))
    load_image(path)
    assert caplog.messages == [f"{path}: its metadata is damaged and left out"]


@pytest.mark.parametrize("damage", [name for name in JPEG_DAMAGE if "EXIF" in name])
def test_an_image_that_was_read_has_no_exif_left(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jpg", JPEG_DAMAGE[damage](encoded(PHOTO, "JPEG")))
    image = load_image(path)
    caplog.clear()
    load_image(image)
    assert not caplog.messages


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_damaged_files_work_or_end_in_a_sentence(tmp_path: Path, kind: str) -> None:
    """120 files with bytes changed, cut, or cut out."""
    rng = np.random.default_rng(sum(kind.encode()))
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(PHOTO.convert("P") if kind == "GIF" else PHOTO, kind, **({"exif": exif} if kind != "PPM" else {}))
    path, worked = tmp_path / "a.any", 0
    sentences: list[str] = []
    for trial in range(120):
        content = bytearray(whole)
        at = int(rng.integers(len(content) if trial % 2 else min(200, len(content))))
        if trial % 3 == 0:
            content[at : at + 4] = rng.bytes(4)
        elif trial % 3 == 1:
            del content[at:]
        else:
            del content[at : at + int(rng.integers(1, 40))]
        write(path, bytes(content))
        for load in (load_image, load_mask):
            try:
                load(path)
                worked += 1
            except InputError as error:
                sentences.append(str(error))
    assert worked > 0
    assert sentences
    assert all(str(path) in sentence and sentence.endswith(".") for sentence in sentences)


@pytest.mark.parametrize("form", ["gray", "16 bits", "white paint"])
def test_a_png_with_any_byte_changed_or_cut_off_is_a_sentence_or_the_same(tmp_path: Path, form: str) -> None:
    """Its sums say so; Pillow does not compare those of the pixels."""
    whole = encoded(MASKS[form](area()), "PNG")
    expected = np.asarray(open_image(write(tmp_path / "a.png", whole)))
    for at in range(8, len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        for content in (bytes(changed), whole[:at], whole[:at] + whole[at + 1 :], whole[:at] + bytes(20)):
            try:
                got = open_image(write(tmp_path / "b.png", content))
            except InputError:
                continue
            assert np.array_equal(np.asarray(got), expected), at


def test_no_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand EPS to Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: pytest.fail("started Ghostscript"))
    path = write(tmp_path / "a.png", encoded(PHOTO, "EPS"))
    with pytest.raises(InputError, match="cannot be read as an image"):
        load_image(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
@pytest.mark.parametrize("load", [load_image, load_mask])
def test_pipes_devices_and_folders_do_not_wait(tmp_path: Path, load: object) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    found: list[str] = []

    def attempt() -> None:
        for path in (tmp_path / "fifo.png", tmp_path / "zero.png", tmp_path):
            try:
                load(path)  # type: ignore[operator]
            except InputError as error:
                found.append(str(error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(20)
    assert [text.partition("(")[2].partition(")")[0] for text in found] == [
        "it is a pipe or a device",
        "it is a pipe or a device",
        "it is a folder",
    ]


def test_paths_that_are_none() -> None:
    for path in ("a\0b.png", "x" * 5000):
        with pytest.raises(InputError):
            load_image(path)


def test_too_many_pixels_are_rejected_before_they_are_read(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    Image.new("1", (13_000, 13_000)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: 13000 x 13000 pixels are more than the 134,217,728 that are read"):
        load_image(tmp_path / "a.png")
    assert not recwarn.list


def test_a_large_jpeg_is_reduced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (640, 400), (200, 30, 30)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    monkeypatch.setattr(images, "DRAFT_SIZE", (200, 200))
    image = load_image(tmp_path / "a.jpg")
    assert image.size == (320, 200)
    assert np.abs(np.asarray(image)[100, 100].astype(int) - (200, 30, 30)).max() < 4


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_image_of_several_is_taken(tmp_path: Path, kind: str) -> None:
    first, second = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    first.save(tmp_path / "a.any", kind, save_all=True, append_images=[second])
    with Image.open(tmp_path / "a.any") as several:
        assert several.n_frames == 2
    assert np.abs(np.asarray(load_image(tmp_path / "a.any"))[5, 5].astype(int) - (255, 0, 0)).max() < 6


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (np.array([[0, 0.5, 1]], np.float32), (0, 128, 255)),
        (np.array([[0, 127.6, 255]], np.float32), (0, 128, 255)),
        (np.array([[0, 32896, 65535]], np.int32), (0, 128, 255)),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), (0, 128, 255)),
        (np.array([[-5, 128, 300]], np.int32), (0, 0, 1)),
    ],
)
def test_gray_of_many_bits(tmp_path: Path, levels: np.ndarray, expected: tuple[int, ...]) -> None:
    Image.fromarray(levels).save(tmp_path / "a.tiff")
    assert tuple(np.asarray(load_image(tmp_path / "a.tiff"))[0, :, 0]) == expected


def test_gray_that_is_not_finite(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="NaN or infinite"):
        load_image(tmp_path / "a.tiff")
