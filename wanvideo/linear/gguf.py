"""Linear layers with GGUF weights: blocks of 32 or 256 values of 4 to 8 bits with their scales, unpacked per call.

The arithmetic of unpacking is that of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .base import QuantizedLinear, store_weight, take_over

__all__ = ["GGUFLinear", "GGUFTensor", "Unpacking", "unpacking_of"]


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as a GGUF file stores it.

    Attributes:
        blocks: uint8 [number of blocks, bytes per block]; row-major over the values.
        quant_type: the type's name, "Q4_K" for instance.
        shape: of the values.
    """

    blocks: Tensor
    quant_type: str
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored: bytes."""
        return self.blocks.dtype

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def is_floating_point(self) -> bool:
        """True: the values are."""
        return True

    def numel(self) -> int:
        """Bytes stored: with `element_size`, the memory that this takes."""
        return self.blocks.numel()

    def element_size(self) -> int:
        return 1

    def to(self, device: str | torch.device) -> GGUFTensor:
        """The same in memory of its own on `device`."""
        blocks = torch.empty_like(self.blocks, device=device, memory_format=torch.contiguous_format)
        return GGUFTensor(blocks.copy_(self.blocks), self.quant_type, self.shape)

    def dequantize(self, dtype: torch.dtype, device: str | torch.device | None = None) -> Tensor:
        """The values in `dtype` on `device`, computed there in float32 and rounded once."""
        blocks = self.blocks if device is None else self.blocks.to(device)
        return _dequantize_blocks(blocks, unpacking_of(self.quant_type)).reshape(self.shape).to(dtype)


Unpacking = tuple[Callable[..., Tensor], int, int]
"""Of a type: diffusers' function, values per block, bytes per block."""


def _dequantize_blocks(blocks: Tensor, unpacking: Unpacking) -> Tensor:
    """blocks uint8 [n, bytes per block] -> values float32 [n, values per block].

    diffusers computes in the dtype of the block scales (float16) unless asked otherwise; float32 costs little next to
    the matmul and adds no error of its own.
    """
    unpack, block_size, type_size = unpacking
    return unpack(blocks, block_size, type_size, dtype=torch.float32)


@cache
def unpacking_of(quant_type: str) -> Unpacking:
    """KeyError for a type that diffusers does not know."""
    import gguf
    from diffusers.quantizers.gguf.utils import dequantize_functions

    kind = gguf.GGMLQuantizationType[quant_type]
    return dequantize_functions[kind], *gguf.GGML_QUANT_SIZES[kind]


class GGUFLinear(QuantizedLinear):
    """A linear layer whose weight stays in GGUF blocks; its key `weight` is uint8 [blocks, bytes per block].

    Attributes:
        quant_type: the blocks' type, "Q4_K" for instance.
    """

    quant_type: str
    unpacking: Unpacking

    @staticmethod
    def adopt(linear: nn.Linear, weight: GGUFTensor, base_dtype: torch.dtype) -> GGUFLinear:
        """Let `linear` run from the blocks of `weight`, in place; they are kept, not copied.

        Raises CheckpointError where the shape is not [out_features, in_features].
        """
        expected = (linear.out_features, linear.in_features)
        if tuple(weight.shape) != expected:
            raise CheckpointError(f"A GGUF weight of shape {list(weight.shape)} stands where {list(expected)} belongs.")
        unpacking = unpacking_of(weight.quant_type)
        layer = take_over(linear, GGUFLinear, base_dtype, quant_type=weight.quant_type, unpacking=unpacking)
        store_weight(layer, weight.blocks)
        return layer

    def dequantized_weight(self) -> Tensor:
        values = _dequantize_blocks(self.weight.detach(), self.unpacking)
        return values.reshape(self.out_features, self.in_features).to(self.base_dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quant_type={self.quant_type}"
