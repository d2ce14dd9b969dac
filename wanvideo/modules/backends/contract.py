"""What an attention kernel needs beyond the common part, the backend that has it, and the repair before its call.

`not_supported_reasons` compares a call with a `Contract` and returns every reason why the kernel cannot compute it;
`Backend.call` repairs the layout with the guards of `layout.py`, so that no kernel is launched outside its contract.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from ...kernels.contract import Device, Layout, Package, Size, dtype_reasons, is_expanded
from ...kernels.inputs import Inputs, Order
from ...kernels.layout import ALIGNMENT, MAX_EXTENT, aligned_contiguous, aligned_rows, aligned_strided, private_copy

__all__ = [
    "ANY_FLOAT",
    "EIGHT_BIT",
    "EXACT",
    "FOUR_BIT",
    "HALF",
    "IN_HALF",
    "Backend",
    "Contract",
    "Device",
    "Package",
    "Size",
    "head_dims",
    "keys",
    "not_supported_reasons",
    "repaired_mask",
    "scale_ratio",
]

HALF = (torch.bfloat16, torch.float16)
ANY_FLOAT = (*HALF, torch.float32, torch.float64)


def head_dims(*values: int, multiple_of: int = 1, at_most: int | None = None) -> Size:
    """The head sizes that a kernel supports."""
    return Size("head_dim is {}", values, multiple_of, at_most=at_most)


def keys(at_least: int = 1, at_most: int | None = None) -> Size:
    """The numbers of keys that a kernel supports."""
    return Size("there are {} keys", at_least=at_least, at_most=at_most)


# ----------------------------------------------------------------------------------------------------------- contracts


@dataclass(frozen=True)
class Contract:
    """Calls that an attention kernel computes rightly.

    Attributes:
        dtypes: of q, k and v as the kernel sees them; all three alike.
        layout: "any", "aligned_strided" or "aligned_contiguous", with `alignment` in bytes.
        max_extent: elements; the offset of every tensor's last element lies below it.
        head_dim, keys: the sizes supported.
        device: where it runs, and the package that it comes from.
        masks: whether `attn_mask` is honored.
        scales: which softmax scales are honored: "any"; "power_of_two": the default head_dim ** -0.5 times a power
            of two (multiplied into q, which is exact); "default".
        causal: "any"; "square": only with as many queries as keys (kernels disagree on the corner otherwise); "no".
        order: how the kernel reads tensors: "BLHD" or "BHLD"; the axes are exchanged (a view) before the guard copies.
        expanded: whether tensors with a stride of 0 (K and V shared by a batch) are read rightly.
        writes_to_k: the kernel changes K in place; it then gets a K that nobody else holds.
        float32_as: what float32 tensors are cast to when `dtypes` lacks float32; None rejects them. Never float16,
            whose range Wan's activations leave.
    """

    dtypes: tuple[torch.dtype, ...]
    layout: Layout = "aligned_strided"
    alignment: int = ALIGNMENT
    max_extent: int = MAX_EXTENT
    head_dim: Size = field(default_factory=head_dims)
    keys: Size = field(default_factory=keys)
    device: Device = field(default_factory=Device)
    masks: bool = False
    scales: Literal["any", "power_of_two", "default"] = "any"
    causal: Literal["any", "square", "no"] = "no"
    order: Order = "BLHD"
    expanded: bool = True
    writes_to_k: bool = False
    float32_as: torch.dtype | None = torch.bfloat16

    @property
    def package(self) -> str | None:
        """The name of the distribution that the kernel comes from; None for this project's kernels and torch's."""
        return None if self.device.package is None else self.device.package.name

    def kernel_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that tensors of `dtype` reach the kernel in."""
        if dtype == torch.float32 and dtype not in self.dtypes and self.float32_as is not None:
            return self.float32_as
        return dtype


def not_supported_reasons(contract: Contract, inputs: Inputs) -> list[str]:
    """Every reason why a kernel with this contract cannot compute a call, whose layout is repaired; empty when it can.

    Host data only: nothing is launched, nothing waits for the GPU.
    """
    found = contract.device.type_reasons(inputs.q.device)
    if contract.kernel_dtype(inputs.q.dtype) not in contract.dtypes:
        found += dtype_reasons("the dtype", inputs.q.dtype, contract.dtypes)
    found += contract.head_dim.reasons(inputs.head_dim)
    found += contract.keys.reasons(inputs.keys)
    for name, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v)):
        if x.numel() > contract.max_extent:
            found.append(f"{name} has {x.numel()} elements, it supports at most {contract.max_extent}")
    if inputs.attn_mask is not None and not contract.masks:
        found.append("it has no attention mask")
    if inputs.softmax_scale is not None:
        found += _scale_reasons(contract, inputs.softmax_scale, inputs.head_dim)
    if inputs.causal and contract.causal == "no":
        found.append("it has no causal mask here")
    if inputs.causal and contract.causal == "square" and inputs.queries != inputs.keys:
        found.append(f"its causal mask needs as many queries as keys, not {inputs.queries} and {inputs.keys}")
    return found


