"""Models in GGUF files: weights in blocks of 4 to 8 bits, unpacked per call.

A GGUF file lists named tensors with a type each. F32, F16 and BF16 are plain; the others store blocks of 32 or 256
values with their scales. The arithmetic of unpacking is that of diffusers. Linear layers keep the blocks
(`GGUFLinear`) and unpack them for each call; everything else is unpacked when it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .quantized_linear import QuantizedLinear, store_weight, take_over

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

__all__ = ["GGUFLinear", "GGUFTensor", "read_gguf", "read_gguf_metadata"]

PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

ORIG_SHAPE = "comfy.gguf.orig_shape."
"""Before a tensor's name: its true shape, where it was flattened (GGUF knows four dimensions at most)."""


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
        return _dequantize_blocks(blocks, _unpacking(self.quant_type)).reshape(self.shape).to(dtype)


Unpacking = tuple[Callable[..., Tensor], int, int]
"""Of a type: diffusers' function, values per block, bytes per block."""


def _dequantize_blocks(blocks: Tensor, unpacking: Unpacking) -> Tensor:
    """blocks uint8 [n, bytes per block] -> values float32 [n, values per block].

    diffusers computes in the dtype of the block scales (float16) unless told otherwise; float32 costs little beside the
    matmul and adds no error of its own.
    """
    unpack, block_size, type_size = unpacking
    return unpack(blocks, block_size, type_size, dtype=torch.float32)


@cache
def _unpacking(quant_type: str) -> Unpacking:
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
        unpacking = _unpacking(weight.quant_type)
        layer = take_over(linear, GGUFLinear, base_dtype, quant_type=weight.quant_type, unpacking=unpacking)
        store_weight(layer, weight.blocks)
        return layer

    def dequantized_weight(self) -> Tensor:
        values = _dequantize_blocks(self.weight.detach(), self.unpacking)
        return values.reshape(self.out_features, self.in_features).to(self.base_dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quant_type={self.quant_type}"


def read_gguf(path: str | Path) -> dict[str, Tensor | GGUFTensor]:
    """All tensors of a GGUF file under their names, in true shapes, mapped: the bytes are read when they are copied.

    F32, F16 and BF16 tensors come as they are, the others as GGUFTensor. Raises CheckpointError for a file that is
    missing, damaged or truncated, or holds a type that is not read here.
    """
    path = Path(path)
    reader = _open(path)
    tensors = {tensor.name: _tensor(reader, tensor, path) for tensor in reader.tensors}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; download it again.")
    return tensors


def read_gguf_metadata(path: str | Path) -> dict[str, str]:
    """The text entries of a GGUF file's header, "general.architecture" for instance; raises as `read_gguf`."""
    from gguf import GGUFValueType

    fields = _open(Path(path)).fields
    return {name: str(field.contents()) for name, field in fields.items() if field.types[:1] == [GGUFValueType.STRING]}


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(path, "c")  # copy on write: torch asks for memory that could be written to
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; check the path of the model file.") from error
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged or was not downloaded completely ({error}); download it again and compare its size."
        ) from error


def _tensor(reader: GGUFReader, tensor: ReaderTensor, path: Path) -> Tensor | GGUFTensor:
    shape = _true_shape(reader, tensor, path)
    kind = tensor.tensor_type.name
    data = torch.from_numpy(np.ascontiguousarray(tensor.data))
    if kind in PLAIN_TYPES:
        return data.view(PLAIN_TYPES[kind]).reshape(shape)
    try:
        _, _, type_size = _unpacking(kind)
    except KeyError as error:
        raise CheckpointError(
            f"{path} stores {tensor.name} as {kind}, which is not read here; use a file of type Q8_0, Q6_K, Q5_K or "
            "Q4_K."
        ) from error
    return GGUFTensor(data.reshape(-1, type_size), kind, shape)


def _true_shape(reader: GGUFReader, tensor: ReaderTensor, path: Path) -> torch.Size:
    """GGUF lists the innermost dimension first; the metadata knows better where a tensor was flattened."""
    shape = [int(n) for n in reversed(tensor.shape)]
    field = reader.fields.get(f"{ORIG_SHAPE}{tensor.name}")
    if field is not None:
        original = [int(n) for n in field.contents()]
        if math.prod(original) != math.prod(shape):
            raise CheckpointError(
                f"{path} says that {tensor.name} has the shape {original}, but stores {math.prod(shape)} values."
            )
        shape = original
    return torch.Size(shape)
