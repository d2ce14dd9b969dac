"""SageAttention 1, 2 and 3: 8-bit and FP4 attention from binary packages.

What each needs comes from its public interface and issue tracker; the limits that are no more than caution say so.
"""

from __future__ import annotations

import torch

from ...kernels.layout import aligned_contiguous
from ...kernels.quantizers import power_of_two_from
from ...kernels.reference import scale_or_default
from . import packages
from .contract import HALF, Contract, Shape, scale_ratio
from .registry import Backend, register

__all__ = ["DELTA_S_BUDGET", "SAGE3_QUERY_BLOCK", "delta_s_bytes", "unit_range"]

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


def _times(out: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    return (out.float() * peak).to(out.dtype)


# --- SageAttention 1: Triton, int8 QK, fp16 PV -----------------------------------------------------------------------


def run_sage1(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """`sageattention.sageattn` of 1.0.x. It subtracts the mean from the K it is given."""
    sageattn = packages.load("sageattention").sageattn
    small, peak = unit_range(v)
    scale = scale_or_default(softmax_scale, q.shape[-1])
    out = sageattn(q, k, small, tensor_layout="NHD", is_causal=causal, sm_scale=scale, smooth_k=True)
    return _times(out, peak)


SAGE1 = register(
    Backend(
        "sageattention_1",
        Contract(
            dtypes=HALF,
            layout="aligned_contiguous",
            head_dims=(64, 96, 128),
            min_kv=128,  # its authors supported shorter keys late; cosine 0.9979 at 32
            causal="square",
            min_capability=(8, 0),
            writes_to_k=True,
            package="sageattention",
            versions=">=1.0,<2",
            module="sageattention",
            entry_points=("sageattn",),
        ),
        run_sage1,
    )
)


# --- SageAttention 2: CUDA, int8 QK, fp16 or fp8 PV; one entry point per GPU family -----------------------------------


def run_sage2_fp16(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """Ampere: int8 QK, fp16 PV with a float32 accumulator."""
    kernel = packages.load("sageattention").sageattn_qk_int8_pv_fp16_cuda
    small, peak = unit_range(v)
    scale = scale_or_default(softmax_scale, q.shape[-1])
    out = kernel(
        q, k, small, tensor_layout="NHD", is_causal=causal, sm_scale=scale, pv_accum_dtype="fp32", smooth_k=True
    )
    return _times(out, peak)


def run_sage2_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """Ada and consumer Blackwell: int8 QK, fp8 PV, two float32 accumulators (the default of 2.2 is fp16 in one)."""
    kernel = packages.load("sageattention").sageattn_qk_int8_pv_fp8_cuda
    scale = scale_or_default(softmax_scale, q.shape[-1])
    return kernel(
        q, k, v, tensor_layout="NHD", is_causal=causal, sm_scale=scale, pv_accum_dtype="fp32+fp32", smooth_k=True
    )


def run_sage2_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """Hopper: int8 QK, fp8 PV, two float32 accumulators."""
    kernel = packages.load("sageattention").sageattn_qk_int8_pv_fp8_cuda_sm90
    scale = scale_or_default(softmax_scale, q.shape[-1])
    return kernel(
        q, k, v, tensor_layout="NHD", is_causal=causal, sm_scale=scale, pv_accum_dtype="fp32+fp32", smooth_k=True
    )


def _sage2_contract(
    capabilities: tuple[tuple[int, int], ...], entry_point: str, min_kv: int, max_kv: int | None
) -> Contract:
    return Contract(
        dtypes=HALF,
        layout="aligned_strided",
        max_head_dim=128,  # it pads others to 64 or 128 itself
        head_dim_multiple=8,  # 16-byte rows
        # Fewer keys than one tile give NaN (SageAttention pulls 376, 377).
        min_kv=min_kv,
        max_kv=max_kv,
        causal="square",
        capabilities=capabilities,
        package="sageattention",
        versions=">=2.1,<3",
        module="sageattention",
        entry_points=(entry_point,),
    )


SAGE2_AMPERE = register(
    Backend(
        "sageattention_2_fp16",
        _sage2_contract(((8, 0), (8, 6), (8, 7)), "sageattn_qk_int8_pv_fp16_cuda", min_kv=128, max_kv=None),
        run_sage2_fp16,
    )
)
# Noise without an error above some 154,000 keys on sm_120 (SageAttention issue 388); the same kernel serves sm_89.
SAGE2_ADA = register(
    Backend(
        "sageattention_2_fp8",
        _sage2_contract(((8, 9), (12, 0), (12, 1)), "sageattn_qk_int8_pv_fp8_cuda", min_kv=64, max_kv=131072),
        run_sage2_fp8,
    )
)
SAGE2_HOPPER = register(
    Backend(
        "sageattention_2_fp8_sm90",
        _sage2_contract(((9, 0),), "sageattn_qk_int8_pv_fp8_cuda_sm90", min_kv=128, max_kv=None),
        run_sage2_hopper,
    )
)


# --- SageAttention 3: NVFP4 on Blackwell -----------------------------------------------------------------------------


def delta_s_bytes(shape: Shape) -> int:
    """Bytes of the float32 [B, H, Lq / 128, Lk] tensor that sageattn3 builds with block means, over all queries."""
    blocks = -(-shape.q_length // SAGE3_QUERY_BLOCK)
    return 4 * shape.batch * shape.heads * blocks * shape.kv_length


def _workspace(shape: Shape) -> int:
    one_block = delta_s_bytes(Shape(shape.batch, SAGE3_QUERY_BLOCK, shape.kv_length, shape.heads, shape.head_dim))
    return min(delta_s_bytes(shape), max(DELTA_S_BUDGET, one_block))


def _rows_within_budget(q: torch.Tensor, keys: int) -> int:
    """How many queries of q [B, H, Lq, D] one call may take: whole blocks, at least one."""
    batch, heads, queries, _ = q.shape
    per_block = 4 * batch * heads * keys
    blocks = max(1, DELTA_S_BUDGET // per_block)
    return min(queries, blocks * SAGE3_QUERY_BLOCK)


def _run_sage3(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None, block_means: bool
) -> torch.Tensor:
    """[B, H, L, D]; q in slices of whole blocks; k belongs to this call alone and is changed by it."""
    kernel = packages.load("sageattn3").sageattn3_blackwell
    ratio = scale_ratio(softmax_scale, q.shape[-1])
    if ratio != 1.0:
        q = q * ratio  # a power of two: exact
    rows = _rows_within_budget(q, k.shape[2]) if block_means else q.shape[2]
    if rows >= q.shape[2]:
        return kernel(q, k, v, attn_mask=None, is_causal=False, per_block_mean=block_means)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for start in range(0, q.shape[2], rows):
        part = aligned_contiguous(q[:, :, start : start + rows])
        # The first call centres k; centring it again changes nothing that softmax sees.
        out[:, :, start : start + rows] = kernel(
            part, k, v, attn_mask=None, is_causal=False, per_block_mean=block_means
        )
    return out


def run_sage3_block_means(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """`sageattn3_blackwell` with one mean per 128 queries: the more accurate way."""
    return _run_sage3(q, k, v, softmax_scale, block_means=True)


def run_sage3(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """`sageattn3_blackwell` without block means: less memory, less accurate."""
    return _run_sage3(q, k, v, softmax_scale, block_means=False)


SAGE3_CONTRACT = Contract(
    dtypes=HALF,
    layout="aligned_contiguous",
    order="BHLD",
    head_dims=(64, 128),
    scales="power_of_two",  # it ignores any scale given to it
    capabilities=((12, 0), (12, 1)),
    writes_to_k=True,
    workspace=_workspace,
    package="sageattn3",
    versions=">=1.0,<2",
    module="sageattn3",
    entry_points=("sageattn3_blackwell",),
)

SAGE3_BLOCK_MEANS = register(Backend("sageattn3_block_means", SAGE3_CONTRACT, run_sage3_block_means))
SAGE3 = register(Backend("sageattn3", SAGE3_CONTRACT, run_sage3))
