"""The reference of the elementwise and linear kernels: the same arguments and results in eager PyTorch.

All compute in float32, round once to the dtype of their first argument, and write to none of their arguments; with
`rows` the result is quantized per row instead. They run where a kernel cannot, in a compiled graph (which fuses them
itself) and under autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .linear import Activations, QuantizedRows
from .rope import Rotation, rotate

__all__ = [
    "add_affine_norm",
    "add_modulated_norm",
    "add_rows",
    "affine_norm",
    "gated_residual",
    "gelu_rows",
    "modulated_norm",
    "qk_norm_rope",
    "quantize_rows",
    "rms_norm",
    "scale_product",
]


def _result(exact: torch.Tensor, dtype: torch.dtype, rows: bool) -> Activations:
    return quantize_rows(exact) if rows else exact.to(dtype)


def modulated_norm(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, rows: bool = False
) -> Activations:
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return _result(torch.addcmul(shift, normed, 1 + scale), x.dtype, rows)


def affine_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, rows: bool = False
) -> Activations:
    normed = F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
    return _result(normed, x.dtype, rows)


def _sum_with(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | float) -> torch.Tensor:
    if isinstance(gate, torch.Tensor):
        return gated_residual(x, branch, gate)
    # On a CPU torch.add would round `alpha` to x's dtype.
    return x + branch if gate == 1 else torch.add(x.float(), branch.float(), alpha=gate).to(x.dtype)


def add_modulated_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | float,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    rows: bool = False,
) -> tuple[torch.Tensor, Activations]:
    sums = _sum_with(x, branch, gate)
    return sums, modulated_norm(sums, shift, scale, eps, rows)


def add_affine_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    rows: bool = False,
) -> tuple[torch.Tensor, Activations]:
    sums = _sum_with(x, branch, gate)
    return sums, affine_norm(sums, weight, bias, eps, rows)


def _rms_norm_float(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _rms_norm_float(x, weight, eps).to(x.dtype)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rotation: Rotation,
    num_heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    def one(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        heads = _rms_norm_float(x, weight, eps).unflatten(-1, (num_heads, -1))
        return rotate(heads, rotation).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def gated_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x, branch, gate).to(x.dtype)


def add_rows(x: torch.Tensor, y: torch.Tensor) -> QuantizedRows:
    return quantize_rows(x.float() + y.float())


def gelu_rows(x: torch.Tensor) -> QuantizedRows:
    return quantize_rows(F.gelu(x.float(), approximate="tanh"))


def quantize_rows(x: torch.Tensor) -> QuantizedRows:
    largest_value = torch.finfo(torch.float8_e4m3fn).max
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    # The lower bound keeps a row of zeros from dividing by zero; clamp_min passes NaN on.
    scale = (largest / largest_value).clamp_min(torch.finfo(torch.float32).tiny)
    values = (x / scale).clamp(-largest_value, largest_value)
    return QuantizedRows(values.to(torch.float8_e4m3fn), scale)


def scale_product(
    product: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    product = product * (rows * columns)
    return (product if bias is None else product + bias.float()).to(dtype)


def _sum(y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    total = y.float()
    if bias is not None:
        total = total + bias.float()
    if residual is not None:
        total = total + residual.float()
    return total.to(y.dtype)


def pad_frames(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gamma: torch.Tensor | None,
    history: torch.Tensor | None,
    kept: int,
    before: int,
    after: int,
    keep_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The padded input of a causal convolution: s = y + bias + residual, then SiLU(s / |s| * sqrt(C) * gamma).

    Args:
        y: [B, T, H, W, C], frames with channels last. bias: [C]. residual: like y.
        gamma: [C]; None leaves out norm and SiLU.
        history: [B, kept, H, W, C], the frames before; None for zeros.
        kept: frames of history that the convolution reads.
        before, after: rows and columns of zeros above and left, below and right.
        keep_sum: whether s is returned.

    Returns:
        the padded frames [B, kept + T, H + before + after, W + before + after, C]; s [B, T, H, W, C] or None; the
        history for the next call, or None where `kept` is 0.
    """
    sums = _sum(y, bias, residual)
    values = sums
    if gamma is not None:
        exact = sums.float()
        normed = F.normalize(exact, dim=-1) * (y.shape[-1] ** 0.5) * gamma.float()
        values = F.silu(normed).to(y.dtype)
    new_history = None
    if kept:
        past = values.new_zeros(values.shape[0], kept, *values.shape[2:]) if history is None else history
        values = torch.cat((past, values), dim=1)
        new_history = values[:, -kept:].clone()
    return F.pad(values, (0, 0, before, after, before, after)), sums if keep_sum else None, new_history


def upsample_frames(
    y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, split: int
) -> torch.Tensor:
    """s = y + bias + residual, every pixel four times, and a border of zeros one pixel wide.

    Args:
        y: [B, T, H, W, split * C]; the j-th group of C channels becomes frame split * t + j.

    Returns:
        [B, split * T, 2 H + 2, 2 W + 2, C]
    """
    sums = _sum(y, bias, residual)
    sums = sums.unflatten(-1, (split, -1)).movedim(-2, 2).flatten(1, 2)
    large = sums.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return F.pad(large, (0, 0, 1, 1, 1, 1))
