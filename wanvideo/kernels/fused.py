"""The elementwise groups of a transformer block as one Triton kernel each, not a pass over memory per operation.

Same arguments and results as the eager forms in `reference.py`; each function has its contract in front. Any address is
right: Triton loads by the alignment it finds. Whether a kernel runs is chosen in `modules/elementwise.py`.
"""

from __future__ import annotations

import torch

from ._common import TRITON, next_power_of_two, on_device_of
from .contract import Contract, Operand, Size
from .rope import Rotation

__all__ = [
    "AFFINE_NORM",
    "GATED_RESIDUAL",
    "MAX_CHANNELS",
    "MAX_ROWS",
    "MODULATED_NORM",
    "QK_NORM_ROPE",
    "RMS_NORM",
    "affine_norm",
    "gated_residual",
    "modulated_norm",
    "qk_norm_rope",
    "rms_norm",
]

DTYPES = (torch.bfloat16, torch.float16)
"""float32 stays eager: there is no rounding to hide another order of sums behind."""

MAX_CHANNELS = 16384
"""A row stays in registers."""

MAX_ROWS = 2**31 - 1

SIZES = {
    "C": Size("there are {} channels", at_least=1, at_most=MAX_CHANNELS),
    "rows": Size("there are {} rows", at_least=1, at_most=MAX_ROWS),
}


def _rows(name: str, shape: str, like_first: bool = False) -> Operand:
    return Operand(name, shape, DTYPES, "contiguous", like_first)


def _modulation(name: str) -> Operand:
    """One float32 row per batch, or one for all."""
    return Operand(name, "1|B 1 C", (torch.float32,), "last_stride_1")


def _weight(name: str) -> Operand:
    return Operand(name, "C", layout="contiguous")


def _batch_stride(m: torch.Tensor) -> int:
    return m.stride(0) if m.shape[0] > 1 else 0


def _launch(kernel: str, x: torch.Tensor, *arguments: object, programs: tuple[int, ...] = (), **constants: int) -> None:
    """Launch a kernel of `_fused_triton` with one program per row of x, times `programs`."""
    from . import _fused_triton as kernels

    channels = x.shape[-1]
    block = next_power_of_two(channels)
    grid = (x.numel() // channels, *programs)
    with on_device_of(x):
        getattr(kernels, kernel)[grid](
            *arguments, C=channels, BLOCK=block, num_warps=min(8, max(1, block // 2048)), **constants
        )


MODULATED_NORM = Contract(
    "modulated_norm", TRITON, (_rows("x", "B L C"), _modulation("shift"), _modulation("scale")), SIZES
)


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    strides = (_batch_stride(scale), _batch_stride(shift))
    _launch("layer_norm", x, x, scale, shift, out, x.shape[1], *strides, eps, ADD_ONE=True)
    return out


AFFINE_NORM = Contract("affine_norm", TRITON, (_rows("x", "... C"), _weight("weight"), _weight("bias")), SIZES)


def affine_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    _launch("layer_norm", x, x, weight, bias, out, x.numel() // x.shape[-1], 0, 0, eps, ADD_ONE=False)
    return out


RMS_NORM = Contract("rms_norm", TRITON, (_rows("x", "... C"), _weight("weight")), SIZES)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    _launch("rms_norm", x, x, weight, out, eps)
    return out


QK_NORM_ROPE = Contract(
    "qk_norm_rope",
    TRITON,
    (
        _rows("q", "B L C"),
        _rows("k", "B L C", like_first=True),
        _weight("q_weight"),
        _weight("k_weight"),
        Operand("cos", "L 1 C/heads/2", (torch.float32,), "contiguous"),
        Operand("sin", "L 1 C/heads/2", (torch.float32,), "contiguous"),
    ),
    SIZES,
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
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    tensors = (q, k, q_weight, k_weight, *rotation, q_out, k_out)
    _launch("qk_norm_rope", q, *tensors, q.shape[1], eps, programs=(2,), HALF=rotation.cos.shape[-1])
    return q_out.unflatten(-1, (num_heads, -1)), k_out.unflatten(-1, (num_heads, -1))


GATED_RESIDUAL = Contract(
    "gated_residual", TRITON, (_rows("x", "B L C"), _rows("branch", "B L C"), _modulation("gate")), SIZES
)


def gated_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    _launch("gated_residual", x, x, branch, gate, out, x.shape[1], _batch_stride(gate))
    return out
