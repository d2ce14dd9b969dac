"""Masks of speakers, and images cut to the size of the video."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from wanvideo_infinitetalk.media.images import cover_image, cover_nearest, fit_size, load_image
from wanvideo_infinitetalk.media.masks import default_masks, latent_masks, load_mask, speaker_planes
from wanvideo_infinitetalk.wanvideo.errors import InputError


def _half(height: int, width: int, left: bool) -> torch.Tensor:
    mask = torch.zeros(height, width)
    mask[:, : width // 2] = 1
    return mask if left else 1 - mask


@pytest.mark.parametrize("speakers", [2, 3, 4])
def test_default_masks_share_the_image_out(speakers) -> None:
    masks = default_masks(speakers, 100, 400)
    assert masks.shape == (speakers + 1, 100, 400)
    assert masks.sum(0).eq(1).all()  # each place belongs to one speaker or to the background
    part = 400 // speakers
    for speaker, mask in enumerate(masks[:-1]):
        rows, columns = mask.nonzero().unbind(1)
        assert (int(rows.min()), int(rows.max()) + 1) == (5, 95)
        assert int(columns.min()) == speaker * part + int(part * 0.05)
        assert int(columns.max()) + 1 == speaker * part + int(part * 0.95)


def test_one_speaker_is_everywhere() -> None:
    assert default_masks(1, 20, 30).eq(1).all()
    assert latent_masks(None, 1, (30, 20), 64, 48).eq(1).all()


def test_a_mask_confines_one_speaker(caplog: pytest.LogCaptureFixture) -> None:
    """Its complement is the place of a second, silent speaker; nothing is left for the background."""
    caplog.set_level("INFO")
    speaker, silent, background = latent_masks([_half(48, 64, True)], 1, (64, 48), 64, 48)
    assert speaker[:, :4].eq(1).all()
    assert speaker[:, 4:].eq(0).all()
    assert torch.equal(silent, 1 - speaker)
    assert background.eq(0).all()
    assert "second one, who is silent" in caplog.text
    latent_masks([torch.ones(48, 64)], 1, (64, 48), 64, 48)
    assert caplog.records[-1].levelname == "WARNING"
    assert "covers the whole video" in caplog.text


def _columns(first: int, last: int) -> torch.Tensor:
    """[64, 96], 1 from column 16 * first to below 16 * last."""
    plane = torch.zeros(64, 96)
    plane[:, 16 * first : 16 * last] = 1
    return plane


@pytest.mark.parametrize(
    ("planes", "words"),
    [
        ([(0, 3), (3, 6)], None),
        ([(0, 2), (2, 4), (4, 6)], None),
        (
            [(0, 4), (2, 6)],
            "speakers 1 and 2 overlap in 33 % of the video (50 % of the smaller one)",
        ),
        ([(0, 6), (4, 6)], "speakers 1 and 2 overlap in 33 % of the video (100 % of the smaller one)"),
        ([(0, 2), (2, 5), (4, 6)], "speakers 2 and 3 overlap in 17 %"),
    ],
)
def test_masks_that_overlap_are_named(planes, words, caplog: pytest.LogCaptureFixture) -> None:
    latent_masks([_columns(*plane) for plane in planes], len(planes), (96, 64), 96, 64)
    assert [record.levelname for record in caplog.records] == ([] if words is None else ["WARNING"])
    assert (words or "") in caplog.text


@pytest.mark.parametrize("planes", [[(0, 6), (0, 6)], [(0, 3), (0, 3)], [(0, 2), (3, 6), (3, 6)]])
def test_masks_that_are_the_same_are_rejected(planes) -> None:
    numbers = "2 and 3" if len(planes) == 3 else "1 and 2"
    with pytest.raises(InputError, match=f"speakers {numbers} cover the same part"):
        latent_masks([_columns(*plane) for plane in planes], len(planes), (96, 64), 96, 64)


@pytest.mark.parametrize("white", [1 / 255, 0.01, 1, 3, 255])
def test_the_largest_value_is_white(white) -> None:
    """Masks saved as 0 and 1 arrive as 0 and 1/255."""
    masks = latent_masks([_columns(0, 2) * white, _columns(3, 6) * white], 2, (96, 64), 96, 64)
    assert masks[0].mean() == pytest.approx(2 / 6)
    assert masks[1].mean() == pytest.approx(3 / 6)


@pytest.mark.parametrize(("size", "said"), [((60, 40), False), ((61, 40), False), ((40, 60), True), ((40, 40), True)])
def test_masks_of_another_aspect_are_named(size, said, caplog: pytest.LogCaptureFixture) -> None:
    masks = [_half(size[1], size[0], left) for left in (True, False)]
    latent_masks(masks, 2, (90, 60), 96, 64)
    assert (f"A mask of {size[0]} x {size[1]} is stretched over the image of 90 x 60" in caplog.text) == said


def test_without_masks_the_sentence_speaks_of_the_aspect() -> None:
    with pytest.raises(InputError, match=r"96 x 160 video shows the middle of the 480 x 270 image") as caught:
        latent_masks(None, 3, (480, 270), 96, 160)
    assert "mask of speaker" not in str(caught.value)


@pytest.mark.parametrize("speakers", [0, 5])
def test_numbers_of_speakers(speakers) -> None:
    with pytest.raises(InputError, match="one to 4"):
        default_masks(speakers, 100, 100)


@pytest.mark.parametrize("scale", [1, 255, True])
@pytest.mark.parametrize("size", [(90, 60), (45, 30), (9, 6)])
def test_given_masks_of_any_scale_and_size(scale, size) -> None:
    given = [_half(size[1], size[0], left) for left in (True, False)]
    given = [m.bool() if scale is True else m * scale for m in given]
    masks = latent_masks(given, 2, (90, 60), 96, 64)
    assert masks.shape == (3, 8, 12)
    assert masks[0, :, :6].eq(1).all()
    assert masks[1, :, 6:].eq(1).all()
    assert masks[0, :, 6:].eq(0).all()
    assert masks[2].eq(0).all()


@pytest.mark.parametrize("scale", [1, 255])
def test_a_speaker_is_where_a_mask_is_above_half(scale) -> None:
    """Columns of 0, 0.2, 0.45 and 0.55, 0.9, 1: gray edges and shadows below one half belong to nobody."""
    levels = torch.tensor([0.0, 0.2, 0.45, 0.55, 0.9, 1.0]).repeat_interleave(16).expand(64, -1)
    masks = latent_masks([levels * scale, levels.flip(1) * scale], 2, (96, 64), 96, 64)
    assert masks[0, 0].tolist() == [0.0] * 6 + [1.0] * 6
    assert masks[1, 0].tolist() == [1.0] * 6 + [0.0] * 6


def test_masks_from_files_and_with_their_background(tmp_path) -> None:
    Image.fromarray(np.array([[0, 51, 255]], np.uint8)).save(tmp_path / "mask.png")
    assert torch.allclose(load_mask(tmp_path / "mask.png"), torch.tensor([[0.0, 0.2, 1.0]]))
    thirds = torch.eye(3).expand(2, 3, 3).transpose(0, 1)  # [3, 2, 3], each one column
    assert [len(speaker_planes(thirds, speakers)) for speakers in (2, 3)] == [2, 3]
    assert torch.equal(speaker_planes(thirds[0], 1)[0], thirds[0])
    assert len(speaker_planes(torch.cat([thirds[:2], thirds[:1]]), 2)) == 3  # no background


def test_masks_are_cut_like_the_image() -> None:
    """A marked square lies at the same place of the cut image and of the cut mask."""
    pixels = np.zeros((200, 120, 3), np.uint8)
    pixels[90:130, 30:80] = 255
    mask = torch.from_numpy(pixels[..., 0] > 0)
    image = cover_image(Image.fromarray(pixels), 64, 48)
    cut = cover_nearest(mask[None].float(), 64, 48)
    assert ((image[0] > 0) == (cut[0] > 0)).float().mean() > 0.97


def test_masks_that_do_not_fit() -> None:
    halves = [_half(60, 90, True), _half(60, 90, False)]
    with pytest.raises(InputError, match="NaN or infinite"):
        latent_masks([halves[0], halves[1] * float("nan")], 2, (90, 60), 96, 64)
    with pytest.raises(InputError, match="2 masks for 1 speakers"):
        latent_masks(halves, 1, (90, 60), 96, 64)
    with pytest.raises(InputError, match="2 masks for 3 speakers"):
        latent_masks(halves, 3, (90, 60), 96, 64)
    with pytest.raises(InputError, match="height, width"):
        latent_masks([torch.zeros(3, 4, 5), halves[1]], 2, (90, 60), 96, 64)
    with pytest.raises(InputError, match=r"speaker 1 covers no part of the 96 x 64 video"):
        latent_masks([torch.zeros(60, 90), halves[1]], 2, (90, 60), 96, 64)
    edge = torch.zeros(60, 200)
    edge[:, :10] = 1  # cut away with the sides of a wide image
    with pytest.raises(InputError, match="speaker 1 covers no part"):
        latent_masks([edge, 1 - edge], 2, (200, 60), 64, 64)


# --- images


@pytest.mark.parametrize(
    ("image", "wanted", "expected"),
    [
        ((1000, 1000), (832, 480), (832, 480)),
        ((1000, 1000), (830, 475), (832, 480)),
        ((1000, 500), (640, None), (640, 320)),
        ((1000, 500), (None, 320), (640, 320)),
        ((1000, 1000), (None, None), (640, 640)),
        ((1920, 1080), (None, None), (848, 480)),
        ((1, 1), (1, 1), (16, 16)),
        ((1, 5000), (None, None), (320, 1280)),
    ],
)
def test_sizes(image, wanted, expected) -> None:
    assert fit_size(image, *wanted) == expected


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (64, 48), (7, 3), (1, 1), (1, 400), (400, 1)])
def test_images_cover_the_size(size) -> None:
    image = Image.new("RGB", size, (255, 0, 51))
    cut = cover_image(image, 64, 48)
    assert cut.shape == (3, 48, 64)
    assert cut.dtype == torch.float32
    assert torch.allclose(cut, torch.tensor([1.0, -1.0, -0.6])[:, None, None].expand_as(cut), atol=1e-6)


def test_the_center_is_kept() -> None:
    """Columns of a wide gradient: the middle of the cut is the middle of the image."""
    ramp = np.repeat(np.linspace(0, 255, 900).astype(np.uint8)[None, :, None], 60, 0).repeat(3, 2)
    for width in (64, 640):
        cut = cover_image(Image.fromarray(ramp), width, width * 3 // 4)
        assert abs(float(cut.mean())) < 0.02
        assert cut[0, 0].diff().min() >= 0


def test_transparent_becomes_white_and_deep_gray_is_scaled() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    assert [load_image(deep).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_pixels_as_arrays_and_tensors() -> None:
    floats = np.array([[[0.0, 0.5, 1.0]]], np.float32)
    for source in (floats, torch.from_numpy(floats), np.array([[[0, 128, 255]]], np.uint8)):
        assert load_image(source).getpixel((0, 0)) == (0, 128, 255)
    assert load_image(np.zeros((2, 2, 1), np.uint8)).mode == "RGB"
    with pytest.raises(InputError, match="NaN"):
        load_image(floats * np.nan)
    with pytest.raises(InputError, match="shape"):
        load_image(np.zeros((2, 2), np.uint8))


def test_files_that_are_no_images(tmp_path) -> None:
    with pytest.raises(InputError, match="no image at"):
        load_image(tmp_path / "none.png")
    for content in (b"", b"text", b"\x89PNG\r\n\x1a\n" + bytes(40)):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as an image"):
            load_image(tmp_path / "bad.png")


def test_upright_as_the_camera_says(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (10, 20)
