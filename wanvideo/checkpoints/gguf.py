"""GGUF files: named tensors with a type each.

F32, F16 and BF16 are plain; the others store blocks of 32 or 256 values with their scales. Linear layers keep the
blocks (`linear.gguf.GGUFLinear`); everything else is unpacked when it is loaded.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..linear.gguf import GGUFTensor, unpacking_of

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

__all__ = ["read_gguf", "read_gguf_metadata"]

PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

ORIG_SHAPE = "comfy.gguf.orig_shape."
"""Before a tensor's name: its true shape, where it was flattened (GGUF knows four dimensions at most)."""


def read_gguf(path: str | Path) -> dict[str, Tensor | GGUFTensor]:
    """All tensors of a GGUF file under their names, in true shapes, mapped: the bytes are read when they are copied.

    F32, F16 and BF16 tensors come as they are, the others as GGUFTensor. Raises CheckpointError for a file that is
    missing, damaged or truncated, or holds a type that is not supported.
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
        _, _, type_size = unpacking_of(kind)
    except KeyError as error:
        raise CheckpointError(
            f"{path} stores {tensor.name} as {kind}, which is not supported; use a file of type Q8_0, Q6_K, Q5_K or "
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
