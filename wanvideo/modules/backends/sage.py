"""SageAttention 1, 2 and 3: 8-bit and FP4 attention from binary packages.

What each needs comes from its public interface and issue tracker; the limits that are no more than caution say so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...kernels import packages
from ...kernels.inputs import Inputs
from ...kernels.layout import aligned_contiguous
from ...kernels.quantizers import power_of_two_from
from .contract import (
    EIGHT_BIT,
    FOUR_BIT,
    HALF,
    Backend,
    Contract,
    Device,
    Package,
    Size,
    head_dims,
    keys,
    scale_ratio,
)

__all__ = [
    "DELTA_S_BUDGET",
    "SAGE1",
    "SAGE2_ADA",
    "SAGE2_AMPERE",
    "SAGE2_HOPPER",
    "SAGE3",
    "SAGE3_BLOCK_MEANS",
    "SAGE3_QUERY_BLOCK",
    "delta_s_bytes",
    "unit_range",
]

DELTA_S_BUDGET = 2 << 30
"""Bytes that sageattn3 may spend on its float32 correction term; longer queries go in slices."""

SAGE3_QUERY_BLOCK = 128
"""Queries that share one mean; slices are whole blocks, so that they give what one call would."""

# fp16 P x V overflows at 65504; a sum over one tile of 64 keys stays below it only for |V| < 1023.
_TINY = torch.finfo(torch.float32).tiny


def unit_range(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """v [B, Lk, H, D] -> (v / peak in v's dtype, peak float32 [B, 1, H, 1]); peak: a power of two >= max|v| of a head.

    For kernels that multiply P and V in fp16: their result times peak is the result for v, without the overflow.
    Dividing by a power of two rounds only what lies below fp16's smallest number, 2 ** -24 of the peak. NaN and
    infinity in V stay in the head that has them.
    """
    peak = v.abs().amax((1, 3), keepdim=True).float().clamp_min(_TINY)
    peak = power_of_two_from(peak)
    return (v.float() / peak).to(v.dtype), peak


def _arguments(inputs: Inputs) -> dict[str, Any]:
    return {"tensor_layout": "NHD", "is_causal": inputs.causal, "sm_scale": inputs.scale}


def _in_unit_range(kernel: Callable[..., torch.Tensor], inputs: Inputs, **options: str) -> torch.Tensor:
    """What a kernel that multiplies P and V in fp16 gives, by `unit_range`."""
    small, peak = unit_range(inputs.v)
    out = kernel(inputs.q, inputs.k, small, smooth_k=True, **options, **_arguments(inputs))
    return (out.float() * peak).to(out.dtype)


# --- SageAttention 1: Triton, int8 QK, fp16 PV -----------------------------------------------------------------------


def run_sage1(inputs: Inputs) -> torch.Tensor:
    """`sageattention.sageattn` of 1.0.x. It subtracts the mean from the K it is given."""
    return _in_unit_range(packages.load("sageattention").sageattn, inputs)


SAGE1 = Backend(
    "sageattention_1",
    Contract(
        dtypes=HALF,
        layout="aligned_contiguous",
        head_dim=head_dims(64, 96, 128),
        keys=keys(at_least=128),  # its authors supported shorter keys late; cosine 0.9979 at 32
        causal="square",
        writes_to_k=True,
        device=Device(
            min_capability=(8, 0), package=Package("sageattention", ">=1.0,<2", "sageattention", ("sageattn",))
        ),
    ),
    run_sage1,
    EIGHT_BIT,
)


# --- SageAttention 2: CUDA, int8 QK, fp16 or fp8 PV; one entry point per GPU family -----------------------------------


def run_sage2_fp16(inputs: Inputs) -> torch.Tensor:
    """Ampere: int8 QK, fp16 PV with a float32 accumulator."""
    kernel = packages.load("sageattention").sageattn_qk_int8_pv_fp16_cuda
    return _in_unit_range(kernel, inputs, pv_accum_dtype="fp32")


def run_sage2_fp8(inputs: Inputs, entry_point: str) -> torch.Tensor:
    """Int8 QK, fp8 PV, two float32 accumulators (the default of 2.2 on Ada is fp16 in one)."""
    kernel = getattr(packages.load("sageattention"), entry_point)
    out: torch.Tensor = kernel(
        inputs.q, inputs.k, inputs.v, pv_accum_dtype="fp32+fp32", smooth_k=True, **_arguments(inputs)
    )
    return out


def _sage2_contract(capabilities: tuple[tuple[int, int], ...], entry_point: str, supported: Size) -> Contract:
    return Contract(
        dtypes=HALF,
        # It pads other head sizes to 64 or 128 itself; rows are multiples of 16 bytes.
        head_dim=head_dims(multiple_of=8, at_most=128),
        # Fewer keys than one tile give NaN (SageAttention pulls 376, 377).
        keys=supported,
        causal="square",
        device=Device(
            capabilities=capabilities, package=Package("sageattention", ">=2.1,<3", "sageattention", (entry_point,))
        ),
    )


SAGE2_AMPERE = Backend(
    "sageattention_2_fp16",
    _sage2_contract(((8, 0), (8, 6), (8, 7)), "sageattn_qk_int8_pv_fp16_cuda", keys(at_least=128)),
    run_sage2_fp16,
    EIGHT_BIT,
)
# Noise without an error above some 154,000 keys on sm_120 (SageAttention issue 388); sm_89 has the same kernel.
SAGE2_ADA = Backend(
    "sageattention_2_fp8",
    _sage2_contract(((8, 9), (12, 0), (12, 1)), "sageattn_qk_int8_pv_fp8_cuda", keys(64, at_most=131072)),
    partial(run_sage2_fp8, entry_point="sageattn_qk_int8_pv_fp8_cuda"),
    EIGHT_BIT,
)
SAGE2_HOPPER = Backend(
    "sageattention_2_fp8_sm90",
    _sage2_contract(((9, 0),), "sageattn_qk_int8_pv_fp8_cuda_sm90", keys(at_least=128)),
    partial(run_sage2_fp8, entry_point="sageattn_qk_int8_pv_fp8_cuda_sm90"),
    EIGHT_BIT,
)


# --- SageAttention 3: NVFP4 on Blackwell -----------------------------------------------------------------------------


def delta_s_bytes(batch: int, heads: int, queries: int, keys: int) -> int:
    """Bytes of the float32 [B, H, Lq / 128, Lk] tensor that sageattn3 builds with block means, over all queries."""
    return 4 * batch * heads * -(-queries // SAGE3_QUERY_BLOCK) * keys


def _rows_within_budget(q: torch.Tensor, keys: int) -> int:
    """How many queries of q [B, H, Lq, D] one call may take: whole blocks, at least one."""
    batch, heads, queries, _ = q.shape
    blocks = max(1, DELTA_S_BUDGET // delta_s_bytes(batch, heads, 1, keys))
    return min(queries, blocks * SAGE3_QUERY_BLOCK)


def run_sage3(inputs: Inputs, block_means: bool) -> torch.Tensor:
    """`sageattn3_blackwell` on [B, H, L, D], q in slices of whole blocks; it changes the k that it gets.

    Args:
        block_means: one mean per 128 queries, the more accurate way, which needs more memory.
    """
    kernel = packages.load("sageattn3").sageattn3_blackwell
    q, k, v, ratio = inputs.q, inputs.k, inputs.v, scale_ratio(inputs)
    if ratio != 1.0:
        q = q * ratio  # a power of two: exact
    rows = _rows_within_budget(q, k.shape[2]) if block_means else q.shape[2]
    if rows >= q.shape[2]:
        out: torch.Tensor = kernel(q, k, v, attn_mask=None, is_causal=False, per_block_mean=block_means)
        return out
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for start in range(0, q.shape[2], rows):
        part = aligned_contiguous(q[:, :, start : start + rows])
        # The first call centers k; centering it again changes nothing that softmax sees.
        out[:, :, start : start + rows] = kernel(
            part, k, v, attn_mask=None, is_causal=False, per_block_mean=block_means
        )
    return out


SAGE3_CONTRACT = Contract(
    dtypes=HALF,
    layout="aligned_contiguous",
    order="BHLD",
    head_dim=head_dims(64, 128),
    scales="power_of_two",  # it ignores any scale given to it
    writes_to_k=True,
    device=Device(
        capabilities=((12, 0), (12, 1)), package=Package("sageattn3", ">=1.0,<2", "sageattn3", ("sageattn3_blackwell",))
    ),
)

SAGE3_BLOCK_MEANS = Backend("sageattn3_block_means", SAGE3_CONTRACT, partial(run_sage3, block_means=True), FOUR_BIT)
SAGE3 = Backend("sageattn3", SAGE3_CONTRACT, partial(run_sage3, block_means=False), FOUR_BIT)
