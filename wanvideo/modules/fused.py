"""The elementwise groups of a transformer block, each as one function (and the two norms that carry weights).

These are the eager forms, and the reference of every fused kernel that takes their place. All of them compute in
float32, round once to the dtype of their first argument, and write to none of their arguments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .rope import Rotation, rotate

__all__ = [
    "AffineNorm",
    "GeluTanh",
    "RMSNorm",
    "affine_norm",
    "gated_residual",
    "gelu_tanh",
    "modulated_norm",
    "qk_norm_rope",
    "rms_norm",
]


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm without weights, then `* (1 + scale) + shift` (adaLN, arXiv 2212.09748, section 3.2).

    Args:
        x: [B, L, C].
        shift, scale: [B, 1, C] float32.
        eps: added to the variance.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def affine_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over the last axis with weight and bias [C] of any float dtype. x [..., C]."""
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467). x [..., C], weight [C]."""
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
    """RMS norm of q and k over all channels together, split into heads, rotary embedding.

    Args:
        q, k: [B, L, C].
        q_weight, k_weight: [C].
        rotation: cos and sin, each [L, 1, D/2] with D = C / num_heads.

    Returns:
        q and k, each [B, L, H, D], contiguous.
    """

    def one(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        heads = _rms_norm_float(x, weight, eps).unflatten(-1, (num_heads, -1))
        return rotate(heads, rotation).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def gated_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + gate * branch. x, branch [B, L, C]; gate [B, 1, C] float32 (the sum is promoted to it)."""
    return torch.addcmul(x, branch, gate).to(x.dtype)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation (arXiv 1606.08415, section 2)."""
    return F.gelu(x, approximate="tanh")


def _rms_norm_float(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


class AffineNorm(nn.LayerNorm):
    """LayerNorm with weight and bias, computed in float32 whatever their dtype. [..., C] -> [..., C]"""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return affine_norm(input, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """RMS norm with a weight, computed in float32 whatever its dtype. [..., C] -> [..., C]"""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class GeluTanh(nn.Module):
    """`gelu_tanh` as a layer of a Sequential."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu_tanh(x)
