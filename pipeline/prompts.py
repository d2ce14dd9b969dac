"""The syntax of prompts, as ComfyUI-WanVideoWrapper's users know it.

    a woman listens | a (smiling:1.2) woman speaks

`|` separates the pieces of a long video: each window takes the next one, the last one stays. `(text:number)` gives the
piece that it stands in a factor, by which the embedding of the whole piece is multiplied; the words inside are not
weighted by themselves. The negative prompt has no syntax. `[1] ... [2]`, the shots of another model, is plain text.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..wanvideo.errors import InputError
from .bounds import check_numbers, shown

__all__ = ["Piece", "encode_pieces", "parse_prompt", "piece_of"]

logger = logging.getLogger(__name__)

# A mark begins at the first bracket of a line; where none follows, the rest of the line is passed over at once.
_MARK = re.compile(r"\((?P<text>.*?):(?P<number>[\d.]+)\)|\(.*")


@dataclass(frozen=True)
class Piece:
    """Text for the encoder, without marks, and the factor on its embedding."""

    text: str
    factor: float = 1.0


def parse_prompt(prompt: str) -> tuple[Piece, ...]:
    """The pieces of a prompt, one or more; empty ones are kept.

    Raises InputError for a weight that is no number, or outside its bounds.
    """
    if "[1]" in prompt:
        logger.warning("[1] in the prompt is read as plain text: separate the prompts of the windows by |")
    return tuple(_weighted(text.strip()) for text in prompt.split("|"))


def _weighted(text: str) -> Piece:
    """Marks are replaced by their text. Equal texts count once, with the last number; different ones multiply."""
    numbers: dict[str, float] = {}

    def replace(mark: re.Match[str]) -> str:
        if mark["number"] is None:
            return mark[0]
        try:
            numbers[mark["text"]] = float(mark["number"])
        except ValueError:
            raise InputError(
                f"The weight {shown(mark['number'])} in the prompt is not a number: write (text:1.2)."
            ) from None
        return mark["text"]

    plain = _MARK.sub(replace, text)
    factor = math.prod(numbers.values())
    check_numbers(prompt_weight=factor)
    return Piece(plain, factor)


def encode_pieces(pieces: Sequence[Piece], encode: Callable[[Sequence[str]], Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """The embedding [tokens, dim] of each piece, times its factor."""
    embeddings = encode([piece.text for piece in pieces])
    return tuple(e * piece.factor for e, piece in zip(embeddings, pieces, strict=True))


def piece_of(pieces: Sequence[Tensor], window: int) -> Tensor:
    """The piece that a window takes, counted from 0: its own, or the last one."""
    return pieces[min(window, len(pieces) - 1)]
