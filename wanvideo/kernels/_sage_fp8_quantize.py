"""Triton: how Q, K and V become 8-bit operands. Two passes over K and V, one over Q.

Pass 1 (`key_value_statistics`) reads K and V once: sums of K and the largest |V|, per channel, per run of tokens.
Pass 2 (`quantize_qkv`) finishes those statistics and writes

* Q int8 [B, H, Lq, D], one scale per row, with the softmax scale and log2(e) folded in, and the largest norm of a row
  in each `BLOCK` of them, for a bound of the scores,
* K int8 [B, H, Lk, D] with its mean over the tokens subtracted, one scale per `BLOCK` keys, and the largest norm
  of a key,
* V e4m3 transposed [B, H, D, Lk padded], one scale per channel, the padding zero.

Keys change places inside groups of 32 in the transposed V. The accumulator of Q·Kᵀ gives a thread the columns
2c, 2c+1, 8+2c, 8+2c+1, ... of a group, while the 8-bit left operand of P·V wants four neighbors per thread. Attention
does not depend on the order of the keys, so V is stored in the order in which P already lies in the registers, and P
needs no exchange between threads.

Strides come in units of 16 bytes (`UNIT` elements), so that the compiler knows their alignment without a compilation
for every stride; integers are not specialized either. One compilation covers all shapes of a dtype and head_dim.

A NaN or infinity in an input makes the scales NaN, and so reaches the output instead of becoming a plausible number.
"""

from __future__ import annotations

import triton
import triton.language as tl

STRIDES = [f"{x}_{dim}" for x in "qkv" for dim in ("batch", "token", "head")]

INT8_MAX = tl.constexpr(127.0)
E4M3_MAX = tl.constexpr(448.0)
# Adding 1.5 * 2^23 rounds a float32 of magnitude below 2^22 to the nearest integer, ties to even, and leaves that
# integer in the low bits of its pattern.
ROUNDER = tl.constexpr(12582912.0)
LARGEST = tl.constexpr(3.4e38)
NAN_BITS = tl.constexpr(0x7FC00000)  # as an integer above every float32


