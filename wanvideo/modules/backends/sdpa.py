"""PyTorch's own attention, and the float32 reference that everything is compared with."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels.inputs import Inputs
from ...kernels.layout import even_strides
from .contract import ANY_FLOAT, Backend, Contract, Device, repaired_mask

__all__ = ["EAGER", "SDPA", "run_eager"]

_CHUNK_BYTES = 256 << 20

# Masks are rare and short here; these two have read them by their strides for years.
_MASK_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# After the 16-byte repair every kernel behind SDPA is right: flash, efficient and cuDNN all read aligned strided
# tensors. Unrepaired, flash and efficient fault and cuDNN returns wrong numbers without an error.
SDPA_CONTRACT = Contract(
    dtypes=ANY_FLOAT,
    layout="aligned_strided",
    masks=True,
    causal="any",
    device=Device(types=()),
    order="BHLD",
)

EAGER_CONTRACT = Contract(
    dtypes=ANY_FLOAT,
    layout="any",
    masks=True,
    causal="any",
    device=Device(types=()),
)


def run_sdpa(inputs: Inputs) -> torch.Tensor:
    """`scaled_dot_product_attention` on [B, H, L, D] views, read by strides."""
    q, k, v = even_strides(inputs.q), even_strides(inputs.k), even_strides(inputs.v)
    scale, causal = inputs.softmax_scale, inputs.causal
    if inputs.attn_mask is None:
        # The output has q's order in memory, [B, L, H, D], so the way back costs no copy.
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    mask = repaired_mask(SDPA_CONTRACT, inputs.attn_mask, q.dtype)
    if causal:  # SDPA takes one or the other
        mask = repaired_mask(SDPA_CONTRACT, mask + _causal_bias(q.shape[2], k.shape[2], mask), q.dtype)
    with sdpa_kernel(_MASK_KERNELS) if q.is_cuda else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    # Kernels disagree on a query that may see no key (NaN, zero, the mean of V); here it gets zeros.
    return out.masked_fill((mask == -torch.inf).all(-1, keepdim=True), 0.0)


def _causal_bias(queries: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    """[Lq, Lk]: 0 where key <= query (aligned at the upper left, as SDPA's), -inf elsewhere."""
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril()
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill(~allowed, -torch.inf)


def run_eager(inputs: Inputs) -> torch.Tensor:
    """The call in float32 (float64 for float64 tensors), in slices of queries.

    A query that may look at no key gets zeros. Matrix products obey torch's float32 matmul precision setting.
    """
    q, k, v, attn_mask, causal = inputs.q, inputs.k, inputs.v, inputs.attn_mask, inputs.causal
    dtype = torch.promote_types(q.dtype, torch.float32)
    (batch, queries, heads, _), keys = q.shape, inputs.keys
    kt = k.permute(0, 2, 3, 1).to(dtype)  # [B, H, D, Lk]
    vt = v.transpose(1, 2).to(dtype)  # [B, H, Lk, D]
    mask = None if attn_mask is None else attn_mask.broadcast_to(batch, heads, queries, keys)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = max(1, _CHUNK_BYTES // (8 * batch * heads * keys))
    for start in range(0, queries, rows):
        part = slice(start, start + rows)
        scores = q[:, part].transpose(1, 2).to(dtype) @ kt * inputs.scale  # [B, H, rows, Lk]
        if mask is not None:
            chosen = mask[:, :, part]
            scores = scores.masked_fill(~chosen, -torch.inf) if chosen.dtype == torch.bool else scores + chosen
        if causal:
            scores = scores + _causal_bias(queries, keys, scores)[part]
        weights = torch.softmax(scores, dim=-1)
        if mask is not None:
            weights = weights.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
        out[:, part] = (weights @ vt).transpose(1, 2).to(q.dtype)
    return out


SDPA = Backend("sdpa", SDPA_CONTRACT, run_sdpa)
EAGER = Backend("eager", EAGER_CONTRACT, run_eager, note="the float32 reference, slow")
