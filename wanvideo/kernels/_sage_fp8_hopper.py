"""Gluon: attention over 8-bit operands on Hopper (sm_90), for head_dim 64 and 128 and Triton from 3.6.

One program computes 128 queries of one head with three partitions of warps: a producer warp streams K and V into shared
memory with the tensor memory accelerator, and two consumer warpgroups of 64 queries each compute. The tensor cores and
the special-function unit (exp2) would each be busy for about as long, so the two groups take turns: while one has its
products on the tensor cores, the other computes its softmax (the ping-pong of FlashAttention-3, arXiv 2407.08608).
Within a group Q·K of the next tile is issued together with P·V of this one.

At its power cap the GPU is limited by energy, and of this kernel's the exponential took most after the tensor cores. So
where the scores of a block of queries are known to stay within `NEAR` or `FAR` octaves, the weights are computed in
integers: `score * step + shift`, read as a float32, has the exponent of 2 ** x and its fraction where the mantissa is,
which is 2 ** x with straight lines between the powers of two: at most 6 % too large, of which the mean cancels, since
numerator and denominator of the softmax hold the same weights. The bound is |q| * |k|, the largest of the block and of
the head (Cauchy and Schwarz). Elsewhere the numerics are those of `_sage_fp8_triton`, with one difference:
score = bits * scale - shift is one fused multiply-add on the raw accumulator, whose rounding moves the exponents of a
row by up to 0.75 * scale, which is held below `MAX_SCALE`. There a NaN reaches the output: it makes the bound NaN.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

# Triton 3.9 renamed it.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

BLOCK_M = gl.constexpr(64)  # queries per warpgroup
BLOCK_N = gl.constexpr(128)  # keys per tile
GROUPS = gl.constexpr(2)  # consumer warpgroups
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)

# See `_sage_fp8_triton`.
MAGIC = gl.constexpr(12582912.0)
MAGIC_BITS = gl.constexpr(0x4B400000)
LOWEST_BITS = gl.constexpr(0x4B000000)  # the smallest number that an accumulator can hold
LOG2_E4M3_MAX = gl.constexpr(8.807354922057604)
MAX_SCALE = gl.constexpr(0.125)

# How the weights are computed: in integers, in integers with a floor of zero, or by exp2.
INTEGER, FLOORED, EXP2 = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
OCTAVE = gl.constexpr(float(1 << 23))  # what one step of a float32's exponent is, in its bits
E4M3_MAX_BITS = gl.constexpr(0x43E00000)  # of 448.0, 135.75 octaves
LOWEST = gl.constexpr(-(1 << 30))  # below every score within FAR
# Octaves of |score|. Two scores are at most twice as far apart, and rounding `step` adds 0.25: the weights stay above
# 0 within NEAR, and within FAR nothing leaves 32 bits.
NEAR, FAR = gl.constexpr(64.0), gl.constexpr(120.0)


@gluon.jit
def _softmax(scores, scale, m, sums, valid, MASKED: gl.constexpr, WAY: gl.constexpr):
    """One step of the online softmax.

    Args:
        scores: accumulators of Q·K, int32 [BLOCK_M, BLOCK_N], which began at MAGIC_BITS (EXP2) or 0.
        scale: octaves of a step of them, float32 [BLOCK_M].
        m: the largest so far in octaves, float32 (EXP2) or int32 times OCTAVE.

    Returns:
        the new largest, what rescales the past, the sums, the weights times 448.
    """
    if MASKED:
        top = gl.max(gl.where(valid[None, :], scores, LOWEST_BITS if WAY == EXP2 else LOWEST), 1)
    else:
        top = gl.max(scores, 1)  # as integers: the order is the same, and the GPU has a maximum of three
    if WAY == EXP2:
        scale = gl.where(scale > MAX_SCALE, MAX_SCALE, scale)  # a comparison lets NaN through, a minimum would not
        m_new = gl.maximum(m, (top.to(gl.float32, bitcast=True) - MAGIC) * scale)
        shift = MAGIC * scale + (m_new - LOG2_E4M3_MAX)
        exponent = scores.to(gl.float32, bitcast=True) * scale[:, None] - shift[:, None]
        if MASKED:
            exponent = gl.where(valid[None, :], exponent, float("-inf"))
        alpha = gl.exp2(m - m_new)
        p = gl.exp2(exponent)
    else:
        step = (scale * OCTAVE + 0.5).to(gl.int32)
        m_new = gl.maximum(m, top * step)
        bits = scores * step[:, None] + (E4M3_MAX_BITS - m_new)[:, None]
        if WAY == FLOORED:
            bits = gl.maximum(bits, 0)
        if MASKED:
            bits = gl.where(valid[None, :], bits, 0)
        alpha = gl.exp2((m - m_new).to(gl.float32) * (1 / OCTAVE))
        p = bits.to(gl.float32, bitcast=True)
    fresh = _partial_sums(p)
    sums = sums * gl.convert_layout(alpha, gl.SliceLayout(1, fresh.type.layout))[:, None] + fresh
    return m_new, alpha, sums, p


@gluon.jit
def _partial_sums(p):
    """[BLOCK_M, 4]: one sum per thread that holds a part of the row; added up once, after the last tile."""
    return gl.sum(gl.sum(p.reshape(BLOCK_M, BLOCK_N // 8, 4, 2), 3), 1)


@gluon.jit
def _left_operand(p, OUT: gl.constexpr):
    """P as the e4m3 left operand of P·V. Moves nothing between threads: see `_sage_fp8_quantize.key_in_place`."""
    p = gl.permute(p.reshape(BLOCK_M, BLOCK_N // 16, 2, 4, 2), (0, 1, 3, 2, 4)).reshape(BLOCK_M, BLOCK_N)
    return gl.convert_layout(p, gl.DotOperandLayout(0, OUT, 4), assert_trivial=True).to(gl.float8e4nv)


@gluon.jit
def _rescale(o, alpha, fresh, OUT: gl.constexpr):
    """The second level of the sum over keys, in float32."""
    return o * gl.convert_layout(alpha, gl.SliceLayout(1, OUT), assert_trivial=True)[:, None] + fresh


@gluon.jit
def _multiply(
    q, buffers, barriers, row_scale, k_scale, keys, tiles,
    D: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, WAY: gl.constexpr,
):  # fmt: skip
    """All tiles of keys: the sums of the weights, in parts, and weights times V [BLOCK_M, D]."""
    _, k_smem, v_smem = buffers
    _, ready, empty, turn = barriers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    ADDED: gl.constexpr = WAY == EXP2

    start = gl.full([BLOCK_M, BLOCK_N], MAGIC_BITS if ADDED else 0, gl.int32, SCORES)
    zeros = gl.zeros([BLOCK_M, D], gl.float32, OUT)
    if ADDED:
        m = gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS)
    else:
        m = gl.full([BLOCK_M], LOWEST, gl.int32, ROWS)
    sums = _partial_sums(gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES))
    o = zeros
    valid = (tiles - 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES)) < keys

    scale = row_scale * gl.load(k_scale)
    mbarrier.wait(ready.index(0), 0)
    s0 = warpgroup_mma(q, k_smem.index(0).permute((1, 0)), start, use_acc=ADDED, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(s0,))
    for i in range(tiles - 1):
        next_scale = row_scale * gl.load(k_scale + i + 1)
        m, alpha, sums, weights = _softmax(scores, scale, m, sums, valid, False, WAY)
        p = _left_operand(weights, OUT)
        k_stage = (i + 1) % STAGES
        v_stage = i % STAGES
        mbarrier.wait(ready.index(k_stage), ((i + 1) // STAGES) & 1)
        mbarrier.wait(turn.index(GROUP), i & 1)
        s = warpgroup_mma(q, k_smem.index(k_stage).permute((1, 0)), start, use_acc=ADDED, is_async=True)
        f = warpgroup_mma(p, v_smem.index(v_stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        # Q·K is done; the other group's products queue up behind this one's P·V.
        scores = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(turn.index(1 - GROUP), count=1)
        fresh = warpgroup_mma_wait(0, deps=(f,))
        mbarrier.arrive(empty.index(v_stage), count=1)
        o = _rescale(o, alpha, fresh, OUT)
        scale = next_scale
    # The last tile may reach past the end.
    _, alpha_last, sums, w_last = _softmax(scores, scale, m, sums, valid, True, WAY)
    p_last = _left_operand(w_last, OUT)
    last = v_smem.index((tiles - 1) % STAGES).permute((1, 0))
    f_last = warpgroup_mma(p_last, last, zeros, use_acc=False, is_async=True)
    return sums, _rescale(o, alpha_last, warpgroup_mma_wait(0, deps=(f_last,)), OUT)


@gluon.jit
def _consume(
    descriptors, buffers, barriers, pointers, numbers, D: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr
):
    q_scale, k_scale, v_scale, out = pointers
    first_row, out_place, out_token, _pair, queries, keys, tiles, way = numbers
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32]))

    first_row += GROUP * BLOCK_M
    row = first_row + gl.arange(0, BLOCK_M, ROWS)
    row_scale = gl.load(q_scale + row, row < queries, other=0.0)
    q = buffers[0].index(GROUP)
    mbarrier.wait(barriers[0], 0)
    if way == INTEGER:
        sums, o = _multiply(q, buffers, barriers, row_scale, k_scale, keys, tiles, D, STAGES, GROUP, INTEGER)
    elif way == FLOORED:
        sums, o = _multiply(q, buffers, barriers, row_scale, k_scale, keys, tiles, D, STAGES, GROUP, FLOORED)
    else:
        sums, o = _multiply(q, buffers, barriers, row_scale, k_scale, keys, tiles, D, STAGES, GROUP, EXP2)

    total = gl.convert_layout(gl.sum(sums, 1), gl.SliceLayout(1, OUT))
    o = o * (1.0 / total)[:, None] * gl.load(v_scale + gl.arange(0, D, gl.SliceLayout(0, OUT)))[None, :]
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o = gl.convert_layout(o.to(out.dtype.element_ty), STORE)
    row = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, STORE))
    channel = gl.arange(0, D, gl.SliceLayout(0, STORE))
    place = out_place + row.to(gl.int64)[:, None] * out_token + channel[None, :]
    gl.store(out + place, o, (row < queries)[:, None])


@gluon.jit
def _produce(
    descriptors, buffers, barriers, pointers, numbers, D: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr
):
    q_desc, k_desc, v_desc = descriptors
    q_smem, k_smem, v_smem = buffers
    q_ready, ready, empty, _turn = barriers
    first_row, _out_place, _out_token, pair, queries, keys, tiles, _way = numbers
    mbarrier.expect(q_ready, GROUPS * BLOCK_M * D)
    for group in gl.static_range(GROUPS):
        row = pair * queries + first_row + group * BLOCK_M
        async_load(q_desc, [row, 0], q_ready, q_smem.index(group))
    for i in range(tiles):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        bar = ready.index(stage)
        mbarrier.expect(bar, 2 * BLOCK_N * D)
        async_load(k_desc, [pair * keys + i * BLOCK_N, 0], bar, k_smem.index(stage))
        async_load(v_desc, [pair * D, i * BLOCK_N], bar, v_smem.index(stage))


@gluon.jit(do_not_specialize=["queries", "keys", "heads"])
def attend(
    q_desc, k_desc, v_desc, q_scale, q_norm, k_scale, k_norm, v_scale, out, loops, queries, keys, heads,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program per (128 queries, head, batch). Operands as in `sage_fp8.Operands`, flattened to two dimensions.

    `loops` [3] counts the programs that computed their weights in each way.
    """
    block, head, batch = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    pair = batch * heads + head
    tiles = gl.cdiv(keys, BLOCK_N)
    first_row = block * (BLOCK_M * GROUPS)
    out_place = (batch.to(gl.int64) * queries * heads + head) * D

    q_smem = gl.allocate_shared_memory(gl.int8, [GROUPS, BLOCK_M, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, D, BLOCK_N], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(turn.index(i), count=1)
    mbarrier.arrive(turn.index(0), count=1)

    descriptors = (q_desc, k_desc, v_desc)
    buffers = (q_smem, k_smem, v_smem)
    barriers = (q_ready, ready, empty, turn)
    scales = pair.to(gl.int64)
    pointers = (q_scale + scales * queries, k_scale + scales * tiles, v_scale + scales * D, out)
    # NaN is above every bound.
    octaves = gl.load(q_norm + scales * gl.num_programs(0) + block) * gl.load(k_norm + pair)
    way = gl.where(octaves <= NEAR, INTEGER, gl.where(octaves <= FAR, FLOORED, EXP2))
    gl.atomic_add(loops + way, 1, sem="relaxed")
    numbers = (first_row, out_place, heads * D, pair, queries, keys, tiles, way)
    gl.warp_specialize(
        [
            (_consume, (descriptors, buffers, barriers, pointers, numbers, D, STAGES, 0)),
            (_consume, (descriptors, buffers, barriers, pointers, numbers, D, STAGES, 1)),
            (_produce, (descriptors, buffers, barriers, pointers, numbers, D, STAGES, 0)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
