"""The elementwise groups of a transformer block as one Triton kernel each, not a pass over memory per operation.

Same arguments and results as the eager forms in `reference.py`; each function has its contract in front. Any address is
right: Triton loads by the alignment it finds. Whether a kernel runs is chosen in `modules/elementwise.py`. With `rows`
the result is quantized per row for an fp8 matmul; `quantizing` gives the contract of that.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from ._common import MAX_CHANNELS, MAX_ROWS, TRITON, next_power_of_two, on_device_of
from .contract import Contract, Operand, Size
from .linear import FP8, Activations, QuantizedRows, empty_rows, rounds_first
from .rope import Rotation

__all__ = [
    "ADD_AFFINE_NORM",
    "ADD_MODULATED_NORM",
    "ADD_ROWS",
    "AFFINE_NORM",
    "GATED_RESIDUAL",
    "GELU_ROWS",
    "MODULATED_NORM",
    "QK_NORM_ROPE",
    "RMS_NORM",
    "add_affine_norm",
    "add_modulated_norm",
    "add_rows",
    "affine_norm",
    "gated_residual",
    "gelu_rows",
    "modulated_norm",
    "qk_norm_rope",
    "quantizing",
    "rms_norm",
]

DTYPES = (torch.bfloat16, torch.float16)
"""float32 stays eager: there is no rounding to hide another order of sums behind."""

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


def _launch(
    kernel: str,
    x: torch.Tensor,
    *arguments: object,
    programs: tuple[int, ...] = (),
    per_warp: int = 2048,
    **constants: int,
) -> None:
    """Launch a kernel of `_fused_triton` with one program per row of x, times `programs`; a warp per `per_warp`
    channels, at most 16."""
    from . import _fused_triton as kernels

    channels = x.shape[-1]
    block = next_power_of_two(channels)
    grid = (x.numel() // channels, *programs)
    with on_device_of(x):
        getattr(kernels, kernel)[grid](
            *arguments, C=channels, BLOCK=block, num_warps=min(16, max(1, block // per_warp)), **constants
        )


@functools.cache
def quantizing(contract: Contract) -> Contract:
    """The contract of the same group where its result is quantized per row."""
    return dataclasses.replace(contract, device=FP8)


def _result(x: torch.Tensor, rows: bool) -> tuple[Activations, torch.Tensor, torch.Tensor]:
    """An empty result like x; and its two tensors, of which the second is not written without `rows`."""
    if not rows:
        out = torch.empty_like(x)
        return out, out, out
    quantized = empty_rows(x.shape, x.device)
    return quantized, *quantized


def _layer_norm(
    x: torch.Tensor,
    factor: torch.Tensor,
    offset: torch.Tensor,
    eps: float,
    rows: bool,
    branch: torch.Tensor | None = None,
    gate: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, Activations]:
    """x + branch * gate, or x without a branch; and its norm. `factor` is a weight [C], or modulation [B, 1, C]."""
    modulated, gated = factor.ndim == 3, isinstance(gate, torch.Tensor)
    out, values, scale = _result(x, rows)
    sums = x if branch is None else torch.empty_like(x)
    _launch(
        "layer_norm", x, x, x if branch is None else branch, gate if gated else x, sums, factor, offset, values, scale,
        x.shape[1] if modulated or gated else x.numel() // x.shape[-1],
        _batch_stride(gate) if isinstance(gate, torch.Tensor) else 0,
        *((_batch_stride(factor), _batch_stride(offset)) if modulated else (0, 0)),
        0.0 if isinstance(gate, torch.Tensor) else float(gate), eps,
        ADD_ONE=modulated, ADDED=branch is not None, GATED=gated, ROWS=rows, ROUND=rows and rounds_first(x.device),
    )  # fmt: skip
    return sums, out


MODULATED_NORM = Contract(
    "modulated_norm", TRITON, (_rows("x", "B L C"), _modulation("shift"), _modulation("scale")), SIZES
)


def modulated_norm(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, rows: bool = False
) -> Activations:
    return _layer_norm(x, scale, shift, eps, rows)[1]


AFFINE_NORM = Contract("affine_norm", TRITON, (_rows("x", "... C"), _weight("weight"), _weight("bias")), SIZES)


def affine_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, rows: bool = False
) -> Activations:
    return _layer_norm(x, weight, bias, eps, rows)[1]


def _summands(gate: Operand) -> tuple[Operand, ...]:
    return _rows("x", "B L C"), _rows("branch", "B L C", like_first=True), gate


_GATE = Operand("gate", "1|B 1 C", (torch.float32,), "last_stride_1", optional=True)
"""None where the gate is a number."""

ADD_MODULATED_NORM = Contract(
    "add_modulated_norm", TRITON, (*_summands(_GATE), _modulation("shift"), _modulation("scale")), SIZES
)


def add_modulated_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | float,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    rows: bool = False,
) -> tuple[torch.Tensor, Activations]:
    return _layer_norm(x, scale, shift, eps, rows, branch, gate)


ADD_AFFINE_NORM = Contract("add_affine_norm", TRITON, (*_summands(_GATE), _weight("weight"), _weight("bias")), SIZES)


def add_affine_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    rows: bool = False,
) -> tuple[torch.Tensor, Activations]:
    return _layer_norm(x, weight, bias, eps, rows, branch, gate)


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


ADD_ROWS = Contract("add_rows", FP8, (_rows("x", "... C"), _rows("y", "... C", like_first=True)), SIZES)


def add_rows(x: torch.Tensor, y: torch.Tensor) -> QuantizedRows:
    out = empty_rows(x.shape, x.device)
    _launch("add_rows", x, x, y, *out, ROUND=rounds_first(x.device))
    return out


GELU_ROWS = Contract("gelu_rows", FP8, (_rows("x", "... C"),), SIZES)


def gelu_rows(x: torch.Tensor) -> QuantizedRows:
    out = empty_rows(x.shape, x.device)
    _launch("gelu_rows", x, x, *out, per_warp=1024, ROUND=rounds_first(x.device))
    return out
