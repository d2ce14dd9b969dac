"""Calls of the elementwise groups, with values that are hard to sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from wanvideo_infinitetalk.wanvideo.modules.rope import Rotation

KINDS = ("normal", "outlier channels", "large mean", "large", "constant rows", "zeros")

EPS = 1e-6


def _rows(shape: tuple[int, ...], kind: str, device: torch.device) -> Tensor:
    x = torch.randn(shape, device=device)
    if kind == "outlier channels":
        x[..., ::17] *= 100
    elif kind == "large mean":
        x += 30
    elif kind == "large":
        x *= 1e3
    elif kind == "constant rows":
        x = x[..., :1].expand(shape).clone()
    elif kind == "zeros":
        x = torch.zeros(shape, device=device)
    return x


def calls(
    batch: int, length: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, kind: str
) -> dict[str, tuple[Any, ...]]:
    """group -> arguments, laid out as the model gives them (modulation as slices of one tensor)."""
    width = heads * head_dim
    x, y = (_rows((batch, length, width), kind, device).to(dtype) for _ in range(2))
    angles = 6.3 * torch.rand(length, 1, head_dim // 2, device=device)
    rotation = Rotation(angles.cos(), angles.sin())
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    shift, scale, gate = torch.randn(batch, 6, width, device=device).split(1, dim=1)[:3]
    return {
        "modulated_norm": (x, shift, scale, EPS),
        "affine_norm": (x, weight, bias, EPS),
        "rms_norm": (x, weight, EPS),
        "qk_norm_rope": (x, y, weight, bias, rotation, heads, EPS),
        "gated_residual": (x, y, gate),
    }
