"""What the encoders share: a module of transformers or diffusers that carries the weights of a public checkpoint."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

__all__ = ["Encoder", "empty_transformer"]

Self = TypeVar("Self", bound="Encoder")


class Encoder:
    """A library's `model` in evaluation mode. `dtype` and `device` are those of its weights."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self: Self, device: str | torch.device) -> Self:
        """Move the weights; returns self."""
        self.model.to(device)
        return self


def empty_transformer(kind: Any, config: Any, attention: str = "eager") -> Any:
    """A model of the transformers class `kind` on the meta device.

    Its eager attention requires nothing of memory layout; "sdpa" takes memory that grows with the length only.
    """
    with torch.device("meta"):
        return kind._from_config(config, attn_implementation=attention)
