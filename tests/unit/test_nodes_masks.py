"""InfiniteTalk Speaker Masks: parts, boxes and painted masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.comfy_host import Host, hosted
from wanvideo_infinitetalk.media.masks import default_masks, latent_masks
from wanvideo_infinitetalk.wanvideo.errors import InputError

IMAGE = torch.zeros(1, 100, 200, 3)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    with hosted(tmp_path_factory.mktemp("comfy")) as host:
        yield host


def masks(host: Host, **given: Any) -> torch.Tensor:
    return host.nodes["InfiniteTalkSpeakerMasks"].execute(image=IMAGE, **given).args[0]


@pytest.mark.parametrize("speakers", [1, 2, 3, 4])
def test_parts_are_those_that_speech_takes_without_masks(host: Host, speakers: int) -> None:
    found = masks(host, speakers=speakers)
    assert torch.equal(found, default_masks(speakers, 100, 200)[:speakers])
    latent_masks(list(found), speakers, (200, 100), 200, 100)


def test_boxes_are_percent_of_the_image(host: Host) -> None:
    found = masks(host, speakers=2, boxes="5 10 45 95\n\n 50,0, 100,100 ")
    assert found.shape == (2, 100, 200)
    assert torch.nonzero(found[0]).aminmax(dim=0).min.tolist() == [10, 10]
    assert torch.nonzero(found[0]).aminmax(dim=0).max.tolist() == [94, 89]
    assert found[1].sum() == 100 * 100


def test_a_box_has_at_least_one_pixel(host: Host) -> None:
    for box in ("50 50 50.1 50.1", "99.9 99.9 100 100", "0 0 0.1 0.1"):
        assert masks(host, speakers=1, boxes=box).sum() == 1


def test_painted_masks_get_the_size_of_the_image(host: Host) -> None:
    painted = torch.zeros(1, 50, 100)
    painted[:, :25] = 1
    found = masks(host, speakers=2, mask_1=painted, mask_2=1 - painted)
    assert found.shape == (2, 100, 200)
    assert found[0, :50].min() == 1
    assert torch.equal(found[1], 1 - found[0])


MASK = torch.ones(1, 8, 8)

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"boxes": "0 0 50 50", "mask_1": MASK}, "boxes and painted masks"),
    "too few lines": ({"speakers": 2, "boxes": "0 0 50 50"}, "in boxes is 1, of speakers 2"),
    "three numbers": ({"boxes": "0 0 50"}, "left, top, right and bottom in percent"),
    "words": ({"boxes": "a b c d"}, "left, top, right and bottom in percent"),
    "not a number": ({"boxes": "0 0 nan 50"}, "left, top, right and bottom in percent"),
    "outside": ({"boxes": "0 0 101 50"}, "left, top, right and bottom in percent"),
    "turned around": ({"boxes": "50 0 10 50"}, "left, top, right and bottom in percent"),
    "one mask of two": ({"speakers": 2, "mask_2": MASK}, "mask_1 and mask_2"),
    "more masks": ({"mask_1": MASK, "mask_2": MASK}, "mask_1 and mask_2 is connected"),
    "several in one": ({"mask_1": torch.ones(2, 8, 8)}, r"shape \[2, 8, 8\]"),
    "empty": ({"mask_1": torch.zeros(1, 8, 8)}, "mask_1 is empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_sentence(host: Host, case: str) -> None:
    given, words = WRONG[case]
    with pytest.raises(InputError, match=words) as caught:
        masks(host, **{"speakers": 1, **given})
    assert str(caught.value).endswith(".")


def test_boxes_are_answered_when_run_is_pressed(host: Host) -> None:
    node = host.nodes["InfiniteTalkSpeakerMasks"]
    assert "in boxes is 1, of speakers 2" in node.validate_inputs(speakers=2, boxes="0 0 50 50")
    assert node.validate_inputs(speakers=2, boxes="") is True
    assert node.validate_inputs(speakers=None, boxes="0 0 50 50") is True
