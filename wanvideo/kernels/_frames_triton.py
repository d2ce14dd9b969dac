"""Triton: what lies between the convolutions of the VAE, each in one pass over memory.

Frames are channels last. A program takes a run of pixels of one padded frame with all their channels; everything is
computed in float32 and rounded once. A frame is addressed by 64-bit, a pixel in it by 32-bit offsets.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum(
    y, bias, residual, y_place, place, inside, channel, C: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr
):
    """y + bias + residual in float32, rounded to the dtype of y; zero where it is not inside."""
    total = tl.load(y + y_place, inside, other=0.0).to(tl.float32)
    if BIASED:
        total += tl.load(bias + channel, channel < C, other=0.0).to(tl.float32)[None, :]
    if ADDED:
        total += tl.load(residual + place, inside, other=0.0).to(tl.float32)
    return tl.where(inside, total, 0.0).to(y.dtype.element_ty)


@triton.jit(do_not_specialize=["height", "width"])
def pad_frames(
    y, bias, residual, gamma, history, padded, sums, new_history, frames, height, width, scale,
    KEPT: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr, PIXELS: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, NORMED: tl.constexpr,
    STORED: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """KEPT frames of history, then the frames of y + bias + residual, normed and through SiLU; zeros around them.

    Frames y [B, frames, height, width, C], pixels STEP apart; padded [B, KEPT + frames, height + BEFORE + AFTER, ...];
    sums [B, frames, height, width, C]; history and new_history [B, KEPT, height, width, C], the last KEPT frames of
    what was padded.
    """
    outer_width = width + BEFORE + AFTER
    outer = (height + BEFORE + AFTER) * outer_width
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    frame = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = pixel // outer_width - BEFORE
    column = pixel % outer_width - BEFORE
    within = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (pixel < outer)
    channel = tl.arange(0, BLOCK)
    inside = within[:, None] & (channel < C)[None, :]
    source = (row * width + column)[:, None]
    place = source * C + channel[None, :]
    inner = (height * width).to(tl.int64) * C
    if frame < KEPT:
        if PAST:
            value = tl.load(history + (batch * KEPT + frame) * inner + place, inside, other=0.0)
        else:
            value = tl.zeros((PIXELS, BLOCK), padded.dtype.element_ty)
    else:
        number = batch * frames + frame - KEPT
        start = number * inner
        y_place = source * STEP + channel[None, :]
        y_frame = y + number * (height * width) * STEP
        value = _sum(y_frame, bias, residual + start, y_place, place, inside, channel, C, BIASED, ADDED)
        if STORED:
            tl.store(sums + start + place, value, inside)
        if NORMED:
            exact = value.to(tl.float32)
            length = tl.sqrt_rn(tl.sum(exact * exact, 1))
            length = tl.where(length < 1e-12, 1e-12, length)
            by = tl.load(gamma + channel, channel < C, other=0.0).to(tl.float32)
            normed = exact * (scale / length)[:, None] * by[None, :]
            value = (normed / (1.0 + tl.exp(-normed))).to(padded.dtype.element_ty)
    out = (batch * (KEPT + frames) + frame) * outer * C + pixel[:, None] * C + channel[None, :]
    tl.store(padded + out, value, (pixel < outer)[:, None] & (channel < C)[None, :])
    if KEPT > 0:  # noqa: SIM102 - decided when the kernel is compiled
        if frame >= frames:
            tl.store(new_history + (batch * KEPT + frame - frames) * inner + place, value, inside)


@triton.jit(do_not_specialize=["height", "width"])
def upsample_frames(
    y, bias, residual, padded, frames, height, width,
    SPLIT: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
    BIASED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Frames of y + bias + residual, each pixel four times, one pixel of zeros around them.

    y [B, frames, height, width, SPLIT * C], pixels STEP apart; padded [B, SPLIT * frames, 2 * height + 2,
    2 * width + 2, C]: the j-th group of C channels is frame SPLIT * f + j.
    """
    outer_width = 2 * width + 2
    outer = (2 * height + 2) * outer_width
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    out_frame = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = pixel // outer_width - 1
    column = pixel % outer_width - 1
    within = (row >= 0) & (row < 2 * height) & (column >= 0) & (column < 2 * width) & (pixel < outer)
    channel = tl.arange(0, BLOCK)
    inside = within[:, None] & (channel < C)[None, :]
    group = (out_frame % SPLIT) * C
    source = ((row // 2) * width + column // 2)[:, None]
    channels = group + channel[None, :]
    first = (batch * frames + out_frame // SPLIT) * (height * width)
    y_frame, residual_frame = y + first * STEP, residual + first * (SPLIT * C)
    y_place, place = source * STEP + channels, source * (SPLIT * C) + channels
    value = _sum(y_frame, bias + group, residual_frame, y_place, place, inside, channel, C, BIASED, ADDED)
    out = (batch * (SPLIT * frames) + out_frame) * outer * C + pixel[:, None] * C + channel[None, :]
    tl.store(padded + out, value, (pixel < outer)[:, None] & (channel < C)[None, :])
