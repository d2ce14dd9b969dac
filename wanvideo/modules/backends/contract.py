"""What a kernel needs, as data, and the one function that reads it.

A `Contract` says which calls a kernel answers rightly. `not_supported_reasons` compares a call with it and returns
every reason why the kernel cannot serve; the door (`attention`) repairs the layout with the guards of `layout.py` and
never launches a kernel outside its contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ...kernels.layout import (
    ALIGNMENT,
    MAX_EXTENT,
    aligned_contiguous,
    aligned_rows,
    aligned_strided,
    layout_violations,
)
from . import packages

__all__ = [
    "HALF",
    "Contract",
    "Shape",
    "layout_reasons",
    "not_supported_reasons",
    "repaired",
    "repaired_mask",
    "scale_ratio",
    "unavailable_reasons_of",
]

HALF = (torch.bfloat16, torch.float16)

Layout = Literal["any", "aligned_strided", "aligned_contiguous"]


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: q [batch, q_length, heads, head_dim], k and v [batch, kv_length, heads, head_dim]."""

    batch: int
    q_length: int
    kv_length: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Contract:
    """Calls that a kernel answers rightly.

    Attributes:
        dtypes: of q, k and v as the kernel sees them; all three alike.
        layout: "any"; "aligned_strided": last stride 1, start and strides multiples of `alignment` bytes;
            "aligned_contiguous": contiguous and aligned.
        alignment: bytes.
        max_extent: elements; the offset of every tensor's last element lies below it.
        head_dims: the head sizes served; empty for all that `max_head_dim` and `head_dim_multiple` allow.
        min_kv, max_kv: keys per call; `max_kv` None for no limit.
        masks: whether `attn_mask` is honoured.
        scales: which softmax scales are honoured: "any"; "power_of_two": the default head_dim ** -0.5 times a power
            of two (multiplied into q, which is exact); "default".
        causal: "any"; "square": only with as many queries as keys (kernels disagree on the corner otherwise); "no".
        device_types: "cpu", "cuda", ...; empty for all.
        capabilities: the (major, minor) compute capabilities served on CUDA; empty for all from `min_capability` on.
        order: how the kernel reads tensors: "BLHD" or "BHLD"; the door turns them (a view) before the guard copies.
        package, versions, module, entry_points: the distribution it comes from, the PEP 440 range that this adapter
            knows, what to import and what must be found there; package None for our own kernels and torch's.
        workspace: bytes that the kernel allocates beside its output, by shape; None when it is negligible.
        expanded: whether tensors with a stride of 0 (K and V shared by a batch) are read rightly.
        writes_to_k: the kernel changes K in place; the door then gives it a K that nobody else holds.
        float32_as: what float32 tensors are cast to when `dtypes` lacks float32; None refuses them. Never float16,
            whose range Wan's activations leave.
    """

    dtypes: tuple[torch.dtype, ...]
    layout: Layout = "aligned_strided"
    alignment: int = ALIGNMENT
    max_extent: int = MAX_EXTENT
    head_dims: tuple[int, ...] = ()
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    min_kv: int = 1
    max_kv: int | None = None
    masks: bool = False
    scales: Literal["any", "power_of_two", "default"] = "any"
    causal: Literal["any", "square", "no"] = "no"
    device_types: tuple[str, ...] = ("cuda",)
    capabilities: tuple[tuple[int, int], ...] = ()
    min_capability: tuple[int, int] | None = None
    order: Literal["BLHD", "BHLD"] = "BLHD"
    package: str | None = None
    versions: str = ""
    module: str = ""
    entry_points: tuple[str, ...] = ()
    workspace: Callable[[Shape], int] | None = None
    expanded: bool = True
    writes_to_k: bool = False
    float32_as: torch.dtype | None = torch.bfloat16

    def kernel_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that tensors of `dtype` reach the kernel in."""
        if dtype == torch.float32 and dtype not in self.dtypes and self.float32_as is not None:
            return self.float32_as
        return dtype


def is_power_of_two(x: float) -> bool:
    """Whether multiplying by `x` only moves the exponent."""
    return x > 0 and math.isfinite(x) and math.frexp(x)[0] == 0.5


def _shape_reasons(contract: Contract, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    reasons = []
    head_dim, keys = q.shape[3], k.shape[1]
    if contract.head_dims and head_dim not in contract.head_dims:
        served = ", ".join(str(d) for d in contract.head_dims)
        reasons.append(f"head_dim is {head_dim}, it serves {served}")
    if contract.max_head_dim is not None and head_dim > contract.max_head_dim:
        reasons.append(f"head_dim is {head_dim}, it serves at most {contract.max_head_dim}")
    if head_dim % contract.head_dim_multiple:
        reasons.append(f"head_dim is {head_dim}, it serves multiples of {contract.head_dim_multiple}")
    if keys < contract.min_kv:
        reasons.append(f"there are {keys} keys, it serves {contract.min_kv} or more")
    if contract.max_kv is not None and keys > contract.max_kv:
        reasons.append(f"there are {keys} keys, it serves at most {contract.max_kv}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.numel() > contract.max_extent:
            reasons.append(f"{name} has {x.numel()} elements, it serves at most {contract.max_extent}")
    return reasons


def _argument_reasons(
    contract: Contract,
    q: torch.Tensor,
    k: torch.Tensor,
    attn_mask: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> list[str]:
    reasons = []
    if attn_mask is not None and not contract.masks:
        reasons.append("it has no attention mask")
    if softmax_scale is not None:
        ratio = softmax_scale * q.shape[3] ** 0.5
        if contract.scales == "default" and not math.isclose(ratio, 1.0, rel_tol=1e-6):
            reasons.append(f"its softmax scale is fixed at head_dim ** -0.5, not {softmax_scale:g}")
        if contract.scales == "power_of_two" and not (
            math.isclose(ratio, 1.0, rel_tol=1e-6) or is_power_of_two(_snapped(ratio))
        ):
            reasons.append(
                f"its softmax scale is head_dim ** -0.5; {softmax_scale:g} is no power of two times that, "
                "so multiplying q would round it"
            )
    if causal and contract.causal == "no":
        reasons.append("it has no causal mask here")
    if causal and contract.causal == "square" and q.shape[1] != k.shape[1]:
        reasons.append(f"its causal mask needs as many queries as keys, not {q.shape[1]} and {k.shape[1]}")
    return reasons


def _snapped(ratio: float) -> float:
    # head_dim ** 0.5 is rounded: 2 * 128 ** -0.5 * 128 ** 0.5 is not quite 2.
    if not (math.isfinite(ratio) and ratio > 0):
        return ratio
    nearest = 2.0 ** round(math.log2(ratio))
    return nearest if math.isclose(ratio, nearest, rel_tol=1e-6) else ratio


def scale_ratio(softmax_scale: float | None, head_dim: int) -> float:
    """What q is multiplied by when the kernel's scale is fixed at head_dim ** -0.5: a power of two, often 1."""
    return 1.0 if softmax_scale is None else _snapped(softmax_scale * head_dim**0.5)


