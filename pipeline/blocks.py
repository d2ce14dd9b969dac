"""Lists of transformer blocks as a person writes them."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..wanvideo.errors import InputError

__all__ = ["check_blocks", "parse_blocks"]

MOST = 1000


def parse_blocks(text: str) -> tuple[int, ...]:
    """Indices from 0, each once and rising, of "9, 10" or "3-7" or both; separated by commas, spaces or lines.

    Raises InputError for anything else, and for indices of `MOST` and more.
    """
    found: set[int] = set()
    for part in re.split(r"[\s,;]+", re.sub(r"\s*-\s*", "-", text.strip("[]() \n\t"))):
        if not part:
            continue
        ends = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise InputError(
                f"'{part[:40]}' is no transformer block: write indices below {MOST}, such as 9, 10, 12-14."
            )
        found.update(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return tuple(sorted(found))


def check_blocks(blocks: Collection[int], count: int) -> None:
    """Raise InputError where `blocks` are not all among the `count` of a model."""
    if not set(blocks) <= set(range(count)):
        raise InputError(f"The blocks {sorted(blocks)} are not all in the model: it has 0 to {count - 1}.")
