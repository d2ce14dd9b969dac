"""ComfyUI's own choice of attention, when it runs in this process.

Nothing of ComfyUI is imported: it has loaded its attention module long before a model runs, or it is not the host.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from ...kernels.inputs import Inputs
from .contract import EIGHT_BIT, HALF, Backend, Contract, Device, repaired_mask, scale_ratio

__all__ = ["HOST", "host_attention"]

HOST_MODULE = "comfy.ldm.modules.attention"


def host_attention() -> Callable[..., torch.Tensor] | None:
    """`optimized_attention` of the ComfyUI that runs this process, None when there is none."""
    return getattr(sys.modules.get(HOST_MODULE), "optimized_attention", None)


CONTRACT = Contract(
    dtypes=(*HALF, torch.float32),
    layout="aligned_strided",
    expanded=False,  # whichever kernel it chooses
    order="BHLD",
    masks=True,
    # Which of its kernels take a scale differs by version and by choice.
    scales="power_of_two",
    device=Device(types=()),
    # It may be SageAttention 1, which changes K.
    writes_to_k=True,
)


def run_host(inputs: Inputs) -> torch.Tensor:
    """`optimized_attention` on [B, H, L, D]."""
    optimized = host_attention()
    if optimized is None:
        raise RuntimeError("ComfyUI's attention module is gone; it was there when the mode was chosen")
    q, ratio = inputs.q, scale_ratio(inputs)
    if ratio != 1.0:
        q = q * ratio
    mask = None if inputs.attn_mask is None else repaired_mask(CONTRACT, inputs.attn_mask, q.dtype)
    return optimized(q, inputs.k, inputs.v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True)


def _unavailable(device: torch.device) -> list[str]:
    return [] if host_attention() is not None else ["ComfyUI is not running this process"]


# It may choose a kernel of 8 bits.
HOST = Backend("comfy", CONTRACT, run_host, EIGHT_BIT, _unavailable, note="ComfyUI's own choice")
