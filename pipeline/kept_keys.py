"""Keys and values of prompts and images, kept over steps and windows where memory allows.

They stay the same as long as the prompt and the source frame do. Of a 14B forward at 32,760 tokens they are 3 of 1,800
TFLOP (by count), in kernels too small to fill a GPU; of a small model's forward far more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..wanvideo.modules.model import KeysValues, WanModel
from ..wanvideo.runtime.compilation import is_compiled

__all__ = ["MOST", "KeptKeys"]

MOST = 4
"""Prompts and images whose keys are kept: a prompt, a negative one, and an image for each of them."""

MARGIN = 1.2
"""Of the memory that they need, for what fragments it."""


@dataclass(eq=False)
class _Kept:
    given: Tensor
    keys: KeysValues = field(default_factory=KeysValues)
    allowed: bool | None = None  # not known yet


class KeptKeys:
    """The `KeysValues` of what a model is given again and again.

    They are not kept for the first forward of a prompt or an image, whose peak shows how much memory is left, nor in
    compiled models, which would be compiled once more for them.

    Args:
        model: anything that is called like `WanModel.forward`; without effect for other classes.
    """

    def __init__(self, model: object, device: torch.device) -> None:
        self._model = model if isinstance(model, WanModel) and not is_compiled(model) else None
        self._device = device
        self._kept: list[_Kept] = []  # the last one used is the last

    def of_forward(self, context: Tensor, clip: Tensor | None) -> dict[str, KeysValues]:
        """Arguments of a forward with this prompt [n, text_dim] and image [1, n, clip_dim]."""
        if self._model is None:
            return {}
        found = {"text_keys": self._of(context, self._model.config.text_len)}
        if clip is not None:
            found["image_keys"] = self._of(clip, int(clip.shape[1]))
        return {name: keys for name, keys in found.items() if keys is not None}

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()

    def _of(self, given: Tensor, tokens: int) -> KeysValues | None:
        kept = next((kept for kept in self._kept if _same(kept.given, given)), None)
        if kept is None:
            self._kept = [*self._kept, _Kept(given)][-MOST:]
            return None
        self._kept.remove(kept)
        self._kept.append(kept)
        kept.given = given  # found at once the next time
        if kept.allowed is None:
            kept.allowed = self._fits(tokens)
        return kept.keys if kept.allowed else None

    def _fits(self, tokens: int) -> bool:
        """Whether memory is left for the keys and values of so many tokens, beside the highest peak so far."""
        if self._device.type != "cuda":
            return True
        assert self._model is not None
        config = self._model.config
        size = 2 * tokens * config.dim * self._model.dtype.itemsize * config.num_layers
        free, _ = torch.cuda.mem_get_info(self._device)
        left = free + torch.cuda.memory_reserved(self._device) - torch.cuda.max_memory_allocated(self._device)
        return MARGIN * MOST * size <= left  # as if nothing were kept yet


def _same(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return one.shape == other.shape and one.device == other.device and torch.equal(one, other)
