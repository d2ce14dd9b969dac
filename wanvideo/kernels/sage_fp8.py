"""8-bit attention: int8 Q·Kᵀ with smoothed K, e4m3 P·V, on any NVIDIA GPU with bf16.

The scheme is that of SageAttention 2 (arXiv 2411.10958): the mean of K over the tokens is subtracted (a shift that the
softmax does not see), Q and K become int8, P = exp(S - max) and V become e4m3, and P·V is summed in a fresh accumulator
per tile of keys that is added in float32 (two levels), because Hopper sums 8-bit products in about 14 bits.
Scales: Q one per row, K one per 128 keys, V one per channel, P the constant 448.

Who reads the operands: on sm_90 a Gluon kernel, elsewhere from sm_89 a Triton kernel with the same numerics, and below
sm_89, which lacks e4m3, the same Triton kernel with P and V in 16 bits (nearer to the exact result).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from ._common import (
    MAX_RUNS,
    launch,
    next_power_of_two,
    opaque,
    runs_of,
    stride_unit,
    stride_units,
)
from .contract import Size
from .inputs import scale_or_default
from .packages import triton_version

__all__ = ["HEAD_DIM", "run", "sage_fp8_attention"]

HEAD_DIM = Size("head_dim is {}", values=(64, 96, 128))

KEYS_PER_SCALE = 128

E4M3_CAPABILITY = (8, 9)
HOPPER_CAPABILITY = (9, 0)
HOPPER_HEAD_DIMS = (64, 128)
HOPPER_TRITON = ((3, 6), (3, 10))
"""From, and below: the versions whose Gluon the Hopper kernel has been compiled with. Others run the Triton kernel."""
HOPPER_ROWS = 64
HOPPER_STAGES = 4

LOOPS = ("integer", "integer with a floor", "exp2")
"""How the Hopper kernel computes the weights of a block of 128 queries, by the bound of its scores."""

LARGE_SHARED_MEMORY = ((9, 0), (10, 0), (10, 3))
"""Capabilities with 227 KiB of shared memory per block; the rest have 99."""


def sage_fp8_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None = None
) -> torch.Tensor:
    """Attention softmax(scale * q·kᵀ)·v in 8-bit arithmetic, without mask.

    Args:
        q: [B, Lq, H, D], bf16, fp16 or fp32, D of `HEAD_DIM`. Read by its strides when its start and strides are
            multiples of 16 bytes and the last stride is 1 (`layout.aligned_strided`); else it is copied once.
        k, v: [B, Lk, H, D], like q. Nothing writes to q, k or v.
        softmax_scale: D ** -0.5 when None.

    Returns:
        [B, Lq, H, D] contiguous, of q's dtype. NaN or infinity in an input makes what depends on it NaN.

    Raises: what `_common.launch` does.
    """
    out: torch.Tensor = _operation(q, k, v, scale_or_default(softmax_scale, q.shape[-1]))
    return out


@dataclass(frozen=True)
class Operands:
    """What the attention kernels multiply. Without e4m3, `v` is the caller's V and `v_scale` is not read."""

    q: torch.Tensor
    """int8 [B, H, Lq, D]."""
    q_scale: torch.Tensor
    """float32 [B, H, Lq], softmax scale and log2(e) folded in."""
    q_norm: torch.Tensor
    """float32 [B, H, ceil(Lq / 128)], the largest norm of a row of Q with its scale. NaN where Q is not finite."""
    k: torch.Tensor
    """int8 [B, H, Lk, D], of K less its mean over the tokens."""
    k_scale: torch.Tensor
    """float32 [B, H, ceil(Lk / 128)]."""
    k_norm: torch.Tensor
    """float32 [B, H], the largest norm of a key with its scale; times `q_norm` a bound of |score|, in octaves."""
    v: torch.Tensor
    """e4m3 [B, H, D, Lk padded to 128], keys in the order of `key_in_place`; or V [B, Lk, H, D] as it came."""
    v_scale: torch.Tensor
    """float32 [B, H, D]."""
    e4m3_v: bool


