"""Low-precision attention in plain torch: the numerics of the FP4 and FP8 kernels, on any device.

Right rather than fast. Every other kernel of the same precision is compared with these, and a machine without one runs
them. Memory stays bounded: the work goes over slices of heads and queries.

* `nvfp4_attention`: SageAttention3 (arXiv 2505.11594): Q, K, P and V in NVFP4, K smoothed, Q centered per block.
* `int8_fp8_attention`: SageAttention2 (arXiv 2411.10958): Q and K in int8, P and V in e4m3, K smoothed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .inputs import scale_or_default
from .quantizers import (
    E2M1_MAX,
    E4M3_MAX,
    e4m3_scaled,
    int8_scaled,
    nvfp4_tensor_scale,
    quantize_nvfp4,
)

__all__ = ["Q_BLOCK", "int8_fp8_attention", "nvfp4_attention"]

Q_BLOCK = 128
"""Queries that share one mean (SageAttention3, section 3.2)."""

Q_GROUP, K_GROUP = 32, 64
"""Queries and keys that share one int8 scale (SageAttention2, section 3.2: per warp, per block)."""

CHUNK_BYTES = 256 << 20
"""Of one float32 score matrix; a handful of them live at once."""

# For a slice of heads: k, v [H, Lk, D] -> a function of some query rows [H, rows, D] -> [H, rows, D].
_Prepare = Callable[[torch.Tensor, torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]


def _over_slices(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prepare: _Prepare) -> torch.Tensor:
    """Run `prepare(k, v)(q rows)` over slices of heads and of whole query blocks; [B, L, H, D] in and out."""
    batch, queries, heads, _ = q.shape
    row_bytes = 4 * k.shape[1]
    heads_at_once = max(1, min(heads, CHUNK_BYTES // (row_bytes * Q_BLOCK)))
    rows_at_once = max(Q_BLOCK, CHUNK_BYTES // (row_bytes * heads_at_once) // Q_BLOCK * Q_BLOCK)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for b in range(batch):
        for head in range(0, heads, heads_at_once):
            part = slice(head, head + heads_at_once)
            attend = prepare(k[b, :, part].transpose(0, 1).float(), v[b, :, part].transpose(0, 1).float())
            for row in range(0, queries, rows_at_once):
                rows = slice(row, row + rows_at_once)
                result = attend(q[b, rows, part].transpose(0, 1).float())  # [H, rows, D]
                out[b, rows, part] = result.transpose(0, 1).to(q.dtype)
    return out


def _pad_rows(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """[H, L, D] -> [H, L', D] with zero rows up to a multiple."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % multiple))


def _block_means(q: torch.Tensor, block: int) -> torch.Tensor:
    """[H, rows, D] -> the mean of each block of rows, repeated for its rows: [H, rows, D]."""
    rows = q.shape[1]
    sums = _pad_rows(q, block).unflatten(1, (-1, block)).sum(2)  # [H, blocks, D]
    counts = torch.full((sums.shape[1],), block, dtype=q.dtype, device=q.device)
    counts[-1] = rows - (sums.shape[1] - 1) * block
    means: torch.Tensor = sums / counts[:, None]
    return means.repeat_interleave(block, dim=1)[:, :rows]


def _weights(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(scores - row maximum) in [0, 1], and its row sums: [H, rows, Lk], [H, rows, 1]."""
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights, weights.sum(-1, keepdim=True)


def nvfp4_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    *,
    block_means: bool = True,
    smooth_k: bool = True,
    two_level: bool = True,
) -> torch.Tensor:
    """Attention with the numerics of SageAttention3 (arXiv 2505.11594, sections 3.1 to 3.3), in float32 between.

    S = Q4 K4^T + mean(Q) K^T with Q4 and K4 in NVFP4 along the head dimension, of Q less the mean of its block of 128
    rows and of K less its mean over the keys (which softmax does not see). P is scaled per row to 448 * 6, the largest
    NVFP4 value, before it is quantized along the keys, as is V. Beyond the paper every head of Q, K and V carries a
    power-of-two outer scale, so that values of any size fit; it changes nothing for those that fit anyway.

    Args:
        q: [B, Lq, H, D]. k, v: [B, Lk, H, D].
        softmax_scale: None for D ** -0.5.
        block_means: center Q; False leaves Q as it is.
        smooth_k: center K.
        two_level: scale P to the whole NVFP4 range; False quantizes P in [0, 1] (the paper's ablation).

    Returns:
        [B, Lq, H, D] contiguous, q's dtype.
    """
    scale = scale_or_default(softmax_scale, q.shape[-1])
    p_scale = 1.0 / (E2M1_MAX * E4M3_MAX) if two_level else 1.0

    def quantized(x: torch.Tensor) -> torch.Tensor:  # [H, rows, n] -> [H, rows, n'], one outer scale per head
        return quantize_nvfp4(x, nvfp4_tensor_scale(x, (1, 2))).dequantized()

    def quantized_queries(q: torch.Tensor) -> torch.Tensor:  # [H, rows, D] -> [H, rows, D']
        # One outer scale per block, so that the result does not depend on how the queries were sliced.
        blocks = _pad_rows(q, Q_BLOCK).unflatten(1, (-1, Q_BLOCK))  # [H, blocks, 128, D]
        outer = nvfp4_tensor_scale(blocks, (2, 3))
        return quantize_nvfp4(blocks, outer).dequantized().flatten(1, 2)[:, : q.shape[1]]

    def prepare(k: torch.Tensor, v: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        if smooth_k:
            k = k - k.mean(1, keepdim=True)
        k4t = quantized(k).transpose(1, 2)  # [H, D', Lk]
        kt = k.transpose(1, 2)  # [H, D, Lk]
        v4 = quantized(v.transpose(1, 2)).transpose(1, 2)  # [H, Lk', D]

        def attend(q: torch.Tensor) -> torch.Tensor:
            mean = _block_means(q, Q_BLOCK) if block_means else torch.zeros_like(q)
            scores = quantized_queries(q - mean) @ k4t
            if block_means:
                scores = scores + mean @ kt  # delta_s of the paper
            weights, total = _weights(scores * scale)  # [H, rows, Lk]
            p4 = quantize_nvfp4(weights, p_scale).dequantized()  # [H, rows, Lk']
            return p4 @ v4 / total

        return attend

    return _over_slices(q, k, v, prepare)


def int8_fp8_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None = None, *, smooth_k: bool = True
) -> torch.Tensor:
    """Attention with the numerics of SageAttention2 (arXiv 2411.10958, sections 3.2 to 3.4), in float32 between.

    Q (per 32 rows) and K less its mean over the keys (per 64 rows) in int8; P times 448 and V per channel in e4m3.

    Args:
        q: [B, Lq, H, D]. k, v: [B, Lk, H, D].
        softmax_scale: None for D ** -0.5.
        smooth_k: center K.

    Returns:
        [B, Lq, H, D] contiguous, q's dtype.
    """
    scale = scale_or_default(softmax_scale, q.shape[-1])

    def quantized(x: torch.Tensor, group: int) -> torch.Tensor:  # [H, L, D] -> [H, L, D]
        rows = x.shape[1]
        values, scales = int8_scaled(_pad_rows(x, group).unflatten(1, (-1, group)), (2, 3))
        return (values * scales).flatten(1, 2)[:, :rows]

    def prepare(k: torch.Tensor, v: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        if smooth_k:
            k = k - k.mean(1, keepdim=True)
        k8t = quantized(k, K_GROUP).transpose(1, 2)  # [H, D, Lk]
        v8, v_scale = e4m3_scaled(v, (1,))  # [H, Lk, D], [H, 1, D]

        def attend(q: torch.Tensor) -> torch.Tensor:
            weights, total = _weights(quantized(q, Q_GROUP) @ k8t * scale)  # [H, rows, Lk]
            p8 = (weights * E4M3_MAX).to(torch.float8_e4m3fn).float()
            return (p8 @ v8) / (total * E4M3_MAX) * v_scale

        return attend

    return _over_slices(q, k, v, prepare)
