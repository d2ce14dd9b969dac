"""What the encoders share: a module of transformers or diffusers that carries the weights of a public checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoints.state_dict import check_complete, check_shape
from ..errors import CheckpointError, some

__all__ = ["Encoder", "check_tensors", "check_unused", "empty_transformer"]

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="Encoder")


class Encoder:
    """A library's `model` in evaluation mode. `dtype` and `device` are those of its weights."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

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


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError unless `tensors` fill `module`: all there, of its shapes, and not packed integers.

    Both may lie on the meta device. `what` names the file in errors.
    """
    expected = module.state_dict()
    check_complete(expected, tensors, what)
    for name, blank in expected.items():
        check_shape(name, tensors[name], blank.shape, what)
        if not tensors[name].is_floating_point():
            raise CheckpointError(
                f"{what} stores {name} as {tensors[name].dtype} without saying how to unpack it; use another version "
                "of the file, in 16 bits for instance."
            )


def check_unused(names: Iterable[str], used: Collection[str], usual: str, what: str) -> None:
    """Raise CheckpointError for a tensor that is not used although its layer is; log a line of others.

    Args:
        names: of all tensors of the model in the file. used: those that fill the module.
        usual: a regular expression for names that such files hold and the module has no place for: no line of these.
        what: names the file in errors.
    """
    layers = {name.removesuffix(".weight") for name in used if name.endswith(".weight")}
    others = [name for name in names if name not in used and not re.fullmatch(usual, name)]
    for name in others:
        if name.rpartition(".")[0] in layers:
            raise CheckpointError(f"{what} holds {name}, which this model has no place for; it is another model.")
    if others:
        logger.warning("%s: %d tensors are not used: %s", what, len(others), some(others))
