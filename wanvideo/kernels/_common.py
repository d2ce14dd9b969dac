"""What the kernels share: checks and repair before a launch, the launch, and how they count blocks and strides."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.library import CustomOpDef, custom_op

from ..errors import BackendUnavailableError, InputError
from .contract import Device, Size, device_reasons, dtype_reasons
from .inputs import Inputs
from .layout import aligned_strided

__all__ = [
    "ATTENTION_DTYPES",
    "MAX_CHANNELS",
    "MAX_ROWS",
    "MAX_RUNS",
    "TRITON",
    "launch",
    "next_power_of_two",
    "on_device_of",
    "opaque",
    "runs_of",
    "stride_unit",
    "stride_units",
]

TRITON = Device(min_capability=(8, 0), purpose="for bf16 tensor cores", triton=True)
"""What every Triton kernel here needs."""

ATTENTION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MAX_CHANNELS = 16384
"""Of one row of an elementwise kernel, which stays in registers."""

MAX_ROWS = 2**31 - 1

MAX_RUNS = 64
"""Into how many runs of tokens the statistics of K and V are cut at most; enough to fill a GPU. A power of two."""


def runs_of(keys: int) -> tuple[int, int]:
    """(tokens per run, runs) of the statistics of K and V: whole multiples of 32 tokens, at most `MAX_RUNS` runs."""
    run = math.ceil(keys / MAX_RUNS / 32) * 32
    return run, math.ceil(keys / run)


def launch(
    run: Callable[..., torch.Tensor],
    head_dim: Size,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    *options: bool,
) -> torch.Tensor:
    """`run` on what a caller from outside gives: checked once, repaired by a copy where the layout needs it.

    Args:
        run: takes q, k, v, the scale and `options`, on the device of q.
        head_dim: the sizes that it supports.

    Raises:
        InputError: shapes, dtypes or devices that do not fit together or that the kernel does not support.
        BackendUnavailableError: this GPU or installation cannot run it; the message lists every reason.
    """
    inputs = Inputs.checked(q, k, v, softmax_scale=softmax_scale)
    if wrong := [*head_dim.reasons(inputs.head_dim), *dtype_reasons("the dtype", q.dtype, ATTENTION_DTYPES)]:
        raise InputError(f"This attention kernel cannot compute the call: {'; '.join(wrong)}.")
    if missing := device_reasons(TRITON, q.device):
        raise BackendUnavailableError(f"This attention kernel cannot run here: {'; '.join(missing)}.")
    with torch.cuda.device(q.device):
        return run(*(aligned_strided(x) for x in (q, k, v)), inputs.scale, *options)


def opaque(name: str, call: Callable[..., torch.Tensor]) -> CustomOpDef:
    """`call` as one opaque operation, checks and all, so that torch.compile neither traces them nor breaks its graph.

    Its result is a fresh contiguous tensor of the shape and dtype of its first argument.
    """
    operation = custom_op(f"wanvideo_infinitetalk::{name}", call, mutates_args=())
    operation.register_fake(lambda q, *_, **__: q.new_empty(q.shape))
    return operation


def on_device_of(x: torch.Tensor) -> AbstractContextManager[Any]:
    """x's GPU as the current one, which Triton launches on; nothing on the CPU, where only its interpreter runs."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def stride_unit(x: torch.Tensor) -> int:
    """Elements in 16 bytes: what every stride of a tensor that `aligned_strided` passed is a multiple of."""
    return 16 // x.element_size()


def stride_units(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and head of x [B, L, H, D] in units of 16 bytes; 0 where there is nothing to step to."""
    unit = stride_unit(x)
    batch, token, head = (
        stride // unit if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    )
    return batch, token, head