def _scale_reasons(contract: Contract, softmax_scale: float, head_dim: int) -> list[str]:
    ratio = softmax_scale * head_dim**0.5
    default = math.isclose(ratio, 1.0, rel_tol=1e-6)
    if contract.scales == "default" and not default:
        return [f"its softmax scale is fixed at head_dim ** -0.5, not {softmax_scale:g}"]
    if contract.scales == "power_of_two" and not (default or is_power_of_two(_snapped(ratio))):
        return [
            f"its softmax scale is head_dim ** -0.5; {softmax_scale:g} is no power of two times that, "
            "so multiplying q would round it"
        ]
    return []


def is_power_of_two(x: float) -> bool:
    """Whether multiplying by `x` only moves the exponent."""
    return x > 0 and math.isfinite(x) and math.frexp(x)[0] == 0.5


def _snapped(ratio: float) -> float:
    # head_dim ** 0.5 is rounded: 2 * 128 ** -0.5 * 128 ** 0.5 is not quite 2.
    if not (math.isfinite(ratio) and ratio > 0):
        return ratio
    nearest = 2.0 ** round(math.log2(ratio))
    return nearest if math.isclose(ratio, nearest, rel_tol=1e-6) else ratio


def scale_ratio(inputs: Inputs) -> float:
    """What q is multiplied by when the kernel's scale is fixed at head_dim ** -0.5: a power of two, often 1."""
    return 1.0 if inputs.softmax_scale is None else _snapped(inputs.softmax_scale * inputs.head_dim**0.5)


# -------------------------------------------------------------------------------------------------------------- repair


def _repaired(contract: Contract, x: torch.Tensor) -> torch.Tensor:
    """`x` [B, L, H, D] in the kernel's order and dtype, without a copy when the kernel may read it as it lies."""
    x = x.to(contract.kernel_dtype(x.dtype))
    if contract.layout == "aligned_strided":
        # Before the axes are exchanged: a copy then lies in the order [B, L, H, D], which the output takes over.
        readable = contract.expanded or not is_expanded(x)
        x = aligned_strided(x, contract.alignment) if readable else aligned_contiguous(x, contract.alignment)
    if contract.order == "BHLD":
        x = x.transpose(1, 2)
    return aligned_contiguous(x, contract.alignment) if contract.layout == "aligned_contiguous" else x


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


# ------------------------------------------------------------------------------------------------------------ backends

EXACT: Mapping[torch.dtype, float] = {
    torch.bfloat16: 0.01,
    torch.float16: 0.003,
    torch.float32: 1e-4,
    torch.float64: 1e-6,
}
IN_HALF = {**EXACT, torch.float32: EXACT[torch.bfloat16]}
EIGHT_BIT = dict.fromkeys(ANY_FLOAT, 0.06)
FOUR_BIT = dict.fromkeys(ANY_FLOAT, 0.26)


def _always_available(device: torch.device) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend:
    """One attention kernel.

    Attributes:
        name: what the log line, the reasons and the tables call it.
        contract: the calls that it computes rightly.
        run: the kernel's call, on inputs that already meet its contract, in its order; the output may have any strides.
        bound: dtype of the call -> relative L2 error against float64 that it keeps on white noise, the hardest input:
            16-bit rounding for exact kernels, for the others what their number format costs.
        unavailable: why it cannot run on a device at all, beyond what the contract says (device, capability, package);
            asked once per device, the answer is kept.
        note: what the user should know when it runs, such as that it is slow.
        emulation: whether it computes a kernel's numbers without the kernel, which takes minutes on a GPU.
    """

    name: str
    contract: Contract
    run: Callable[[Inputs], torch.Tensor]
    bound: Mapping[torch.dtype, float] = field(default_factory=lambda: EXACT)
    unavailable: Callable[[torch.device], list[str]] = _always_available
    note: str = ""
    emulation: bool = False

    def call(self, inputs: Inputs) -> torch.Tensor:
        """The attention [B, Lq, H, D] of a call that the contract supports, contiguous, of q's dtype.

        A tensor whose layout breaks the contract is copied once; the caller's tensors are never written to.
        """
        contract, k = self.contract, _repaired(self.contract, inputs.k)
        if contract.writes_to_k and k.untyped_storage().data_ptr() == inputs.k.untyped_storage().data_ptr():
            k = private_copy(k)
        q, v = _repaired(contract, inputs.q), _repaired(contract, inputs.v)
        repaired = Inputs(q, k, v, inputs.attn_mask, inputs.softmax_scale, inputs.causal, contract.order)
        # Packages launch on the current device, and some change it.
        with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
            out = self.run(repaired)
        if contract.order == "BHLD":
            out = out.transpose(1, 2)
        return aligned_contiguous(out.to(inputs.q.dtype))
