"""Triton: attention over NVFP4 operands (SageAttention3, arXiv 2505.11594), online softmax, P quantized on the way.

S = (Q4·K4ᵀ) * outer scales + mean(Q)·(K - mean(K))ᵀ. The second part, one number per key for a block of 128 queries,
is computed here tile by tile from K itself and never stored. `attend` multiplies operands that were expanded to bf16,
which is exact, on any GPU; `attend_native` gives the packed values and their scales to block-scaled tensor-core
instructions (sm_100, sm_120).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._sage_fp4_quantize import (
    E4M3_MAX,
    GROUP,
    NVFP4_MAX,
    TILE,
    _pack,
    key_in_place,
    round_to_e2m1,
    round_to_e4m3,
)

# P in [0, 1] is scaled to the whole NVFP4 range before it is quantized (section 3.3: two levels).
P_OUTER = tl.constexpr(1.0 / 2688.0)


@triton.jit
def _mean_scores(k, k_mean, q_mean, key, keys, k_token, D: tl.constexpr):
    """mean(Q)·(K - mean(K))ᵀ for the keys of a tile: [tile]."""
    channel = tl.arange(0, D)
    place = key.to(tl.int64)[:, None] * k_token + channel[None, :]
    tile = tl.load(k + place, (key < keys)[:, None], other=0.0).to(tl.float32)
    return tl.sum((tile - k_mean[None, :]) * q_mean[None, :], 1)


@triton.jit
def _softmax_step(s, m, key, keys, MASKED: tl.constexpr):
    """s in base 2 -> (P in [0, 1], new maximum, what rescales the past)."""
    if MASKED:
        s = tl.where((key < keys)[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    return tl.exp2(s - m_new[:, None]), m_new, tl.exp2(m - m_new)


@triton.jit
def _attend_tile(
    q4, q_mean, scale, mean_scale, m, sums, o, k, k_mean, k4, v4, k_token, tile, keys,
    D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, D)
    place = tile * TILE + tl.arange(0, TILE)
    key = key_in_place(place)
    k_tile = tl.load(k4 + place[:, None] * D + channel[None, :])
    s = tl.dot(q4, tl.trans(k_tile)) * scale
    s += (_mean_scores(k, k_mean, q_mean, key, keys, k_token, D) * mean_scale)[None, :]
    p, m_new, alpha = _softmax_step(s, m, key, keys, MASKED)
    sums = sums * alpha + tl.sum(p, 1)
    # The 16 keys of a group are the axes j and i of place = 8 j + 2 c + i, all in one thread.
    p = p.reshape(BLOCK, 8, 4, 2)
    peak = tl.max(tl.max(p, 3, keep_dims=True), 1, keep_dims=True)
    p_scale = round_to_e4m3(peak * E4M3_MAX)
    up = tl.where(p_scale == 0.0, 0.0, NVFP4_MAX / p_scale)
    p = (round_to_e2m1(p * up) * p_scale).reshape(BLOCK, TILE).to(v4.dtype.element_ty)
    v_tile = tl.load(v4 + place[:, None] * D + channel[None, :])
    return m_new, sums, tl.dot(p, v_tile, o * alpha[:, None])


@triton.jit(do_not_specialize=["k_batch", "k_token", "k_head", "queries", "keys", "heads"])
def attend(
    q4, q_outer, q_mean, k, k_mean, k4, k_outer, v4, v_outer, out,
    k_batch, k_token, k_head,
    queries, keys, heads, logit_scale,
    D: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program per (block of queries that share a mean, head, batch). bf16 operands."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pair = batch * heads + head
    row = block * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, D)
    index = pair * tl.num_programs(0) + block
    padded_keys = tl.cdiv(keys, TILE) * TILE
    k += (batch * k_batch + head.to(tl.int64) * k_head) * UNIT
    k_token *= UNIT
    k4 += pair * padded_keys * D
    v4 += pair * padded_keys * D
    inside = (row < queries)[:, None]
    q_tile = tl.load(q4 + (pair * queries + row.to(tl.int64)[:, None]) * D + channel[None, :], inside, other=0.0)
    mean_q = tl.load(q_mean + index * D + channel)
    mean_k = tl.load(k_mean + pair * D + channel)
    scale = tl.load(q_outer + index) * tl.load(k_outer + pair) * logit_scale

    m = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    o = tl.zeros([BLOCK, D], tl.float32)
    last = tl.cdiv(keys, TILE) - 1
    # The tile that may reach past the end comes first, so that the maximum is finite from then on.
    m, sums, o = _attend_tile(
        q_tile, mean_q, scale, logit_scale, m, sums, o, k, mean_k, k4, v4, k_token, last, keys, D, BLOCK, True
    )
    for tile in range(last):
        m, sums, o = _attend_tile(
            q_tile, mean_q, scale, logit_scale, m, sums, o, k, mean_k, k4, v4, k_token, tile, keys, D, BLOCK, False
        )
    o = o * (tl.load(v_outer + pair) * P_OUTER) / sums[:, None]
    place = ((batch * queries + row[:, None].to(tl.int64)) * heads + head) * D + channel[None, :]
    tl.store(out + place, o.to(out.dtype.element_ty), inside)


@triton.jit
def _attend_tile_native(
    q4, q_scales, q_mean, scale, mean_scale, m, sums, o, k, k_mean, k4, k_scales, v4, v_scales, k_token, tile, keys,
    padded_keys, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, D)
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, D // 2)
    group = tl.arange(0, D // GROUP)
    k_tile = tl.load(k4 + key[None, :] * (D // 2) + byte[:, None])
    k_scale = tl.load(k_scales + key[:, None] * (D // GROUP) + group[None, :])
    # Zeros that the compiler cannot see through: its passes for sm_100 trip over a constant start of this product.
    s = tl.broadcast_to((sums * 0.0)[:, None], (BLOCK, BLOCK_N))
    s = tl.dot_scaled(q4, q_scales, "e2m1", k_tile, k_scale, "e2m1", acc=s) * scale
    s += (_mean_scores(k, k_mean, q_mean, key, keys, k_token, D) * mean_scale)[None, :]
    p, m_new, alpha = _softmax_step(s, m, key, keys, True)
    sums = sums * alpha + tl.sum(p, 1)
    p = p.reshape(BLOCK, BLOCK_N // GROUP, GROUP)
    p_scale = round_to_e4m3(tl.max(p, 2, keep_dims=True) * E4M3_MAX)
    p = round_to_e2m1(p * tl.where(p_scale == 0.0, 0.0, NVFP4_MAX / p_scale))
    p4 = _pack(p.reshape(BLOCK, BLOCK_N))
    p_scale = p_scale.reshape(BLOCK, BLOCK_N // GROUP).to(tl.float8e4nv)
    pair_of_keys = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    key_group = tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    v_tile = tl.load(v4 + channel[None, :] * (padded_keys // 2) + pair_of_keys[:, None])
    v_scale = tl.load(v_scales + channel[:, None] * (padded_keys // GROUP) + key_group[None, :])
    o = tl.dot_scaled(p4, p_scale, "e2m1", v_tile, v_scale, "e2m1", acc=o * alpha[:, None])
    return m_new, sums, o


@triton.jit(do_not_specialize=["k_batch", "k_token", "k_head", "queries", "keys", "heads"])
def attend_native(
    q4, q_scales, q_outer, q_mean, k, k_mean, k4, k_scales, k_outer, v4, v_scales, v_outer, out,
    k_batch, k_token, k_head,
    queries, keys, heads, logit_scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Like `attend`, for packed operands [.., D / 2] (V: [D, keys / 2]) with e4m3 scales, keys in their own order."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pair = batch * heads + head
    row = block * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, D)
    index = pair * tl.num_programs(0) + block
    padded_keys = tl.cdiv(keys, BLOCK_N) * BLOCK_N
    k += (batch * k_batch + head.to(tl.int64) * k_head) * UNIT
    k_token *= UNIT
    k4 += pair * padded_keys * (D // 2)
    k_scales += pair * padded_keys * (D // GROUP)
    v4 += pair * D * (padded_keys // 2)
    v_scales += pair * D * (padded_keys // GROUP)
    inside = (row < queries)[:, None]
    place = pair * queries + row.to(tl.int64)[:, None]
    q_tile = tl.load(q4 + place * (D // 2) + tl.arange(0, D // 2)[None, :], inside, other=0)
    q_scale = tl.load(q_scales + place * (D // GROUP) + tl.arange(0, D // GROUP)[None, :], inside, other=0.0)
    mean_q = tl.load(q_mean + index * D + channel)
    mean_k = tl.load(k_mean + pair * D + channel)
    scale = tl.load(q_outer + index) * tl.load(k_outer + pair) * logit_scale

    m = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    o = tl.zeros([BLOCK, D], tl.float32)
    # One loop, with a mask in every step: Triton's passes for sm_100 do not take block-scaled products outside a loop.
    for tile in range(tl.cdiv(keys, BLOCK_N)):
        m, sums, o = _attend_tile_native(
            q_tile, q_scale, mean_q, scale, logit_scale, m, sums, o, k, mean_k, k4, k_scales, v4, v_scales, k_token,
            tile, keys, padded_keys, D, BLOCK, BLOCK_N,
        )  # fmt: skip
    o = o * (tl.load(v_outer + pair) * P_OUTER) / sums[:, None]
    place = ((batch * queries + row[:, None].to(tl.int64)) * heads + head) * D + channel[None, :]
    tl.store(out + place, o.to(out.dtype.element_ty), inside)
