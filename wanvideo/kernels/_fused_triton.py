"""Triton: the elementwise groups of a transformer block, one row of channels per program.

All of them compute in float32 and round once, as the eager forms do, so that both are as far from the exact result.
Where ROWS is set, the result is quantized per row for an fp8 matmul instead of rounded, as `quantize_rows` does it.

The strides of modulation are specialized, that is, compiled anew where one is no multiple of 16: only a compiler that
knows them to be multiples reads 16 bytes at a time, which more than doubles the speed of a norm.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._linear_triton import store_quantized


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


@triton.jit
def _store(values, like, out, scale, row, place, inside, ROWS: tl.constexpr, ROUND: tl.constexpr):
    """`values` rounded once: to the dtype of `like`, or quantized per row."""
    if ROWS:
        store_quantized(tl.where(inside, values, 0.0), out, scale, row, place, inside, ROUND)
    else:
        tl.store(out + place, values.to(like.dtype.element_ty), inside)


@triton.jit
def _by_batch(x, batch, stride, inside, BLOCK: tl.constexpr):
    return tl.load(x + batch * stride + tl.arange(0, BLOCK), inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows_per_batch", "alpha"])
def layer_norm(
    x, branch, gate, sums, factor, offset, out, row_scale,
    rows_per_batch, gate_batch, factor_batch, offset_batch, alpha, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ADD_ONE: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """normed * factor + offset, or normed * (1 + factor) + offset: one row of factor and offset per batch.

    With ADDED what is normed is sums = x + branch * alpha, rounded and written; with GATED x + branch * gate, one row
    of gate per batch.
    """
    row = tl.program_id(0)
    batch = (row // rows_per_batch).to(tl.int64)
    values, inside, place = _row(x, row, C, BLOCK)
    if ADDED:
        by = _by_batch(gate, batch, gate_batch, inside, BLOCK) if GATED else alpha
        rounded = (values + tl.load(branch + place, inside, other=0.0).to(tl.float32) * by).to(sums.dtype.element_ty)
        tl.store(sums + place, rounded, inside)
        values = rounded.to(tl.float32)
    centered = tl.where(inside, values - tl.sum(values, 0) / C, 0.0)
    normed = centered * _inverse_root(tl.sum(centered * centered, 0) / C, eps)
    times = _by_batch(factor, batch, factor_batch, inside, BLOCK)
    if ADD_ONE:
        times += 1.0
    plus = _by_batch(offset, batch, offset_batch, inside, BLOCK)
    _store(normed * times + plus, x, out, row_scale, row, place, inside, ROWS, ROUND)


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
    by = _by_batch(gate, (row // rows_per_batch).to(tl.int64), gate_batch, inside, BLOCK)
    added = tl.load(branch + place, inside, other=0.0).to(tl.float32)
    tl.store(out + place, (values + added * by).to(out.dtype.element_ty), inside)


@triton.jit
def add_rows(x, y, out, row_scale, C: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    """x + y."""
    row = tl.program_id(0)
    values, inside, place = _row(x, row, C, BLOCK)
    total = values + tl.load(y + place, inside, other=0.0).to(tl.float32)
    _store(total, x, out, row_scale, row, place, inside, True, ROUND)


@triton.jit
def gelu_rows(x, out, row_scale, C: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    """GELU by tanh, x / 2 * (1 + tanh(u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3), as x / (1 + exp(-2 u))."""
    row = tl.program_id(0)
    values, inside, place = _row(x, row, C, BLOCK)
    # -2 * sqrt(2 / pi) * log2(e), so that exp2 takes it.
    power = -2.302208198144325 * (values + 0.044715 * values * values * values)
    _store(values / (1.0 + tl.exp2(power)), x, out, row_scale, row, place, inside, True, ROUND)