def _device_reasons(contract: Contract, device: torch.device) -> list[str]:
    if contract.device_types and device.type not in contract.device_types:
        return [f"it runs on {' or '.join(contract.device_types)}, the tensors are on {device.type}"]
    return []


def not_supported_reasons(
    contract: Contract,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    layout: bool = True,
) -> list[str]:
    """Every reason why a kernel with this contract cannot serve the call; empty when it can.

    Host data only: nothing is launched, nothing waits for the GPU.

    Args:
        q: [B, Lq, H, D]. k, v: [B, Lk, H, D].
        layout: whether addresses and strides count. The door asks without, then repairs; a raw kernel sees all.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        return [f"q, k and v must be [B, L, H, D], they have {q.ndim}, {k.ndim} and {v.ndim} dimensions"]
    reasons = _device_reasons(contract, q.device)
    if contract.kernel_dtype(q.dtype) not in contract.dtypes:
        served = ", ".join(str(d).removeprefix("torch.") for d in contract.dtypes)
        reasons.append(f"the dtype is {str(q.dtype).removeprefix('torch.')}, it serves {served}")
    reasons += _shape_reasons(contract, q, k, v)
    reasons += _argument_reasons(contract, q, k, attn_mask, softmax_scale, causal)
    if layout:
        reasons += layout_reasons(contract, q, k, v, attn_mask)
    return reasons


def layout_reasons(
    contract: Contract, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None
) -> list[str]:
    """The reasons that a copy would mend: dtype to cast, address, strides, extent."""
    reasons = []
    if q.dtype not in contract.dtypes and contract.kernel_dtype(q.dtype) in contract.dtypes:
        reasons.append(f"q, k and v are {q.dtype}, to be cast to {contract.float32_as}")
    if contract.layout == "any":
        return reasons
    tensors = [("q", q), ("k", k), ("v", v)]
    if attn_mask is not None:
        tensors.append(("attn_mask", attn_mask))
    for name, x in tensors:
        if name != "attn_mask" and contract.order == "BHLD":
            x = x.transpose(1, 2)
        found = layout_violations(x, contract.alignment, contract.max_extent)
        if contract.layout == "aligned_contiguous" and name != "attn_mask" and not x.is_contiguous():
            found.append("it is not contiguous")
        if not contract.expanded and is_expanded(x):
            found.append("it is expanded with a stride of 0")
        reasons += [f"{name}: {violation}" for violation in found]
    return reasons


def unavailable_reasons_of(contract: Contract, device: torch.device) -> list[str]:
    """Why no call at all can be served on `device`: its kind, its compute capability, the package.

    Looks up packages and the GPU; ask once and keep the answer.
    """
    reasons = _device_reasons(contract, device)
    if not reasons and (contract.capabilities or contract.min_capability):
        found = packages.capability(device)
        if found is None:
            reasons.append("it needs an NVIDIA GPU")
        elif contract.capabilities and found not in contract.capabilities:
            served = ", ".join(f"{major}.{minor}" for major, minor in contract.capabilities)
            reasons.append(f"the GPU has compute capability {found[0]}.{found[1]}, it serves {served}")
        elif contract.min_capability is not None and found < contract.min_capability:
            major, minor = contract.min_capability
            reasons.append(f"the GPU has compute capability {found[0]}.{found[1]}, it needs {major}.{minor} or newer")
    if contract.package is not None:
        reasons += packages.package_reasons(contract.package, contract.versions, contract.module, contract.entry_points)
    return reasons


def repaired(contract: Contract, x: torch.Tensor) -> torch.Tensor:
    """`x` [B, L, H, D] in the kernel's order and dtype, without a copy when the kernel may read it as it lies."""
    x = x.to(contract.kernel_dtype(x.dtype))
    if contract.layout == "aligned_strided":
        # Before the turn, so that a copy lies in the order [B, L, H, D], which the output then takes over.
        readable = contract.expanded or not is_expanded(x)
        x = aligned_strided(x, contract.alignment) if readable else aligned_contiguous(x, contract.alignment)
    if contract.order == "BHLD":
        x = x.transpose(1, 2)
    return aligned_contiguous(x, contract.alignment) if contract.layout == "aligned_contiguous" else x


def is_expanded(x: torch.Tensor) -> bool:
    """Whether several elements of `x` share one place in memory by a stride of 0."""
    return any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def repaired_mask(contract: Contract, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as the kernel may read it: additive, of `dtype`, four dimensions, every row at an aligned address.

    Args:
        mask: broadcastable to [B, H, Lq, Lk]; bool (True takes part) or floating point (added to the scores).
    """
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        mask = torch.where(mask, zero, zero - math.inf)
    mask = mask.to(dtype)
    return mask if contract.layout == "any" else aligned_rows(mask, contract.alignment)
