"""What lies between the convolutions of the VAE, on frames with channels last: one Triton kernel per group.

A convolution of the VAE needs its input padded in space, and behind the last frames of the chunk before (the causal
cache). So its norm, its SiLU, the addition before and the padding are one pass: each value is read once and written to
its place in the padded input, instead of seven passes and a turn of the layout. `reference` has the same in eager
PyTorch. Any address is right: Triton loads by the alignment it finds.
"""

from __future__ import annotations

import torch

from ._common import TRITON, next_power_of_two, on_device_of
from .contract import Contract, Operand, Size

__all__ = ["FRAMES", "pad_frames", "upsample_frames"]

FRAMES = Contract(
    "pad_frames",
    TRITON,
    (Operand("frames", "B T H W C", (torch.bfloat16, torch.float16), "last_stride_1"),),
    {"C": Size("there are {} channels", at_least=1, at_most=1024)},  # those of a pixel stay in registers
)
"""float32 stays with PyTorch: there is no rounding to hide another order of sums behind."""

VALUES = 4096
"""Of one program: pixels times channels."""


def _sizes(y: torch.Tensor, channels: int) -> dict[str, int]:
    block = next_power_of_two(channels)
    return {"C": channels, "STEP": y.stride(3), "BLOCK": block, "PIXELS": max(1, VALUES // block), "num_warps": 4}


def pad_frames(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gamma: torch.Tensor | None,
    history: torch.Tensor | None,
    kept: int,
    before: int,
    after: int,
    keep_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """As `reference.pad_frames`; pixels of y may lie further apart than their channels, evenly."""
    from . import _frames_triton as kernels

    batch, frames, height, width, channels = y.shape
    outer_height, outer_width = height + before + after, width + before + after
    padded = y.new_empty(batch, kept + frames, outer_height, outer_width, channels)
    sums = y.new_empty(y.shape) if keep_sum else None
    new_history = y.new_empty(batch, kept, height, width, channels) if kept else None
    sizes = _sizes(y, channels)
    with on_device_of(y):
        kernels.pad_frames[-(-outer_height * outer_width // sizes["PIXELS"]), kept + frames, batch](
            y, _or(bias, y), _or(residual, y), _or(gamma, y), _or(history, y), padded, _or(sums, y),
            _or(new_history, y), frames, height, width, channels**0.5,
            KEPT=kept, BEFORE=before, AFTER=after, BIASED=bias is not None, ADDED=residual is not None,
            NORMED=gamma is not None, STORED=keep_sum, PAST=history is not None, **sizes,
        )  # fmt: skip
    return padded, sums, new_history


def upsample_frames(
    y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, split: int
) -> torch.Tensor:
    """As `reference.upsample_frames`."""
    from . import _frames_triton as kernels

    batch, frames, height, width, channels = y.shape
    channels //= split
    padded = y.new_empty(batch, split * frames, 2 * height + 2, 2 * width + 2, channels)
    sizes = _sizes(y, channels)
    with on_device_of(y):
        kernels.upsample_frames[-(-padded.shape[2] * padded.shape[3] // sizes["PIXELS"]), split * frames, batch](
            y, _or(bias, y), _or(residual, y), padded, frames, height, width,
            SPLIT=split, BIASED=bias is not None, ADDED=residual is not None, **sizes,
        )  # fmt: skip
    return padded


def _or(x: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """An argument that the kernel does not read still has to be a tensor."""
    return other if x is None else x
