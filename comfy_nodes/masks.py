"""Where the speakers are: one mask for each, for InfiniteTalk Speech."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..media.masks import MAX_SPEAKERS, default_masks
from ..pipeline.bounds import shown
from ..wanvideo.errors import InputError
from .comfyui import io
from .schema import node_schema
from .types import checked_image

__all__ = ["InfiniteTalkSpeakerMasks", "parse_boxes"]


class InfiniteTalkSpeakerMasks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        painted = [
            io.Mask.Input(f"mask_{i}", optional=True, tooltip=f"Where speaker {i} is: painted, in place of the boxes.")
            for i in range(1, MAX_SPEAKERS + 1)
        ]
        return node_schema(
            "InfiniteTalkSpeakerMasks",
            "InfiniteTalk Speaker Masks",
            "One mask per speaker: equal parts of the image from left to right, boxes, or masks that you painted.",
            group="image",
            aliases=["masks", "two speakers", "speaker masks", "说话人遮罩"],
            inputs=[
                io.Image.Input("image", tooltip="The image that the video starts from; the masks have its size."),
                io.Int.Input("speakers", default=2, min=1, max=MAX_SPEAKERS, tooltip="How many people speak."),
                io.String.Input(
                    "boxes",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="One line per speaker: left, top, right, bottom in percent of the image, such as 5 10 45 "
                    "95. Empty: equal parts of the image, the first speaker on the left.",
                ),
                *painted,
            ],
            outputs=[
                io.Mask.Output(display_name="masks", tooltip="For ref_target_masks of InfiniteTalk Speech."),
            ],
        )

    @classmethod
    def check_early(cls, speakers: int | None = None, boxes: str | None = "") -> None:
        if speakers is not None and boxes:
            parse_boxes(boxes, speakers)

    @classmethod
    def execute(cls, image: torch.Tensor, speakers: int, boxes: str = "", **painted: torch.Tensor | None) -> Any:
        height, width = checked_image(image).shape[1:3]
        given = {name: mask for name, mask in sorted(painted.items()) if mask is not None}
        if given and boxes.strip():
            raise InputError("There are boxes and painted masks: empty boxes, or disconnect the masks.")
        if given:
            return io.NodeOutput(_painted(given, speakers, height, width))
        if not boxes.strip():
            return io.NodeOutput(default_masks(speakers, height, width)[:speakers])
        masks = torch.zeros(speakers, height, width)
        for mask, (left, top, right, bottom) in zip(masks, parse_boxes(boxes, speakers), strict=True):
            mask[_pixels(top, bottom, height), _pixels(left, right, width)] = 1
        return io.NodeOutput(masks)


def _pixels(first: float, last: float, side: int) -> slice:
    """From one percentage of a side to another, at least one pixel."""
    begin = min(round(first / 100 * side), side - 1)
    return slice(begin, max(begin + 1, round(last / 100 * side)))


def _painted(given: dict[str, torch.Tensor], speakers: int, height: int, width: int) -> torch.Tensor:
    """Masks by their input, each at the size of the image."""
    wanted = [f"mask_{i + 1}" for i in range(speakers)]
    if list(given) != wanted:
        raise InputError(
            f"{speakers} speakers need {' and '.join(wanted)}, and {' and '.join(given)} is connected: connect one "
            "mask for each, or set speakers."
        )
    masks = []
    for name, mask in given.items():
        plane = mask if mask.ndim == 3 else mask[None]
        if plane.ndim != 3 or len(plane) != 1 or plane.numel() == 0:
            raise InputError(f"{name} has the shape {list(mask.shape)}: it takes one MASK, [1, height, width].")
        if float(plane.max()) <= 0:
            raise InputError(f"{name} is empty: paint where the speaker is.")
        masks.append(F.interpolate(plane[None].float(), size=(height, width), mode="nearest")[0])
    return torch.cat(masks)


def parse_boxes(text: str, speakers: int) -> list[tuple[float, ...]]:
    """(left, top, right, bottom) in percent, one per line of `text`; numbers stand between spaces or commas.

    Raises InputError where lines and speakers are not as many, and for what is no box within the image.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != speakers:
        raise InputError(
            f"The number of lines in boxes is {len(lines)}, of speakers {speakers}: write one line for each speaker."
        )
    found: list[tuple[float, ...]] = []
    for line in lines:
        try:
            box = tuple(float(number) for number in line.replace(",", " ").split())
        except ValueError:
            box = ()
        if len(box) != 4 or not (0 <= box[0] < box[2] <= 100 and 0 <= box[1] < box[3] <= 100):
            raise InputError(
                f"boxes has the line {shown(line)}: write left, top, right, bottom in percent, such as 5 10 45 95."
            )
        found.append(box)
    return found
