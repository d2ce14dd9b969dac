"""The memory layout that GPU kernels rely on: a checked contract, and one repairing copy where it is broken.

`tensor.is_contiguous()` says nothing about *where* a tensor starts. A contiguous view at an odd storage offset makes
16-byte kernels fault (`CUDA error: misaligned address`), abort the process, or return wrong numbers without an error.
A kernel with 16-byte vector loads or tensor-map copies needs all of:

* the last stride is 1,
* the address of the first element is a multiple of 16 bytes,
* every other stride, times the item size, is a multiple of 16 bytes (dimensions of size 1 are never stepped along),
* the largest element offset stays below 2^31.

Only this module copies for the sake of layout. The guards return the very same object when the contract holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

__all__ = [
    "ALIGNMENT",
    "MAX_EXTENT",
    "GuardStats",
    "aligned_contiguous",
    "aligned_rows",
    "aligned_strided",
    "count_guards",
    "even_strides",
    "layout_violations",
    "private_copy",
]

ALIGNMENT = 16
"""Bytes. What the widest vector load and a tensor map's base address ask for."""

MAX_EXTENT = 2**31
"""Elements. Kernels index with 32-bit signed offsets."""


@dataclass
class GuardStats:
    """What the guards did: `calls` seen, `copies` made, `bytes` written by those copies."""

    calls: int = 0
    copies: int = 0
    bytes: int = 0


_stats: ContextVar[GuardStats | None] = ContextVar("guard_stats", default=None)


@contextlib.contextmanager
def count_guards() -> Iterator[GuardStats]:
    """Count guard calls and copies inside the `with` block. Nested blocks count for the inner one, then the outer."""
    stats = GuardStats()
    token = _stats.set(stats)
    try:
        yield stats
    finally:
        _stats.reset(token)
        _count(stats.calls, stats.copies, stats.bytes)


def _start_address(x: torch.Tensor) -> int:
    # While a graph is traced there are no addresses. Kernels are called through opaque operators there, and the guard
    # before the launch sees the addresses when the graph runs.
    return 0 if torch.compiler.is_compiling() else x.data_ptr()


def layout_violations(x: torch.Tensor, alignment: int = ALIGNMENT, max_extent: int = MAX_EXTENT) -> list[str]:
    """All the reasons why a 16-byte kernel cannot read `x` by its strides; empty when it can.

    Args:
        x: any tensor. Only host data is read: no launch, no synchronization.
        alignment: bytes that the start address and every stepped stride must be a multiple of.
        max_extent: elements; the offset of the last element must be below it.
    """
    if x.numel() == 0:
        return []
    reasons = []
    item = x.element_size()
    sizes, strides = x.shape, x.stride()
    address = _start_address(x)
    if address % alignment:
        reasons.append(f"it starts {address % alignment} bytes past a multiple of {alignment}")
    if x.ndim and sizes[-1] > 1 and strides[-1] != 1:
        reasons.append(f"its last stride is {strides[-1]}, not 1")
    for dim in range(x.ndim - 1):
        if sizes[dim] > 1 and strides[dim] * item % alignment:
            reasons.append(f"dimension {dim} has a stride of {strides[dim] * item} bytes, no multiple of {alignment}")
    extent = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if extent >= max_extent:
        reasons.append(f"its last element lies {extent} elements from its first, beyond {max_extent - 1}")
    return reasons


def _copy(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    _count(copies=1, copied=out.nbytes)
    return out


def _count(calls: int = 0, copies: int = 0, copied: int = 0) -> None:
    """Add to the statistics of the innermost `count_guards`, `copied` being bytes."""
    # A compiled graph holds no counter: what it copies is decided while it is traced.
    stats = None if torch.compiler.is_compiling() else _stats.get()
    if stats is not None:
        stats.calls += calls
        stats.copies += copies
        stats.bytes += copied


def aligned_contiguous(x: torch.Tensor, alignment: int = ALIGNMENT) -> torch.Tensor:
    """`x` itself when it is contiguous and starts at a multiple of `alignment` bytes, otherwise one fresh copy.

    Unlike `Tensor.contiguous`, this also repairs a contiguous view that starts at an odd storage offset.
    Gradients flow through the copy. Never synchronizes with the GPU.
    """
    _count(calls=1)
    if x.is_contiguous() and _start_address(x) % alignment == 0:
        return x
    return _copy(x)


def even_strides(x: torch.Tensor, alignment: int = ALIGNMENT) -> torch.Tensor:
    """`x` itself, or a view whose dimensions of size 1 before the last have strides of whole `alignment` bytes.

    Nothing steps along them, so that no address changes; but PyTorch's memory-efficient attention chooses its kernel by
    them too, and finds none for float32 ("cutlassF: no kernel found to launch").
    """
    item = x.element_size()
    outer = list(zip(x.shape, x.stride(), strict=True))[:-1]
    if all(size != 1 or stride * item % alignment == 0 for size, stride in outer):
        return x
    strides = [alignment if size == 1 else stride for size, stride in outer]
    return x.as_strided(x.shape, (*strides, x.stride(-1)), x.storage_offset())


def aligned_strided(x: torch.Tensor, alignment: int = ALIGNMENT) -> torch.Tensor:
    """`x` itself when a kernel that reads by strides may read it (`layout_violations`), otherwise one contiguous copy.

    For kernels that take strides: q/k/v slices of one fused tensor, or K/V expanded with stride 0, pass untouched.
    """
    _count(calls=1)
    if not layout_violations(x, alignment):
        return x
    return _copy(x)


def aligned_rows(x: torch.Tensor, alignment: int = ALIGNMENT) -> torch.Tensor:
    """`x` itself when a kernel may read it by its strides, otherwise one copy whose rows start at aligned addresses.

    For tensors whose last size is no multiple of 16 bytes, as attention masks: the copy's rows are padded in memory, so
    its shape is that of `x`, and it need not be contiguous. Broadcast dimensions (stride 0) stay broadcast.
    """
    _count(calls=1)
    if not layout_violations(x, alignment):
        return x
    elements = alignment // x.element_size()
    # One copy of what is really there: stride-0 dimensions are copied once and expanded again.
    core = x
    for dim, stride in enumerate(x.stride()[:-1]):
        if stride == 0 and x.shape[dim] > 1:
            core = core.narrow(dim, 0, 1)
    padded = -(-core.shape[-1] // elements) * elements
    storage = torch.empty((*core.shape[:-1], padded), dtype=x.dtype, device=x.device)
    rows = storage[..., : core.shape[-1]]
    rows.copy_(core)
    _count(copies=1, copied=rows.nbytes)
    return rows.expand(x.shape)


def private_copy(x: torch.Tensor) -> torch.Tensor:
    """A contiguous, aligned copy of `x` that nobody else holds, for kernels that write to their input."""
    _count(calls=1)
    return _copy(x)
