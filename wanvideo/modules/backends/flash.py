"""FlashAttention 2 and 3 from their own packages: exact attention in 16 bits on [B, L, H, D]."""

from __future__ import annotations

import torch

from ...kernels import packages
from ...kernels.inputs import Inputs
from .contract import HALF, IN_HALF, Backend, Contract, Device, Package, head_dims

__all__ = ["FLASH_2", "FLASH_3"]


def run_flash_2(inputs: Inputs) -> torch.Tensor:
    """`flash_attn.flash_attn_func`."""
    flash = packages.load("flash_attn")
    scale, causal = inputs.softmax_scale, inputs.causal
    out: torch.Tensor = flash.flash_attn_func(
        inputs.q, inputs.k, inputs.v, dropout_p=0.0, softmax_scale=scale, causal=causal
    )
    return out


def run_flash_3(inputs: Inputs) -> torch.Tensor:
    """`flash_attn_interface.flash_attn_func`: the output alone, or with the log-sum-exp in versions before 2025-09."""
    flash = packages.load("flash_attn_interface")
    scale, causal = inputs.softmax_scale, inputs.causal
    returned = flash.flash_attn_func(inputs.q, inputs.k, inputs.v, softmax_scale=scale, causal=causal)
    out: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
    return out


def _contract(device: Device) -> Contract:
    # The causal mask is aligned at the lower right since 2.1, torch's at the upper left: they agree on squares only.
    return Contract(dtypes=HALF, head_dim=head_dims(multiple_of=8, at_most=256), causal="square", device=device)


FLASH_2 = Backend(
    "flash_attn_2",
    _contract(
        Device(min_capability=(8, 0), package=Package("flash-attn", ">=2.1,<3", "flash_attn", ("flash_attn_func",)))
    ),
    run_flash_2,
    IN_HALF,
)
FLASH_3 = Backend(
    "flash_attn_3",
    _contract(
        Device(
            capabilities=((9, 0),),
            package=Package("flash-attn-3", ">=3.0.0b1,<4", "flash_attn_interface", ("flash_attn_func",)),
        )
    ),
    run_flash_3,
    IN_HALF,
)
