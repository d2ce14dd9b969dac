"""Copies from a GPU to host memory."""

from __future__ import annotations

import logging

import torch

__all__ = ["to_host"]

logger = logging.getLogger(__name__)


def to_host(x: torch.Tensor) -> torch.Tensor:
    """`x` in host memory, contiguous; through pinned memory, into which a GPU writes several times as fast.

    torch keeps pinned blocks for the next copy of their size. Where no memory can be pinned, the copy is an ordinary
    one.
    """
    if x.device.type != "cuda":
        return x.cpu().contiguous()
    try:
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    except RuntimeError as error:
        logger.debug("copied without pinned memory: %s", error)
        return x.cpu().contiguous()
    return pinned.copy_(x)
