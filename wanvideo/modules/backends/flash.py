"""FlashAttention 2 and 3 from their own packages: exact attention in 16 bits on [B, L, H, D]."""

from __future__ import annotations

import torch

from . import packages
from .contract import HALF, Contract
from .registry import Backend, register

__all__ = ["FLASH_2", "FLASH_3"]


def run_flash_2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """`flash_attn.flash_attn_func`."""
    flash = packages.load("flash_attn")
    return flash.flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=softmax_scale, causal=causal)


def run_flash_3(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """`flash_attn_interface.flash_attn_func`: the output alone, or with the log-sum-exp in versions before 2025-09."""
    flash = packages.load("flash_attn_interface")
    out = flash.flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal)
    return out[0] if isinstance(out, tuple) else out


# Its causal mask is aligned at the lower right since 2.1, torch's at the upper left: they agree on squares only.
FLASH_2 = register(
    Backend(
        "flash_attn_2",
        Contract(
            dtypes=HALF,
            layout="aligned_strided",
            max_head_dim=256,
            head_dim_multiple=8,
            causal="square",
            min_capability=(8, 0),
            package="flash-attn",
            versions=">=2.1,<3",
            module="flash_attn",
            entry_points=("flash_attn_func",),
        ),
        run_flash_2,
    )
)

FLASH_3 = register(
    Backend(
        "flash_attn_3",
        Contract(
            dtypes=HALF,
            layout="aligned_strided",
            max_head_dim=256,
            head_dim_multiple=8,
            causal="square",
            capabilities=((9, 0),),
            package="flash-attn-3",
            versions=">=3.0.0b1,<4",
            module="flash_attn_interface",
            entry_points=("flash_attn_func",),
        ),
        run_flash_3,
    )
)
