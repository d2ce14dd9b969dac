"""Triton: attention over 8-bit operands, on any NVIDIA GPU from sm_80."""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23, and its bit pattern. An int32 accumulator that starts at the pattern holds, read as a float32, the number
# 1.5 * 2^23 + sum exactly: |sum| <= 128 * 127 * 127 < 2^22. So no conversion from integer to float is needed.
MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)
# P is stored as e4m3 times 448, its largest number; in the exponent that is an addition.
LOG2_E4M3_MAX = tl.constexpr(8.807354922057604)
# Logits per step of the integer score. A larger one says nothing more, because int8 does not resolve scores that
# finely, and times 2^21 it leaves the exponents of a row off by many powers of two: weights beyond what P can hold.
MAX_SCALE = tl.constexpr(0.125)


@triton.jit
def _attend_tile(
    q, q_scale, m, sums, o, k8, k_scale, v, v_token, tile, keys, padded_keys,
    D: tl.constexpr, D_POW2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEYS_PER_SCALE: tl.constexpr, E4M3_V: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys of `tile`. Returns the new maximum, sum and output."""
    channel = tl.arange(0, D_POW2)
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_place = k8 + key[:, None] * D + channel[None, :]
    if MASKED or D != D_POW2:
        k = tl.load(k_place, (key < keys)[:, None] & (channel < D)[None, :], other=0)
    else:
        k = tl.load(k_place)
    start = tl.full([BLOCK_M, BLOCK_N], MAGIC_BITS, tl.int32)
    s = tl.dot(q, tl.trans(k), start, out_dtype=tl.int32).to(tl.float32, bitcast=True) - MAGIC
    scale = q_scale * tl.load(k_scale + tile * BLOCK_N // KEYS_PER_SCALE)
    s *= tl.where(scale > MAX_SCALE, MAX_SCALE, scale)[:, None]  # a comparison lets NaN through
    if MASKED:
        s = tl.where((key < keys)[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    alpha = tl.exp2(m - m_new)
    if E4M3_V:
        p = tl.exp2(s - (m_new - LOG2_E4M3_MAX)[:, None])
        sums = sums * alpha + tl.sum(p, 1)
        # The order of key_in_place: columns (16 h, 8 r, 2 c, i) become (h, c, r, i).
        p = tl.permute(p.to(tl.float8e4nv).reshape(BLOCK_M, BLOCK_N // 16, 2, 4, 2), (0, 1, 3, 2, 4))
        p = p.reshape(BLOCK_M, BLOCK_N)
        v_place = v + channel[:, None].to(tl.int64) * padded_keys + key[None, :]
        if D == D_POW2:
            vt = tl.load(v_place)
        else:
            vt = tl.load(v_place, (channel < D)[:, None], other=0.0)
        # A fresh accumulator per tile, added in float32: 8-bit products are summed in about 14 bits on Hopper.
        fresh = tl.dot(p, tl.trans(vt), out_dtype=tl.float32)
    else:
        p = tl.exp2(s - m_new[:, None])
        sums = sums * alpha + tl.sum(p, 1)
        v_tile = tl.load(
            v + key[:, None].to(tl.int64) * v_token + channel[None, :],
            (key < keys)[:, None] & (channel < D)[None, :], other=0.0,
        )  # fmt: skip
        if v_tile.dtype == tl.float32:
            v_tile = v_tile.to(tl.bfloat16)
        fresh = tl.dot(p.to(v_tile.dtype), v_tile, out_dtype=tl.float32)
    return m_new, sums, o * alpha[:, None] + fresh


@triton.jit(do_not_specialize=["v_batch", "v_token", "v_head", "queries", "keys", "heads"])
def attend(
    q8, q_scale, k8, k_scale, v, v_scale, out,
    v_batch, v_token, v_head,
    queries, keys, heads,
    D: tl.constexpr, D_POW2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEYS_PER_SCALE: tl.constexpr, E4M3_V: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program per (block of queries, head, batch).

    `v` is the transposed e4m3 V with `v_scale` (E4M3_V), or the caller's V read by its strides, in units of 16 bytes.
    """
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pair = batch * heads + head
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, D_POW2)
    q8 += pair * queries * D
    k8 += pair * keys * D
    k_blocks = tl.cdiv(keys, KEYS_PER_SCALE)
    padded_keys = k_blocks * KEYS_PER_SCALE
    k_scale += pair * k_blocks
    if E4M3_V:
        v += pair * D * padded_keys
    else:
        v += (batch * v_batch + head.to(tl.int64) * v_head) * UNIT
    v_token *= UNIT

    inside = (row < queries)[:, None] & (channel < D)[None, :]
    q = tl.load(q8 + row[:, None].to(tl.int64) * D + channel[None, :], inside, other=0)
    scale = tl.load(q_scale + pair * queries + row, row < queries, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, D_POW2], tl.float32)
    # The tile that may reach past the end comes first, so that the maximum is finite from then on.
    last = tl.cdiv(keys, BLOCK_N) - 1
    m, sums, o = _attend_tile(
        q, scale, m, sums, o, k8, k_scale, v, v_token, last, keys, padded_keys,
        D, D_POW2, BLOCK_M, BLOCK_N, KEYS_PER_SCALE, E4M3_V, True,
    )  # fmt: skip
    for tile in range(last):
        m, sums, o = _attend_tile(
            q, scale, m, sums, o, k8, k_scale, v, v_token, tile, keys, padded_keys,
            D, D_POW2, BLOCK_M, BLOCK_N, KEYS_PER_SCALE, E4M3_V, False,
        )  # fmt: skip
    o = o / sums[:, None]
    if E4M3_V:
        o *= tl.load(v_scale + pair * D + channel, channel < D, other=0.0)[None, :]
    place = ((batch * queries + row[:, None].to(tl.int64)) * heads + head) * D + channel[None, :]
    tl.store(out + place, o.to(out.dtype.element_ty), inside)
