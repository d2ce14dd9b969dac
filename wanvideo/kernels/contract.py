"""What a kernel needs, as data, and the functions that compare a device or a call with it.

A `Contract` says which calls a kernel computes rightly: on which devices (`Device`), for which tensors (`Operand`) and
for which sizes (`Size`). `reasons` returns every reason why a call is outside it, and nothing when it is inside.
Elementwise kernels and the matrix products of linear layers are described here; attention adds what only it has
(masks, softmax scales, order of the axes) in `modules/backends/contract.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, Literal, NamedTuple

import torch

from . import packages

__all__ = [
    "Contract",
    "Described",
    "Device",
    "Layout",
    "Operand",
    "Package",
    "Size",
    "device_reasons",
    "dtype_reasons",
    "is_expanded",
    "reasons",
]

Capability = tuple[int, int]

Layout = Literal["any", "last_stride_1", "contiguous", "aligned_strided", "aligned_contiguous"]
"""How a tensor may lie in memory. "aligned_strided": last stride 1, start and other strides multiples of the alignment;
"aligned_contiguous": contiguous, and starting at such a multiple."""


# ------------------------------------------------------------------------------------------------------------ devices


@dataclass(frozen=True)
class Package:
    """A distribution that a kernel comes from: name, PEP 440 range known here, module, what it must hold."""

    name: str
    versions: str
    module: str
    entry_points: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Device:
    """Where a kernel runs.

    Attributes:
        types: "cpu", "cuda", ...; empty for all.
        capabilities: the compute capabilities supported on CUDA; empty for all from `min_capability` on.
        purpose: what GPUs below `min_capability` lack.
        not_on: values of `sys.platform` that it is not built for.
        triton: whether it is compiled by Triton on this machine.
        package: the binary package that it comes from; None for this project's kernels and torch's.
    """

    types: tuple[str, ...] = ("cuda",)
    capabilities: tuple[Capability, ...] = ()
    min_capability: Capability | None = None
    purpose: str = ""
    not_on: tuple[str, ...] = ()
    triton: bool = False
    package: Package | None = None

    def type_reasons(self, device: torch.device) -> list[str]:
        """Why tensors on a device of this type are not supported: host data of the call alone."""
        if self.types and device.type not in self.types:
            return [f"it runs on {' or '.join(self.types)}, the tensors are on {device.type}"]
        return []


def device_reasons(needs: Device, device: torch.device) -> list[str]:
    """Every reason why no call at all can run on `device`: its type and compute capability, the platform, the package.

    Looks up packages and the GPU, so ask once and keep the answer (`selftest.device_reasons`).
    """
    found = needs.type_reasons(device)
    if not found and (needs.capabilities or needs.min_capability):
        found += _capability_reasons(needs, packages.capability(device), device)
    if sys.platform in needs.not_on:
        found.append(f"it is not built on {sys.platform}")
    if needs.triton and not found and (missing := packages.triton_import_reason()):
        found.append(missing)
    if needs.package is not None:
        found += packages.package_reasons(*astuple(needs.package))
    return found


def _capability_reasons(needs: Device, capability: Capability | None, device: torch.device) -> list[str]:
    if capability is None:
        return [] if device.type == "cpu" else ["it needs an NVIDIA GPU that PyTorch sees"]
    has = f"the GPU has compute capability {_dotted(capability)}"
    if needs.capabilities and capability not in needs.capabilities:
        return [f"{has}, it supports {', '.join(map(_dotted, needs.capabilities))}"]
    if needs.min_capability is not None and capability < needs.min_capability:
        purpose = f" ({needs.purpose})" if needs.purpose else ""
        return [f"{has}, it supports {_dotted(needs.min_capability)} and newer{purpose}"]
    return []


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


# -------------------------------------------------------------------------------------------------------------- calls


@dataclass(frozen=True, eq=False)
class Size:
    """What one number of a call may be.

    Attributes:
        says: the beginning of the reason, the number in place of {}.
        values: the numbers supported; empty for all that the others allow.
    """

    says: str = "{}"
    values: tuple[int, ...] = ()
    multiple_of: int = 1
    at_least: int = 0
    at_most: int | None = None

    def reasons(self, n: int) -> list[str]:
        supported = []
        if self.values and n not in self.values:
            supported.append(", ".join(map(str, self.values)))
        if self.at_most is not None and n > self.at_most:
            supported.append(f"at most {self.at_most}")
        if n % self.multiple_of:
            supported.append(f"multiples of {self.multiple_of}")
        if n < self.at_least:
            supported.append(f"{self.at_least} or more")
        return [f"{self.says.format(n)}, it supports {what}" for what in supported]


@dataclass(frozen=True, eq=False)
class Operand:
    """What one tensor of a call must be.

    Attributes:
        dtypes: supported ones; empty for all. like_first: the dtype must be that of the first operand.
        layout: "aligned_..." is what a guard repairs before the call, and so no reason against one.
        shape: its axes, apart by spaces: a number, a name (the same size wherever it stands, or one given with the
            call), a quotient of them ("C/heads/2"), alternatives of those ("1|B"); "..." in front for any more axes.
        optional: whether it may be None.
    """

    name: str
    shape: str
    dtypes: tuple[torch.dtype, ...] = ()
    layout: Layout = "any"
    like_first: bool = False
    optional: bool = False


@dataclass(frozen=True, eq=False)
class Contract:
    """Calls that a kernel computes rightly.

    Attributes:
        kernel: its name.
        operands: in the order in which `reasons` is given the tensors; all on one device.
        sizes: axis -> what it may be. "rows" is the number of rows of the first operand.
        choices: argument -> the values supported.
    """

    kernel: str
    device: Device
    operands: tuple[Operand, ...]
    sizes: Mapping[str, Size] = field(default_factory=dict)
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


class Described(NamedTuple):
    """What a contract asks of a tensor, or all that is known of one that there is not."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device
    contiguous: bool = True
    last_stride: int = 1


