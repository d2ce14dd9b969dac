"""NVFP4 attention: the numerics of SageAttention3 (arXiv 2505.11594) on any NVIDIA GPU with bf16.

Q less the mean of its block of 128 rows, K less its mean over the tokens, P and V are quantized to NVFP4: e2m1 values,
one e4m3 scale per 16 of them, one power-of-two outer scale above. An e2m1 x e4m3 product is exact in bf16, so GPUs
without FP4 tensor cores multiply exactly the same numbers in bf16: right, though no faster than bf16. GPUs with them
(sm_100, sm_103, sm_120, sm_121) can multiply the packed values (`native`); that path is compiled in the tests, and the
self-test compares it with the bf16 one on the GPU before its first use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ._common import MAX_RUNS, launch, opaque, runs_of, stride_unit, stride_units
from .contract import Device, Size
from .inputs import scale_or_default

__all__ = ["HEAD_DIM", "run", "sage_fp4_attention"]

HEAD_DIM = Size("head_dim is {}", values=(64, 128))

Q_BLOCK = 128
"""Queries that share one mean."""

GROUP = 16
"""Values that share one e4m3 scale."""

KEY_TILE = 64
NATIVE_KEY_TILE = 128

NATIVE = Device(capabilities=((10, 0), (10, 3), (12, 0), (12, 1)), triton=True)
"""GPUs with FP4 tensor cores that Triton knows."""

NATIVE_TRITON = (3, 6)
"""The first Triton known to compile NVFP4 to block-scaled instructions."""


def sage_fp4_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None = None, native: bool = False
) -> torch.Tensor:
    """Attention softmax(scale * q·kᵀ)·v with NVFP4 operands, without mask.

    Args:
        q: [B, Lq, H, D], bf16, fp16 or fp32, D of `HEAD_DIM`. Read by its strides when its start and strides are
            multiples of 16 bytes and the last stride is 1 (`layout.aligned_strided`); else it is copied once.
        k, v: [B, Lk, H, D], like q. Nothing writes to q, k or v.
        softmax_scale: D ** -0.5 when None.
        native: multiply packed values on FP4 tensor cores, where `selftest.native_fp4_reasons` has nothing against it.

    Returns:
        [B, Lq, H, D] contiguous, of q's dtype. NaN or infinity in an input makes what depends on it NaN.

    Raises: what `_common.launch` does.
    """
    out: torch.Tensor = _operation(q, k, v, scale_or_default(softmax_scale, q.shape[-1]), native)
    return out


@dataclass(frozen=True)
class Operands:
    """Q, K and V in NVFP4. bf16: values times block scale, K and V in the key order of `key_in_place`, scales empty.

    Native: e2m1 packed two per byte along the last dimension, scales e4m3 [..., n / 16], keys in their own order.
    """

    q: torch.Tensor
    """[B, H, Lq, D], or [B, H, Lq, D / 2] packed."""
    q_scales: torch.Tensor
    q_outer: torch.Tensor
    """float32 [B, H, query blocks]."""
    q_mean: torch.Tensor
    """float32 [B, H, query blocks, D]."""
    k: torch.Tensor
    """[B, H, Lk padded, D], or [B, H, Lk padded, D / 2] packed."""
    k_scales: torch.Tensor
    k_outer: torch.Tensor
    """float32 [B, H]."""
    k_mean: torch.Tensor
    """float32 [B, H, D]."""
    v: torch.Tensor
    """[B, H, Lk padded, D], or [B, H, D, Lk padded / 2] packed."""
    v_scales: torch.Tensor
    v_outer: torch.Tensor
    """float32 [B, H]."""
    padded_keys: int
    native: bool


def quantize(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, native: bool = False) -> Operands:
    """The NVFP4 operands of q, k, v [B, L, H, D], which are read by their strides: K and V twice, Q once."""
    from . import _sage_fp4_quantize as triton_kernels

    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    q_blocks = math.ceil(queries / Q_BLOCK)
    tile = NATIVE_KEY_TILE if native else KEY_TILE
    padded_keys = math.ceil(keys / tile) * tile
    run, runs = runs_of(keys)
    unit = stride_unit(q)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty((batch, heads, *shape), dtype=dtype, device=q.device)

    def values(rows: int, columns: int) -> torch.Tensor:
        return empty(rows, columns // 2, dtype=torch.uint8) if native else empty(rows, columns, dtype=torch.bfloat16)

    def scales(rows: int, columns: int) -> torch.Tensor:
        return empty(*((rows, columns // GROUP) if native else (0,)), dtype=torch.float8_e4m3fn)

    result = Operands(
        q=values(queries, dim),
        q_scales=scales(queries, dim),
        q_outer=empty(q_blocks),
        q_mean=empty(q_blocks, dim),
        k=values(padded_keys, dim),
        k_scales=scales(padded_keys, dim),
        k_outer=empty(),
        k_mean=empty(dim),
        v=values(dim, padded_keys) if native else values(padded_keys, dim),
        v_scales=scales(dim, padded_keys),
        v_outer=empty(),
        padded_keys=padded_keys,
        native=native,
    )
    partial = [empty(runs, dim) for _ in range(4)]
    triton_kernels.key_value_statistics[runs, heads, batch](
        k, v, *partial, *stride_units(k), *stride_units(v), keys, heads, run, D=dim, BLOCK=32, UNIT=unit
    )  # fmt: skip
    triton_kernels.finish_statistics[batch * heads,](
        *partial, result.k_mean, result.k_outer, result.v_outer, keys, runs, D=dim, RUNS=MAX_RUNS
    )
    triton_kernels.quantize_queries[q_blocks, heads, batch](
        q, result.q, result.q_scales, result.q_outer, result.q_mean, *stride_units(q), queries, heads,
        D=dim, BLOCK=Q_BLOCK, UNIT=unit, NATIVE=native, num_warps=8,
    )  # fmt: skip
    triton_kernels.quantize_keys_values[padded_keys // KEY_TILE, heads, batch](
        k, v, result.k_mean, result.k_outer, result.v_outer, result.k, result.k_scales, result.v, result.v_scales,
        *stride_units(k), *stride_units(v), keys, padded_keys // KEY_TILE, heads,
        D=dim, UNIT=unit, NATIVE=native, num_warps=8,
    )  # fmt: skip
    return result


def attend(operands: Operands, k: torch.Tensor, out: torch.Tensor, softmax_scale: float) -> None:
    """Fill out [B, Lq, H, D]. k [B, Lk, H, D] is the caller's: mean(Q)·K is computed from it, unquantized."""
    from . import _sage_fp4_triton as triton_kernels

    batch, queries, heads, dim = out.shape
    grid = (math.ceil(queries / Q_BLOCK), heads, batch)
    sizes = (*stride_units(k), queries, k.shape[1], heads, softmax_scale * math.log2(math.e))
    constants = {"D": dim, "BLOCK": Q_BLOCK, "UNIT": stride_unit(k), "num_warps": 8, "num_stages": 2}
    if operands.native:
        triton_kernels.attend_native[grid](
            operands.q, operands.q_scales, operands.q_outer, operands.q_mean, k, operands.k_mean,
            operands.k, operands.k_scales, operands.k_outer, operands.v, operands.v_scales, operands.v_outer, out,
            *sizes, BLOCK_N=NATIVE_KEY_TILE, **constants,
        )  # fmt: skip
    else:
        triton_kernels.attend[grid](
            operands.q, operands.q_outer, operands.q_mean, k, operands.k_mean, operands.k, operands.k_outer,
            operands.v, operands.v_outer, out, *sizes, **constants,
        )  # fmt: skip


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, native: bool = False) -> torch.Tensor:
    """Quantize and attend, on inputs that meet the contract and whose device is the current one."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel():
        attend(quantize(q, k, v, native), k, out, softmax_scale)
    return out


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, native: bool) -> torch.Tensor:
    return launch(run, HEAD_DIM, q, k, v, softmax_scale, native)


_operation = opaque("sage_fp4_attention", _attention)
