"""Triton: what lies around the fp8 matmul of a linear layer, each in one pass over memory and bit-equal to eager."""

from __future__ import annotations

import triton
import triton.language as tl

from ._sage_fp4_quantize import round_to_e4m3

# PyTorch multiplies by the float32 reciprocal where a CUDA tensor is divided by a number.
INVERSE_E4M3_MAX = tl.constexpr(1.0 / 448.0)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def store_quantized(tile, values, scale, row, place, inside, ROUND: tl.constexpr):
    """Write a row, float32 [BLOCK] with zeros behind it, as values e4m3 at `place` and its scale.

    ROUND: round to e4m3 before the conversion. On sm_89 Triton up to 3.7 converts by way of a truncated float16, which
    takes a number just above a tie for the tie; numbers that e4m3 holds pass unchanged.
    """
    # A maximum drops NaN; the difference is 0, or NaN where a value is not finite.
    largest = tl.max(tl.abs(tile), 0) + tl.sum(tile - tile, 0)
    factor = largest * INVERSE_E4M3_MAX
    factor = tl.where(factor < TINY, TINY, factor)
    tl.store(scale + row, factor)
    # tile / factor, rounded as a division rounds: with the float nearest to 1 / factor, one correction of the quotient
    # by its exact remainder is enough (Markstein, IBM Journal of R&D 34, 1990). It would drop the sign of a zero.
    inverse = tl.div_rn(1.0, factor)
    rough = tile * inverse
    quotient = tl.fma(tl.fma(-rough, factor, tile), inverse, rough)
    quotient = tl.where(quotient == 0.0, rough, quotient)
    if ROUND:
        sign = quotient.to(tl.int32, bitcast=True) & -0x80000000
        rounded = round_to_e4m3(tl.abs(quotient)).to(tl.int32, bitcast=True)
        quotient = (rounded | sign).to(tl.float32, bitcast=True)
    tl.store(values + place, quotient.to(tl.float8e4nv), inside)


@triton.jit
def quantize_rows(x, values, scale, K: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    """One program per row of x [M, K]: values e4m3 [M, K] and scale float32 [M], x ~ values * scale."""
    row = tl.program_id(0)
    channel = tl.arange(0, BLOCK)
    inside = channel < K
    place = row.to(tl.int64) * K + channel
    tile = tl.load(x + place, inside, other=0.0).to(tl.float32)
    store_quantized(tile, values, scale, row, place, inside, ROUND)


# `columns` is specialized, so that a multiple of 16 is read 16 bytes at a time.
@triton.jit
def scale_product(
    product, row_scale, column_scale, bias, out, columns,
    PER_COLUMN: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and block of product [M, N] float32: out = product * (row scale * column scale) + bias."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    place = row.to(tl.int64) * columns + column
    by = tl.load(row_scale + row)
    if PER_COLUMN:
        by *= tl.load(column_scale + column, inside, other=0.0)
    else:
        by *= tl.load(column_scale)
    scaled = tl.load(product + place, inside, other=0.0) * by
    if BIASED:
        scaled += tl.load(bias + column, inside, other=0.0).to(tl.float32)
    tl.store(out + place, scaled.to(out.dtype.element_ty), inside)
