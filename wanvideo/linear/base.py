"""What every linear layer with a stored low-precision weight has in common.

Such a layer keeps the weight as it lies in the file (8-bit floats, packed 4-bit floats, GGUF blocks) under the public
state-dict names, and computes in `base_dtype`. The portable way to run it is the same for all formats: unpack the
weight, then `F.linear`. A format adds a faster way where the device has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.layout import aligned_contiguous

__all__ = [
    "QuantizedLinear",
    "branched",
    "linear_in",
    "read_rows",
    "relative_l2",
    "store_buffers",
    "store_weight",
    "take_over",
    "unbranched",
]


class QuantizedLinear(nn.Linear):
    """A linear layer whose `weight` is stored in a format that it does not compute in. Never trained.

    Made from an `nn.Linear` by `take_over`, which changes the layer in place: names, hooks and
    references to it stay valid.

    Attributes:
        base_dtype: dtype of the computation and of the output (float32, bfloat16 or float16).
        full_precision: whether the weight is unpacked per call whatever the device has.
    """

    base_dtype: torch.dtype
    full_precision: bool = False
    fast_way: ClassVar[str] = ""
    """What is to run instead of unpacking the weight per call; empty where nothing is."""

    def unpacked_reasons(self, device: torch.device) -> Sequence[str]:
        """Every reason why a call on `device` unpacks the weight although there is a `fast_way`; empty without one."""
        return ("the file asks for full precision",) if self.full_precision else ()

    def reads_rows(self, device: torch.device) -> bool:
        """Whether a call on `device` would quantize its input per row, and so takes `QuantizedRows` as well."""
        return False

    def dequantized_weight(self) -> Tensor:
        """The weight [out_features, in_features] in `base_dtype`, as a fresh tensor."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features], any float dtype -> [..., out_features] in `base_dtype`, contiguous."""
        return linear_in(self.base_dtype, input, self.dequantized_weight(), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `model.to(torch.float16)` must not turn stored fp8 numbers into fp16 ones: only the place changes.
        own = {id(t) for t in (*self._parameters.values(), *self._buffers.values()) if t is not None}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or id(tensor) not in own:
                return moved
            return tensor.to(moved.device)

        module: nn.Module = super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return module

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stored={self.weight.dtype}, base_dtype={self.base_dtype}"


LinearKind = TypeVar("LinearKind", bound=QuantizedLinear)


def take_over(linear: nn.Linear, kind: type[LinearKind], base_dtype: torch.dtype, **state: Any) -> LinearKind:
    """Turn `linear` into a layer of `kind` in place, with the attributes `state`, and return it.

    The object keeps its identity. Raises TypeError for a subclass of nn.Linear that runs its own way.
    """
    before = unbranched(type(linear))
    if not issubclass(before, QuantizedLinear) and before.forward is not nn.Linear.forward:
        raise TypeError(f"{before.__name__} has a forward of its own and cannot become a {kind.__name__}")
    linear.__class__ = kind if before is type(linear) else branched(kind)
    assert isinstance(linear, kind)
    linear.base_dtype = base_dtype
    for name, value in state.items():
        setattr(linear, name, value)
    return linear


def read_rows(device: torch.device, *linears: nn.Module) -> bool:
    """Whether all of these layers take `QuantizedRows`, so that what they read is quantized once for all."""
    return all(
        isinstance(linear, QuantizedLinear) and not isinstance(linear, _Branched) and linear.reads_rows(device)
        for linear in linears
    )


class _Branched(nn.Linear):
    """Mixed into the class of a linear layer whose child `lora` adds to its output.

    A class and not a hook, because compiled code notices that a layer changed its class, but not that it got a hook.
    """

    lora: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        added: Tensor = self.lora(input, super().forward(input))
        return added


_branched_kinds: dict[type[nn.Linear], type[nn.Linear]] = {}


def branched(kind: type[nn.Linear]) -> type[nn.Linear]:
    """The class, one per `kind`, of its layers whose output goes through `self.lora(input, output)`."""
    if issubclass(kind, _Branched):
        return kind
    if kind not in _branched_kinds:
        _branched_kinds[kind] = type(f"Branched{kind.__name__}", (_Branched, kind), {})
    return _branched_kinds[kind]


def unbranched(kind: type[nn.Linear]) -> type[nn.Linear]:
    """The class that `branched` made `kind` from; `kind` itself when it is no such class."""
    return kind.__mro__[2] if issubclass(kind, _Branched) else kind


def store_weight(linear: nn.Linear, weight: Tensor) -> None:
    """Give `linear` a stored `weight` of any dtype and shape."""
    linear.weight = nn.Parameter(weight, requires_grad=False)


def store_buffers(linear: nn.Linear, **buffers: Tensor | None) -> None:
    """Give `linear` tensors that belong to its weight; each becomes a key of the state dict, None does not."""
    for name, tensor in buffers.items():
        if hasattr(linear, name):
            delattr(linear, name)
        linear.register_buffer(name, tensor)


def linear_in(dtype: torch.dtype, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with all three in `dtype`: input [..., K], weight [N, K], bias [N] -> [..., N], contiguous."""
    x = aligned_contiguous(input.to(dtype))
    out = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    return aligned_contiguous(out)


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """Root of the summed squared differences over that of `expected`, in float64: the error that the bounds state."""
    actual, expected = actual.detach().double(), expected.detach().double()
    difference, reference = (actual - expected).norm(), expected.norm()
    return float(difference / reference) if reference > 0 else math.inf if difference > 0 else 0.0
