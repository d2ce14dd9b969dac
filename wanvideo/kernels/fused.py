"""The elementwise groups of a transformer block as one Triton kernel each, not a pass over memory per operation.

Same arguments and results as the eager forms in `modules/fused.py`; each function has a predicate beside it that says
from host data alone whether the kernel serves a call. Any address is right: Triton loads by the alignment it finds.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ._common import next_power_of_two, on_device_of, triton_reasons
from .rope import Rotation
from .selftest import disagreements

__all__ = ["MAX_CHANNELS", "unavailable_reasons"]

DTYPES = (torch.bfloat16, torch.float16)
"""float32 stays eager: there is no rounding to hide another order of sums behind."""

MAX_CHANNELS = 16384
"""A row stays in registers."""

MAX_ROWS = 2**31 - 1


SUITE_RAN_ON = ((9, 0),)
"""Compute capabilities on which tests/cuda has passed. On others the kernels are compared with PyTorch first."""


@lru_cache(maxsize=16)
def _installation_reasons(device: torch.device) -> tuple[str, ...]:
    return tuple(triton_reasons(device))


@lru_cache(maxsize=16)
def _suite_ran_on(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) in SUITE_RAN_ON


def unavailable_reasons(device: torch.device) -> tuple[str, ...]:
    """All the reasons why these kernels cannot run on `device`; empty when they can. Kept after the first question."""
    reasons = _installation_reasons(device)
    if reasons or _suite_ran_on(device):
        return reasons
    if torch.cuda.is_current_stream_capturing():
        return ("they were not tried on this GPU before a CUDA graph was captured",)  # a comparison waits for the GPU
    return disagreements(device)


def _rows_fit(x: torch.Tensor) -> bool:
    return (
        x.is_cuda
        and x.dtype in DTYPES
        and x.is_contiguous()
        and 0 < x.shape[-1] <= MAX_CHANNELS
        and 0 < x.numel() // x.shape[-1] <= MAX_ROWS
        and not unavailable_reasons(x.device)
    )


def _modulation_fits(m: torch.Tensor, x: torch.Tensor) -> bool:
    """One float32 row [B, 1, C] (or [1, 1, C]) per batch of x [B, L, C]."""
    return (
        m.dtype == torch.float32
        and m.ndim == x.ndim == 3
        and m.shape[0] in (1, x.shape[0])
        and m.shape[1:] == (1, x.shape[2])
        and m.stride(2) == 1
        and m.device == x.device
    )


def _weight_fits(weight: torch.Tensor, x: torch.Tensor) -> bool:
    return weight.shape == x.shape[-1:] and weight.is_contiguous() and weight.device == x.device


def _batch_stride(m: torch.Tensor) -> int:
    return m.stride(0) if m.shape[0] > 1 else 0


def _sizes(x: torch.Tensor) -> dict[str, int]:
    block = next_power_of_two(x.shape[-1])
    return {"C": x.shape[-1], "BLOCK": block, "num_warps": min(8, max(1, block // 2048))}


def serves_modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> bool:
    return _rows_fit(x) and _modulation_fits(shift, x) and _modulation_fits(scale, x)


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    from . import _fused_triton as kernels

    out = torch.empty_like(x)
    with on_device_of(x):
        kernels.layer_norm[x.numel() // x.shape[-1],](
            x, scale, shift, out, x.shape[1], _batch_stride(scale), _batch_stride(shift), eps, ADD_ONE=True, **_sizes(x)
        )  # fmt: skip
    return out


def serves_affine_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> bool:
    return _rows_fit(x) and _weight_fits(weight, x) and _weight_fits(bias, x)


def affine_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    from . import _fused_triton as kernels

    out = torch.empty_like(x)
    rows = x.numel() // x.shape[-1]
    with on_device_of(x):
        kernels.layer_norm[rows,](x, weight, bias, out, rows, 0, 0, eps, ADD_ONE=False, **_sizes(x))
    return out


def serves_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> bool:
    return _rows_fit(x) and _weight_fits(weight, x)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    from . import _fused_triton as kernels

    out = torch.empty_like(x)
    with on_device_of(x):
        kernels.rms_norm[x.numel() // x.shape[-1],](x, weight, out, eps, **_sizes(x))
    return out


def serves_qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rotation: Rotation,
    num_heads: int,
    eps: float,
) -> bool:
    if not (q.ndim == 3 and q.shape == k.shape and q.dtype == k.dtype and q.device == k.device):
        return False
    angles = (q.shape[1], 1, q.shape[2] // num_heads // 2)
    return (
        _rows_fit(q)
        and _rows_fit(k)
        and _weight_fits(q_weight, q)
        and _weight_fits(k_weight, k)
        and q.shape[2] % (2 * num_heads) == 0
        and all(
            t.dtype == torch.float32 and t.shape == angles and t.is_contiguous() and t.device == q.device
            for t in rotation
        )
    )


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rotation: Rotation,
    num_heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    from . import _fused_triton as kernels

    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    batch, length, _ = q.shape
    with on_device_of(q):
        kernels.qk_norm_rope[batch * length, 2](
            q, k, q_weight, k_weight, rotation.cos, rotation.sin, q_out, k_out, length, eps,
            HALF=rotation.cos.shape[-1], **_sizes(q),
        )  # fmt: skip
    return q_out.unflatten(-1, (num_heads, -1)), k_out.unflatten(-1, (num_heads, -1))


def serves_gated_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> bool:
    return (
        _rows_fit(x)
        and branch.shape == x.shape
        and branch.dtype in DTYPES
        and branch.is_contiguous()
        and branch.device == x.device
        and _modulation_fits(gate, x)
    )


def gated_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    from . import _fused_triton as kernels

    out = torch.empty_like(x)
    with on_device_of(x):
        kernels.gated_residual[x.numel() // x.shape[-1],](
            x, branch, gate, out, x.shape[1], _batch_stride(gate), **_sizes(x)
        )
    return out