def quantize(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, e4m3_v: bool = True) -> Operands:
    """The 8-bit operands of q, k, v [B, L, H, D], which are read by their strides: K and V twice, Q once."""
    from . import _sage_fp8_quantize as triton_kernels

    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    block = KEYS_PER_SCALE
    q_blocks, k_blocks = math.ceil(queries / block), math.ceil(keys / block)
    run, runs = runs_of(keys)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    k_sums, v_peaks = empty(batch, heads, runs, dim), empty(batch, heads, runs, dim)
    k_mean = empty(batch, heads, dim)
    result = Operands(
        q=empty(batch, heads, queries, dim, dtype=torch.int8),
        q_scale=empty(batch, heads, queries),
        q_norm=empty(batch, heads, q_blocks),
        k=empty(batch, heads, keys, dim, dtype=torch.int8),
        k_scale=empty(batch, heads, k_blocks),
        k_norm=empty(batch, heads),
        v=empty(batch, heads, dim, k_blocks * block, dtype=torch.float8_e4m3fn) if e4m3_v else v,
        v_scale=empty(batch, heads, dim),
        e4m3_v=e4m3_v,
    )
    constants = {"D": dim, "D_POW2": next_power_of_two(dim)}
    unit = stride_unit(q)
    triton_kernels.key_value_statistics[runs, heads, batch](
        k, v, k_sums, v_peaks, *stride_units(k), *stride_units(v), keys, heads, run, BLOCK=32, UNIT=unit, **constants
    )  # fmt: skip
    triton_kernels.finish_statistics[batch * heads,](
        k_sums, v_peaks, k_mean, result.k_norm.view(torch.int32), result.v_scale, keys, runs, RUNS=MAX_RUNS, **constants
    )  # fmt: skip
    triton_kernels.quantize_qkv[q_blocks + (2 if e4m3_v else 1) * k_blocks, heads, batch](
        q, k, v, k_mean, result.v_scale,
        result.q, result.q_scale, result.q_norm,
        result.k, result.k_scale, result.k_norm.view(torch.int32), result.v,
        *stride_units(q), *stride_units(k), *stride_units(v),
        queries, keys, heads, softmax_scale * math.log2(math.e),
        BLOCK=block, E4M3_V=e4m3_v, UNIT=unit, **constants, num_warps=8,
    )  # fmt: skip
    return result


def attend_portable(operands: Operands, out: torch.Tensor) -> None:
    """Fill out [B, Lq, H, D] by the Triton kernel."""
    from . import _sage_fp8_triton as triton_kernels

    batch, queries, heads, dim = out.shape
    rows = 128
    large = torch.cuda.is_available() and torch.cuda.get_device_capability(out.device) in LARGE_SHARED_MEMORY
    triton_kernels.attend[math.ceil(queries / rows), heads, batch](
        operands.q, operands.q_scale, operands.k, operands.k_scale, operands.v, operands.v_scale, out,
        *(stride_units(operands.v) if not operands.e4m3_v else (0, 0, 0)), queries, operands.k.shape[2], heads,
        D=dim, D_POW2=next_power_of_two(dim), BLOCK_M=rows, BLOCK_N=KEYS_PER_SCALE if large else 64,
        KEYS_PER_SCALE=KEYS_PER_SCALE, E4M3_V=operands.e4m3_v, UNIT=stride_unit(operands.v),
        num_warps=8, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip


def attend_hopper(operands: Operands, out: torch.Tensor) -> None:
    """Fill out [B, Lq, H, D] by the Gluon kernel for sm_90; V in e4m3, D of `HOPPER_HEAD_DIMS`."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from . import _sage_fp8_hopper as gluon_kernels

    batch, queries, heads, dim = out.shape

    def descriptor(x: torch.Tensor, block: list[int], element: object) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(block, element)
        return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), block, layout)

    gluon_kernels.attend[math.ceil(queries / (2 * HOPPER_ROWS)), heads, batch](
        descriptor(operands.q, [HOPPER_ROWS, dim], gl.int8),
        descriptor(operands.k, [KEYS_PER_SCALE, dim], gl.int8),
        descriptor(operands.v, [dim, KEYS_PER_SCALE], gl.float8e4nv),
        operands.q_scale, operands.q_norm, operands.k_scale, operands.k_norm, operands.v_scale, out,
        _counts_of_loops(out.device), queries, operands.k.shape[2], heads,
        # 168 registers are what 65,536 leave to each of 12 warps at the launch; the partitions share them out anew.
        D=dim, STAGES=HOPPER_STAGES, num_warps=4, maxnreg=168, enable_fp_fusion=True,
    )  # fmt: skip


_loop_counts: dict[torch.device, torch.Tensor] = {}


def _counts_of_loops(device: torch.device) -> torch.Tensor:
    if device not in _loop_counts:
        _loop_counts[device] = torch.zeros(len(LOOPS), dtype=torch.int64, device=device)
    return _loop_counts[device]


def loops_taken() -> Counter[str]:
    """How many blocks of queries computed their weights in each way of `LOOPS`, on all GPUs since the process began.

    Waits for the GPUs that have such counts.
    """
    taken: Counter[str] = Counter()
    for counts in _loop_counts.values():
        taken.update(dict(zip(LOOPS, counts.tolist(), strict=True)))
    return taken


def runs_on_hopper(device: torch.device, head_dim: int) -> bool:
    """Whether the Gluon kernel computes attention of this head size on `device`, and not the Triton one."""
    oldest, too_new = HOPPER_TRITON
    return (
        torch.cuda.get_device_capability(device) == HOPPER_CAPABILITY
        and head_dim in HOPPER_HEAD_DIMS
        and oldest <= triton_version() < too_new
    )


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float) -> torch.Tensor:
    """Quantize and attend, on inputs that meet the contract and whose device is the current one."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    has_e4m3 = torch.cuda.get_device_capability(q.device) >= E4M3_CAPABILITY
    operands = quantize(q, k, v, softmax_scale, e4m3_v=has_e4m3)
    if runs_on_hopper(q.device, q.shape[-1]):
        attend_hopper(operands, out)
    else:
        attend_portable(operands, out)
    return out


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float) -> torch.Tensor:
    return launch(run, HEAD_DIM, q, k, v, softmax_scale)


_operation = opaque("sage_fp8_attention", _attention)
