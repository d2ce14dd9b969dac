"""FlashAttention 2 and 3 from their own packages: exact attention in 16 bits on [B, L, H, D].

fa3-fwd holds the forward pass of FlashAttention 3 alone, in a wheel, without fp16.
"""

from __future__ import annotations

import functools

import torch

from ...kernels import packages
from ...kernels.inputs import Inputs
from .contract import EXACT, HALF, IN_HALF, Backend, Contract, Device, Package, head_dims

__all__ = ["FLASH_2", "FLASH_3", "FLASH_3_FORWARD"]


def run_flash_2(inputs: Inputs) -> torch.Tensor:
    """`flash_attn.flash_attn_func`."""
    flash = packages.load("flash_attn")
    scale, causal = inputs.softmax_scale, inputs.causal
    out: torch.Tensor = flash.flash_attn_func(
        inputs.q, inputs.k, inputs.v, dropout_p=0.0, softmax_scale=scale, causal=causal
    )
    return out


def run_flash_3(module: str, inputs: Inputs) -> torch.Tensor:
    """A module's `flash_attn_func`: the output alone, or with the log-sum-exp in versions before 2025-09."""
    flash = packages.load(module)
    scale, causal = inputs.softmax_scale, inputs.causal
    returned = flash.flash_attn_func(inputs.q, inputs.k, inputs.v, softmax_scale=scale, causal=causal)
    out: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
    return out


def _contract(device: Device, dtypes: tuple[torch.dtype, ...] = HALF) -> Contract:
    # The causal mask is aligned at the lower right since 2.1, torch's at the upper left: they agree on squares only.
    return Contract(dtypes=dtypes, head_dim=head_dims(multiple_of=8, at_most=256), causal="square", device=device)


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
    functools.partial(run_flash_3, "flash_attn_interface"),
    IN_HALF,
)
FLASH_3_FORWARD = Backend(
    "flash_attn_3_forward",
    _contract(
        Device(
            capabilities=((9, 0),),
            package=Package("fa3-fwd", ">=0.0.3,<0.1", "fa3_fwd_interface", ("flash_attn_func",)),
        ),
        (torch.bfloat16,),
    ),
    functools.partial(run_flash_3, "fa3_fwd_interface"),
    {torch.bfloat16: EXACT[torch.bfloat16], torch.float32: EXACT[torch.bfloat16]},
)
