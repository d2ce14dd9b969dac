"""Triton: the elementwise groups of a transformer block, one row of channels per program.

All of them compute in float32 and round once, as the eager forms do, so that both are as far from the exact result.

The strides of modulation are specialized, that is, compiled anew where one is no multiple of 16: only a compiler that
knows them to be multiples reads 16 bytes at a time, which more than doubles the speed of a norm.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row(x, row, C: tl.constexpr, BLOCK: tl.constexpr):
    """A row of x [rows, C] in float32, zeros behind it; where those of it are that count; and where the row begins."""
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    place = row.to(tl.int64) * C + channel
    return tl.load(x + place, inside, other=0.0).to(tl.float32), inside, place


@triton.jit
def _inverse_root(mean_square, eps):
    return 1.0 / tl.sqrt_rn(mean_square + eps)


@triton.jit(do_not_specialize=["rows_per_batch"])
def layer_norm(
    x, factor, offset, out, rows_per_batch, factor_batch, offset_batch, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ADD_ONE: tl.constexpr,
):  # fmt: skip
    """normed * factor + offset, or normed * (1 + factor) + offset: one row of factor and offset per batch."""
    row = tl.program_id(0)
    batch = (row // rows_per_batch).to(tl.int64)
    values, inside, place = _row(x, row, C, BLOCK)
    centered = tl.where(inside, values - tl.sum(values, 0) / C, 0.0)
    normed = centered * _inverse_root(tl.sum(centered * centered, 0) / C, eps)
    channel = tl.arange(0, BLOCK)
    by = tl.load(factor + batch * factor_batch + channel, inside, other=0.0).to(tl.float32)
    plus = tl.load(offset + batch * offset_batch + channel, inside, other=0.0).to(tl.float32)
    if ADD_ONE:
        by += 1.0
    tl.store(out + place, (normed * by + plus).to(out.dtype.element_ty), inside)


@triton.jit
def _rms_normed(x, weight, row, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    values, inside, place = _row(x, row, C, BLOCK)
    by = tl.load(weight + tl.arange(0, BLOCK), inside, other=0.0).to(tl.float32)
    return values * _inverse_root(tl.sum(values * values, 0) / C, eps) * by, inside, place


@triton.jit
def rms_norm(x, weight, out, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) * weight."""
    normed, inside, place = _rms_normed(x, weight, tl.program_id(0), eps, C, BLOCK)
    tl.store(out + place, normed.to(out.dtype.element_ty), inside)


@triton.jit
def _rms_norm_rope(
    x, weight, cos, sin, out, row, position, eps, C: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    normed, inside, place = _rms_normed(x, weight, row, eps, C, BLOCK)
    a, b = tl.split(normed.reshape(BLOCK // 2, 2))
    pair = tl.arange(0, BLOCK // 2)
    angle = position.to(tl.int64) * HALF + pair % HALF
    c = tl.load(cos + angle, pair < C // 2, other=0.0)
    s = tl.load(sin + angle, pair < C // 2, other=0.0)
    turned = tl.join(a * c - b * s, a * s + b * c).reshape(BLOCK)
    tl.store(out + place, turned.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["length"])
def qk_norm_rope(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, length, eps,
    C: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q and k [batch * length, C]: RMS norm over C, then the pairs of each head of 2 * HALF channels turned by
    cos and sin [length, HALF]. One program per row of q, then of k."""
    row = tl.program_id(0)
    position = row % length
    if tl.program_id(1) == 0:
        _rms_norm_rope(q, q_weight, cos, sin, q_out, row, position, eps, C, HALF, BLOCK)
    else:
        _rms_norm_rope(k, k_weight, cos, sin, k_out, row, position, eps, C, HALF, BLOCK)


@triton.jit(do_not_specialize=["rows_per_batch"])
def gated_residual(x, branch, gate, out, rows_per_batch, gate_batch, C: tl.constexpr, BLOCK: tl.constexpr):
    """x + gate * branch, one row of gate per batch."""
    row = tl.program_id(0)
    values, inside, place = _row(x, row, C, BLOCK)
    batch = (row // rows_per_batch).to(tl.int64)
    by = tl.load(gate + batch * gate_batch + tl.arange(0, BLOCK), inside, other=0.0)
    added = tl.load(branch + place, inside, other=0.0).to(tl.float32)
    tl.store(out + place, (values + added * by).to(out.dtype.element_ty), inside)