@triton.jit
def _to_int8(x, inverse_scale):
    return (x * inverse_scale + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _inverse(scale):
    """1 / scale; 0 for a block of zeros, or so small that the inverse would overflow. NaN stays NaN."""
    return tl.where(scale < 1e-37, 0.0, 1.0 / scale)


@triton.jit
def _norms(rounded):
    """Of the rows of an int8 tile; exact but for the root."""
    x = rounded.to(tl.float32)
    return tl.sqrt(tl.sum(x * x, 1))


@triton.jit
def key_in_place(position):
    """Which key of a group of 32 stands at `position` in the transposed V."""
    in_group = position % 32
    half = in_group // 16
    lane = (in_group % 16) // 4
    return position - in_group + 16 * half + 8 * ((in_group % 4) // 2) + 2 * lane + in_group % 2


@triton.jit(do_not_specialize=[*STRIDES, "keys", "heads", "run"])
def key_value_statistics(
    k, v, k_sums, v_peaks,
    k_batch, k_token, k_head, v_batch, v_token, v_head,
    keys, heads, run,
    D: tl.constexpr, D_POW2: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program per (run of tokens, head, batch). Writes k_sums and v_peaks [B, H, runs, D] float32."""
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, D_POW2)
    in_head = channel < D
    k += (batch * k_batch + head.to(tl.int64) * k_head) * UNIT
    v += (batch * v_batch + head.to(tl.int64) * v_head) * UNIT
    k_sum = tl.zeros([BLOCK, D_POW2], tl.float32)
    v_peak = tl.zeros([BLOCK, D_POW2], tl.float32)
    unsound = tl.zeros([BLOCK, D_POW2], tl.float32)
    first = chunk * run
    for start in tl.range(first, tl.minimum(first + run, keys), BLOCK, num_stages=4):
        token = start + tl.arange(0, BLOCK)
        inside = (token < keys)[:, None] & in_head[None, :]
        token = token.to(tl.int64)[:, None]
        k_sum += tl.load(k + token * k_token * UNIT + channel[None, :], inside, other=0.0).to(tl.float32)
        v_tile = tl.load(v + token * v_token * UNIT + channel[None, :], inside, other=0.0).to(tl.float32)
        v_peak = tl.maximum(v_peak, tl.abs(v_tile))
        unsound += v_tile - v_tile  # 0, or NaN for good where V is NaN or infinite; the maximum would drop it
    row = ((batch * heads + head) * tl.num_programs(0) + chunk) * D
    tl.store(k_sums + row + channel, tl.sum(k_sum, 0), in_head)
    tl.store(v_peaks + row + channel, tl.max(v_peak, 0) + tl.sum(unsound, 0), in_head)


@triton.jit(do_not_specialize=["keys", "runs"])
def finish_statistics(
    k_sums, v_peaks, k_mean, k_bits, v_scale, keys, runs, D: tl.constexpr, D_POW2: tl.constexpr, RUNS: tl.constexpr
):
    """One program per head and batch: k_mean and v_scale [B, H, D] from the runs; k_bits [B, H] begins at 0."""
    pair = tl.program_id(0).to(tl.int64)
    tl.store(k_bits + pair, 0)
    channel = tl.arange(0, D_POW2)
    in_head = channel < D
    run = tl.arange(0, RUNS)[:, None]
    partial = (pair * runs + run) * D + channel[None, :]
    some = (run < runs) & in_head[None, :]
    tl.store(k_mean + pair * D + channel, tl.sum(tl.load(k_sums + partial, some, other=0.0), 0) / keys, in_head)
    peaks = tl.load(v_peaks + partial, some, other=0.0)
    peak = tl.max(peaks, 0) + tl.sum(peaks - peaks, 0)
    tl.store(v_scale + pair * D + channel, peak / E4M3_MAX, in_head)


@triton.jit
def _quantize_queries(
    q, q8, q_scale, q_norm, block, q_token, queries, logit_scale,
    D: tl.constexpr, D_POW2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = block * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, D_POW2)[None, :]
    inside = (token < queries)[:, None] & (channel < D)
    place = token.to(tl.int64)[:, None]
    tile = tl.load(q + place * q_token + channel, inside, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(tile), 1) / INT8_MAX + tl.sum(tile - tile, 1)
    rounded = _to_int8(tile, _inverse(scale)[:, None])
    scale *= logit_scale
    tl.store(q_scale + token, scale, token < queries)
    tl.store(q_norm + block, tl.max(_norms(rounded) * scale) + tl.sum(scale - scale))  # a maximum would drop NaN
    tl.store(q8 + place * D + channel, rounded, inside)


@triton.jit
def _quantize_keys(
    k, k_mean, k8, k_scale, k_bits, block, k_token, keys,
    D: tl.constexpr, D_POW2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = block * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, D_POW2)[None, :]
    inside = (token < keys)[:, None] & (channel < D)
    place = token.to(tl.int64)[:, None]
    mean = tl.load(k_mean + channel, channel < D, other=0.0)
    tile = tl.load(k + place * k_token + channel, inside, other=0.0).to(tl.float32)
    tile = tl.where(inside, tile - mean, 0.0)
    scale = tl.max(tl.abs(tile)) / INT8_MAX + tl.sum(tile - tile)
    rounded = _to_int8(tile, _inverse(scale))
    norm = tl.max(_norms(rounded)) * scale
    # Numbers that are not negative are in the same order as their bits.
    tl.atomic_max(k_bits, tl.where(norm <= LARGEST, norm.to(tl.int32, bitcast=True), NAN_BITS), sem="relaxed")
    tl.store(k_scale + block, scale)
    tl.store(k8 + place * D + channel, rounded, inside)


@triton.jit
def _quantize_values(
    v, v_scale, v8, block, v_token, keys, padded_keys,
    D: tl.constexpr, D_POW2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = block * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, D_POW2)[None, :]
    key = key_in_place(place)[:, None]
    inside = (key < keys) & (channel < D)
    scale = tl.load(v_scale + channel, channel < D, other=0.0)
    tile = tl.load(v + key.to(tl.int64) * v_token + channel, inside, other=0.0).to(tl.float32)
    tile = (tile * _inverse(scale)).to(tl.float8e4nv)
    tl.store(v8 + channel.to(tl.int64) * padded_keys + place[:, None], tile, channel < D)


@triton.jit(do_not_specialize=[*STRIDES, "queries", "keys", "heads"])
def quantize_qkv(
    q, k, v, k_mean, v_scale,
    q8, q_scale, q_norm, k8, k_scale, k_bits, v8,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    queries, keys, heads, logit_scale,
    D: tl.constexpr, D_POW2: tl.constexpr, BLOCK: tl.constexpr, E4M3_V: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program per (block of tokens of Q, then of K, then of V; head; batch). k_bits: k_norm as int32."""
    q_blocks, k_blocks = tl.cdiv(queries, BLOCK), tl.cdiv(keys, BLOCK)
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pair = batch * heads + head
    if block < q_blocks:
        _quantize_queries(
            q + (batch * q_batch + head * q_head) * UNIT, q8 + pair * queries * D, q_scale + pair * queries,
            q_norm + pair * q_blocks, block, q_token * UNIT, queries, logit_scale, D, D_POW2, BLOCK,
        )  # fmt: skip
    elif block < q_blocks + k_blocks:
        _quantize_keys(
            k + (batch * k_batch + head * k_head) * UNIT, k_mean + pair * D, k8 + pair * keys * D,
            k_scale + pair * k_blocks, k_bits + pair, block - q_blocks, k_token * UNIT, keys, D, D_POW2, BLOCK,
        )  # fmt: skip
    elif E4M3_V:
        _quantize_values(
            v + (batch * v_batch + head * v_head) * UNIT, v_scale + pair * D, v8 + pair * D * k_blocks * BLOCK,
            block - q_blocks - k_blocks, v_token * UNIT, keys, k_blocks * BLOCK, D, D_POW2, BLOCK,
        )  # fmt: skip