def reasons(contract: Contract, tensors: Sequence[torch.Tensor | Described | None], **given: Any) -> list[str]:
    """Every reason why a call is outside a contract; empty when it is inside.

    Host data only: nothing is launched, nothing waits for the GPU. What a GPU and its packages are is asked once, by
    `device_reasons`.

    Args:
        tensors: one for each operand of the contract.
        given: sizes that no shape shows, and arguments named in `choices`.
    """
    described = tuple(
        [
            Described(x.dtype, x.shape, x.device, x.is_contiguous(), x.stride(-1) if x.ndim else 1)
            if isinstance(x, torch.Tensor)
            else x
            for x in tensors
        ]
    )
    return list(_read(contract, described, tuple(given.items())))


@lru_cache(maxsize=4096)
def _read(
    contract: Contract, described: tuple[Described | None, ...], given: tuple[tuple[str, Any], ...]
) -> tuple[str, ...]:
    """What shapes, strides, dtypes and devices say. A model has few different calls, so that the answers are kept."""
    first = described[0]
    assert first is not None
    found = contract.device.type_reasons(first.device)
    sizes = {name: value for name, value in given if isinstance(value, int)}
    for operand, x in zip(contract.operands, described, strict=True):
        if x is not None:
            found += _operand_reasons(operand, x, contract.operands[0].name, first, sizes)
        elif not operand.optional:
            found.append(f"it needs {operand.name}")
    sizes["rows"] = prod(first.shape[:-1])
    for name, size in contract.sizes.items():
        if name in sizes:
            found += size.reasons(sizes[name])
    for name, value in given:
        supported = contract.choices.get(name)
        if supported is not None and value not in supported:
            found.append(f"{name} is {_plain(value)}, it supports {', '.join(map(_plain, supported))}")
    return tuple(found)


def _operand_reasons(
    operand: Operand, x: Described, first_name: str, first: Described, sizes: dict[str, int]
) -> list[str]:
    found = dtype_reasons(operand.name, x.dtype, operand.dtypes or (x.dtype,))
    if operand.like_first and x.dtype != first.dtype:
        found.append(f"{operand.name} is {_plain(x.dtype)}, {first_name} is {_plain(first.dtype)}")
    if x.device != first.device:
        found.append(f"{operand.name} is on {x.device}, {first_name} on {first.device}")
    if not _fits(operand.shape, x.shape, sizes):
        known = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        found.append(f"{operand.name} is {list(x.shape)}, it supports [{operand.shape}]" + (known and f" with {known}"))
    if operand.layout == "contiguous" and not x.contiguous:
        found.append(f"{operand.name} is not contiguous")
    if operand.layout == "last_stride_1" and x.last_stride != 1:
        found.append(f"{operand.name} has a last stride of {x.last_stride}, not 1")
    return found


def _fits(pattern: str, shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Whether a shape has the axes of `pattern`; binds in `sizes` the names that are new."""
    axes = pattern.split()
    if axes[0] == "...":
        axes, shape = axes[1:], shape[1 - len(axes) :]
    return len(shape) == len(axes) and all(_axis_fits(*pair, sizes) for pair in zip(axes, shape, strict=True))


def _axis_fits(axis: str, size: int, sizes: dict[str, int]) -> bool:
    for alternative in axis.split("|"):
        name, *divisors = alternative.split("/")
        wanted = int(name) if name.isdigit() else sizes.setdefault(name, size)
        if wanted == size * prod(int(sizes.get(divisor, divisor)) for divisor in divisors):
            return True
    return False


def _plain(value: Any) -> str:
    return str(value).removeprefix("torch.")


def dtype_reasons(name: str, dtype: torch.dtype, supported: Sequence[torch.dtype]) -> list[str]:
    """Why a dtype is not supported; empty when it is."""
    return [] if dtype in supported else [f"{name} is {_plain(dtype)}, it supports {', '.join(map(_plain, supported))}"]


def is_expanded(x: torch.Tensor) -> bool:
    """Whether several elements of `x` share one place in memory by a stride of 0."""
    return any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))
