"""The elementwise groups of a transformer block, each as one function (and the two norms that carry weights).

Each group has two forms with the same arguments: the eager one in `kernels/reference.py`, and a Triton kernel in
`kernels/fused.py`. Both compute in float32, round once to the dtype of their first argument, and write to none of their
arguments. The kernel runs where its contract and the self-test allow it; the eager form elsewhere, in graphs compiled
for a CPU (which fuse it) and under autograd. `kernels.selftest.eager_reasons` says why. docs/kernels.md has times and
errors.

Where all linear layers that read a result would quantize it (`rows`), it is given to them quantized per row: once, and
without being rounded to x's dtype before.

comfy-kitchen's `adaln` is no form of ours: it reads scale and shift in x's dtype whatever theirs is, so that the
float32 modulation of a bf16 model gives numbers of 1e29 without an error. `python -m benchmarks.fused` times it on a
rounded copy.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import fused, reference
from ..kernels.contract import Contract
from ..kernels.linear import Activations, QuantizedRows
from ..kernels.opaque import opaque_in_graphs
from ..kernels.rope import Rotation
from ..kernels.selftest import eager_reasons

__all__ = [
    "AffineNorm",
    "RMSNorm",
    "add",
    "add_affine_norm",
    "add_modulated_norm",
    "affine_norm",
    "gated_residual",
    "gelu",
    "modulated_norm",
    "qk_norm_rope",
    "rms_norm",
]


def _form(contract: Contract, tensors: tuple[torch.Tensor | None, ...], rows: bool = False, **given: Any) -> ModuleType:
    """The module whose function of the group computes the call."""
    needs = fused.quantizing(contract) if rows else contract
    return reference if eager_reasons(needs, tensors, **given) else fused


@opaque_in_graphs("rows if asked")
def modulated_norm(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, rows: bool = False
) -> Activations:
    """LayerNorm without weights, then `* (1 + scale) + shift` (adaLN, arXiv 2212.09748, section 3.2).

    Args:
        x: [B, L, C].
        shift, scale: [B, 1, C] float32.
        eps: added to the variance.
        rows: quantize the result per row.
    """
    form = _form(fused.MODULATED_NORM, (x, shift, scale), rows)
    normed: Activations = form.modulated_norm(x, shift, scale, eps, rows)
    return normed


@opaque_in_graphs("rows if asked")
def affine_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, rows: bool = False
) -> Activations:
    """LayerNorm over the last axis with weight and bias [C] of any float dtype. x [..., C]."""
    normed: Activations = _form(fused.AFFINE_NORM, (x, weight, bias), rows).affine_norm(x, weight, bias, eps, rows)
    return normed


@opaque_in_graphs("tensor", "rows if asked")
def add_modulated_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | float,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    rows: bool = False,
) -> tuple[torch.Tensor, Activations]:
    """x + gate * branch, rounded to x's dtype, and its `modulated_norm`.

    Args:
        x, branch: [B, L, C].
        gate: [B, 1, C] float32, or a number.
    """
    tensors = (x, branch, gate if isinstance(gate, torch.Tensor) else None, shift, scale)
    form = _form(fused.ADD_MODULATED_NORM, tensors, rows)
    both: tuple[torch.Tensor, Activations] = form.add_modulated_norm(x, branch, gate, shift, scale, eps, rows)
    return both


@opaque_in_graphs("tensor", "rows if asked")
def add_affine_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    rows: bool = False,
) -> tuple[torch.Tensor, Activations]:
    """x + gate * branch, rounded to x's dtype, and its `affine_norm`; arguments as of `add_modulated_norm`."""
    tensors = (x, branch, gate if isinstance(gate, torch.Tensor) else None, weight, bias)
    form = _form(fused.ADD_AFFINE_NORM, tensors, rows)
    both: tuple[torch.Tensor, Activations] = form.add_affine_norm(x, branch, gate, weight, bias, eps, rows)
    return both


def add(x: torch.Tensor, y: torch.Tensor, rows: bool = False) -> Activations:
    """x + y, both [..., C]."""
    return add_rows(x, y) if rows else x + y


@opaque_in_graphs("rows")
def add_rows(x: torch.Tensor, y: torch.Tensor) -> QuantizedRows:
    rows: QuantizedRows = _form(fused.ADD_ROWS, (x, y)).add_rows(x, y)
    return rows


def gelu(x: torch.Tensor, rows: bool = False) -> Activations:
    """GELU by tanh (arXiv 1606.08415). x [..., C]."""
    return gelu_rows(x) if rows else F.gelu(x, approximate="tanh")


@opaque_in_graphs("rows")
def gelu_rows(x: torch.Tensor) -> QuantizedRows:
    rows: QuantizedRows = _form(fused.GELU_ROWS, (x,)).gelu_rows(x)
    return rows


@opaque_in_graphs("tensor")
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467). x [..., C], weight [C]."""
    normed: torch.Tensor = _form(fused.RMS_NORM, (x, weight)).rms_norm(x, weight, eps)
    return normed


@opaque_in_graphs("tensor", "tensor")
def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rotation: Rotation,
    num_heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm of q and k over all channels together, split into heads, rotary embedding.

    Args:
        q, k: [B, L, C].
        q_weight, k_weight: [C].
        rotation: cos and sin, each [L, 1, D/2] with D = C / num_heads.

    Returns:
        q and k, each [B, L, H, D], contiguous.
    """
    form = _form(fused.QK_NORM_ROPE, (q, k, q_weight, k_weight, *rotation), heads=num_heads)
    both: tuple[torch.Tensor, torch.Tensor] = form.qk_norm_rope(q, k, q_weight, k_weight, rotation, num_heads, eps)
    return both


@opaque_in_graphs("tensor")
def gated_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + gate * branch. x, branch [B, L, C]; gate [B, 1, C] float32 (the sum is promoted to it)."""
    total: torch.Tensor = _form(fused.GATED_RESIDUAL, (x, branch, gate)).gated_residual(x, branch, gate)
    return total


class AffineNorm(nn.LayerNorm):
    """LayerNorm with weight and bias, computed in float32 whatever their dtype. [..., C] -> [..., C]"""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        normed = affine_norm(input, self.weight, self.bias, self.eps)
        assert isinstance(normed, torch.Tensor)  # no rows were asked for
        return normed


class RMSNorm(nn.Module):
    """RMS norm with a weight, computed in float32 whatever its dtype. [..., C] -> [..., C]"""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
