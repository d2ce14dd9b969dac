"""Reading checkpoint files: safetensors, PyTorch pickles (weights only) and GGUF.

A file opened here answers with names, shapes and dtypes without reading a weight; tensors are then read one at a time,
each into memory of its own (a fresh allocation is 64-byte aligned), because views into a mapped file start at any byte
and a 16-byte GPU kernel must not see them.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..linear.gguf import GGUFTensor
from .gguf import read_gguf, read_gguf_metadata

logger = logging.getLogger(__name__)

# Called with (bytes read, bytes in the file) after each tensor.
Progress = Callable[[int, int], None]

# A tensor, or the packed blocks of one in a GGUF file.
Stored = Tensor | GGUFTensor

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
GGUF_SUFFIXES = (".gguf",)

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def own_memory(tensor: Tensor, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy of `tensor` on `device` in storage that nothing else shares, starting at its first byte."""
    target = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)
    return target.copy_(tensor)


class CheckpointFile:
    """An open checkpoint: `shapes` at once, each tensor when asked for.

    `shapes` maps every name to what has its shape and dtype (a tensor on the meta device, or the mapped one);
    `metadata` is the text that a safetensors or GGUF header carries. Raises CheckpointError when the file is missing,
    damaged, or of a format that is not supported. Use as a context manager, or call `close`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, Stored] = {}
        self._tensors: dict[str, Stored] | None = None  # formats that are loaded (or mapped) whole
        self._safetensors: safe_open | None = None
        _check_file(self.path)
        suffix = self.path.suffix.lower()
        if suffix in SAFETENSORS_SUFFIXES:
            self.shapes |= self._open_safetensors()
        elif suffix in PICKLE_SUFFIXES:
            self._tensors = {**_load_pickle(self.path)}
            self.shapes |= self._tensors
        elif suffix in GGUF_SUFFIXES:
            self._tensors = {**read_gguf(self.path)}
            self.shapes |= self._tensors
            self.metadata = read_gguf_metadata(self.path)
        else:
            known = ", ".join((*SAFETENSORS_SUFFIXES, *PICKLE_SUFFIXES, *GGUF_SUFFIXES))
            raise CheckpointError(f"{self.path} has an unknown ending '{suffix}': model files end in {known}.")
        if not self.shapes:
            raise CheckpointError(f"{self.path} holds no tensors; download it again.")

    def _open_safetensors(self) -> dict[str, Tensor]:
        try:
            self._safetensors = safe_open(str(self.path), framework="pt", device="cpu")
            self.metadata = dict(self._safetensors.metadata() or {})
            shapes = {}
            for name in self._safetensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                piece = self._safetensors.get_slice(name)
                dtype = _SAFETENSORS_DTYPES.get(piece.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{self.path} stores {name} as {piece.get_dtype()}, a type that this program does not read."
                    )
                shapes[name] = torch.empty(piece.get_shape(), dtype=dtype, device="meta")
            return shapes
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(self.path, error) from error

    @property
    def names(self) -> list[str]:
        return list(self.shapes)

    def read(self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """The tensor `name` in memory of its own on `device`, cast to `dtype` where one is given.

        Packed tensors of a GGUF file are unpacked, to bfloat16 where no dtype is given.
        """
        tensor = self.mapped(name)
        if isinstance(tensor, GGUFTensor):
            return tensor.dequantize(dtype or torch.bfloat16, device)
        try:
            return own_memory(tensor, device, dtype)
        except OSError as error:
            raise _damaged(self.path, error) from error

    def mapped(self, name: str) -> Stored:
        """The tensor as it lies in the file: at any byte, and valid only while the file stays as it is."""
        try:
            if self._safetensors is not None:
                return self._safetensors.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(self.path, error) from error
        if self._tensors is None:
            raise ValueError(f"{self.path} is closed")
        return self._tensors[name]

    def close(self) -> None:
        self._safetensors = None
        self._tensors = None

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_state_dict(
    path: str | Path, device: str | torch.device = "cpu", *, progress: Progress | None = None
) -> dict[str, Tensor]:
    """All tensors of a .safetensors, .pth/.pt or .gguf file, in their stored dtypes, names as in the file.

    The packed tensors of a GGUF file come unpacked, in bfloat16.

    Each tensor lies contiguous in memory of its own on `device`. Raises CheckpointError, one sentence, for a file that
    is missing, truncated, a folder, a Git LFS pointer, unsafe to unpickle, or of an unknown format.
    """
    begin = time.monotonic()
    with CheckpointFile(path) as file:
        total = sum(tensor.nbytes for tensor in file.shapes.values())
        state: dict[str, Tensor] = {}
        done = 0
        for name, shape in file.shapes.items():
            state[name] = file.read(name, device)
            done += shape.nbytes
            if progress is not None:
                progress(done, total)
    seconds = time.monotonic() - begin
    logger.info("Read %s: %d tensors, %.2f GiB in %.1f s", Path(path).name, len(state), total / 2**30, seconds)
    return state


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a safetensors header; {} for the other formats."""
    if Path(path).suffix.lower() not in SAFETENSORS_SUFFIXES:
        return {}
    with CheckpointFile(path) as file:
        return file.metadata


def _damaged(path: Path, error: Exception) -> CheckpointError:
    text = str(error).strip()
    reason = text.splitlines()[0].split(". ")[0] if text else type(error).__name__
    return CheckpointError(
        f"{path} is damaged or was not downloaded completely ({reason}); download it again and compare its size."
    )


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; name the model file inside it.")
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; check the path of the model file.")
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not head:
        raise CheckpointError(f"{path} is empty; download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the model itself; run 'git lfs pull' or download the file."
        )
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not a model; the download was answered with HTML, try it again.")


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """A plain state dict from torch.save, unpickled with weights_only, mapped where the file allows it."""
    try:
        content = _torch_load(path)
    except pickle.UnpicklingError as error:
        if any(word in str(error) for word in ("Unsupported global", "Unsupported class", "Trying to")):
            raise CheckpointError(
                f"{path} holds more than tensors and is not unpickled, because that could run foreign code; "
                "use a safetensors version of it."
            ) from error
        raise _damaged(path, error) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(path, error) from error
    # Trainers wrap the weights: {"state_dict": {...}} or {"model": {...}}.
    for key in ("state_dict", "model_state", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__} instead of a table of named weights.")
    return {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}


def _torch_load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # Files of the format before torch 1.6 cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True)
