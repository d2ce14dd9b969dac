"""What the kernels share: whether they can run here, how they are launched, whether q, k and v fit together."""

from __future__ import annotations

import contextlib
import importlib
import logging
from contextlib import AbstractContextManager
from functools import lru_cache
from textwrap import shorten
from typing import Any

import torch

from ..errors import InputError

__all__ = [
    "check_qkv",
    "next_power_of_two",
    "on_device_of",
    "stride_unit",
    "stride_units",
    "triton_reasons",
    "triton_version",
]

logger = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)
"""The first compute capability with bf16 tensor cores."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@lru_cache(maxsize=1)
def _triton_import_reason() -> str | None:
    try:
        importlib.import_module("triton.language")
    except (ImportError, OSError) as error:  # OSError: its shared library does not load
        return f"Triton cannot be imported ({error}); install the triton package that fits this PyTorch"
    return None


@lru_cache(maxsize=16)
def _triton_build_reason(device: torch.device) -> str | None:
    """Why no kernel can be built and launched, asked once: Triton needs a C compiler and Python's headers for that."""
    from . import _probe_triton

    try:
        with torch.cuda.device(device):
            _probe_triton.store_one[1,](torch.empty(1, dtype=torch.int32, device=device))
    except torch.OutOfMemoryError:
        raise  # says nothing of the compiler, and must not be kept as its answer
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a driver says is the reason
        said = shorten((str(error).strip().splitlines() or [type(error).__name__])[0], 120, placeholder=" ...")
        reason = (
            f"Triton cannot build a kernel here ({said}); install a C compiler (gcc) and the headers of this Python"
        )
        logger.warning("%s.", reason[0].upper() + reason[1:])
        return reason
    return None


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int]:
    """(major, minor) of the installed Triton."""
    major, minor = importlib.import_module("triton").__version__.split(".")[:2]
    return int(major), int(minor)


def triton_reasons(device: torch.device | str | int) -> list[str]:
    """All the reasons why a Triton kernel for bf16 tensor cores cannot run on `device`; empty when it can."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda" or torch.version.cuda is None:
        return [f"it runs on an NVIDIA GPU, not on {device.type}"]
    if not torch.cuda.is_available():
        return ["no NVIDIA GPU is visible to PyTorch"]
    reasons = []
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found, wanted = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
        reasons.append(f"compute capability {found} has no bf16 tensor cores ({wanted} has)")
    missing = _triton_import_reason()
    if missing is None and not reasons:
        missing = _triton_build_reason(device)
    if missing is not None:
        reasons.append(missing)
    return reasons


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_dims: tuple[int, ...]) -> None:
    """Raise InputError unless q [B, Lq, H, D] and k, v [B, Lk, H, D] fit together. Reads host data only."""
    named = {"q": q, "k": k, "v": v}
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
    if any(x.ndim != 4 for x in named.values()):
        raise InputError(f"attention takes [batch, length, heads, head_dim], not {shapes}.")
    batch, _, heads, head_dim = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[2], k.shape[3]) != (batch, heads, head_dim):
        raise InputError(f"q, k and v do not fit together: {shapes}; k and v need q's batch, heads and head_dim.")
    if head_dim not in head_dims:
        raise InputError(f"this attention kernel takes a head_dim of {', '.join(map(str, head_dims))}, not {head_dim}.")
    if k.shape[1] == 0:
        raise InputError("attention needs at least one key; k and v are empty.")
    for name, x in named.items():
        if x.dtype not in DTYPES:
            raise InputError(f"{name} is {x.dtype}; attention takes bfloat16, float16 or float32.")
        if x.dtype != q.dtype:
            raise InputError(f"q is {q.dtype} and {name} {x.dtype}; bring them to one dtype.")
        if x.device != q.device:
            raise InputError(f"q is on {q.device} and {name} on {x.device}; move them to one device.")


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
