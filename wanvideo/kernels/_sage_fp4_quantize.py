"""Triton: Q, K and V as NVFP4 operands: e2m1 values times one e4m3 scale per 16 of them times one outer scale.

Bit for bit what `wanvideo.quantizers.quantize_nvfp4` gives for the same smoothed inputs: IEEE divisions in float32, all
roundings to nearest, ties to even. The rounding to e4m3 and e2m1 is done in float32 arithmetic, so that GPUs without
those types do it too. A value times its block scale needs 6 significant bits: it is stored exactly as bf16.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Strides come in units of 16 bytes (`UNIT` elements), and no integer is specialized: see `_sage_fp8_quantize`.
STRIDES = [f"{x}_{dim}" for x in "qkv" for dim in ("batch", "token", "head")]

E2M1_MAX = tl.constexpr(6.0)
E4M3_MAX = tl.constexpr(448.0)
NVFP4_MAX = tl.constexpr(2688.0)
GROUP = tl.constexpr(16)
TILE = tl.constexpr(64)
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def key_in_place(position):
    """Which key of a tile of 64 stands at `position` in the stored K and V.

    A thread of the tensor core's accumulator holds the columns 8 j + 2 c + i for one c: it gets the 16 neighboring
    keys 16 c ... 16 c + 15, which share one scale of P, so that their maximum needs no exchange between threads.
    """
    in_tile = position % TILE
    return position - in_tile + GROUP * ((in_tile % 8) // 2) + 2 * (in_tile // 8) + in_tile % 2


@triton.jit
def round_to_e4m3(x):
    """The e4m3 number nearest to x in [0, 448], ties to even, as float32. NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    subnormal = (x + 24576.0) - 24576.0  # 1.5 * 2^14, where the spacing of float32 is 2^-9
    return tl.where(x != x, x, tl.where(x < 0.015625, subnormal, normal))


@triton.jit
def round_to_e2m1(x):
    """The e2m1 number nearest to x, ties to even, saturating at 6, as float32. NaN stays NaN."""
    size = tl.abs(x)
    # 1.5 * 2^23 steps, with steps of 1/2 below 2, of 1 below 4, of 2 above.
    rounder = tl.where(size < 2.0, 6291456.0, tl.where(size < 4.0, 12582912.0, 25165824.0))
    rounded = (x + rounder) - rounder
    return tl.where(size > E2M1_MAX, tl.where(x < 0, -E2M1_MAX, E2M1_MAX), rounded)


@triton.jit
def _outer_scale(peak):
    """The power of two that brings `peak` to at most 6 * 448; `peak` itself where it is not finite."""
    scale = tl.maximum(tl.div_rn(peak, NVFP4_MAX), SMALLEST_NORMAL)
    up = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    unsound = peak - peak
    return tl.where(unsound != unsound, unsound, up)


@triton.jit
def _quantize_groups(groups, outer, AXIS: tl.constexpr):
    """float32 groups of 16 along AXIS -> (e2m1 values, e4m3 block scales with that axis kept), both as float32."""
    peak = tl.max(tl.abs(groups), AXIS, keep_dims=True)
    wanted = tl.div_rn(tl.div_rn(peak, E2M1_MAX), outer)
    scale = round_to_e4m3(tl.minimum(wanted, E4M3_MAX))
    total = scale * outer
    values = round_to_e2m1(tl.div_rn(groups, tl.where(total == 0.0, 1.0, total)))
    return tl.where(total == 0.0, 0.0, values), scale


