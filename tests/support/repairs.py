"""What the guards repair before a kernel sees a call, for tests that compare a contract with the truth."""

from __future__ import annotations

import torch
from wanvideo_infinitetalk.wanvideo.kernels.contract import is_expanded
from wanvideo_infinitetalk.wanvideo.kernels.inputs import Inputs
from wanvideo_infinitetalk.wanvideo.kernels.layout import layout_violations
from wanvideo_infinitetalk.wanvideo.modules.backends import Contract


def repairable_reasons(contract: Contract, inputs: Inputs) -> list[str]:
    """What `Backend.call` repairs by a cast or a copy before a kernel with this contract sees it."""
    found = []
    dtype = inputs.q.dtype
    if dtype not in contract.dtypes and contract.kernel_dtype(dtype) in contract.dtypes:
        found.append(f"q, k and v are {dtype}, to be cast to {contract.float32_as}")
    for name, x in {"q": inputs.q, "k": inputs.k, "v": inputs.v}.items():
        x = x.transpose(1, 2) if contract.order == "BHLD" else x
        found += [f"{name}: {reason}" for reason in _layout_reasons(contract, x, contract.layout)]
    if inputs.attn_mask is not None and contract.layout != "any":
        reasons = _layout_reasons(contract, inputs.attn_mask, "aligned_strided")
        found += [f"attn_mask: {reason}" for reason in reasons]
    return found


def _layout_reasons(contract: Contract, x: torch.Tensor, layout: str) -> list[str]:
    """What one copy would repair: address, strides, extent, and where it is not read rightly a stride of 0."""
    if layout == "any":
        return []
    found = layout_violations(x, contract.alignment, contract.max_extent)
    if layout == "aligned_contiguous" and not x.is_contiguous():
        found.append("it is not contiguous")
    if not contract.expanded and is_expanded(x):
        found.append("it is expanded with a stride of 0")
    return found
