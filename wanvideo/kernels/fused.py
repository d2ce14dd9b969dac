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


def _sizes(x: torch.Tensor) -> dict[str, int]:
    block = next_power_of_two(x.shape[-1])
    return {"C": x.shape[-1], "BLOCK": block, "num_warps": min(8, max(1, block // 2048))}


MODULATED_NORM = Contract(
    "modulated_norm", TRITON, (_rows("x", "B L C"), _modulation("shift"), _modulation("scale")), SIZES
)


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    from . import _fused_triton as kernels

    out = torch.empty_like(x)
    with on_device_of(x):
        kernels.layer_norm[x.numel() // x.shape[-1],](
            x, scale, shift, out, x.shape[1], _batch_stride(scale), _batch_stride(shift), eps, ADD_ONE=True, **_sizes(x)
        )  # fmt: skip
    return out


AFFINE_NORM = Contract("affine_norm", TRITON, (_rows("x", "... C"), _weight("weight"), _weight("bias")), SIZES)


def affine_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    from . import _fused_triton as kernels

    out = torch.empty_like(x)
    rows = x.numel() // x.shape[-1]
    with on_device_of(x):
        kernels.layer_norm[rows,](x, weight, bias, out, rows, 0, 0, eps, ADD_ONE=False, **_sizes(x))
    return out


RMS_NORM = Contract("rms_norm", TRITON, (_rows("x", "... C"), _weight("weight")), SIZES)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    from . import _fused_triton as kernels

    out = torch.empty_like(x)
    with on_device_of(x):
        kernels.rms_norm[x.numel() // x.shape[-1],](x, weight, out, eps, **_sizes(x))
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
    from . import _fused_triton as kernels

    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    batch, length, _ = q.shape
    with on_device_of(q):
        kernels.qk_norm_rope[batch * length, 2](
            q, k, q_weight, k_weight, rotation.cos, rotation.sin, q_out, k_out, length, eps,
            HALF=rotation.cos.shape[-1], **_sizes(q),
        )  # fmt: skip
    return q_out.unflatten(-1, (num_heads, -1)), k_out.unflatten(-1, (num_heads, -1))


GATED_RESIDUAL = Contract(
    "gated_residual", TRITON, (_rows("x", "B L C"), _rows("branch", "B L C"), _modulation("gate")), SIZES
)


def gated_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    from . import _fused_triton as kernels

    out = torch.empty_like(x)
    with on_device_of(x):
        kernels.gated_residual[x.numel() // x.shape[-1],](
            x, branch, gate, out, x.shape[1], _batch_stride(gate), **_sizes(x)
        )
    return out