@triton.jit(do_not_specialize=[*STRIDES, "keys", "heads", "run"])
def key_value_statistics(
    k, v, k_sums, k_lows, k_highs, v_peaks,
    k_batch, k_token, k_head, v_batch, v_token, v_head,
    keys, heads, run,
    D: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program per (run of tokens, head, batch). Writes four [B, H, runs, D] float32 tensors."""
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, D)
    k += (batch * k_batch + head.to(tl.int64) * k_head) * UNIT
    v += (batch * v_batch + head.to(tl.int64) * v_head) * UNIT
    k_sum = tl.zeros([BLOCK, D], tl.float32)
    k_low = tl.full([BLOCK, D], float("inf"), tl.float32)
    k_high = tl.full([BLOCK, D], float("-inf"), tl.float32)
    v_peak = tl.zeros([BLOCK, D], tl.float32)
    unsound = tl.zeros([BLOCK, D], tl.float32)
    first = chunk * run
    for start in tl.range(first, tl.minimum(first + run, keys), BLOCK, num_stages=4):
        token = start + tl.arange(0, BLOCK)
        inside = (token < keys)[:, None]
        token = token.to(tl.int64)[:, None]
        k_tile = tl.load(k + token * k_token * UNIT + channel[None, :], inside, other=0.0).to(tl.float32)
        k_sum += k_tile
        k_low = tl.minimum(k_low, tl.where(inside, k_tile, float("inf")))
        k_high = tl.maximum(k_high, tl.where(inside, k_tile, float("-inf")))
        v_tile = tl.load(v + token * v_token * UNIT + channel[None, :], inside, other=0.0).to(tl.float32)
        v_peak = tl.maximum(v_peak, tl.abs(v_tile))
        unsound += v_tile - v_tile  # 0, or NaN for good; the maximum would drop it
    row = ((batch * heads + head) * tl.num_programs(0) + chunk) * D + channel
    tl.store(k_sums + row, tl.sum(k_sum, 0))
    tl.store(k_lows + row, tl.min(k_low, 0))
    tl.store(k_highs + row, tl.max(k_high, 0))
    tl.store(v_peaks + row, tl.max(v_peak, 0) + tl.sum(unsound, 0))


@triton.jit(do_not_specialize=["keys", "runs"])
def finish_statistics(
    k_sums, k_lows, k_highs, v_peaks, k_mean, k_outer, v_outer, keys, runs, D: tl.constexpr, RUNS: tl.constexpr
):
    """One program per head and batch: k_mean [B, H, D]; k_outer, v_outer [B, H]."""
    pair = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, D)
    run = tl.arange(0, RUNS)[:, None]
    partial = (pair * runs + run) * D + channel[None, :]
    some = run < runs
    mean = tl.sum(tl.load(k_sums + partial, some, other=0.0), 0) / keys
    tl.store(k_mean + pair * D + channel, mean)
    # Subtraction is monotonic, rounding included: the largest |k - mean| belongs to a channel's smallest or largest k.
    low = tl.min(tl.load(k_lows + partial, some, other=float("inf")), 0)
    high = tl.max(tl.load(k_highs + partial, some, other=float("-inf")), 0)
    peak = tl.max(tl.maximum(tl.abs(low - mean), tl.abs(high - mean)))
    tl.store(k_outer + pair, _outer_scale(peak + tl.sum(mean - mean)))
    peaks = tl.load(v_peaks + partial, some, other=0.0)
    tl.store(v_outer + pair, _outer_scale(tl.max(peaks) + tl.sum(peaks - peaks)))


@triton.jit
def _pack(values):
    """e2m1 values [rows, n] -> uint8 [rows, n / 2], the first of two in the low half, as `tl.dot_scaled` reads it."""
    size = tl.abs(values)
    # 0, 0.5, 1, 1.5, 2, 3, 4, 6 -> 0 ... 7.
    code = tl.where(size < 2.0, size * 2.0, tl.where(size < 4.0, size + 2.0, size * 0.5 + 4.0)).to(tl.int32)
    code = code | ((values.to(tl.int32, bitcast=True) >> 28) & 8)
    low, high = tl.split(code.reshape(values.shape[0], values.shape[1] // 2, 2))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def _store_rows(values, scale, x4, x_scales, row, limit, D: tl.constexpr, NATIVE: tl.constexpr):
    """values [rows, D / 16, 16] and scale [rows, D / 16, 1] of rows below `limit`: one bf16 product, or packed."""
    rows: tl.constexpr = values.shape[0]
    inside = (row < limit)[:, None]
    place = row.to(tl.int64)[:, None]
    if NATIVE:
        byte = tl.arange(0, D // 2)[None, :]
        tl.store(x4 + place * (D // 2) + byte, _pack(values.reshape(rows, D)), inside)
        group = tl.arange(0, D // GROUP)[None, :]
        stored = scale.reshape(rows, D // GROUP).to(tl.float8e4nv)
        tl.store(x_scales + place * (D // GROUP) + group, stored, inside)
    else:
        product = (values * scale).reshape(rows, D)
        tl.store(x4 + place * D + tl.arange(0, D)[None, :], product.to(tl.bfloat16), inside)


@triton.jit(do_not_specialize=[*STRIDES, "queries", "heads"])
def quantize_queries(
    q, q4, q_scales, q_outer, q_mean, q_batch, q_token, q_head, queries, heads,
    D: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One program per (block of queries, head, batch). The mean of the block is subtracted and stored."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pair = batch * heads + head
    index = pair * tl.num_programs(0) + block
    row = block * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, D)
    inside = (row < queries)[:, None]
    start = q + (batch * q_batch + head.to(tl.int64) * q_head) * UNIT
    tile = tl.load(start + row.to(tl.int64)[:, None] * q_token * UNIT + channel[None, :], inside, other=0.0).to(
        tl.float32
    )
    mean = tl.div_rn(tl.sum(tile, 0), tl.minimum(queries - block * BLOCK, BLOCK).to(tl.float32))
    tl.store(q_mean + index * D + channel, mean)
    tile = tl.where(inside, tile - mean[None, :], 0.0)
    outer = _outer_scale(tl.max(tl.abs(tile)) + tl.sum(tile - tile))
    tl.store(q_outer + index, outer)
    values, scale = _quantize_groups(tile.reshape(BLOCK, D // GROUP, GROUP), outer, 2)
    _store_rows(
        values, scale, q4 + pair * queries * (D // 2 if NATIVE else D), q_scales + pair * queries * (D // GROUP),
        row, queries, D, NATIVE,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*STRIDES, "keys", "tiles", "heads"])
def quantize_keys_values(
    k, v, k_mean, k_outer, v_outer, k4, k_scales, v4, v_scales,
    k_batch, k_token, k_head, v_batch, v_token, v_head,
    keys, tiles, heads,
    D: tl.constexpr, UNIT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One program per (64 keys, head, batch), `tiles` in all. Rows past the end are zeros."""
    padded_keys = tiles * TILE
    tile_index, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pair = batch * heads + head
    head = head.to(tl.int64)
    channel = tl.arange(0, D)
    place = tile_index * TILE + tl.arange(0, TILE)
    key = place if NATIVE else key_in_place(place)
    inside = (key < keys)[:, None]
    start = k + (batch * k_batch + head * k_head) * UNIT
    tile = tl.load(start + key.to(tl.int64)[:, None] * k_token * UNIT + channel[None, :], inside, other=0.0).to(
        tl.float32
    )
    tile = tl.where(inside, tile - tl.load(k_mean + pair * D + channel)[None, :], 0.0)
    values, scale = _quantize_groups(tile.reshape(TILE, D // GROUP, GROUP), tl.load(k_outer + pair), 2)
    _store_rows(
        values, scale, k4 + pair * padded_keys * (D // 2 if NATIVE else D),
        k_scales + pair * padded_keys * (D // GROUP), place, padded_keys, D, NATIVE,
    )  # fmt: skip

    # V in groups of 16 neighboring keys.
    start = v + (batch * v_batch + head * v_head) * UNIT
    outer = tl.load(v_outer + pair)
    if NATIVE:
        # Transposed [D, keys]: what P·V multiplies with is packed along the keys.
        tile = tl.load(
            start + place.to(tl.int64)[None, :] * v_token * UNIT + channel[:, None], (place < keys)[None, :], other=0.0
        )
        values, scale = _quantize_groups(tile.to(tl.float32).reshape(D, TILE // GROUP, GROUP), outer, 2)
        row = pair * D + channel.to(tl.int64)[:, None]
        byte = tile_index * (TILE // 2) + tl.arange(0, TILE // 2)[None, :]
        tl.store(v4 + row * (padded_keys // 2) + byte, _pack(values.reshape(D, TILE)))
        group = tile_index * (TILE // GROUP) + tl.arange(0, TILE // GROUP)[None, :]
        tl.store(v_scales + row * (padded_keys // GROUP) + group, scale.reshape(D, TILE // GROUP).to(tl.float8e4nv))
    else:
        tile = tl.load(start + key.to(tl.int64)[:, None] * v_token * UNIT + channel[None, :], inside, other=0.0).to(
            tl.float32
        )
        # place = 8 j + 2 c + i holds key 16 c + 2 j + i: the axes of the 16 keys of a group are j and i.
        apart = tl.permute(tile.reshape(8, 4, 2, D), (1, 3, 0, 2)).reshape(4, D, GROUP)
        values, scale = _quantize_groups(apart, outer, 2)
        product = tl.permute((values * scale).reshape(4, D, 8, 2), (2, 0, 3, 1)).reshape(TILE, D)
        row = pair * padded_keys + place.to(tl.int64)[:, None]
        tl.store(v4 + row * D + channel[None, :], product.to(tl.bfloat16))
