"""comfy-kitchen's int8 attention: int8 Q, K, V and P with float32 softmax, from a plain pip install."""

from __future__ import annotations

import torch

from ...kernels.reference import scale_or_default
from . import packages
from .contract import Contract, Shape, repaired_mask
from .registry import Backend, register

__all__ = ["KITCHEN_INT8"]


def _workspace(shape: Shape) -> int:
    """Bytes of its int8 copies of Q, K and V; scales are small beside them."""
    dim = next((d for d in (64, 128, 256) if shape.head_dim <= d), shape.head_dim)
    return shape.batch * shape.heads * dim * (shape.q_length + 2 * shape.kv_length)


CONTRACT = Contract(
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    layout="aligned_strided",
    order="BHLD",
    max_head_dim=256,
    head_dim_multiple=8,
    expanded=False,
    masks=True,
    min_capability=(7, 5),
    workspace=_workspace,
    package="comfy-kitchen",
    versions=">=0.2.30,<1",
    module="comfy_kitchen",
    entry_points=("int8_attention", "int8_attention_is_available"),
)


def run_kitchen_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """`comfy_kitchen.int8_attention` on [B, H, L, D]."""
    mask = None if attn_mask is None else repaired_mask(CONTRACT, attn_mask, q.dtype)
    scale = scale_or_default(softmax_scale, q.shape[-1])
    return packages.load("comfy_kitchen").int8_attention(q, k, v, scale=scale, attn_mask=mask)


def _unavailable(device: torch.device) -> list[str]:
    if device.type != "cuda" or packages.installed_version("comfy-kitchen") is None:
        return []  # the contract says so already
    available = getattr(packages.load("comfy_kitchen"), "int8_attention_is_available", None)
    if available is not None and not available(device):
        return ["comfy-kitchen's compiled kernels do not load here"]
    return []


KITCHEN_INT8 = register(Backend("comfy_kitchen_int8", CONTRACT, run_kitchen_int8, _unavailable))
