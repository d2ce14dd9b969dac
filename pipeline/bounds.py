"""Which numbers each setting takes: one table for the library, the command and the nodes.

`BOUNDS` has a row for every numeric field of `GenerateConfig` and `Job`, and for what the sampler node has besides.
`check_numbers` checks values, `parse_number` reads them from the command line; both end in the same sentence.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..wanvideo.errors import InputError

__all__ = ["BOUNDS", "MAX_WINDOW_PIXELS", "Bound", "check_numbers", "check_window", "parse_number"]

MAX_WINDOW_PIXELS = 2**30
"""Frames x width x height of one window: 81 frames of 3,640 x 3,640 pixels, more than any GPU holds."""


@dataclass(frozen=True)
class Bound:
    """The numbers that a setting takes, `least` and `most` included. NaN is never one of them.

    Attributes:
        whole: whole numbers only.
        positive: `least` itself is excluded.
        optional: None is taken too.
        per_step: a list with one number for each step is taken too.
    """

    least: float
    most: float
    whole: bool = False
    positive: bool = False
    optional: bool = False
    per_step: bool = False

    @property
    def words(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        span = f"above {self.least:,} and up to" if self.positive else f"from {self.least:,} to"
        return f"{kind} {span} {self.most:,}" + (", or a list of them, one for each step" if self.per_step else "")

    def accepts(self, value: Any) -> bool:
        """Whether `value` is such a number, or a list of them where that is taken."""
        if value is None:
            return self.optional
        if self.per_step and not isinstance(value, (str, bytes, Real)):
            return isinstance(value, Sequence) and all(self._accepts_one(item) for item in value)
        return self._accepts_one(value)

    def _accepts_one(self, value: Any) -> bool:
        if isinstance(value, bool):
            return False
        if self.whole:
            try:
                value = operator.index(value)
            except TypeError:
                return False
        elif not isinstance(value, Real):
            return False
        return bool((self.least < value if self.positive else self.least <= value) and value <= self.most)


BOUNDS: dict[str, Bound] = {
    # GenerateConfig
    "width": Bound(1, 8192, whole=True, optional=True),
    "height": Bound(1, 8192, whole=True, optional=True),
    "area": Bound(256, 8192 * 8192, whole=True),
    "frames": Bound(1, 10_000, whole=True),
    "motion_frames": Bound(1, 10_000, whole=True),
    "total_frames": Bound(0, 10_000_000, whole=True, optional=True),  # 0: of a recording shorter than a frame
    "steps": Bound(1, 10_000, whole=True),
    "shift": Bound(0, 1000, positive=True),
    "sigmas": Bound(0, 1, optional=True, per_step=True),
    "start_step": Bound(0, 10_000, whole=True),
    "cfg": Bound(0, 100, per_step=True),
    "audio_cfg": Bound(0, 100, per_step=True),
    "image_cfg": Bound(0, 100),
    "apg_momentum": Bound(-1, 1),
    "apg_norm_threshold": Bound(0, 1e12, positive=True),
    "audio_scale": Bound(0, 100),
    "seed": Bound(0, 2**64 - 1, whole=True),  # what torch's generators take
    "color_correction": Bound(0, 1),
    # Job
    "max_frames": Bound(1, 10_000_000, whole=True, optional=True),
    "blocks_to_swap": Bound(0, 1000, whole=True),
    "gpus": Bound(1, 64, whole=True),
    "guidance_gpus": Bound(1, 3, whole=True),  # no step has more passes
    "lora_strength": Bound(-1000, 1000),
    "prompt_weight": Bound(0, 100),  # the product of a piece's weights
    # The sampler node
    "denoise_strength": Bound(0, 1, positive=True),
    "end_step": Bound(-1, 10_000, whole=True),
}


def check_numbers(**values: Any) -> None:
    """Raise InputError for the first of `values` (by names of `BOUNDS`) that is outside its bounds or no number."""
    for name, value in values.items():
        if not BOUNDS[name].accepts(value):
            raise InputError(f"{name} {shown(value)} cannot be used: give {BOUNDS[name].words}.")


def check_window(frames: int, width: int, height: int) -> None:
    """Raise InputError for a window of more than `MAX_WINDOW_PIXELS`."""
    if frames * width * height > MAX_WINDOW_PIXELS:
        raise InputError(
            f"A window of {frames} frames of {width} x {height} pixels is too large: choose a smaller size, or fewer "
            "frames per window."
        )


def parse_number(name: str, text: str) -> float | list[float]:
    """The number that the option `name` of the command is given; "5,4,3" is a list where the option takes one.

    Raises ValueError with what to give.
    """
    bound = BOUNDS[name]
    parts = text.split(",") if bound.per_step else [text]
    try:
        values = [int(part) if bound.whole else float(part) for part in parts]
    except ValueError:
        raise ValueError(f"{shown(text)} is not {bound.words}") from None
    value = values[0] if len(values) == 1 else values
    if not bound.accepts(value):
        raise ValueError(f"{shown(text)} is not {bound.words}")
    return value


def shown(value: Any) -> str:
    """`value` in a sentence, short whatever it is."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"of {round(value.bit_length() * math.log10(2)):,} digits"
    text = re.sub(r"\s+", " ", value if isinstance(value, str) else repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
